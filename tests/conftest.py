"""Small real models for tests: random Llamas of each variant, and the shared ones where they are."""

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from llamas import save_tiny

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> None:
    """Small models are faster on one thread, and results do not depend on the machine's cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What an earlier run of the tests packed or measured is not taken for this one's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSAMER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """A test run started in the background inherits an ignored Ctrl-C; those that test it need it back."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """bytes -> from now on this process can write no larger file, as on a full disk.

    Byte code neither, which Python would cut off and leave to every process that comes after.
    """
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """`../shared/data`: real models and texts that a fresh clone does not have."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there: the real models and texts are not part of the repository")
    return SHARED


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """variant -> a random Llama directory (2 layers, D 48, byte-level BPE of 320 tokens, BOS 0, EOS 1)."""
    made: dict[str, Path] = {}

    def make(variant: str) -> Path:
        if variant not in made:
            made[variant] = save_tiny(variant, tmp_path_factory.mktemp("tiny") / variant)
        return made[variant]

    return make


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 20,000 tokens of the tests' own source."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(path.read_text(encoding="utf-8") for path in sources)[:50_000], encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def reserved_slice(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The part of TinyStories that is for evaluation only, as shared/data/README.md cuts it."""
    marker = b"<|endoftext|>"
    tail = (shared_data / "text" / "tinystories-train-b.txt").read_bytes()[-300_000:]
    file = tmp_path_factory.mktemp("reserved") / "reserved.txt"
    file.write_bytes(tail[tail.index(marker) + len(marker) :].replace(marker, b"\n"))
    return file
