"""Models: a diffusers pipeline seen as parts. One file per family."""

from flowalign.models.base import Model, Policy, Sampling, Size
from flowalign.models.checkpoints import inspect_checkpoint
from flowalign.models.checks import check_lora_targets, path_of
from flowalign.models.conditions import Conditions
from flowalign.models.family import Family
from flowalign.models.images import Images
from flowalign.models.load import load_policy
from flowalign.models.lora import LoRA
from flowalign.models.roles import Role

__all__ = [
    "Conditions", "Family", "Images", "LoRA", "Model", "Policy", "Role", "Sampling", "Size", "check_lora_targets", "inspect_checkpoint", "load_policy",
    "path_of",
]  # fmt: skip
