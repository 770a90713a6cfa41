"""NVIDIA's driver and torch's CUDA: their versions, and what is in the way of computing on a GPU."""

import ctypes
import importlib.util
import os

DRIVER = "libcuda.so.1"


def driver() -> ctypes.CDLL | None:
    """CUDA's driver; None where it is not installed."""
    try:
        return ctypes.CDLL(DRIVER)
    except OSError:
        return None


def driver_version(driver: ctypes.CDLL) -> tuple[int, int]:
    """Of the newest CUDA that it supports."""
    number = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(number))
    return number.value // 1000, number.value % 1000 // 10


def torch_cuda() -> tuple[int, int] | None:
    """The version of CUDA that torch was built for; None where for none."""
    import torch

    if torch.version.cuda is None:
        return None
    major, minor = torch.version.cuda.split(".")[:2]
    return int(major), int(minor)


def why_no_gpu() -> str:
    """What is in the way of computing on a GPU, and what to do; empty where there is one."""
    if (found := driver()) is None:
        return f"CUDA's driver ({DRIVER}) was not found"
    if importlib.util.find_spec("torch") is None:
        return "CUDA's driver is here; models run on it through torch: pip install 'gossamer[compress]'"
    import torch

    if torch.cuda.is_available():
        return ""
    built, (major, minor) = torch_cuda(), driver_version(found)
    if built is None:
        return (
            f"CUDA's driver is here, but torch {torch.__version__} is built without CUDA: install a torch "
            f"for CUDA {major} or older"
        )
    if built[0] > major:  # within a major version older drivers do
        return (
            f"CUDA's driver supports CUDA {major}.{minor}, but torch {torch.__version__} is built for CUDA "
            f"{built[0]}.{built[1]}: update the driver, or install a torch for CUDA {major}"
        )
    return (
        f"CUDA's driver and torch {torch.__version__} for CUDA {built[0]}.{built[1]} are here, but no GPU is "
        "visible: see what `nvidia-smi` lists; CUDA_VISIBLE_DEVICES is "
        f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')!r}"
    )
