"""INT8 arithmetic against compressed-tensors, GPTQ against rounding to nearest, smoothing scales."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gossamer.compress.gptq import gptq, hessian, reconstruction_error
from gossamer.compress.hessian import inverse_factor
from gossamer.compress.int8 import fake_quantize_tokens, quantize_tokens, quantize_weights, row_scales
from gossamer.compress.magnitude import magnitude
from gossamer.compress.smooth import divide_norm, share_over_query_heads, smoothing_scales, value_rows


def correlated(seed: int, tokens: int, inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)


def test_activations_round_as_in_compressed_tensors() -> None:
    x_BTK = correlated(0, 64, 40).view(2, 32, 40) * torch.logspace(-20, 10, 32)[:, None]
    x_BTK[0, 3] = 0
    x_BTK[1, 5], x_BTK[1, 5, 7] = 0, -1e-45
    settings = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    arguments = QuantizationArgs.model_validate(settings)
    scale, zero_point = compute_dynamic_scales_and_zp(x_BTK, arguments, nn.Linear(1, 1))
    expected = fake_quantize(x_BTK, scale, zero_point, arguments)
    q, ours = quantize_tokens(x_BTK)
    assert torch.equal(ours, scale) and torch.equal(fake_quantize_tokens(x_BTK), expected)
    assert q.min() == -128 and q.max() == 127


def test_row_scales_clamp_nothing_and_survive_a_cast() -> None:
    w_NK = correlated(1, 30, 50)
    w_NK[4], w_NK[5] = 0, w_NK[5] * 1e-4
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scale_N1 = row_scales(w_NK, dtype)
        assert torch.equal(scale_N1.to(dtype).float(), scale_N1) and (scale_N1 > 0).all()
        assert (w_NK - quantize_weights(w_NK, scale_N1) * scale_N1).abs().div(scale_N1).max() <= 1.0
    assert (w_NK / row_scales(w_NK)).abs().max() <= 127.0001


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 24),
    inputs=st.integers(2, 64),
    sparsity=st.floats(0, 0.9),
    block_size=st.sampled_from([1, 16, 128]),
)
def test_gptq_keeps_zeros_and_is_not_far_from_nearest_at_worst(
    seed: int, rows: int, inputs: int, sparsity: float, block_size: int
) -> None:
    H_KK = hessian([correlated(seed, 300, inputs)])
    w_NK = magnitude(correlated(seed + 1, rows, inputs), sparsity)
    scale_N1 = row_scales(w_NK) * 16  # coarse: 4 bits, so that rounding matters
    factor = inverse_factor(H_KK, 0.01)
    q_NK = gptq(w_NK, scale_N1, factor, block_size=block_size)
    nearest_NK = quantize_weights(w_NK, scale_N1) * scale_N1
    assert q_NK.dtype == torch.int8 and (q_NK[w_NK == 0] == 0).all()
    ours = reconstruction_error(w_NK, q_NK * scale_N1, H_KK)
    assert ours <= 1.5 * reconstruction_error(w_NK, nearest_NK, H_KK) + 1e-9


@pytest.mark.parametrize(("sparsity", "bound"), [(0.0, 0.6), (0.5, 0.95), (0.7, 1.0)])
def test_gptq_beats_nearest_on_correlated_inputs(sparsity: float, bound: float) -> None:
    """Mean over seeds of its error over rounding's: of few kept weights, few can make up for an error."""
    ratios = []
    for seed in range(6):
        H_KK = hessian([correlated(seed, 600, 64)])
        w_NK = magnitude(correlated(seed + 99, 24, 64), sparsity)
        scale_N1 = row_scales(w_NK)
        ours = gptq(w_NK, scale_N1, inverse_factor(H_KK)) * scale_N1
        nearest = quantize_weights(w_NK, scale_N1) * scale_N1
        ratios.append(reconstruction_error(w_NK, ours, H_KK) / reconstruction_error(w_NK, nearest, H_KK))
    assert sum(ratios) / len(ratios) < bound


def test_smoothing_scales_follow_the_formula_and_skip_what_is_never_active() -> None:
    x_amax_K, w_amax_K = torch.tensor([16.0, 1.0, 0.0, 4.0]), torch.tensor([1.0, 4.0, 1.0, 0.0])
    expected = torch.tensor([16**0.5, 0.5, 1.0, 1.0])
    torch.testing.assert_close(smoothing_scales(x_amax_K, w_amax_K, 0.5), expected)


def test_norm_and_columns_cancel_to_the_stored_precision() -> None:
    norm_K, scale_K = torch.randn(64), torch.rand(64) * 50 + 0.01
    norm_K[3] = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        divided_K, effective_K = divide_norm(norm_K.to(dtype).float(), scale_K, dtype)
        assert torch.equal(divided_K.to(dtype).float(), divided_K)
        torch.testing.assert_close(divided_K * effective_K, norm_K.to(dtype).float(), rtol=1e-6, atol=0)


def test_query_heads_of_one_key_head_share_their_scales() -> None:
    amax_K = torch.tensor([1.0, 8.0, 5.0, 2.0, 3.0, 1.0, 1.0, 9.0])  # 4 query heads of width 2 on 2 key heads
    shared_K = share_over_query_heads(amax_K, 2, 2)
    assert shared_K.tolist() == [5, 8, 5, 8, 3, 9, 3, 9]
    assert value_rows(shared_K, 2, 2).tolist() == [5, 8, 3, 9]
