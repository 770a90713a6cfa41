"""Text to calibrate and evaluate on."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 20,000 tokens of the tests' own source."""
    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
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
