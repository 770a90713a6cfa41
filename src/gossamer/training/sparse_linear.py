"""Linear layers that store, train and multiply only their nonzero weights.

    y = x W^T + b,   dx = dy W,   dW = dy^T x at the nonzero weights;   W [N, K], x [T, K], y [T, N], b [N]

The parameter `values` holds the nonzero weights in the order of the native plan, so that its gradient and its
moments are as short as it is. On the CPU in float32 the products are native (`_native.SparsePlan`). On other
devices, and in other types, torch multiplies W written out as a dense matrix, and autograd gathers the
gradient of `values` from that of W. Whatever saves or loads the layer sees the `weight` [N, K] of an
`nn.Linear`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from gossamer import _native
from gossamer.errors import CheckpointError


class Pattern:
    """Where a matrix [N, K] has nonzero weights. It never changes, so copies of a layer share it."""

    def __init__(self, mask_NK: Tensor) -> None:
        self.shape = (mask_NK.shape[0], mask_NK.shape[1])
        self.plan = _native.SparsePlan(mask_NK.cpu().contiguous().numpy())
        self._positions: dict[torch.device, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Pattern":
        return self

    def positions(self) -> Tensor:
        """int64 [num_values] on the CPU: n * K + k of each value."""
        return torch.from_numpy(self.plan.positions())

    def positions_on(self, device: torch.device) -> Tensor:
        """`positions` on `device`, where torch's products need them; copied once."""
        if device not in self._positions:
            self._positions[device] = self.positions().to(device)
        return self._positions[device]

    def mask_NK(self) -> Tensor:
        """bool [N, K] on the CPU, true where the weight is nonzero."""
        mask = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.bool)
        return mask.index_fill_(0, self.positions(), True).view(self.shape)


class SparseLinear(nn.Module):
    """Takes the place of an `nn.Linear`. The zeros that its weight has now are its mask from here on."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = dense.out_features, dense.in_features
        weight_NK = dense.weight.detach()
        self.pattern = Pattern(weight_NK != 0)
        values = weight_NK.reshape(-1)[self.pattern.positions().to(weight_NK.device)]
        self.values = nn.Parameter(values, requires_grad=dense.weight.requires_grad)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", dense.bias)

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] of x [..., K]; under autocast y has autocast's type, as that of `nn.Linear` has."""
        device = self.values.device.type
        autocast = torch.is_autocast_enabled(device)
        if not _is_native(self.values) or (x.dtype != torch.float32 and not autocast):
            return linear(x, self._scattered(self.pattern.positions_on(self.values.device)), self.bias)
        y: Any = _Product.apply(x, self.values, self.pattern.plan)
        y = y if self.bias is None else y + self.bias
        return y.to(torch.get_autocast_dtype(device)) if autocast else y

    def dense_weight(self) -> Tensor:
        """The matrix [N, K] with its zeros, detached from autograd."""
        return self._scattered(self.pattern.positions().to(self.values.device)).detach()

    def to_linear(self) -> nn.Linear:
        """An `nn.Linear` with the same weight and bias."""
        with torch.device("meta"):
            dense = nn.Linear(self.in_features, self.out_features, bias=False)
        dense.register_parameter("bias", self.bias)
        dense.weight = nn.Parameter(self.dense_weight(), requires_grad=self.values.requires_grad)
        return dense

    def extra_repr(self) -> str:
        live = self.values.numel() / (self.out_features * self.in_features)
        return f"in_features={self.in_features}, out_features={self.out_features}, sparsity={1 - live:.3f}"

    def _scattered(self, positions: Tensor) -> Tensor:
        N, K = self.pattern.shape
        return self.values.new_zeros(N * K).index_copy(0, positions, self.values).view(N, K)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.dense_weight()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        loads = {"weight": self._load_weight} | ({} if self.bias is None else {"bias": self._load_bias})
        for own_name, load in loads.items():
            name = prefix + own_name
            if name in state_dict:
                load(name, state_dict[name])
            elif strict:
                missing_keys.append(name)

    @torch.no_grad()
    def _load_bias(self, name: str, bias_N: Tensor) -> None:
        assert self.bias is not None
        if bias_N.shape != self.bias.shape:
            raise CheckpointError(
                f"{name} has shape {list(bias_N.shape)}; the model in training has {list(self.bias.shape)}: "
                "give the checkpoint of this model"
            )
        self.bias.copy_(bias_N)

    @torch.no_grad()
    def _load_weight(self, name: str, weight_NK: Tensor) -> None:
        """Take the values of a dense weight; raises CheckpointError unless it is zero where it is pruned."""
        if tuple(weight_NK.shape) != self.pattern.shape:
            raise CheckpointError(
                f"{name} has shape {list(weight_NK.shape)}; the mask of the model in training has "
                f"{list(self.pattern.shape)}: give the checkpoint of this model"
            )
        values = weight_NK.reshape(-1)[self.pattern.positions().to(weight_NK.device)]
        stray = int(torch.count_nonzero(weight_NK)) - int(torch.count_nonzero(values))
        if stray:
            raise CheckpointError(
                f"{name} has {stray} nonzero weights where the mask of the model in training has zeros "
                f"({torch.count_nonzero(weight_NK)} nonzero in all, the mask lets {len(values)} live): give "
                "the checkpoint of a run from this model"
            )
        self.values.copy_(values)


class _Product(torch.autograd.Function):
    """The native products over rows of tokens, computed in float32 whatever the type of the input is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, plan: _native.SparsePlan) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.plan = plan
        x_TK = _rows(x)
        y_TN = x_TK.new_empty(len(x_TK), plan.rows)
        plan.forward(values.detach().numpy(), x_TK.numpy(), y_TN.numpy(), torch.get_num_threads())
        return y_TN.view(*x.shape[:-1], plan.rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, values = ctx.saved_tensors
        dy_TN, num_threads = _rows(dy), torch.get_num_threads()
        dx = dvalues = None
        if ctx.needs_input_grad[0]:
            dx_TK = dy_TN.new_empty(len(dy_TN), ctx.plan.columns)
            ctx.plan.backward_input(values.detach().numpy(), dy_TN.numpy(), dx_TK.numpy(), num_threads)
            dx = dx_TK.view(x.shape).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dvalues = torch.empty_like(values)
            ctx.plan.backward_values(_rows(x).numpy(), dy_TN.numpy(), dvalues.numpy(), num_threads)
        return dx, dvalues, None


def _is_native(values: Tensor) -> bool:
    return values.device.type == "cpu" and values.dtype == torch.float32


def _rows(tensor: Tensor) -> Tensor:
    """The tensor as contiguous float32 [T, width]."""
    return tensor.detach().reshape(-1, tensor.shape[-1]).float().contiguous()


def sparsify(model: nn.Module, names: Iterable[str]) -> None:
    """Replace each named `nn.Linear` of the model by a SparseLinear.

    Do this before an optimizer is made: it replaces parameters.
    """
    for name in list(names):
        dense = model.get_submodule(name)
        assert isinstance(dense, nn.Linear), name
        model.set_submodule(name, SparseLinear(dense))


def densify(model: nn.Module) -> None:
    """Undo `sparsify`: replace every SparseLinear by an `nn.Linear` with the same weight, zeros included.

    Layers are replaced one by one and released at once, so that memory holds one layer twice, never all.
    """
    for name in [name for name, module in model.named_modules() if isinstance(module, SparseLinear)]:
        sparse: Any = model.get_submodule(name)
        model.set_submodule(name, sparse.to_linear())
        del sparse
