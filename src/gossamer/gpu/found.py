"""Which GPUs are here, and whether the kernels can run on them."""

from gossamer.cuda import why_no_gpu
from gossamer.errors import ConfigError, EngineError, UnsupportedError

DEVICE = "cuda"  # torch's name


def found_gpus() -> list[str]:
    """A line for each GPU, on which the kernels are loaded, or one that says why there is none."""
    if why := why_no_gpu():
        return [f"none: {why}"]
    import torch

    return [_described(index) for index in range(torch.cuda.device_count())]


def gpu_device() -> str:
    """Torch's name of the GPU that `--backend gpu` computes on.

    ConfigError where there is none; as `check_kernels` where they do not run on it.
    """
    if why := why_no_gpu():
        raise ConfigError(
            f"no GPU was found: {why}. --backend gpu needs one of NVIDIA's (docs/gpu.md says which); "
            "--backend engine computes on this CPU"
        )
    check_kernels()
    return DEVICE


def has_gpu() -> bool:
    """Whether there is one that torch computes on."""
    return not why_no_gpu()


def check_kernels(index: int | None = None) -> None:
    """Compile and load them, before anything is packed; on torch's current GPU unless one is named.

    UnsupportedError or EngineError, as `driver.Gpu`'s, where that is not possible.
    """
    import torch

    from gossamer.gpu.driver import gpu

    gpu(torch.cuda.current_device() if index is None else index)


def _described(index: int) -> str:
    import torch

    it = torch.cuda.get_device_properties(index)
    what = f"{it.name}, {it.total_memory / 1e9:.0f} GB, compute capability {it.major}.{it.minor}"
    try:
        check_kernels(index)
    except (UnsupportedError, EngineError) as error:
        return f"{what}: no sparse kernels, {error}"
    return f"{what}: sparse kernels compiled and loaded"
