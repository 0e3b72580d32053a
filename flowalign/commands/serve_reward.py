"""`flowalign serve-reward`: the reward of a configuration over HTTP, for rewards.Http."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from flowalign.config import load_reward
from flowalign.errors import ConfigError
from rewards import Http, Reward, RewardError
from rewards.remote.server import Listener, Service, serve


def serve_reward(arguments: Sequence[str]) -> None:
    """Serves until SIGTERM or Ctrl-C. ConfigError for what cannot be served."""
    parser = argparse.ArgumentParser(
        prog="flowalign serve-reward", exit_on_error=False, allow_abbrev=False, add_help=False
    )
    parser.add_argument("sources", nargs="*")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--token-env")
    try:
        given, unknown = parser.parse_known_intermixed_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(f"flowalign serve-reward: {error}") from error
    if unknown or not given.sources:
        raise ConfigError(
            f"flowalign serve-reward: got {' '.join(unknown) or 'no reward'}; expected CONFIG.yaml or a class such as "
            "rewards.OCR, [reward.key=value ...] [--port N] [--host ADDRESS] [--token-env VARIABLE]"
        )
    try:
        service = Service(_served(load_reward(given.sources)))
        listener = Listener(service, given.host, given.port, _token(given.token_env))
    except (ValueError, OSError, OverflowError) as error:
        raise ConfigError(f"flowalign serve-reward: {error}") from error
    try:
        serve(listener, lambda sentence: print(sentence, flush=True))
    except RewardError as error:
        raise ConfigError(str(error)) from error


def _served(reward: Reward) -> Reward:
    """What a run's configuration expects at a server is what is served: one file does for both sides."""
    return reward.reward if isinstance(reward, Http) else reward


def _token(variable: str | None) -> str | None:
    if variable is None:
        return None
    token = os.environ.get(variable, "")
    if len(token) < 16:
        raise ConfigError(
            f"got a token of {len(token)} characters in the environment variable {variable}; expected at least 16, such as "
            'python -c "import secrets; print(secrets.token_urlsafe())"'
        )
    return token
