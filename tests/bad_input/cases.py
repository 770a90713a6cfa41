"""Bad input: one clear message, the right exit code, and nothing half-written.

A case: what is given, the variant of the model, what is done to it, the command line, what the message must
say. The models, texts and examples that these name, and ways to damage them.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gossamer import cli

Tiny = Callable[[str], Path]
Case = tuple[str, str, Callable[[Path], object], list[str], list[str]]
CALIBRATE = ["--dataset", "{text}", "--num-calibration-samples", "4", "--max-seq-length", "32"]
PRUNE = ["prune", "{model}", "-o", "{out}", *CALIBRATE]
FINETUNE = ["finetune", "{model}", "-o", "{out}", "--dataset", "{rows}", "--num-train-epochs", "1"]


def workplace(tiny_llama: Tiny, variant: str, directory: Path) -> dict[str, Path]:
    """A copy of a tiny model to damage, with a text and examples to calibrate and train on."""
    places = {name: directory / name for name in ("model", "out", "teacher")}
    shutil.copytree(tiny_llama(variant), places["model"])
    places["text"] = directory / "text.txt"
    places["text"].write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    places["rows"] = directory / "rows.jsonl"
    places["rows"].write_text('{"prompt": "a b", "completion": "c"}\n' * 8)
    places |= {"goss": directory / "model.goss", "cache": directory / "cache", "report": directory / "r.json"}
    return places


def rewrite(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def edit_config(model: Path, **changes: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def truncate(file: Path, by: int = 100) -> None:
    os.truncate(file, file.stat().st_size - by)


def flip(file: Path, position: int, mask: int = 0xFF) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= mask
    file.write_bytes(content)


def make_sparse(model: Path) -> None:
    def zero(tensors: dict[str, torch.Tensor]) -> None:
        for name, weight in tensors.items():
            if "_proj" in name:
                weight[:, ::2] = 0

    rewrite(model, zero)


def nothing(model: Path) -> None:
    pass


def by_name(table: list[Case]) -> pytest.MarkDecorator:
    """Runs a test with each `case` of a table."""
    return pytest.mark.parametrize("case", table, ids=[case[0] for case in table])


def check_refused(case: Case, tiny_llama: Tiny, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with code 2, says what it must, and leaves the files as they were."""
    _, variant, prepare, arguments, says = case
    places = workplace(tiny_llama, variant, directory)
    prepare(places["model"])
    before = sorted(directory.rglob("*"))
    code = cli.call([argument.format(**places) for argument in arguments])
    message = capsys.readouterr().err
    assert code == 2, message
    assert all(phrase in message.replace("\n", " ") for phrase in says), message
    assert "Traceback" not in message
    assert sorted(directory.rglob("*")) == before
