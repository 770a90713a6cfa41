"""Two runs side by side: what either's failure does to the other, and to this process's threads."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gossamer.errors import GossamerError
from gossamer.runs.beside import beside


def write_threads(file: Path) -> None:
    file.write_text(str(torch.get_num_threads()))


def fail(file: Path) -> None:
    raise ValueError("nothing to be done")


def sleep_then_write(file: Path) -> None:
    time.sleep(3600)  # the test would run into its limit
    file.write_text("late")


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """And the other process finds this file, whatever pytest calls it."""
    monkeypatch.syspath_prepend(Path(__file__).parents[__name__.count(".")])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_both_have_one_thread_and_end_together(tmp_path: Path) -> None:
    with beside(write_threads, tmp_path / "threads"):
        assert torch.get_num_threads() == 1
    assert (tmp_path / "threads").read_text() == "1"
    assert torch.get_num_threads() == 2


def test_a_failure_beside_is_ours_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(GossamerError, match="fail ended with code 1"), beside(fail, tmp_path):
        pass
    assert "nothing to be done" in capfd.readouterr().err
    assert torch.get_num_threads() == 2


def test_our_failure_ends_the_other(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), beside(sleep_then_write, tmp_path / "late"):
        raise KeyboardInterrupt
    assert not (tmp_path / "late").exists()
    assert torch.get_num_threads() == 2
