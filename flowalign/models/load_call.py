"""The call that loads a policy's pipeline in plain diffusers."""

from __future__ import annotations

import os
from pathlib import Path

from flowalign.models.checkpoints import inspect_checkpoint
from flowalign.models.load import DTYPES
from flowalign.models.quantization import Quantization, quantization_arguments
from flowalign.models.shipped import resolve

# of diffusers, as far as a call names them
IMPORTS = ("DiffusionPipeline", "BitsAndBytesConfig", "PipelineQuantizationConfig")


def load_call(
    path: str, family: str | None, dtype: str, vae_dtype: str | None, quantization: Quantization | None = None
) -> str:
    """Python that makes the pipeline from `torch` and names of `diffusers` (IMPORTS), from any working directory: a folder by its
    absolute path, a hub id as it is, with the parts that the checkpoint lacks, the dtypes and the quantization said."""
    index, known = inspect_checkpoint(path, family)
    name = resolve(path)
    place = os.path.abspath(name) if Path(name).exists() else name
    kinds = {"default": str(DTYPES[dtype]), "vae": str(DTYPES[vae_dtype or dtype])}
    several = ", ".join(f"{part!r}: {kind}" for part, kind in kinds.items())
    arguments = [
        repr(place),
        *(f"{part}={value!r}" for part, value in known.load_arguments(index).items()),
        "dtype=" + (f"{{{several}}}" if len(set(kinds.values())) > 1 else kinds["default"]),
    ]
    if quantization is not None:
        settings = ", ".join(
            f"{key}={value!r}" for key, value in quantization_arguments(quantization, DTYPES[dtype]).items()
        )
        mapping = ", ".join(f"{name!r}: BitsAndBytesConfig({settings})" for name in known.networks)
        arguments.append(f"quantization_config=PipelineQuantizationConfig(quant_mapping={{{mapping}}})")
    return "\n".join(["DiffusionPipeline.from_pretrained(", *(f"    {argument}," for argument in arguments), ")"])
