from pathlib import Path

import pytest

from gossamer.errors import UnsupportedError
from gossamer.gpu import compiler, found, linear, products
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
def cpu_as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU that verbs find: torch's CPU, where sparse linears are computed by their definition."""
    monkeypatch.setattr(found, "DEVICE", "cpu")
    monkeypatch.setattr(found, "why_no_gpu", lambda: "")


@pytest.fixture
def emulated_gpu(library: Path, cpu_as_gpu: None, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    """The same, but that sparse linears are computed by a GPU's kernels, for a tenth of a second each."""
    device = Emulated(library)
    monkeypatch.setattr(linear, "_by_definition", lambda *operands: products.product(device, *operands))
    return device
