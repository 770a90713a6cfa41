"""A damaged tensor raises FormatError before a kernel touches it; nothing crashes."""

from collections.abc import Callable

import numpy as np
import pytest

from gossamer import _native
from gossamer.errors import FormatError

ISAS = tuple(level for level, runs in _native.levels().items() if runs)
X_TK = np.ones((2, 150), np.float32)
INTEGERS = [(values, storage) for values in ("i8", "i4") for storage in ("sparse", "dense")]
INTEGERS += [("i8", "blocks")]


def run(matrix) -> np.ndarray:
    """Row sums of the weights, times their scales, on every level."""
    return np.stack([_native.matmul(isa, **matrix.arguments, x_TK=X_TK) for isa in ISAS])


@pytest.fixture(scope="module", params=INTEGERS, ids="-".join)
def sound(request: pytest.FixtureRequest, matrix: Callable):
    values, storage = request.param
    rng, low = np.random.default_rng(0), -128 if values == "i8" else -8
    q_NK = (rng.integers(low, -low, (45, 150)) * (rng.random((45, 150)) < 0.3)).astype(np.int8)
    multiplier_NG = rng.integers(1, 17, (45, 2)).astype(np.uint8)
    found = matrix(values, storage, q_NK, 0.5 + rng.random(45), multiplier_NG)
    run(found)
    return found


@pytest.fixture(scope="module", params=["f32", "bf16"])
def sound_floats(request: pytest.FixtureRequest, matrix: Callable):
    rng = np.random.default_rng(0)
    w_NK = (rng.standard_normal((45, 150)) * (rng.random((45, 150)) < 0.3)).astype(np.float32)
    stored = w_NK if request.param == "f32" else (w_NK.view(np.uint32) >> 16).astype(np.uint16)
    found = matrix(request.param, "sparse", stored, np.ones(45))
    run(found)
    return found


def run_damaged(sound, buffer: np.ndarray) -> None:
    """Damage is found, or changes no row's sum: int4 multipliers of no weights, two weights' nibbles."""
    try:
        found = run(sound.with_buffer(buffer))
    except FormatError:
        return
    assert sound.matrices["w"]["values"] == "i4"
    np.testing.assert_array_equal(found, run(sound))


def test_every_flipped_bit_is_found(sound) -> None:
    """Masks, values, slack, offsets and sums: the row sums tie them together. Scales only have to be sane."""
    rng = np.random.default_rng(1)
    for name, (_, _, begin, length) in sound.tensors.items():
        for _ in range(0 if name.endswith("scale") else 150):
            buffer = sound.buffer.copy()
            buffer[begin + rng.integers(length)] ^= 1 << rng.integers(8)
            run_damaged(sound, buffer)


def test_every_overwritten_run_is_found_or_harmless(sound) -> None:
    rng = np.random.default_rng(2)
    first, length = sound.tensors["w.weight_scale"][2:]
    for _ in range(150):
        buffer = sound.buffer.copy()
        begin = rng.integers(buffer.size)
        buffer[begin : begin + rng.integers(1, 40)] = rng.integers(0, 256)
        outside = np.r_[0:first, first + length : buffer.size]
        if (buffer[outside] != sound.buffer[outside]).any():
            buffer[first : first + length] = sound.buffer[first : first + length]
            run_damaged(sound, buffer)


def test_damaged_float_streams_never_lead_a_kernel_outside(sound_floats) -> None:
    """Other values are other weights; masks and offsets that do not fit, zeros and NaN are found."""
    rng, refused = np.random.default_rng(3), 0
    for _ in range(400):
        buffer = sound_floats.buffer.copy()
        begin = rng.integers(buffer.size)
        buffer[begin : begin + rng.integers(1, 8)] ^= np.uint8(rng.integers(1, 256))
        try:
            run(sound_floats.with_buffer(buffer))
        except FormatError:
            refused += 1
    assert refused > 20
    stream = sound_floats.tensors["w.weight.stream"][2]
    buffer = sound_floats.buffer.copy()
    buffer[stream] ^= 1  # the first mask
    with pytest.raises(FormatError):
        run(sound_floats.with_buffer(buffer))


@pytest.mark.parametrize("bad", [0, 17, 255])
def test_multipliers_are_1_to_16(sound, bad: int) -> None:
    if "w.weight_multiplier" in sound.tensors:
        buffer, begin = sound.buffer.copy(), sound.tensors["w.weight_multiplier"][2]
        buffer[begin] = bad
        with pytest.raises(FormatError, match="multipliers"):
            run(sound.with_buffer(buffer))


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
                run(sound.__class__(sound.buffer, sound.tensors | {name: wild}, sound.matrices))
        with pytest.raises(FormatError, match=name):
            left = {other: entry for other, entry in sound.tensors.items() if other != name}
            run(sound.__class__(sound.buffer, left, sound.matrices))


CHANGES = [{"rows": 44}, {"rows": 64}, {"columns": 149}, {"columns": 300}, {"rows": 0}, {"columns": -4}]


@pytest.mark.parametrize("change", [*CHANGES, {"values": "i2"}, {"storage": "coo"}], ids=str)
def test_a_table_that_contradicts_the_tensors_is_refused(sound, change: dict) -> None:
    with pytest.raises(FormatError):
        run(sound.__class__(sound.buffer, sound.tensors, {"w": sound.matrices["w"] | change}))


@pytest.mark.parametrize("values", ["f32", "bf16"])
def test_nan_weights_are_refused(values: str, matrix: Callable) -> None:
    w_NK = np.ones((20, 150), np.float32)
    w_NK[19, 149] = np.nan
    stored = w_NK if values == "f32" else (w_NK.view(np.uint32) >> 16).astype(np.uint16)
    with pytest.raises(FormatError, match="NaN"):
        run(matrix(values, "dense", stored, np.ones(20)))
