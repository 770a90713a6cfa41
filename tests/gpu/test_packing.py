"""Weights packed by torch are what the specification makes of them, to the byte."""

import numpy as np
import pytest
import torch

from gossamer.errors import UnsupportedError
from gossamer.gpu import layout, packing
from gpu.emulated import int8_weights, random_int4
from gpu.test_layout import random_weights


@pytest.mark.parametrize("zeros", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(16, 128), (1, 1), (40, 300), (100, 1000), (33, 129)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=["i8", "bf16"])
@pytest.mark.parametrize("at_once", [packing.CHUNK_WEIGHTS, 1], ids=["whole", "by panels"])
def test_it_packs_as_the_specification_says(
    shape: tuple[int, int], zeros: float, at_once: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "CHUNK_WEIGHTS", at_once)
    w_NK = random_weights(*shape, zeros=zeros)
    given = torch.from_numpy(w_NK).to(dtype)
    values = w_NK if dtype == torch.int8 else given.view(torch.int16).numpy().view(np.uint16)
    expected, found = layout.from_weights(values), packing.pack(given)
    assert (found.rows, found.columns) == shape and found.num_bytes == expected.num_bytes
    assert np.array_equal(found.masks.numpy().view(np.uint64), expected.masks)
    assert np.array_equal(found.values.view(torch.int8).numpy(), expected.values.view(np.int8))
    assert np.array_equal(found.starts.numpy().view(np.uint32), expected.starts)


@pytest.mark.parametrize("zeros", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(16, 128), (1, 1), (40, 300), (100, 1000), (33, 129)], ids=str)
@pytest.mark.parametrize("at_once", [packing.CHUNK_WEIGHTS, 1], ids=["whole", "by panels"])
def test_int4_is_packed_as_the_specification_says(
    shape: tuple[int, int], zeros: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "CHUNK_WEIGHTS", at_once)
    q_NK, multiplier_NS = random_int4(*shape, zeros)
    expected = layout.from_weights(q_NK, multiplier_NS)
    found = packing.pack(torch.from_numpy(q_NK), torch.from_numpy(multiplier_NS))
    assert found.num_bytes == expected.num_bytes and found.multipliers is not None
    assert np.array_equal(found.masks.numpy().view(np.uint64), expected.masks)
    assert np.array_equal(found.values.numpy(), expected.values)
    assert np.array_equal(found.starts.numpy().view(np.uint32), expected.starts)
    assert np.array_equal(found.multipliers.numpy(), expected.multipliers)
    assert np.array_equal(packing.unpacked(found).numpy(), int8_weights(q_NK, multiplier_NS))


def test_a_transposed_matrix_is_packed_as_it_is_seen() -> None:
    w_KN = torch.from_numpy(random_weights(300, 40))
    expected = packing.pack(w_KN.T.contiguous())
    assert torch.equal(packing.pack(w_KN.T).values, expected.values)


def test_parameters_are_packed_as_their_weights_are() -> None:
    weight = torch.nn.Linear(300, 40, dtype=torch.bfloat16).weight
    found = packing.pack(weight)
    assert torch.equal(packing.unpacked(found), weight) and not found.values.requires_grad


def test_more_weights_than_can_be_counted_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MOST_WEIGHTS", 10)
    with pytest.raises(UnsupportedError, match=r"16 x 128 has 2,048 weights.*: 10"):
        packing.pack(torch.ones(16, 128, dtype=torch.int8))
