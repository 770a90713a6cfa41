"""Which GPUs are here, and whether the kernels can run on them."""

import ctypes
import importlib.util

from gossamer.errors import EngineError, UnsupportedError
from gossamer.gpu import compiler


def found_gpus() -> list[str]:
    """A line for each GPU, for which the kernels are compiled, or one that says why there is none."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ["none: CUDA's driver (libcuda.so.1) was not found"]
    if importlib.util.find_spec("torch") is None:
        return ["CUDA's driver is here; models run on it through torch: pip install 'gossamer[compress]'"]
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA"
        return [f"CUDA's driver is here, but torch {torch.__version__} (built for {built}) cannot use it"]
    return [_described(index) for index in range(torch.cuda.device_count())]


def _described(index: int) -> str:
    import torch

    it = torch.cuda.get_device_properties(index)
    what = f"{it.name}, {it.total_memory / 1e9:.0f} GB, compute capability {it.major}.{it.minor}"
    try:
        compiler.cubin((it.major, it.minor))
    except (UnsupportedError, EngineError) as error:
        return f"{what}: no sparse kernels, {error}"
    return f"{what}: sparse kernels compiled"
