"""A GPU that is not there: its tensors have values, and meet those of the CPU only where a GPU's may.

So code that is meant for GPUs runs on a machine without one, and a tensor that was left behind on the CPU
raises what a GPU would. torch sees tensors on "meta"; every operation comes here, and is done on the CPU.
"""

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

DEVICE = torch.device("cuda", 0)
ATEN = torch.ops.aten
TAKES_BOTH = (ATEN._to_copy.default, ATEN.copy_.default, ATEN.index.Tensor)  # copies, and indices


class Elsewhere(Tensor):
    """A tensor that says it is on the device; `values` has what is in it."""

    values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls, values: Tensor) -> "Elsewhere":
        empty = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device="meta")
        made = Tensor._make_subclass(cls, empty)
        made.values = values  # pyright: ignore[reportAttributeAccessIssue]
        _count(values.untyped_storage())
        return made

    def __init__(self, values: Tensor) -> None: ...

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return DEVICE

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, Elsewhere):
            raise RuntimeError("the data of a tensor elsewhere was set to one of the CPU")
        self.values = value.values

    def tolist(self) -> Any:
        return self.values.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_held: dict[int, int] = {}
_most = [0]


def _count(storage: torch.UntypedStorage) -> None:
    """Add a storage that the device has not had yet; it is taken off when the last tensor of it has gone."""
    key, num_bytes = storage._cdata, storage.nbytes()
    if key not in _held:
        _held[key] = num_bytes
        weakref.finalize(storage, _held.pop, key, None)
        _most[0] = max(_most[0], sum(_held.values()))


@contextlib.contextmanager
def most_bytes() -> Iterator[Callable[[], int]]:
    """What says the most bytes that the device held at a time in the block, beside those from before."""
    gc.collect()
    _most[0] = before = sum(_held.values())
    yield lambda: _most[0] - before


class _Everything(TorchDispatchMode):
    """Also of operations that take no tensor, such as `torch.zeros`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _FromNumbers(TorchFunctionMode):
    """`torch.tensor` of numbers, which are made on the CPU, and moved where no dispatch mode sees it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None) if func is torch.tensor else None
        found = func(*args, **kwargs)
        return found if device is None else found.to(device)


ANSWERS: dict[str, Any] = {
    "_lazy_init": None,
    "is_available": True,
    "device_count": 1,
    "current_device": 0,
    "set_device": None,
    "mem_get_info": (10**9, 10**9),
    "get_device_name": "made up",
    "is_bf16_supported": False,
    "synchronize": None,
    "empty_cache": None,
    "set_rng_state": None,
}


@contextlib.contextmanager
def another_device() -> Iterator[str]:
    """The device's name, with an index, which torch needs here; for the time of the block there is a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        for name, answer in ANSWERS.items():
            patch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
        for module in (torch.cuda, torch.cuda.random):
            patch.setattr(module, "get_rng_state", lambda *_: torch.zeros(1, dtype=torch.uint8))
        patch.setattr(PartialState, "default_device", property(lambda self: DEVICE))
        AcceleratorState._reset_state(True)
        try:
            with _Everything(), _FromNumbers():
                yield str(DEVICE)
        finally:
            AcceleratorState._reset_state(True)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given, structure = tree_flatten((args, kwargs))
    tensors = [it for it in given if isinstance(it, Tensor)]
    ours = [it for it in tensors if isinstance(it, Elsewhere)]
    if ours and func not in TAKES_BOTH and any(it.ndim for it in tensors if not isinstance(it, Elsewhere)):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found cpu and {DEVICE}")
    if func is ATEN.copy_.default:
        stays = isinstance(args[0], Elsewhere)
    else:
        stays = bool(ours) if kwargs.get("device") is None else _is_ours(kwargs["device"])
    args, kwargs = tree_unflatten([_plain(it) for it in given], structure)
    same = {id(it.values): it for it in ours}

    def returned(it: Any) -> Any:
        if not isinstance(it, Tensor) or id(it) in same:
            return same.get(id(it), it)
        return Elsewhere(it) if stays else it

    return tree_map(returned, func(*args, **kwargs))


def _plain(it: Any) -> Any:
    if isinstance(it, Elsewhere):
        return it.values
    return torch.device("cpu") if isinstance(it, torch.device) and _is_ours(it) else it


def _is_ours(device: torch.device) -> bool:
    """Also "meta", where torch itself made something beside one of our tensors, and no one asked for meta."""
    asked = (isinstance(mode, DeviceContext) for mode in torch.overrides._get_current_function_mode_stack())
    return device.type == DEVICE.type or (device.type == "meta" and not any(asked))
