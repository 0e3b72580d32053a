"""A LoRA in a folder, as diffusers' `save_lora_weights` writes it: its settings are read before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

NAME = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class LoRAFile:
    """The part of a LoRA file that belongs to one network, a component of the pipeline.

    ranks, alphas: by the name of the module in the network. An alpha is that of the file's metadata (diffusers), of its
    `.alpha` entry (kohya), or else the rank, as diffusers takes it."""

    path: Path
    component: str
    ranks: dict[str, int]
    alphas: dict[str, float]

    @property
    def modules(self) -> tuple[str, ...]:
        """The adapted modules, sorted."""
        return tuple(sorted(self.ranks))

    def check_modules(self, linear: Collection[str]) -> None:
        """ValueError unless each module is one of the network's linear layers."""
        unknown = [module for module in self.modules if module not in linear]
        if unknown:
            raise ValueError(
                f"got {self.path} with adapters for {', '.join(unknown[:3])} ({len(unknown)} in all), which are no linear layers "
                f"of the {self.component}; expected a LoRA of this model: train or convert one for it"
            )

    def check_equal(self, what: str, modules: Collection[str], rank: int, alpha: float) -> None:
        """ValueError unless the LoRA has exactly these modules, this rank and this alpha."""
        ranks, alphas = sorted(set(self.ranks.values())), sorted(set(self.alphas.values()))
        if ranks == [rank] and alphas == [alpha] and set(modules) == set(self.ranks):
            return
        differ = sorted(set(modules) ^ set(self.ranks))
        raise ValueError(
            f"got {self.path} with rank {ranks}, alpha {alphas} at {len(self.ranks)} layers of the {self.component} for {what}; "
            f"expected rank {rank}, alpha {alpha} at {len(modules)} layers"
            + (f", which differ in {', '.join(differ[:3])}" if differ else "")
            + ": set policy.lora.rank, alpha and targets to those of the file"
        )

    def tensors(self) -> dict[str, Tensor]:
        """{module.lora_A.weight, module.lora_B.weight: tensor}, on the CPU. ValueError if one is not finite."""
        with safe_open(self.path, "pt") as file:
            tensors = {
                f"{module}.lora_{side}.weight": file.get_tensor(f"{self.component}.{module}.lora_{side}.weight")
                for module in self.modules
                for side in "AB"
            }
        if bad := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
            raise ValueError(
                f"got {self.path} with values of {bad[0]} that are NaN or infinite; expected finite weights: take an earlier export"
            )
        return tensors

    def peft_settings(self) -> dict[str, Any]:
        """Arguments of peft's LoraConfig for this file, one rank and alpha per module if they differ."""
        rank, alpha = (max(values, key=list(values).count) for values in (self.ranks.values(), self.alphas.values()))
        return {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {f"^{module}": own for module, own in self.ranks.items() if own != rank},
            "alpha_pattern": {f"^{module}": own for module, own in self.alphas.items() if own != alpha},
            "target_modules": list(self.modules),
        }


def find_lora(place: str | Path) -> Path:
    """The .safetensors file that `place` names: itself, or in a folder of diffusers' `save_lora_weights`, or in the lora/ of a
    run folder. FileNotFoundError if there is none."""
    given = Path(place).expanduser()
    for path in (given, given / NAME, given / "lora" / NAME):
        if path.is_file() and path.suffix == ".safetensors":
            return path
    raise FileNotFoundError(
        f"got the LoRA {place}, which is no .safetensors file and holds no {NAME} (working directory: {Path.cwd()}); expected "
        "a run folder or its lora/ (of a run without one: flowalign export RUN), or what diffusers' save_lora_weights wrote"
    )


def read_lora(place: str | Path, component: str) -> LoRAFile:
    """Reads names, shapes and metadata of the file that `find_lora` finds. FileNotFoundError if there is none; ValueError if it
    is damaged, has nothing for the component, or something other than lora_A and lora_B."""
    path = find_lora(place)
    try:
        return _read(path, component)
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"got the LoRA {path} of {path.stat().st_size:,} bytes, which is damaged ({error}); expected a whole safetensors file: "
            "copy or export it anew"
        ) from error


def _read(path: Path, component: str) -> LoRAFile:
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    others: dict[str, int] = {}  # the ranks of lora_B
    with safe_open(path, "pt") as file:
        settings = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        names = [name for name in file.keys() if name.startswith(f"{component}.")]  # noqa: SIM118 (no mapping)
        for name in names:
            module, _, kind = name.removeprefix(f"{component}.").rpartition(".lora_")
            if kind == "A.weight":
                ranks[module] = file.get_slice(name).get_shape()[0]
            elif name.endswith(".alpha"):
                alphas[name.removeprefix(f"{component}.").removesuffix(".alpha")] = float(file.get_tensor(name))
            elif kind == "B.weight":
                others[module] = file.get_slice(name).get_shape()[1]
            else:
                raise ValueError(
                    f"got {name} in {path}; expected only lora_A and lora_B weights: save it by peft's plain LoRA"
                )
    if not ranks:
        raise ValueError(
            f"got {path} without adapters for the {component}; expected names such as {component}.….lora_A.weight: save it "
            "by save_lora_weights of this model's pipeline"
        )
    if ranks != others:
        module = min(module for module, _ in ranks.items() ^ others.items())
        raise ValueError(
            f"got {path} with lora_A of rank {ranks.get(module)} and lora_B of rank {others.get(module)} at {module}; expected both, of "
            "one rank: export it anew"
        )
    general, special = settings.get(f"{component}.lora_alpha"), settings.get(f"{component}.alpha_pattern") or {}
    for module, rank in ranks.items():
        alphas.setdefault(module, float(_special(special, module) or general or rank))
    return LoRAFile(path, component, ranks, {module: alphas[module] for module in ranks})


def _special(pattern: dict[str, float], module: str) -> float | None:
    """peft's alpha_pattern: keys are module names, or their ends, with or without ^."""
    return next((value for key, value in pattern.items() if f".{module}".endswith("." + key.removeprefix("^"))), None)
