"""A teacher reads the ids of the student's tokenizer: which directories go together."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import ConfigError
from gossamer.training.head_loss import TeacherLogits
from gossamer.training.teacher import LiveTeacher, open_teacher
from gossamer.training.whole_model import load_model

Files = dict[str, str]
MODEL, OLD = {"tokenizer.model": "a"}, {"vocab.json": "a", "merges.txt": "b"}
TOGETHER: list[tuple[Files, Files]] = [
    ({"tokenizer.json": "a"}, {"tokenizer.json": "a", "tokenizer.model": "b"}),
    ({"tokenizer.model": "a"}, {"tokenizer.json": "b", "tokenizer.model": "a"}),
    (OLD, {**OLD, "tokenizer.json": "c"}),
    ({}, {}),
]
APART: list[tuple[Files, Files, str]] = [
    ({"tokenizer.json": "b", **MODEL}, {"tokenizer.json": "a", **MODEL}, "another tokenizer .tokenizer.json"),
    ({"tokenizer.model": "b"}, MODEL, "another tokenizer .tokenizer.model sha256 [0-9a-f]{12}. than"),
    ({**MODEL, "added_tokens.json": "c"}, MODEL, "another tokenizer .tokenizer.model sha256"),
    ({**OLD, "merges.txt": "c"}, OLD, "another tokenizer .vocab.json sha256"),
    (MODEL, {**OLD, "tokenizer.json": "a"}, "found tokenizer.model there, tokenizer.json and vocab"),
    ({}, {"tokenizer.json": "a"}, "found none there, tokenizer.json here; expected tokenizer.json in both"),
]


@pytest.fixture
def pair(tiny_llama: Callable[[str], Path], tmp_path: Path) -> Callable[[Files, Files], tuple[Path, Path]]:
    """Two copies of a model, a teacher and a student, with other files of a tokenizer."""

    def make(*of_each: Files) -> tuple[Path, Path]:
        paths = tmp_path / "teacher", tmp_path / "student"
        for path, files in zip(paths, of_each, strict=True):
            shutil.copytree(tiny_llama("llama2"), path, ignore=shutil.ignore_patterns("tokenizer.*"))
            for name, content in files.items():
                (path / name).write_text(content)
        return paths

    return make


@pytest.mark.parametrize(("theirs", "ours"), TOGETHER)
def test_the_same_tokenizer_is_told_by_a_file_that_both_have(
    theirs: Files, ours: Files, pair: Callable[..., tuple[Path, Path]]
) -> None:
    teacher, student = pair(theirs, ours)
    assert open_teacher(teacher, Checkpoint.open(student)).path == teacher


@pytest.mark.parametrize(("theirs", "ours", "message"), APART)
def test_another_tokenizer_is_refused(
    theirs: Files, ours: Files, message: str, pair: Callable[..., tuple[Path, Path]]
) -> None:
    teacher, student = pair(theirs, ours)
    with pytest.raises(ConfigError, match=message):
        open_teacher(teacher, Checkpoint.open(student))


@torch.no_grad()
def test_a_teacher_on_its_own_device_gives_what_one_on_the_students_does(
    tiny_llama: Callable[[str], Path],
) -> None:
    """What is learned of it is where the student is; the types are those of the student's autocast."""
    model, cpu = load_model(Checkpoint.open(tiny_llama("llama2"))), torch.device("cpu")
    here, elsewhere = LiveTeacher(model), LiveTeacher(model, "cpu")
    ids_BT, kept_BT = torch.arange(2, 26).view(2, 12), all_but_the_last(2, 12)
    found = []
    for teacher in (here, elsewhere):
        teacher.prepare(model, cpu)
        with torch.autocast("cpu", torch.bfloat16):
            teacher.read({}, {"input_ids": ids_BT, "attention_mask": None, "position_ids": None})
            head = teacher.at_the_head(kept_BT, 1.0)
            assert isinstance(head, TeacherLogits)
            found.append((*teacher.states(), head.logits(3, 20)))
        teacher.forget()
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_without_any_only_the_model_itself_is_a_teacher(pair: Callable[..., tuple[Path, Path]]) -> None:
    """Another one of the same shape may have had any vocabulary of that size."""
    teacher, student = pair({}, {})
    file = teacher / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"may have another tokenizer .* none there, none here; expected"):
        open_teacher(teacher, Checkpoint.open(student))


def all_but_the_last(num_rows: int, length: int) -> torch.Tensor:
    """Tokens that another one follows: bool [B, T]."""
    return torch.arange(length).expand(num_rows, -1) < length - 1
