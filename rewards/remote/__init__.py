"""Rewards that live in another process (InWorker) or behind HTTP (Http; server: what serves one), and their wire format."""

from rewards.remote.client import Http
from rewards.remote.in_worker import InWorker

__all__ = ["Http", "InWorker"]
