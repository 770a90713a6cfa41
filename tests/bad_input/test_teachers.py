"""Teachers that do not go with the student, and folders that are no cache of one."""

import shutil
from pathlib import Path

import pytest
import torch

from bad_input.cases import FINETUNE, Case, Tiny, by_name, check_refused, edit_config, nothing, rewrite


def other_tokenizer(model: Path) -> None:
    teacher = Path(shutil.copytree(model, model.parent / "teacher"))
    text = (teacher / "tokenizer.json").read_text()
    (teacher / "tokenizer.json").write_text(text.replace('"Ġ"', '"Ġ̂"'))


def smaller_teacher(model: Path) -> None:
    def drop_last_layer(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.1.")]:
            del tensors[name]

    teacher = Path(shutil.copytree(model, model.parent / "teacher"))
    rewrite(teacher, drop_last_layer)
    edit_config(teacher, num_hidden_layers=1)


TABLE: list[Case] = [
    (
        "teacher of another shape",
        "llama2",
        smaller_teacher,
        [*FINETUNE, "--teacher", "{teacher}"],
        ["1", "2", "layers"],
    ),
    (
        "teacher of another tokenizer",
        "llama2",
        other_tokenizer,
        [*FINETUNE, "--teacher", "{teacher}"],
        ["tokenizer"],
    ),
    (
        "teacher that is not learned from",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--teacher", "dense"],
        ["--teacher dense", "--distill none"],
    ),
    (
        "temperature of zero",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "kl", "--teacher", "dense", "--distill-temperature", "0"],
        ["--distill-temperature is 0", "above 0"],
    ),
    (
        "cross-entropy that counts less than nothing",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "kl", "--teacher", "dense", "--cross-entropy-weight", "-1"],
        ["--cross-entropy-weight is -1", "from 0 on"],
    ),
    (
        "nothing is learned at all",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--cross-entropy-weight", "0"],
        ["--cross-entropy-weight 0", "expected --teacher"],
    ),
    (
        "no likely tokens",
        "llama2",
        nothing,
        [*FINETUNE, "--teacher", "{model}", "--teacher-cache", "{cache}", "--cache-top-k", "0"],
        ["--cache-top-k is 0", "at least 1"],
    ),
    (
        "no layers",
        "llama2",
        nothing,
        [*FINETUNE, "--teacher", "{model}", "--teacher-cache", "{cache}", "--cache-layers", "0"],
        ["--cache-layers is 0", "at least 1"],
    ),
    (
        "layers of no cache",
        "llama2",
        nothing,
        [*FINETUNE, "--teacher", "{model}", "--cache-layers", "1"],
        ["--cache-layers 1", "--teacher-cache FOLDER"],
    ),
    (
        "layers that are not learned of",
        "llama2",
        nothing,
        [
            *(*FINETUNE, "--teacher", "{model}", "--teacher-cache", "{cache}", "--distill", "kl"),
            *("--cache-layers", "1"),
        ],
        ["--cache-layers 1", "kl learns of no layer"],
    ),
    (
        "likely tokens of no cache",
        "llama2",
        nothing,
        [*FINETUNE, "--teacher", "{model}", "--distill", "kl", "--cache-top-k", "64"],
        ["--cache-top-k 64 is for --teacher-cache FOLDER", "no --teacher-cache"],
    ),
    (
        "likely tokens that are not learned",
        "llama2",
        nothing,
        [*FINETUNE, "--teacher", "{model}", "--teacher-cache", "{cache}", "--cache-top-k", "64"],
        ["--cache-top-k 64", "found --distill squarehead"],
    ),
    (
        "a temperature of nothing",
        "llama2",
        nothing,
        [*FINETUNE, "--teacher", "{model}", "--distill-temperature", "2"],
        ["--distill-temperature 2 has no part in --distill squarehead", "kl or both"],
    ),
    (
        "a teacher on a device that is not there",
        "llama2",
        nothing,
        [*FINETUNE, "--teacher", "{model}", "--teacher-device", "cuda:77"],
        ["--teacher-device cuda:77 is not there; found cpu", "give one of these"],
    ),
    (
        "a device for no teacher",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--teacher-device", "cpu"],
        ["--teacher-device cpu needs --teacher DIR"],
    ),
    (
        "a cache that is a file",
        "llama2",
        nothing,
        [*FINETUNE, "--teacher", "{model}", "--teacher-cache", "{text}"],
        ["text.txt, a file", "expected a folder"],
    ),
    (
        "a cache among the files of a model",
        "llama2",
        nothing,
        [*FINETUNE, "--teacher", "{model}", "--teacher-cache", "{model}"],
        ["holds something else (config.json", "new, empty or a teacher's cache"],
    ),
    (
        "a cache where the output goes",
        "llama2",
        nothing,
        [*FINETUNE, "--teacher", "{model}", "--teacher-cache", "{out}"],
        ["the output directory", "give another folder"],
    ),
]


@by_name(TABLE)
def test_bad_input_is_refused_with_a_message(
    case: Case, tiny_llama: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(case, tiny_llama, tmp_path, capsys)
