"""A damaged tensor raises FormatError before a kernel touches it; nothing crashes."""

from collections.abc import Callable

import numpy as np
import pytest

from gossamer import _native
from gossamer.errors import FormatError

ISAS = sorted({row["isa"] for row in _native.kernels() if row["isa"] in {"scalar", _native.isa()}})
X_TK = np.ones((2, 150), np.float32)


def run(matrix) -> None:
    for isa in ISAS:
        _native.matmul(isa, **matrix.arguments, x_TK=X_TK)


@pytest.fixture(scope="module", params=["sparse", "dense"])
def sound(request: pytest.FixtureRequest, matrix: Callable):
    rng = np.random.default_rng(0)
    q_NK = (rng.integers(-128, 128, (45, 150)) * (rng.random((45, 150)) < 0.3)).astype(np.int8)
    found = matrix("i8", request.param, q_NK, 0.5 + rng.random(45))
    run(found)
    return found


def test_every_flipped_bit_is_found(sound) -> None:
    """Masks, values, slack, offsets and sums: the row sums tie them together. Scales only have to be sane."""
    rng = np.random.default_rng(1)
    for name, (_, _, begin, length) in sound.tensors.items():
        for _ in range(150):
            buffer = sound.buffer.copy()
            buffer[begin + rng.integers(length)] ^= 1 << rng.integers(8)
            damaged = sound.with_buffer(buffer)
            if name.endswith("scale"):
                continue
            with pytest.raises(FormatError):
                run(damaged)


def test_every_overwritten_run_is_found_or_harmless(sound) -> None:
    rng = np.random.default_rng(2)
    for _ in range(150):
        buffer = sound.buffer.copy()
        begin = rng.integers(buffer.size)
        buffer[begin : begin + rng.integers(1, 40)] = rng.integers(0, 256)
        try:
            run(sound.with_buffer(buffer))
        except FormatError:
            continue
        begin, length = sound.tensors["w.weight_scale"][2:]
        outside = np.r_[0:begin, begin + length : buffer.size]
        np.testing.assert_array_equal(buffer[outside], sound.buffer[outside])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_scales_must_be_finite_and_not_negative(sound, bad: float) -> None:
    buffer, begin = sound.buffer.copy(), sound.tensors["w.weight_scale"][2]
    buffer[begin : begin + 4] = np.array([bad], np.float32).view(np.uint8)
    with pytest.raises(FormatError, match="scales"):
        run(sound.with_buffer(buffer))


def test_truncated_buffers_and_wild_tensors_are_refused(sound) -> None:
    for size in range(0, sound.buffer.size - 1, 97):
        with pytest.raises(FormatError):
            run(sound.with_buffer(sound.buffer[:size]))
    huge = 2**64 - 64
    for name, (dtype, shape, offset, length) in sound.tensors.items():
        for wild in [
            (dtype, shape, huge, length),
            (dtype, shape, offset + 8, length),
            (dtype, shape, offset, huge),
            (dtype, (*shape, 1), offset, length),
            ("F64", shape, offset, length),
        ]:
            with pytest.raises(FormatError):
                run(sound.__class__(sound.buffer, sound.tensors | {name: wild}, sound.layers))
        with pytest.raises(FormatError, match=name):
            left = {other: entry for other, entry in sound.tensors.items() if other != name}
            run(sound.__class__(sound.buffer, left, sound.layers))


CHANGES = [{"rows": 44}, {"rows": 64}, {"columns": 149}, {"columns": 200}, {"rows": 0}, {"columns": -4}]


@pytest.mark.parametrize("change", [*CHANGES, {"values": "i4"}, {"storage": "coo"}], ids=str)
def test_a_table_that_contradicts_the_tensors_is_refused(sound, change: dict) -> None:
    with pytest.raises(FormatError):
        run(sound.__class__(sound.buffer, sound.tensors, {"w": sound.layers["w"] | change}))


@pytest.mark.parametrize("values", ["f32", "bf16"])
def test_nan_weights_are_refused(values: str, matrix: Callable) -> None:
    w_NK = np.ones((20, 150), np.float32)
    w_NK[19, 149] = np.nan
    stored = w_NK if values == "f32" else (w_NK.view(np.uint32) >> 16).astype(np.uint16)
    with pytest.raises(FormatError, match="NaN"):
        run(matrix(values, "dense", stored, np.ones(20)))
