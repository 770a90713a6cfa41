import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gossamer import cuda
from gossamer.errors import UnsupportedError
from gossamer.gpu import compiler, driver, found, linear, products
from gpu.emulated import Emulated, build
from once import once


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GPU's kernels and a driver for them, compiled for this CPU."""
    return once(tmp_path_factory, "emulated-gpu", lambda folder: build(folder)) / "emulated.so"


@pytest.fixture(scope="session")
def nvrtc() -> compiler.Nvrtc:
    """NVIDIA's compiler, which needs no GPU."""
    try:
        return compiler.Nvrtc()
    except UnsupportedError:
        pytest.skip("no NVRTC: pip install nvidia-cuda-nvrtc")


@pytest.fixture
def kernel_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which this test keeps machine code."""
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gpu"


@pytest.fixture
def small_kernels(
    nvrtc: compiler.Nvrtc, kernel_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of files that need no second to compile; those of the package have their own tests."""
    for number, name in enumerate(compiler.ROOTS):
        (tmp_path / name).write_text(f'extern "C" __global__ void kernel_{number}() {{}}')
    monkeypatch.setattr(compiler, "SOURCES", tmp_path)


@pytest.fixture
def emulated_driver(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """CUDA's driver, as all of this process finds it."""
    monkeypatch.setattr(cuda, "DRIVER", str(library))
    opened = ctypes.CDLL(str(library))
    yield opened
    opened.emulate_version(13000)


@pytest.fixture
def capabilities(
    emulated_driver: ctypes.CDLL, small_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[tuple[int, int]]]:
    """Two GPUs of that driver, as torch would describe them; a test may change what they are."""
    kinds, stream = [(8, 0), (9, 0)], SimpleNamespace(cuda_stream=0)

    def properties(index: int) -> SimpleNamespace:
        (major, minor), sizes = kinds[index], {"multi_processor_count": 8, "total_memory": 24e9}
        return SimpleNamespace(name="Emulated", major=major, minor=minor, **sizes)

    answers = {
        "is_available": lambda: True,
        "device_count": lambda: len(kinds),
        "current_device": lambda: 0,
        "current_stream": lambda: stream,
        "device": lambda _: contextlib.nullcontext(),
        "get_device_properties": properties,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    driver.gpu.cache_clear()
    yield kinds
    driver.gpu.cache_clear()


@pytest.fixture
def cpu_as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU that verbs find: torch's CPU, where sparse linears are computed by their definition."""
    monkeypatch.setattr(found, "DEVICE", "cpu")
    monkeypatch.setattr(found, "why_no_gpu", lambda: "")
    monkeypatch.setattr(found, "check_kernels", lambda: None)


@pytest.fixture
def emulated_gpu(library: Path, cpu_as_gpu: None, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    """The same, but that sparse linears are computed by a GPU's kernels, for a tenth of a second each."""
    device = Emulated(library)
    monkeypatch.setattr(linear, "_by_definition", lambda *operands: products.product(device, *operands))
    return device
