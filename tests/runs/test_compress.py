"""The whole path on a tiny model: every directory loads elsewhere, zeros grow, what stands is skipped."""

import dataclasses
import json
import shutil
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from gossamer.checkpoint.directory import Checkpoint
from gossamer.engine import LLM, SamplingParams
from gossamer.errors import ConfigError, Interrupted
from gossamer.job.report import Event
from gossamer.packed.reader import Packed
from gossamer.runs.compress import Compress, compress, plan
from gossamer.runs.options import check

STAGES = ["prune", "pretrain", "prune", "pretrain", "finetune", "quantize", "pack"]


@pytest.fixture(scope="module")
def job(tiny_llama: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Compress:
    """`compress` run once, with every kind of training, on a copy of a tiny tied Llama 3."""
    directory = tmp_path_factory.mktemp("compress")
    shutil.copytree(tiny_llama("llama3"), directory / "model")
    (directory / "text.txt").write_text(Path(__file__).read_text(encoding="utf-8") * 3, encoding="utf-8")
    rows = [{"prompt": f"{a} + {b} = ", "completion": str(a + b)} for a in range(6) for b in range(6)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = Compress(
        str(directory / "model"),
        str(directory / "out"),
        dataset=(str(directory / "text.txt"),),
        sparsity=0.7,
        num_calibration_samples=8,
        max_seq_length=64,
        pretrain_dataset=(str(directory / "text.txt"),),
        num_tokens=2048,
        finetune_dataset=(str(directory / "rows.jsonl"),),
        format="prompt-completion",
        num_train_epochs=1,
        kernel="dense",
    )
    result = compress(made)
    assert [(stage, how) for stage, _, how in result.stages] == [(stage, "ran") for stage in STAGES]
    assert result.sparsity >= 0.699
    assert result.num_bytes == Path(result.packed).stat().st_size
    return made


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": 5_000_000_000}, "--seed is 5000000000"),
        ({"learning_rate": 0.0}, "--learning-rate 0"),
        ({"num_tokens": 0}, "--num-tokens 0"),
        ({"num_train_epochs": 0}, "--num-train-epochs 0"),
        ({"lora": 0}, "--lora"),
        ({"distill": "none", "cross_entropy_weight": 0.5}, "--cross-entropy-weight 0.5"),
        ({"smoothing_strength": 2.0}, "--smoothing-strength is 2"),
        ({"ignore": ("nothing*",)}, "--ignore 'nothing.*' matches none"),
    ],
)
def test_what_a_later_step_refuses_is_said_before_the_first(
    job: Compress, wrong: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """And nothing is written, where else hours of pruning would come first."""
    with pytest.raises(ConfigError, match=message):
        compress(dataclasses.replace(job, output_dir=str(tmp_path / "out"), **wrong))
    assert not (tmp_path / "out").exists()


def test_what_is_of_a_teacher_is_not_for_pretraining_without_one(job: Compress) -> None:
    asked = dataclasses.replace(job, distill="both", cross_entropy_weight=0.25, distill_temperature=2.0)
    jobs = {step.stage: step.job for step in plan(asked)}
    assert (jobs["finetune"].cross_entropy_weight, jobs["finetune"].distill_temperature) == (0.25, 2.0)
    assert (jobs["pretrain"].cross_entropy_weight, jobs["pretrain"].distill_temperature) == (1.0, 1.0)
    check(jobs.values(), Checkpoint.open(job.model))


def test_a_cached_teacher_is_of_fine_tuning_alone(job: Compress, tmp_path: Path) -> None:
    """It is asked before training, into the folder that is given, and not beside each step."""
    made = dataclasses.replace(
        job,
        output_dir=str(tmp_path / "out"),
        sparsity=0.5,
        teacher_cache=str(tmp_path / "cache"),
        cache_layers=1,
    )
    pretrain, finetune = (
        step.job for stage in ("pretrain", "finetune") for step in plan(made) if step.stage == stage
    )
    assert (pretrain.teacher_cache, pretrain.cache_layers) == (None, None)
    assert (finetune.teacher_cache, finetune.cache_layers) == (str(tmp_path / "cache"), 1)
    events: list[Event] = []
    compress(dataclasses.replace(made, pretrain_dataset=()), events.append)
    assert any("the teacher is asked once" in event.message for event in events)
    assert (tmp_path / "cache" / "hidden-02.bf16").is_file()
    with pytest.raises(ConfigError, match="the output directory; give another folder"):
        compress(
            dataclasses.replace(made, output_dir=str(tmp_path / "new"), teacher_cache=str(tmp_path / "new"))
        )
    assert not (tmp_path / "new").exists()


def test_a_foreign_directory_is_refused(job: Compress, tmp_path: Path) -> None:
    (tmp_path / "1-prune").mkdir()
    with pytest.raises(ConfigError, match="not made by compress or a recipe"):
        compress(dataclasses.replace(job, output_dir=str(tmp_path)))


def test_zeros_only_grow_and_every_directory_loads(job: Compress) -> None:
    directories = sorted(Path(job.output_dir).glob("[0-9]-*"))
    for parent, child in pairwise(directories):
        before, after = Checkpoint.open(parent), Checkpoint.open(child)
        for name in (f"{linear}.weight" for linear in before.linears):
            assert not np.any(before.zeros(name) & ~after.zeros(name)), f"{child}: {name}"
    for directory in directories:
        config = json.loads((directory / "config.json").read_text())
        assert "sparsity_config" not in json.dumps(config)
        model = AutoModelForCausalLM.from_pretrained(directory)
        ids = AutoTokenizer.from_pretrained(directory)("def f(x):", return_tensors="pt").input_ids
        with torch.no_grad():
            assert torch.isfinite(model(ids).logits).all()


def test_the_packed_file_is_safetensors_and_runs(job: Compress) -> None:
    packed = Path(job.output_dir) / "model.goss"
    with safe_open(packed, "np") as file:
        assert file.metadata()["format"] == "gossamer"
        assert len(list(file.keys())) > 14
    [answer] = LLM(packed).generate("def f(x):", SamplingParams(max_tokens=8))
    assert len(answer.token_ids) == 8 or answer.finish_reason == "stop"


def test_what_stands_is_skipped_and_what_changed_runs_again(job: Compress) -> None:
    assert {how for _, _, how in compress(job).stages} == {"stood"}
    sparser = dataclasses.replace(job, sparsity=0.75)
    with pytest.raises(
        ConfigError, match=r"4-pretrain was trained with other options.*--overwrite replaces it"
    ):
        compress(sparser)
    sparser = dataclasses.replace(sparser, overwrite=True)
    assert [how for _, _, how in compress(sparser).stages] == ["stood"] * 3 + ["ran"] * 4
    shutil.rmtree(Path(job.output_dir) / "1-prune")
    assert compress(sparser).stages[0][2] == "ran"


def test_another_head_is_packed_again_and_nothing_else_runs(job: Compress, tmp_path: Path) -> None:
    shutil.copytree(job.output_dir, tmp_path / "out")
    there = dataclasses.replace(job, output_dir=str(tmp_path / "out"), finetune_dataset=(), head="keep")
    there = dataclasses.replace(there, pretrain_dataset=(), overwrite=True)
    assert {how for _, _, how in compress(there).stages} == {"ran"}
    assert {how for _, _, how in compress(there).stages} == {"stood"}
    assert [how for _, _, how in compress(dataclasses.replace(there, head="i8")).stages] == [
        *("stood", "stood", "ran")
    ]
    packed = Packed.open(tmp_path / "out" / "model.goss")
    assert packed.matrices[packed.head].values == "i8"


def test_an_interrupted_training_goes_on(job: Compress, tmp_path: Path) -> None:
    """Ctrl-C in the fifth step; the same command ends in the bits of a run that nobody interrupted."""
    whole = dataclasses.replace(
        job,
        output_dir=str(tmp_path / "whole"),
        sparsity=0.5,
        num_tokens=6 * 16_384,
        repeat=True,
        finetune_dataset=(),
    )
    broken = dataclasses.replace(whole, output_dir=str(tmp_path / "broken"))
    steps: list[float] = []

    def watch(event: Event) -> None:
        if event.message == "training":
            steps.append(event.done)
            if event.done == 4 and len(steps) == 4:
                signal.raise_signal(signal.SIGINT)

    compress(whole)
    with pytest.raises(Interrupted, match="after step 4 of 6"):
        compress(broken, watch)
    assert (tmp_path / "broken" / "2-pretrain.partial").is_dir()
    result = compress(broken, watch)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [how for _, _, how in result.stages] == ["stood", "went on", "ran", "ran"]
    weights = [tmp_path / name / "2-pretrain" / "model.safetensors" for name in ("whole", "broken")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert [how for _, _, how in compress(broken).stages] == ["stood"] * 4


def test_interrupted_pruning_and_rounding_go_on(job: Compress, tmp_path: Path) -> None:
    """Ctrl-C in the second layer of each, with the first one saved; other threads only with --overwrite."""
    whole = dataclasses.replace(
        job, output_dir=str(tmp_path / "whole"), sparsity=0.5, pretrain_dataset=(), finetune_dataset=()
    )
    broken = dataclasses.replace(whole, output_dir=str(tmp_path / "broken"), save_seconds=0.0)

    def interrupt(event: Event) -> None:
        if event.done == 10 and event.stage not in interrupted:
            interrupted.append(event.stage)
            signal.raise_signal(signal.SIGINT)

    compress(whole)
    interrupted: list[str] = []
    for _ in range(2):
        with pytest.raises(Interrupted, match=r"checkpoint-1 is saved"):
            compress(broken, interrupt)
    assert interrupted == ["prune", "quantize"]
    shutil.copytree(broken.output_dir, tmp_path / "kept")
    torch.set_num_threads(2)
    try:
        with pytest.raises(ConfigError, match=r"num_threads: found 2, expected 1; .*--overwrite"):
            compress(broken)
        events: list[Event] = []
        anew = compress(dataclasses.replace(broken, overwrite=True), events.append)
        assert [how for _, _, how in anew.stages] == ["stood", "ran", "ran"]
        assert any("starts anew: " in event.message and event.lasting for event in events)
    finally:
        torch.set_num_threads(1)
    shutil.rmtree(broken.output_dir)
    (tmp_path / "kept").rename(broken.output_dir)
    assert [how for _, _, how in compress(broken).stages] == ["stood", "went on", "ran"]
    for name in ("1-prune", "2-quantize"):
        weights = [tmp_path / run / name / "model.safetensors" for run in ("whole", "broken")]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_other_data_does_not_go_on_with_what_is_left(job: Compress, tmp_path: Path) -> None:
    """The text has changed under its name: what was trained is not lost unless that is asked for."""
    text = tmp_path / "text.txt"
    shutil.copyfile(job.pretrain_dataset[0], text)
    made = dataclasses.replace(
        job,
        output_dir=str(tmp_path / "out"),
        sparsity=0.5,
        pretrain_dataset=(str(text),),
        num_tokens=3 * 16_384,
        finetune_dataset=(),
    )

    def interrupt(event: Event) -> None:
        if event.message == "training" and event.done == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        compress(made, interrupt)
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    text.write_text("".join(reversed(lines)), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"the rows of tokens .sha256.: found .*--overwrite"):
        compress(made)
    anew = compress(dataclasses.replace(made, overwrite=True))
    assert [how for _, _, how in anew.stages] == ["stood", "ran", "ran", "ran"]
