"""What pruned weights aim at, against NumPy's least squares on the tokens themselves."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gossamer.compress.hessian import inverse_factor, moments
from gossamer.compress.target import Evidence, added_to_hidden, read_by_others, target, token_error

DAMPENING = 0.01


def tokens(seed: int, *widths: int) -> list[Tensor]:
    """One tensor [6 rows, 50 tokens, width] for each width, float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 50, width, generator=generator, dtype=torch.float64) for width in widths]


def least_squares(w_NK: Tensor, x_TK: Tensor, wanted_TN: Tensor, H_KK: Tensor) -> np.ndarray:
    """argmin over V of mean |V x - wanted|^2 + l |V - W|^2, by lstsq on the stacked problem."""
    num_inputs = w_NK.shape[1]
    weight = np.sqrt(DAMPENING * H_KK.diagonal().mean().item() * len(x_TK) / 2)
    rows = np.concatenate([x_TK.numpy(), weight * np.eye(num_inputs)])
    outputs = np.concatenate([wanted_TN.numpy(), weight * w_NK.T.numpy()])
    return np.linalg.lstsq(rows, outputs, rcond=None)[0].T


def in_float64(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """H and P as `moments` says, without its rounding to float32."""
    x_TK, y_TM = (torch.cat([pair[i].flatten(0, 1) for pair in pairs]) for i in (0, 1))
    return 2 / len(x_TK) * x_TK.T @ x_TK, 2 / len(x_TK) * y_TM.T @ x_TK


def test_moments_of_batches_are_those_of_all_tokens() -> None:
    x_TK, y_TM = torch.randn(50, 300), torch.randn(50, 70)
    H_KK, P_MK = moments([(x_TK[:20], y_TM[:20]), (x_TK[20:], y_TM[20:])])
    torch.testing.assert_close(P_MK, 2 / 50 * y_TM.T @ x_TK, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(H_KK, 2 / 50 * x_TK.T @ x_TK, rtol=1e-4, atol=1e-5)
    assert torch.equal(H_KK, H_KK.T)


def test_a_linear_that_others_read_aims_at_its_outputs_in_the_parent() -> None:
    x, noise = tokens(0, 12, 12)
    other, w_NK = x + 0.3 * noise, torch.randn(4, 12, dtype=torch.float64)
    seen = read_by_others([(x[:2], other[:2]), (x[2:], other[2:])])
    factor = inverse_factor(seen.h_KK.double(), DAMPENING)
    expected = least_squares(w_NK, x.flatten(0, 1), (other @ w_NK.T).flatten(0, 1), seen.h_KK)
    found = target(w_NK.float(), inverse_factor(seen.h_KK, DAMPENING), seen, seen)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-4)
    same = Evidence(seen.h_KK.double(), torch.zeros_like(seen.p_NK, dtype=torch.float64), shared=True)
    assert torch.equal(target(w_NK, factor, same, same), w_NK)


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_that_is_added_to_hidden_states_makes_up_for_what_they_lack(bias: bool) -> None:
    """Each token is divided by the norm of the parent's hidden state; one is 1,000 times as large."""
    x, noise, h, lost = tokens(1, 12, 12, 5, 5)
    other, parent = x + 0.3 * noise, h + 0.2 * lost
    linear = nn.Linear(12, 5, bias).double().requires_grad_(False)
    w_NK = linear.weight
    for states in (x, other, h, parent):
        states[:, 0] *= 1000
    parent = parent + linear(other)
    bias_N = linear.bias if bias else torch.zeros(5)
    seen = added_to_hidden(linear.float(), [x[:2], x[2:]], [(h[:2], parent[:2]), (h[2:], parent[2:])])
    scale = 1 / parent.norm(dim=-1, keepdim=True)
    wanted = (parent - h - bias_N) * scale
    expected = least_squares(w_NK, (x * scale).flatten(0, 1), wanted.flatten(0, 1), seen.h_KK)
    found = target(w_NK.float(), inverse_factor(seen.h_KK, DAMPENING), seen, seen)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("noise", [0.0, 0.5, 3.0])
def test_goes_as_far_as_is_best_on_rows_that_were_held_out(noise: float) -> None:
    """The held-out error along W..W + M, found by trying steps, is least at the target."""
    x, y, other_x, other_y = tokens(2, 8, 3, 8, 3)
    rule = torch.randn(3, 8, dtype=torch.float64)
    y, other_y = x @ rule.T + noise * y, other_x @ rule.T * 0.7 + noise * other_y
    w_NK = torch.randn(3, 8, dtype=torch.float64)
    seen = Evidence(*in_float64([(x, y)]), shared=False)
    unseen = Evidence(*in_float64([(other_x, other_y)]), shared=False)
    factor = inverse_factor(seen.h_KK, DAMPENING)
    full_NK = target(w_NK, factor, seen, seen)
    steps = np.linspace(0, 1, 1001)
    tried = [float((other_y - other_x @ ((full_NK - w_NK) * s).T).square().mean()) for s in steps]
    found = target(w_NK, factor, seen, unseen)
    torch.testing.assert_close(found, w_NK + (full_NK - w_NK) * steps[np.argmin(tried)], rtol=0, atol=2e-3)
    against = Evidence(unseen.h_KK, -unseen.p_NK, shared=False)
    assert torch.equal(target(w_NK, factor, seen, against), w_NK)


def test_token_error_sees_tokens_beside_a_sink() -> None:
    parent = torch.ones(1, 10, 4)
    parent[:, 0] *= 1e6
    ours = parent.clone()
    ours[:, 1:] = 0
    assert token_error(ours, parent).item() == pytest.approx(0.9)
