"""What a run does otherwise on a GPU than on a CPU: the precision, and the size of a micro-batch."""

from typing import Literal

import torch
from torch import nn

from gossamer.cuda import why_no_gpu
from gossamer.errors import ConfigError

Precision = Literal["f32", "bf16"]
MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}


def choose_precision(wanted: Literal["auto", "f32", "bf16"], device: str) -> Precision:
    """The precision of matrix products: for `auto` bf16 where hardware has it (1.5 to 2 times as fast)."""
    if wanted != "auto":
        return wanted
    fast = torch.cuda.is_bf16_supported() if device == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "f32"


def check_device(wanted: str, option: str) -> None:
    """Raise ConfigError for a device that is not there."""
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if wanted not in there and (wanted != "cuda" or len(there) == 1):
        why = f" ({why})" if (why := why_no_gpu()) else ""
        raise ConfigError(f"{option} {wanted} is not there; found {', '.join(there)}{why}: give one of these")


def another_device(wanted: str | None, own: str) -> str | None:
    """`wanted`, or None where that is the device, "cpu" or "cuda", that the run trains on anyway."""
    return None if wanted in ((None, "cpu") if own == "cpu" else (None, "cuda", "cuda:0")) else wanted


def cast_teacher(model: nn.Module, precision: str) -> None:
    """Give a model that only reads weights of the run's precision.

    Buffers stay as they are: in bfloat16 the frequencies of rotary positions would be off by up to 0.2%.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16 if precision == "bf16" else torch.float32)
