from pathlib import Path

import pytest

from gpu.emulated import build
from once import once


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GPU's kernels and a driver for them, compiled for this CPU."""
    return once(tmp_path_factory, "emulated-gpu", lambda folder: build(folder)) / "emulated.so"
