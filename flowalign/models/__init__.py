"""Models: a diffusers pipeline seen as parts. One file per family."""

from flowalign.models.base import Conditions, Policy
from flowalign.models.load import check_lora_targets, inspect_checkpoint, load_policy, path_of
from flowalign.models.lora import LoRA

__all__ = ["Conditions", "LoRA", "Policy", "check_lora_targets", "inspect_checkpoint", "load_policy", "path_of"]
