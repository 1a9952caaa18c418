"""Weights that are not trained, held in less than float32: in bf16, or quantised by bitsandbytes."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from pipeline.config.schema import Dtype
from pipeline.errors import UserError
from pipeline.models.device import device

QUANTISED = ("int8", "nf4")


def check_dtype(dtype: Dtype) -> None:
    """UserError where frozen weights cannot be held in a dtype. Loads nothing."""
    if dtype not in QUANTISED:
        return
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f'dtype {dtype} needs bitsandbytes: pip install -e ".[quantized]", or dtype: bf16'
        )
    import bitsandbytes  # slow to import, and only these need it

    if (kind := device().type) not in bitsandbytes.supported_torch_devices:
        raise UserError(f"dtype {dtype}: bitsandbytes does not run on {kind}; set dtype: bf16")


def held_in(dtype: Dtype) -> dict[str, Any]:
    """How `from_pretrained` is told. What of a quantised model is no linear layer, and its head, stay in
    float32, in which it also computes but for int8's products (arXiv 2208.07339; nf4: 2305.14314)."""
    if dtype not in QUANTISED:
        return {"dtype": torch.bfloat16 if dtype == "bf16" else torch.float32}
    how = BitsAndBytesConfig(
        load_in_8bit=dtype == "int8",
        load_in_4bit=dtype == "nf4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
    )
    return {"dtype": torch.float32, "quantization_config": how}


def settle(model: nn.Module, dtype: Dtype) -> None:
    """Have a quantised model compute in evaluation as in training.

    On CPUs bitsandbytes would not: its int8 products then differ by as much as their own error, and with
    the rest of the batch, so that a policy would sample from other probabilities than it trains.
    """
    if dtype not in QUANTISED:
        return
    for p in model.parameters():
        if p.is_floating_point():  # a view of the file, which would stay in memory whole
            p.data = p.data.clone()
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes"):
            module.register_forward_pre_hook(_as_in_training)


def _as_in_training(layer: nn.Module, _: object) -> None:
    layer.training = True
