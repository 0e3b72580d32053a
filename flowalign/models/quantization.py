"""A frozen base in 8 or 4 bits, by bitsandbytes through diffusers. The adapters on it are fp32 and trained as on any other."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any, Literal

import torch
from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig

Quantization = Literal["8bit", "4bit"]


def check_quantization(quantization: Quantization | None, trainable: str, cuda: bool = True) -> None:
    """ValueError unless weights may be quantized: frozen ones, with bitsandbytes, on a GPU (`cuda`: there is one; a forecast needs none)."""
    if quantization is None:
        return
    if trainable == "full":
        raise ValueError(
            f"got policy.quantization={quantization} with policy.trainable=full, whose weights an optimizer steps; expected frozen ones: "
            "set policy.trainable=lora, or policy.quantization=null"
        )
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"got policy.quantization={quantization} without bitsandbytes; expected the package: pip install "
            "'flowalign-diffusion[quantization]', or set policy.quantization=null"
        )
    if not cuda:
        raise ValueError(
            f"got policy.quantization={quantization} without a CUDA device, where diffusers does not load quantized weights; expected "
            "one: set policy.quantization=null here"
        )


def quantization_config(
    quantization: Quantization, networks: Iterable[str], dtype: torch.dtype
) -> PipelineQuantizationConfig:
    """What `from_pretrained` of a pipeline takes, for the linear layers of the networks."""
    # of its 8-bit products bitsandbytes says at each that it casts bf16 to fp16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    arguments = quantization_arguments(quantization, dtype)
    return PipelineQuantizationConfig(quant_mapping={name: BitsAndBytesConfig(**arguments) for name in networks})


def quantization_arguments(quantization: Quantization, dtype: torch.dtype) -> dict[str, Any]:
    """Of diffusers' BitsAndBytesConfig: 8 bits as LLM.int8 (arXiv:2208.07339); 4 as QLoRA (arXiv:2305.14314), NF4 with quantized
    constants, multiplied in `dtype`."""
    if quantization == "8bit":
        return {"load_in_8bit": True}
    return {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype,
    }  # fmt: skip
