"""What packing takes is what is said, by torch's own record of what it allocates."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from gossamer.gpu import SparseLinear, packing
from gossamer.gpu.linear import while_packing
from gossamer.measure.gpu_decoder import Decoder, Sizes, most_bytes
from gossamer.measure.stopwatch import Stopwatch

WHOLE, RAGGED = (1040, 2176), (1037, 2076)  # somewhat more than a chunk


def peak_bytes(function: Callable[[], Any]) -> tuple[int, Any]:
    """The most that was allocated at once meanwhile, and what came of it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = function()
    found: Any = recorded.profiler
    events = [it for it in found.kineto_results.events() if it.name() == "[memory]"]
    taken = [it.nbytes() for it in sorted(events, key=lambda it: it.start_ns())]
    return int(np.cumsum(taken).max()), result


def random_weights(rows: int, columns: int, zeros: float, kind: str) -> tuple[Tensor, Tensor | None]:
    """Weights, and multipliers of INT4."""
    random = torch.Generator().manual_seed(1)
    q_NK = torch.randint(1, 8, (rows, columns), dtype=torch.int8, generator=random)
    q_NK[torch.rand(rows, columns, generator=random) < zeros] = 0
    multiplier_NS = torch.ones(rows, -(-columns // 128), dtype=torch.uint8) if kind == "i4" else None
    return q_NK.bfloat16() if kind == "bf16" else q_NK, multiplier_NS


@pytest.mark.parametrize("kind", ["i8", "bf16", "i4"])
@pytest.mark.parametrize(
    ("shape", "zeros"),
    [(WHOLE, 0.0), (WHOLE, 0.46), (WHOLE, 0.7), (WHOLE, 1.0), (RAGGED, 0.0), (RAGGED, 1.0)],
    ids=str,
)
def test_packing_takes_what_is_said(shape: tuple[int, int], zeros: float, kind: str) -> None:
    assert packing.CHUNK_WEIGHTS < math.prod(shape) < 1.1 * packing.CHUNK_WEIGHTS
    w_NK, multiplier_NS = random_weights(*shape, zeros, kind)
    peak, packed = peak_bytes(lambda: packing.pack(w_NK, multiplier_NS))
    is_int4, number = kind == "i4", int(packed.starts[-1])
    said = packing.packing_bytes(*shape, w_NK.dtype, is_int4=is_int4, num_values=number)
    assert said / 3 <= peak <= said <= packing.packing_bytes(*shape, w_NK.dtype, is_int4=is_int4)
    made = packing.packed_bytes(*shape, w_NK.dtype, is_int4=is_int4, num_values=number)
    assert made == packed.num_bytes


@pytest.mark.parametrize(
    ("kind", "zeros", "keep_dense"),
    [("i8", 0.0, False), ("i8", 0.46, True), ("bf16", 0.0, False), ("bf16", 0.46, True), ("i4", 0.0, True)],
)
def test_a_linear_takes_no_more_than_is_said(kind: str, zeros: float, keep_dense: bool) -> None:
    w_NK, multiplier_NS = random_weights(*WHOLE, zeros, kind)
    scales_N = None if kind == "bf16" else torch.ones(len(w_NK))
    how: dict[str, Any] = {"multiplier_NS": multiplier_NS, "keep_dense": keep_dense}
    peak, _ = peak_bytes(lambda: SparseLinear.from_weight(w_NK, scales_N, **how))
    packing_it = while_packing("o", w_NK, is_int4=kind == "i4", keep_dense=keep_dense)
    with pytest.raises(MemoryError, match="o was packed, beside the weights") as raised, packing_it:
        raise torch.OutOfMemoryError("CUDA out of memory")
    [said] = re.findall(r"at most ([\d.]+) GB more while it is: CUDA out", str(raised.value))
    assert peak <= 1e9 * float(said) + 5e6


@pytest.mark.parametrize("kind", ["i8", "bf16", "i4"])
@pytest.mark.parametrize(("vocabulary", "zeros"), [(500, 0.0), (16000, 0.7)])
def test_a_decoder_that_is_measured_takes_what_is_said(vocabulary: int, zeros: float, kind: str) -> None:
    sizes = Sizes(hidden=512, intermediate=512, layers=2, heads=4, kv_heads=2, vocabulary=vocabulary)
    peak, _ = peak_bytes(lambda: Decoder(Stopwatch("cpu"), sizes, kind, zeros))
    said = most_bytes(sizes, kind, zeros)
    assert said / 3 <= peak <= 1.01 * said  # as many zeros as chance has it
