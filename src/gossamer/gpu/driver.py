"""A GPU as what launches kernels: CUDA's driver through ctypes, on torch's stream, in torch's context.

So a launch is one call, which CUDA graphs capture as they do torch's own.
"""

import ctypes
import functools

import torch

from gossamer import cuda
from gossamer.errors import EngineError, UnsupportedError
from gossamer.gpu import compiler
from gossamer.gpu.kernels import Job, Kernel, all_kernels

_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Module:
    """Machine code of all kernels, which CUDA's driver has loaded into a device's context, that of torch."""

    def __init__(self, driver: ctypes.CDLL, code: bytes, index: int = 0) -> None:
        """EngineError where the driver refuses the code; `index` is the device's number."""
        self._driver, self._device, self._context = driver, ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(self._device), index)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self._enter()
        module = ctypes.c_void_p()
        try:
            self._call("cuModuleLoadData", ctypes.byref(module), code)
        except EngineError as error:
            raise EngineError(f"{error}; {_versions(driver)}") from error
        self._functions = {it.name: self._function(module, it) for it in all_kernels()}

    def launch(self, kernel: Kernel, blocks: int, job: Job, stream: int) -> None:
        """In that context, from any thread; EngineError where the driver refuses it."""
        self._enter()
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(job))
        shape = (blocks, 1, 1, kernel.threads, 1, 1, kernel.shared_bytes)
        function = self._functions[kernel.name]
        self._call("cuLaunchKernel", function, *shape, ctypes.c_void_p(stream), arguments, None)

    def _enter(self) -> None:
        """A thread that has not used the device yet has no context, or another device's."""
        found = ctypes.c_int(-1)
        self._driver.cuCtxGetDevice(ctypes.byref(found))  # which fails without a context
        if found.value != self._device.value:
            self._call("cuCtxSetCurrent", self._context)

    def _function(self, module: ctypes.c_void_p, kernel: Kernel) -> ctypes.c_void_p:
        function = ctypes.c_void_p()
        self._call("cuModuleGetFunction", ctypes.byref(function), module, kernel.name.encode())
        self._call("cuFuncSetAttribute", function, _SHARED_BYTES, kernel.shared_bytes)
        return function

    def _call(self, function: str, *arguments: object) -> None:
        if code := getattr(self._driver, function)(*arguments):
            name = ctypes.c_char_p()
            self._driver.cuGetErrorName(code, ctypes.byref(name))
            said = (name.value or b"error %d" % code).decode()
            raise EngineError(f"CUDA's {function} failed: {said}")


class Gpu:
    """One of torch's CUDA devices, with the kernels on it."""

    def __init__(self, index: int) -> None:
        """UnsupportedError as `compiler.cubin`'s, or where there is no driver; EngineError as `Module`'s."""
        properties = torch.cuda.get_device_properties(index)
        self.processors: int = properties.multi_processor_count
        self._index = index
        code = compiler.cubin((properties.major, properties.minor))
        with torch.cuda.device(index):
            self._module = Module(_driver(), code, index)

    def launch(self, kernel: Kernel, blocks: int, job: Job) -> None:
        """On the stream that torch uses at this moment; EngineError where the driver refuses it."""
        with torch.cuda.device(self._index):
            self._module.launch(kernel, blocks, job, torch.cuda.current_stream().cuda_stream)


@functools.cache
def gpu(index: int) -> Gpu:
    """Torch's CUDA device of this number, its kernels loaded once in a process."""
    return Gpu(index)


def _driver() -> ctypes.CDLL:
    if (found := cuda.driver()) is None:
        raise UnsupportedError(
            f"CUDA's driver ({cuda.DRIVER}) was not found; models run on CPUs by `gossamer run`, and on a "
            "GPU where NVIDIA's driver is installed"
        )
    return found


def _versions(driver: ctypes.CDLL) -> str:
    """What may not fit where a driver refuses code, and what to do."""
    supported, made_by = cuda.driver_version(driver), compiler.Nvrtc().version
    numbers = "the driver supports CUDA {}.{}, NVRTC is of {}.{}".format(*supported, *made_by)
    return (
        f"{numbers}, and torch is built for {torch.version.cuda or 'none'}. A driver takes code of its own "
        f"CUDA's major version or an older one: update the driver, or {compiler.install()}"
    )
