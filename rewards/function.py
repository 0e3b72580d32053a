"""A user's plain function as a reward: `fn(images, prompts, **metadata) -> scores`, named by file or import path."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from rewards.base import Input, RewardBatch, RewardOutput, RewardSpec, Scope
from rewards.import_path import check_file, import_named, near, split_path

BATCH_FIELDS = ("latents", "sigma", "videos", "fps", "conditions")  # what a function may name beside metadata columns


@dataclass(eq=False)
class FunctionReward:
    """A reward from a function, or from the path of one: `./my_rewards.py:shininess`, `package.module:shininess` or
    `package.module.shininess`.

    The function gets images (float32 [N, 3, H, W] in [0, 1]) and prompts (N texts), then by keyword the metadata columns
    that it names (or all, with **metadata): lists of N, None where a sample lacks the key. It returns N numbers: a tensor,
    an array or a list, in which NaN or None means "no score for this sample".

    inputs: what it reads. Without "images" the first argument is prompts. Parameters called latents, sigma, videos, fps or
    conditions get those of the batch (see RewardBatch). scope: "latent" makes it a process reward of states (latents, sigma).
    channels: names of its scores, if there are several: it then returns [N, C]. differentiable: it returns a tensor with a
    graph to its inputs. scores_black: see RewardSpec.

    path: the function itself (in Python), or its path. The path's form and the file are checked at construction, the
    function is imported by `load`. Relative files are looked for in the working directory. name: by default the function's.
    TypeError for what cannot be called.
    """

    path: str | Callable[..., Any]
    name: str = ""
    channels: tuple[str, ...] = ()
    inputs: tuple[Input, ...] = ("images",)
    scope: Scope = "terminal"
    differentiable: bool = False
    scores_black: bool = True
    _function: Callable[..., Any] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.path, str):
            check_file(self.path)
            self.name = self.name or split_path(self.path)[1]
        else:
            if not callable(self.path):
                raise TypeError(
                    f"got {self.path!r} as a reward; expected a function, or its path './my_rewards.py:shininess'"
                )
            self._function = self.path
            self.name = self.name or _name_of(self.path)
        self.spec  # noqa: B018 (checked at construction)

    @property
    def spec(self) -> RewardSpec:
        return RewardSpec(
            tuple(self.inputs), self.scope, tuple(self.channels), self.differentiable, scores_black=self.scores_black
        )

    def load(self) -> None:
        if self._function is None:
            self._function = import_function(str(self.path))

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        self.load()
        assert self._function is not None
        first = [batch.images] if "images" in self.inputs else []
        named = self._named(self._function, batch, skip=len(first) + 1)
        answer = self._function(*first, list(batch.prompts), **named)
        scores = as_scores(answer, self._label, grad=torch.is_grad_enabled() and self.differentiable)
        return RewardOutput(scores, torch.isfinite(scores))

    @property
    def _label(self) -> str:
        """Of messages."""
        return self.path if isinstance(self.path, str) else self.name

    def _named(self, function: Callable[..., Any], batch: RewardBatch, skip: int) -> dict[str, Any]:
        """The fields of the batch and the metadata columns that the function takes, after its first `skip` parameters."""
        known = list(dict.fromkeys(key for row in batch.metadata for key in row))
        parameters = list(inspect.signature(function).parameters.values())[skip:]
        named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
        fields = {each.name: vars(batch)[each.name] for each in named if each.name in BATCH_FIELDS}
        for each in named:
            if each.default is not each.empty:
                continue
            if each.name in BATCH_FIELDS and fields[each.name] is None:
                raise ValueError(
                    f"reward {self._label!r} takes {each.name!r}, which its batch does not have: name what it reads in "
                    "`inputs` ('videos', 'latents'); conditions come with prompts that have images"
                )
            if each.name not in known and each.name not in fields:
                raise ValueError(
                    f"reward {self._label!r} needs the metadata column {each.name!r}; the prompts have "
                    f"{near(each.name, known)}"
                )
        takes_all = any(each.kind == each.VAR_KEYWORD for each in parameters)
        wanted = known if takes_all else [each.name for each in named if each.name in known]
        given = {name: value for name, value in fields.items() if value is not None}  # else its default
        return {key: [row.get(key) for row in batch.metadata] for key in wanted} | given


def _name_of(function: Callable[..., Any]) -> str:
    """`shininess`, "lambda", or the class of an object that can be called."""
    named = function if inspect.isroutine(function) or inspect.isclass(function) else type(function)
    return named.__name__.strip("<>")


def import_function(path: str) -> Callable[..., Any]:
    """The function behind a path; ValueError if it is not there, or is none."""
    found = import_named(path)
    if not callable(found) or inspect.isclass(found):
        what = "a class" if inspect.isclass(found) else f"of type {type(found).__name__}"
        raise ValueError(f"got {path!r}, {what}; expected a function of images and prompts")
    return cast(Callable[..., Any], found)


def as_scores(values: object, path: str, *, grad: bool = False) -> Tensor:
    """float32 on the CPU from what the function `path` returned; None becomes NaN. grad: a tensor as it is, with its graph."""
    if grad:
        if not isinstance(values, Tensor):
            raise TypeError(
                f"reward {path!r} returned {type(values).__name__}; expected a tensor with a graph to its inputs "
                "(differentiable: true)"
            )
        return values
    try:
        scores = torch.as_tensor(_numbers(values) if isinstance(values, (list, tuple)) else values).detach()
        if scores.is_complex():  # its imaginary part would be dropped with a warning
            raise TypeError("complex numbers")
        return scores.to("cpu", torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"reward {path!r} returned {type(values).__name__}; expected one number per sample ({error})"
        ) from error


def _numbers(values: object) -> object:
    """Lists, also nested ones, with NaN for None."""
    if isinstance(values, (list, tuple)):
        return [_numbers(value) for value in values]
    return float("nan") if values is None else values
