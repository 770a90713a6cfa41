"""Which GPUs are here, and whether the kernels can run on them."""

import ctypes
import importlib.util

from gossamer.errors import ConfigError, EngineError, UnsupportedError
from gossamer.gpu import compiler

DEVICE = "cuda"  # torch's name


def found_gpus() -> list[str]:
    """A line for each GPU, for which the kernels are compiled, or one that says why there is none."""
    if why := why_no_gpu():
        return [f"none: {why}"]
    import torch

    return [_described(index) for index in range(torch.cuda.device_count())]


def gpu_device() -> str:
    """Torch's name of the GPU that `--backend gpu` computes on; ConfigError where there is none."""
    if why := why_no_gpu():
        raise ConfigError(
            f"no GPU was found: {why}. --backend gpu needs one of NVIDIA's (docs/gpu.md says which); "
            "--backend engine computes on this CPU"
        )
    return DEVICE


def has_gpu() -> bool:
    """Whether there is one that torch computes on."""
    return not why_no_gpu()


def why_no_gpu() -> str:
    """What is in the way of computing on a GPU; empty where there is one."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "CUDA's driver (libcuda.so.1) was not found"
    if importlib.util.find_spec("torch") is None:
        return "CUDA's driver is here; models run on it through torch: pip install 'gossamer[compress]'"
    import torch

    if torch.cuda.is_available():
        return ""
    built = torch.version.cuda or "no CUDA"
    return f"CUDA's driver is here, but torch {torch.__version__} (built for {built}) cannot use it"


def _described(index: int) -> str:
    import torch

    it = torch.cuda.get_device_properties(index)
    what = f"{it.name}, {it.total_memory / 1e9:.0f} GB, compute capability {it.major}.{it.minor}"
    try:
        compiler.cubin((it.major, it.minor))
    except (UnsupportedError, EngineError) as error:
        return f"{what}: no sparse kernels, {error}"
    return f"{what}: sparse kernels compiled"
