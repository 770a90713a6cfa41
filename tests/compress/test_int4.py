"""INT4 on group scales, and FP8: GPTQ against rounding to nearest, zeros, what number types hold."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor, nn

from gossamer.checkpoint import schemes
from gossamer.compress import fp8, int4
from gossamer.compress.gptq import hessian, reconstruction_error
from gossamer.compress.hessian import inverse_factor
from gossamer.compress.magnitude import magnitude
from gossamer.packed import panels

WIDTHS = (48, 128, 200, 256)


def correlated(seed: int, tokens: int, inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)


def dequantized(q_NK: Tensor, unit_N1: Tensor, multiplier_NG: Tensor) -> Tensor:
    scale_NG = unit_N1 * multiplier_NG
    return q_NK * scale_NG.repeat_interleave(int4.GROUP_INPUTS, 1)[:, : q_NK.shape[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_group_scales_are_numbers_of_the_type_and_clamp_nothing(dtype: torch.dtype) -> None:
    w_NK = correlated(1, 40, 50) * torch.logspace(-6, 3, 40)[:, None]
    w_NK[4] = 0
    unit_N1 = int4.unit_scales(w_NK, dtype)
    products_NM = unit_N1 * torch.arange(1, 17)
    assert torch.equal(products_NM.to(dtype).float(), products_NM) and (unit_N1 > 0).all()
    assert (w_NK.abs() <= 7 * 16 * unit_N1).all()
    large = w_NK.abs().amax(1) > 1e-3
    assert (w_NK.abs().amax(1)[large] > 0.88 * 7 * 16 * unit_N1[large, 0]).all()  # and waste little


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7])
@pytest.mark.parametrize("inputs", WIDTHS)
def test_gptq_in_groups_keeps_zeros_and_beats_nearest(inputs: int, sparsity: float) -> None:
    ratios = []
    for seed in range(4):
        H_KK = hessian([correlated(seed, 1000, inputs)])
        w_NK = magnitude(correlated(seed + 99, 24, inputs), sparsity)
        unit_N1 = int4.unit_scales(w_NK)
        q_NK, multiplier_NG = int4.gptq_in_groups(w_NK, unit_N1, inverse_factor(H_KK))
        assert q_NK.dtype == torch.int8 and q_NK.abs().max() <= 7 and (q_NK[w_NK == 0] == 0).all()
        assert ((multiplier_NG >= 1) & (multiplier_NG <= 16) & (multiplier_NG % 1 == 0)).all()
        found = reconstruction_error(w_NK, dequantized(q_NK, unit_N1, multiplier_NG), H_KK)
        ratios.append(found / reconstruction_error(w_NK, int4.nearest(w_NK), H_KK))
    assert sum(ratios) / len(ratios) < {0.0: 0.5, 0.5: 0.8, 0.7: 0.9}[sparsity], ratios


def test_nearest_is_the_grid_of_each_group() -> None:
    """Against rounding each group by itself, in a few lines."""
    w_NK = correlated(3, 20, 200)
    unit_N1, found_NK = int4.unit_scales(w_NK), int4.nearest(w_NK)
    for start in (0, 128):
        group_NB = w_NK[:, start : start + 128]
        scale_N1 = unit_N1 * (group_NB.abs().amax(1, keepdim=True) / (7 * unit_N1)).ceil()
        expected = (group_NB / scale_N1).round() * scale_N1
        torch.testing.assert_close(found_NK[:, start : start + 128], expected)


def test_the_rooms_agree_on_groups() -> None:
    assert int4.GROUP_INPUTS == schemes.GROUP_INPUTS == panels.MULTIPLIER_INPUTS
    assert int4.MAX_MULTIPLIER == schemes.MAX_MULTIPLIER == panels.MAX_MULTIPLIER


def test_fp8_activations_and_weights_round_as_in_compressed_tensors() -> None:
    x_BTK = correlated(0, 64, 40).view(2, 32, 40) * torch.logspace(-20, 10, 32)[:, None]
    x_BTK[0, 3] = 0
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    inputs = QuantizationArgs.model_validate({**common, "strategy": "token", "dynamic": True})
    scale, zero_point = compute_dynamic_scales_and_zp(x_BTK, inputs, nn.Linear(1, 1))
    assert torch.equal(fp8.fake_quantize_tokens(x_BTK), fake_quantize(x_BTK, scale, zero_point, inputs))
    weights = QuantizationArgs.model_validate({**common, "strategy": "channel", "dynamic": False})
    w_NK = correlated(7, 30, 50)
    scale_N1 = fp8.row_scales(w_NK)
    expected = fake_quantize(w_NK, scale_N1, torch.zeros_like(scale_N1), weights)
    assert torch.equal(fp8.nearest(w_NK), expected)
    for dtype in (torch.bfloat16, torch.float16):
        rounded_N1 = fp8.row_scales(w_NK, dtype)
        assert torch.equal(rounded_N1.to(dtype).float(), rounded_N1)
