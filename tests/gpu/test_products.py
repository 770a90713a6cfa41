"""What a GPU is asked for, by an emulated one: the operator's bits, whichever kernels make them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gossamer import _native
from gossamer.gpu import kernels, products
from gossamer.gpu.linear import sparse_linear
from gossamer.gpu.packing import PackedWeights, pack, padded, unpacked
from gpu.emulated import Emulated, needs_compiler, random_int4
from gpu.test_layout import random_weights
from native.conftest import make_matrix

pytestmark = needs_compiler
TOKENS = [1, 5, 13, 64, 70, 300]


def operands(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, 300] of very different tokens, the first with extremes; int8 weights [40, 300], their scales."""
    random = torch.Generator().manual_seed(tokens)
    x_TK = torch.randn(tokens, 300, generator=random)
    x_TK *= 10.0 ** torch.randint(-3, 4, (tokens, 1), generator=random)
    x_TK[0, :5] = torch.tensor([0, -0.0, 1e-30, float(x_TK[0].max()) / 2, -2 * float(x_TK[0].abs().max())])
    scales_N = torch.rand(40, generator=random) * 0.1 + 0.001
    return x_TK.to(dtype), torch.from_numpy(random_weights(40, 300)), scales_N


def int4_operands(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `operands`, with INT4 weights and their multipliers."""
    x_TK, _, scales_N = operands(tokens, dtype)
    return x_TK, *map(torch.from_numpy, random_int4(40, 300, 0.7)), scales_N


def defined(
    x_TK: Tensor, w_NK: Tensor, scales_N: Tensor | None, multiplier_NS: Tensor | None = None
) -> Tensor:
    packed = pack(w_NK, multiplier_NS)
    held = (packed.masks, packed.values, packed.starts, packed.multipliers, scales_N, None)
    return sparse_linear(x_TK, *held, *w_NK.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_linear_of_int8_has_the_bits_of_the_format(library: Path, tokens: int, dtype: torch.dtype) -> None:
    """Rounding, sums and scales, for any number of tokens: as the CPU engine is held against them."""
    x_TK, w_NK, scales_N = operands(tokens, dtype)
    device = Emulated(library, 1, processors=8)
    found = products.product(device, x_TK, pack(w_NK), None, scales_N, 40)
    assert torch.equal(found, defined(x_TK, w_NK, scales_N))
    assert ("expand_i8" in device.launched) == (tokens > products.MOST_SPARSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_linear_of_int4_has_the_bits_of_the_engines(library: Path, tokens: int, dtype: torch.dtype) -> None:
    """Those that its kernel for CPUs computes of the same matrix in a .goss file."""
    x_TK, q_NK, multiplier_NS, scales_N = int4_operands(tokens, dtype)
    device = Emulated(library, 1, processors=8)
    found = products.product(device, x_TK, pack(q_NK, multiplier_NS), None, scales_N, 40)
    assert torch.equal(found, defined(x_TK, q_NK, scales_N, multiplier_NS))
    assert ("expand_i4" in device.launched) == (tokens > products.MOST_SPARSE)
    given = (it.numpy() for it in (q_NK, scales_N, multiplier_NS))
    matrix = make_matrix("i4", "sparse", *given)
    of_engine = _native.matmul("scalar", **matrix.arguments, x_TK=x_TK.float().numpy())
    assert torch.equal(found, torch.from_numpy(of_engine).to(dtype))


@pytest.mark.parametrize("tokens", [1, 65])
def test_int4_that_is_kept_dense_is_int8(library: Path, tokens: int) -> None:
    x_TK, q_NK, multiplier_NS, scales_N = int4_operands(tokens, torch.float32)
    device, packed = Emulated(library), pack(q_NK, multiplier_NS)
    found = products.product(device, x_TK, packed, padded(unpacked(packed)), scales_N, 40)
    assert torch.equal(found, defined(x_TK, q_NK, scales_N, multiplier_NS))
    assert ("sparse_i4_1" in device.launched) == (tokens == 1)


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_linear_of_bfloat16_adds_in_float32(library: Path, tokens: int) -> None:
    x_TK, w_NK, _ = operands(tokens, torch.bfloat16)
    w_NK = (w_NK / 50).bfloat16()
    device = Emulated(library, 1, processors=8)
    found = products.product(device, x_TK, pack(w_NK), None, None, 40).double()
    exact = x_TK.double() @ w_NK.double().T
    magnitude = x_TK.double().abs() @ w_NK.double().abs().T
    assert ((found - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * magnitude).all()
    assert torch.allclose(
        found, defined(x_TK, w_NK, None).double(), rtol=2**-7, atol=1e-5 * float(magnitude.max())
    )
    assert ("expand_bf16" in device.launched) == (tokens > products.MOST_SPARSE)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "both"])
@pytest.mark.parametrize("tokens", [1, 65])
def test_weights_that_are_kept_dense_give_the_same_bits(library: Path, tokens: int, packed: bool) -> None:
    x_TK, w_NK, scales_N = operands(tokens, torch.float32)
    device = Emulated(library)
    held = pack(w_NK) if packed else None
    found = products.product(device, x_TK, held, padded(w_NK), scales_N, 40)
    assert torch.equal(found, defined(x_TK, w_NK, scales_N))
    assert ("sparse_i8_1" in device.launched) == (packed and tokens == 1)
    floats = products.product(device, x_TK.bfloat16(), None, padded(w_NK.bfloat16()), None, 40)
    assert torch.equal(floats, x_TK.bfloat16() @ w_NK.bfloat16().T)


def test_tokens_of_zeros_have_the_scale_of_the_format(library: Path) -> None:
    """And so have those whose numbers are so small that their scale would be 0."""
    _, w_NK, scales_N = operands(2, torch.float32)
    device, x_TK = Emulated(library), torch.zeros(2, 300)
    x_TK[1, 7] = 1e-44
    rounded = torch.full((8, 384), 5, dtype=torch.int8)
    assert products._round(device, x_TK, rounded, 0, 8).tolist() == [2.0**-23] * 2 and not rounded.any()
    assert not products.product(device, x_TK, pack(w_NK), None, scales_N, 40).any()


def test_no_tokens_have_no_outputs(library: Path) -> None:
    _, w_NK, scales_N = operands(1, torch.float32)
    device = Emulated(library)
    assert products.product(device, torch.zeros(0, 300), pack(w_NK), None, scales_N, 40).shape == (0, 40)
    assert not device.launched


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=["i8", "bf16"])
def test_weights_are_expanded_as_they_were(library: Path, dtype: torch.dtype) -> None:
    w_NK = torch.from_numpy(random_weights(40, 700)).to(dtype)
    packed: PackedWeights = pack(w_NK)
    whole = products.expanded(Emulated(library, 2), packed)
    assert torch.equal(whole, padded(w_NK)) and torch.equal(unpacked(packed), w_NK)


def test_int4_is_expanded_to_the_int8_weights_that_it_stands_for(library: Path) -> None:
    """All nibbles by all multipliers among them."""
    nibbles, multipliers = torch.arange(-8, 8, dtype=torch.int8), torch.arange(1, 17, dtype=torch.uint8)
    q_NK, multiplier_NS = nibbles.repeat(40, 20)[:, :300], multipliers.repeat(9)[: 3 * 40].view(40, 3)
    packed = pack(q_NK, multiplier_NS)
    expected = q_NK.int() * multiplier_NS.int().repeat_interleave(128, 1)[:, :300]
    assert expected.min() == -128 and expected.max() == 112
    assert torch.equal(unpacked(packed).int(), expected)
    assert torch.equal(products.expanded(Emulated(library, 2), packed), padded(unpacked(packed)))


@pytest.mark.parametrize(
    ("processors", "panels", "steps", "shares"),
    [
        (132, 1792, 32, 2),
        (132, 256, 32, 8),
        (132, 256, 112, 9),
        (132, 8, 112, 16),
        (132, 64, 3, 1),
        (1, 1, 1, 1),
    ],
)
def test_small_matrices_are_cut_into_shares_that_fill_the_gpu(
    processors: int, panels: int, steps: int, shares: int
) -> None:
    assert products.num_shares(processors, panels, steps) == shares


def test_each_kernel_is_there_once() -> None:
    names = [it.name for it in kernels.all_kernels()]
    assert len(names) == len(set(names)) == 18
