"""The operator by its definition: the bits of the format, and what torch asks of an operator."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gossamer.errors import UnsupportedError
from gossamer.gpu.linear import SparseLinear
from gossamer.gpu.packing import pack, unpacked
from gpu.emulated import int8_weights, random_int4
from gpu.test_layout import random_weights
from native.reference import rounded


def linear_of(rows: int, columns: int, *, bias: bool = False) -> tuple[SparseLinear, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    w_NK, scales_N = random_weights(rows, columns), rng.uniform(0.001, 0.1, rows).astype(np.float32)
    bias_N = torch.arange(rows, dtype=torch.float32) if bias else None
    return (
        SparseLinear.from_weight(torch.from_numpy(w_NK), torch.from_numpy(scales_N), bias_N),
        w_NK,
        scales_N,
    )


def held(linear: SparseLinear) -> tuple[Tensor | None, ...]:
    """What the operator is given of it."""
    return linear.masks, linear.values, linear.starts, linear.multipliers, linear.scales, linear.dense


@pytest.mark.parametrize("shape", [(16, 128), (40, 300), (1, 1)], ids=str)
def test_weights_are_unpacked_as_they_were(shape: tuple[int, int]) -> None:
    w_NK = torch.from_numpy(random_weights(*shape))
    assert torch.equal(unpacked(pack(w_NK)), w_NK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_have_the_bits_of_the_format(dtype: torch.dtype) -> None:
    linear, w_NK, scales_N = linear_of(40, 300)
    x = (torch.randn(2, 5, 300, generator=torch.Generator().manual_seed(1)) * 30).to(dtype)
    q_TK, scale_T1 = rounded(x.float().numpy().reshape(10, 300))
    sums_TN = (q_TK.astype(np.float64) @ w_NK.T.astype(np.float64)).astype(np.float32)
    expected = torch.from_numpy(sums_TN * (scale_T1 * scales_N)).to(dtype)
    assert torch.equal(linear(x), expected.view(2, 5, 40))


@pytest.mark.parametrize("zeros", [0.0, 0.7])
@pytest.mark.parametrize("keep_dense", [False, True])
def test_int4_has_the_bits_of_the_int8_weights_that_it_stands_for(zeros: float, keep_dense: bool) -> None:
    """And is packed whatever its zeros: 5.1 bits a weight without any."""
    q_NK, multiplier_NS = random_int4(40, 300, zeros)
    scales_N, x = torch.rand(40, generator=torch.Generator().manual_seed(1)), torch.randn(2, 5, 300)
    linear = SparseLinear.from_weight(
        torch.from_numpy(q_NK), scales_N, multiplier_NS=torch.from_numpy(multiplier_NS), keep_dense=keep_dense
    )
    packed_bytes = pack(torch.from_numpy(q_NK), torch.from_numpy(multiplier_NS)).num_bytes
    assert not linear.is_dense and linear.num_bytes == packed_bytes + keep_dense * 48 * 384
    of_int8 = SparseLinear.from_weight(torch.from_numpy(int8_weights(q_NK, multiplier_NS)), scales_N)
    assert torch.equal(linear(x), of_int8(x)) and torch.equal(linear(x.bfloat16()), of_int8(x.bfloat16()))
    checks = ("test_schema", "test_faketensor")
    given = (x, *held(linear), 40, 300)
    torch.library.opcheck(torch.ops.gossamer.sparse_linear.default, given, test_utils=checks)


@pytest.mark.parametrize(
    ("weight", "multiplier", "groups", "says"),
    [
        (8, 1, 2, "INT4 weights from 0 to 8; supported: -8 to 7"),
        (7, 17, 2, "multipliers from 17 to 17; supported: 1 to 16"),
        (7, 0, 2, "multipliers from 0 to 0"),
        (7, 1, 1, r"multipliers \(16, 1\) of torch.uint8; supported: uint8 \(16, 2\), one for each 128"),
    ],
    ids=str,
)
def test_int4_that_is_none_is_refused(weight: int, multiplier: int, groups: int, says: str) -> None:
    q_NK = torch.zeros(16, 130, dtype=torch.int8)
    q_NK[3, 4] = weight
    multiplier_NS = torch.full((16, groups), multiplier, dtype=torch.uint8)
    with pytest.raises(UnsupportedError, match=says):
        SparseLinear.from_weight(q_NK, torch.ones(16), multiplier_NS=multiplier_NS)


def test_int4_without_scales_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"weights of torch.int8 without scales; supported: int8 with"):
        SparseLinear.from_weight(
            torch.ones(16, 4, dtype=torch.int8), multiplier_NS=torch.ones(16, 1, dtype=torch.uint8)
        )


def test_zeros_and_biases() -> None:
    linear, _, _ = linear_of(40, 300, bias=True)
    assert torch.equal(linear(torch.zeros(3, 300)), torch.arange(40.0).expand(3, 40))
    assert linear(torch.zeros(0, 300)).shape == (0, 40)


@pytest.mark.parametrize("tokens", [1, 9])
def test_torch_finds_nothing_wrong_with_the_operator(tokens: int) -> None:
    """Its schema, its fake form for `torch.compile`, and that it changes nothing that it is given."""
    linear, _, _ = linear_of(40, 300)
    given = (torch.randn(tokens, 300), *held(linear), 40, 300)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    found = torch.library.opcheck(torch.ops.gossamer.sparse_linear.default, given, test_utils=checks)
    assert set(found.values()) == {"SUCCESS"}


def test_it_is_saved_and_loaded_as_other_modules_are(tmp_path: Path) -> None:
    linear, w_NK, _ = linear_of(40, 300, bias=True)
    torch.save(linear.state_dict(), tmp_path / "state.pt")
    other = SparseLinear.from_weight(torch.from_numpy(-w_NK), torch.ones(40), torch.zeros(40))
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    x = torch.randn(3, 300)
    assert torch.equal(other(x), linear(x))


@pytest.mark.parametrize("keep_dense", [False, True])
def test_a_model_that_is_converted_keeps_its_weights(keep_dense: bool) -> None:
    """Their scales are float32, as the kernels read them; what is around them becomes what was asked."""
    w_NK, scales_N = torch.from_numpy(random_weights(40, 300)), torch.rand(40) + 0.1
    linear = SparseLinear.from_weight(w_NK, scales_N, torch.rand(40), keep_dense=keep_dense)
    model, x = nn.Sequential(nn.LayerNorm(300), linear), torch.randn(3, 300).bfloat16()
    expected, before = linear(x), {name: it.clone() for name, it in linear.state_dict().items()}
    for convert in (nn.Module.bfloat16, nn.Module.float, nn.Module.double, nn.Module.half):
        convert(model)
        assert all(torch.equal(it, before[name]) for name, it in linear.state_dict().items())
    model.to(torch.bfloat16)
    assert linear.scales is not None and linear.scales.dtype == torch.float32
    assert torch.equal(linear(x), expected) and model(x).dtype == torch.bfloat16
    with pytest.raises(UnsupportedError, match=r"to become torch.float16; supported: other devices"):
        linear.type(torch.float16)


def test_it_moves_and_refuses_inputs_from_elsewhere() -> None:
    linear, _, _ = linear_of(40, 300, bias=True)
    x = torch.zeros(2, 300)
    with pytest.raises(UnsupportedError, match="inputs on meta; supported: cpu, as the weights"):
        linear(x.to("meta"))
    assert {it.device.type for it in linear.to("meta").state_dict().values()} == {"meta"}
    assert linear.out_features == 40 and linear(x.to("meta")).shape == (2, 40)


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.zeros(2, 300, dtype=torch.float16), "inputs of torch.float16; supported: bfloat16"),
        (torch.zeros(2, 299), "found 299 inputs; supported: 300"),
    ],
    ids=["float16", "299 inputs"],
)
def test_inputs_that_do_not_fit_are_refused(x: torch.Tensor, says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        linear_of(40, 300)[0](x)


def test_scales_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="one for each of 16 outputs"):
        SparseLinear.from_weight(torch.zeros(16, 4, dtype=torch.int8), torch.ones(4))


@pytest.mark.parametrize(
    ("weights", "scales", "says"),
    [
        (torch.float32, None, "weights of torch.float32 without scales; supported: int8 with"),
        (torch.int8, None, "weights of torch.int8 without scales"),
        (torch.bfloat16, torch.ones(16), "weights of torch.bfloat16 with scales"),
    ],
    ids=["float32", "int8 alone", "bfloat16 with scales"],
)
def test_weights_that_do_not_fit_are_refused(
    weights: torch.dtype, scales: torch.Tensor | None, says: str
) -> None:
    with pytest.raises(UnsupportedError, match=says):
        SparseLinear.from_weight(torch.zeros(16, 4, dtype=weights), scales)


def test_bfloat16_is_added_in_float32() -> None:
    w_NK = (torch.from_numpy(random_weights(40, 300)) / 50).bfloat16()
    linear = SparseLinear.from_weight(w_NK)
    x = torch.randn(2, 5, 300, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(linear(x), (x.float() @ w_NK.float().T).bfloat16())
    with pytest.raises(UnsupportedError, match=r"inputs of torch.float32; supported: bfloat16$"):
        linear(x.float())


@pytest.mark.parametrize(("zeros", "keep", "is_dense"), [(0.3, False, True), (0.7, True, False)])
def test_too_few_zeros_stay_dense_and_others_where_it_is_asked(
    zeros: float, keep: bool, is_dense: bool
) -> None:
    w_NK = torch.from_numpy(random_weights(48, 384, zeros=zeros))
    linear = SparseLinear.from_weight(w_NK, torch.ones(48), keep_dense=keep)
    assert linear.is_dense == is_dense and f"dense={is_dense}" in repr(linear)
    assert linear.dense is not None and torch.equal(linear.dense, w_NK)
    packed_bytes = 0 if is_dense else pack(w_NK).num_bytes
    assert linear.num_bytes == w_NK.numel() + packed_bytes
    x = torch.randn(3, 384)
    assert torch.equal(linear(x), SparseLinear(pack(w_NK), None, (48, 384), torch.ones(48))(x))
