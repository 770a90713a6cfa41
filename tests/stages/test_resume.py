"""Interrupted runs go on as if nothing had happened: bit for bit, from the newest sound checkpoint."""

import json
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gossamer import _native
from gossamer.checkpoint.directory import Checkpoint
from gossamer.checkpoint.resumable import _sha256, _write_record, damage
from gossamer.data import packing
from gossamer.errors import CheckpointError, ConfigError, GossamerError, Interrupted, UnsupportedError
from gossamer.job.report import Event
from gossamer.stages import pretrain as pretrain_module
from gossamer.stages.pretrain import Pretrain, pretrain
from gossamer.training import interruption, kernel_choice, parallel, preparation, trainer
from gossamer.training.adamw import AdamW
from gossamer.training.memory import estimate_memory
from gossamer.training.row_trainer import RowTrainer, SaveEvery
from gossamer.training.sparse_linear import SparseLinear
from gossamer.training.whole_model import load_model
from short_run import NUM_STEPS, model_and_text, short_run, weights
from two_processes import one_of_three, one_of_two

Llamas = Callable[[str], Path]
TORTURE = bool(os.environ.get("GOSSAMER_TORTURE"))
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def place(tiny_llama: Llamas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A half sparse model and a text."""
    place = tmp_path_factory.mktemp("resume")
    return model_and_text(place, tiny_llama("llama3"), 0.5, Path(__file__))


def twelve_steps(place: Path, output: Path, **changes: object) -> Pretrain:
    return short_run(place, output, **({"kernel": "dense"} | changes))


@pytest.fixture
def job(place: Path, tmp_path: Path) -> Pretrain:
    return twelve_steps(place, tmp_path / "out")


@pytest.fixture(scope="module")
def uninterrupted(place: Path) -> Callable[..., str]:
    """The weights' hash of a run that nothing disturbs, for the micro-batches in force."""

    @cache
    def run(micro_tokens: int, kernel: str) -> str:
        whole = twelve_steps(place, place / f"whole-{micro_tokens}-{kernel}", kernel=kernel)
        pretrain(whole)
        return weights(whole)

    return lambda kernel="dense": run(trainer.MICRO_BATCH_TOKENS["cpu"], kernel)


class Stop(Exception):
    """Ends a run from outside, as if the machine had failed."""


def stop_at(step: int) -> Callable[[Event], None]:
    def progress(event: Event) -> None:
        if event.done == step:
            raise Stop

    return progress


def interrupt(job: Pretrain, step: int = 7) -> Path:
    """Leave an interrupted run behind; returns the folder of its checkpoints."""
    with pytest.raises(Stop):
        pretrain(job, stop_at(step))
    return Path(job.output_dir + ".partial") / "checkpoints"


@pytest.mark.parametrize("micro_tokens", [2048, 64])
@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.02])
def test_ctrl_c_saves_and_the_resumed_run_ends_in_the_same_bits(
    job: Pretrain,
    uninterrupted: Callable[..., str],
    delay_s: float,
    micro_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wherever in a step it lands, between two micro-batches too; logs have every step once."""
    monkeypatch.setitem(trainer.MICRO_BATCH_TOKENS, "cpu", micro_tokens)

    def press_control_c(event: Event) -> None:
        if event.done == 3:
            threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGINT)).start()

    with pytest.raises(Interrupted, match=rf"interrupted after step \d+ of {NUM_STEPS}, saved in .*partial"):
        pretrain(job, press_control_c)
    assert not Path(job.output_dir).exists()
    events: list[Event] = []
    time.sleep(1 - time.time() % 1)  # TensorBoard orders its files by the second in their names
    result = pretrain(replace(job, resume=True), events.append)
    assert weights(job) == uninterrupted()
    [said] = [event.message for event in events if event.lasting]
    assert said.startswith("kernel dense: as the run began; steps will take about ")

    output = Path(job.output_dir)
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in logged] == list(range(1, NUM_STEPS + 1))
    assert tuple(entry["loss"] for entry in logged) == result.losses
    seconds = [entry["seconds"] for entry in logged]
    assert seconds == sorted(seconds) and result.seconds == pytest.approx(seconds[-1], abs=0.06)
    shown = EventAccumulator(str(output / "runs"))
    shown.Reload()
    assert [scalar.step for scalar in shown.Scalars("train/loss")] == list(range(1, NUM_STEPS + 1))
    assert (output / "loss.png").stat().st_size > 5000
    assert not (output / "checkpoints").exists()


def test_ctrl_c_after_the_last_step_is_too_late(job: Pretrain, uninterrupted: Callable[..., str]) -> None:
    """Where nothing is saved on the way, the whole run would be lost."""

    def press_control_c(event: Event) -> None:
        if event.done == NUM_STEPS:
            os.kill(os.getpid(), signal.SIGINT)

    result = pretrain(replace(job, save_steps=0), press_control_c)
    assert result.num_steps == NUM_STEPS and weights(job) == uninterrupted()


def test_a_run_without_steps_left_measures_nothing(
    job: Pretrain, uninterrupted: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted while the result was written; a resumed run that has steps left measures at its first."""
    job = replace(job, report_to="none")
    with monkeypatch.context() as patch:
        patch.setattr(pretrain_module, "write_model", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            pretrain(job)
    pretrain(replace(job, resume=True))
    assert weights(job) == uninterrupted()
    assert "optimizer_gradient_bytes" not in metrics(job)
    job = replace(job, overwrite=True)
    interrupt(job, step=11)
    pretrain(replace(job, resume=True))
    assert metrics(job)["optimizer_gradient_bytes"] > 0


def metrics(job: Pretrain) -> dict[str, Any]:
    return json.loads((Path(job.output_dir) / "gossamer.json").read_text())["metrics"]


def test_a_second_ctrl_c_does_not_wait(job: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "SAME_PRESS_S", -1.0)

    def press_twice(event: Event) -> None:
        if event.done == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=r"interrupted; .*checkpoint-4 is saved"):
        pretrain(job, press_twice)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert sorted(path.name for path in Path(job.output_dir + ".partial/checkpoints").iterdir()) == [
        "checkpoint-2",
        "checkpoint-4",
    ]


def test_the_sparse_kernel_resumes_to_the_same_bits(job: Pretrain, uninterrupted: Callable[..., str]) -> None:
    """Its packed moments too; what the run took at its start counts, not what would be measured now."""
    job = replace(job, kernel="sparse")
    interrupt(job)
    pretrain(replace(job, resume=True))
    assert weights(job) == uninterrupted(kernel="sparse")


def test_a_run_by_a_teacher_that_was_written_down_resumes_to_the_same_bits(
    job: Pretrain, tiny_llama: Llamas, tmp_path: Path
) -> None:
    """The same rows and the same cache: neither is made again, and another cache is another run."""
    cached = replace(
        job,
        teacher=str(tiny_llama("llama3")),
        teacher_cache=str(tmp_path / "cache"),
        distill="both",
        cache_layers=1,
    )
    whole = replace(cached, output_dir=str(tmp_path / "whole"))
    pretrain(whole)
    interrupt(cached)
    events: list[Event] = []
    with pytest.raises(ConfigError, match=r"written of something else .layers \(--cache-layers, --dis"):
        pretrain(replace(cached, resume=True, cache_layers=2))
    with pytest.raises(ConfigError, match=r"teacher_cache: found .*, expected "):
        pretrain(replace(cached, resume=True, teacher_cache=None, cache_layers=None))
    pretrain(replace(cached, resume=True), events.append)
    assert weights(cached) == weights(whole)
    assert not [event for event in events if event.message == "the teacher reads"]
    assert not (Path(cached.output_dir) / "rows").exists()


@pytest.fixture
def make_room(job: Pretrain, monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """rows -> from now on there is memory for micro-batches of so many of the job's rows, or for any."""
    model = load_model(Checkpoint.open(job.model))

    def make(num_rows: int | None) -> None:
        found = None if num_rows is None else int(estimate_memory(model, num_rows, 32, "f32").total / 0.9) + 1
        monkeypatch.setattr(preparation, "available_bytes", lambda device: found)

    return make


def test_micro_batches_stay_those_that_fitted_when_the_run_began(
    job: Pretrain, make_room: Callable[[int | None], None], tmp_path: Path
) -> None:
    """Whatever fits when it goes on; with less than they need that is said, and what may be changed."""
    whole = replace(job, output_dir=str(tmp_path / "whole"))
    said: list[str] = []

    def listen(event: Event) -> None:
        said.extend(event.message.split(", in ")[-1] for _ in range(event.lasting))

    make_room(2)
    pretrain(whole, listen)
    folder = interrupt(job)
    assert json.loads((folder / "checkpoint-6/checkpoint.json").read_text())["micro_rows"] == 2
    make_room(1)
    again = "--activation-checkpointing keeps .*; --overwrite starts anew, .*; free memory"
    with pytest.raises(ConfigError, match=f"for 64 tokens at a time; found .* available: {again}"):
        pretrain(replace(job, resume=True))
    make_room(None)
    pretrain(replace(job, resume=True), listen)
    assert said == ["micro-batches of 64 tokens (more do not fit)", "micro-batches of 64 tokens"]
    assert weights(job) == weights(whole)


def test_a_run_from_before_micro_batches_were_fitted_keeps_the_usual_ones(
    job: Pretrain, uninterrupted: Callable[..., str], make_room: Callable[[int | None], None]
) -> None:
    newest = interrupt(job) / "checkpoint-6"
    record = json.loads((newest / "checkpoint.json").read_text())
    assert record.pop("micro_rows") == 8 and record.pop("digest")
    _write_record(newest, record)
    make_room(2)
    with pytest.raises(ConfigError, match="for 256 tokens at a time; found"):
        pretrain(replace(job, resume=True))
    make_room(None)
    pretrain(replace(job, resume=True))
    assert weights(job) == uninterrupted()


def test_moments_and_values_are_gone_when_dense_weights_come_back(
    job: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer by layer: of all others' values none is left twice."""
    watched: dict[str, list[Any]] = {"moments": [], "values": []}
    adam, to_linear = AdamW._update, SparseLinear.to_linear
    num_alive = []

    def update(optimizer: AdamW, weight: torch.Tensor, group: dict[str, Any]) -> None:
        adam(optimizer, weight, group)
        watched["moments"].append(weakref.ref(optimizer.state[weight]["exp_avg"]))

    def counted(layer: SparseLinear) -> torch.nn.Linear:
        num_alive.append([sum(ref() is not None for ref in refs) for refs in watched.values()])
        watched["values"].append(weakref.ref(layer.values))
        return to_linear(layer)

    monkeypatch.setattr(AdamW, "_update", update)
    monkeypatch.setattr(SparseLinear, "to_linear", counted)
    pretrain(replace(job, kernel="sparse"))
    assert num_alive == [[0, 0]] * 14


def test_a_run_that_took_the_sparse_kernel_is_not_resumed_under_fsdp(
    job: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on with what it began with; that is said before anything is sharded."""
    monkeypatch.setattr(preparation, "check_processes", lambda *_: None)  # one is enough to be refused
    monkeypatch.setattr(kernel_choice, "_seconds", lambda *_: (0.3, 0.1))
    job = replace(job, kernel="auto")
    interrupt(job)
    with pytest.raises(UnsupportedError, match="kernel sparse: found weights sharded by FSDP"):
        pretrain(replace(job, resume=True, parallel="fsdp"))


def left_behind(job: Pretrain) -> list[str]:
    """What is in `OUT.partial`, and in the folder beside it that packed rows are put into."""
    partial, aside = (Path(job.output_dir + end) for end in (".partial", ".partial.rows"))
    inside = sorted(str(path.relative_to(partial)) for path in partial.rglob("*"))
    return inside + sorted(f"beside: {path.name}" for path in aside.rglob("*"))


def test_ctrl_c_before_the_first_step_is_done_leaves_the_rows(
    job: Pretrain, uninterrupted: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are no run to be resumed; the next run takes them, unless its data are others."""
    text = tmp_path / "other.txt"
    text.write_text(Path(job.dataset[0]).read_text(encoding="utf-8") * 2, encoding="utf-8")
    before = Path(job.output_dir + ".partial.rows/rows.i32")
    with monkeypatch.context() as patch:
        press_control_c_in_the_first_step(patch)
        with pytest.raises(KeyboardInterrupt) as raised:
            pretrain(job)
        assert not isinstance(raised.value, Interrupted)
        assert left_behind(job) == ["beside: rows.i32", "beside: rows.json"]
        with pytest.raises(ConfigError, match="--resume: found no interrupted run in"):
            pretrain(replace(job, resume=True))
        written = before.stat().st_mtime_ns
        press_control_c_in_the_first_step(patch)
        with pytest.raises(KeyboardInterrupt):
            pretrain(replace(job, seed=1))
        assert before.stat().st_mtime_ns > written
        press_control_c_in_the_first_step(patch)
        with pytest.raises(KeyboardInterrupt):
            pretrain(replace(job, dataset=(str(text),)))
        assert left_behind(job) == ["beside: rows.i32", "beside: rows.json"]
        press_control_c_in_the_first_step(patch)
        with pytest.raises(KeyboardInterrupt):
            pretrain(job)
    events: list[Event] = []
    with monkeypatch.context() as patch:
        patch.setattr(packing, "pack", None)
        pretrain(job, events.append)
    assert "the rows are those that an earlier run packed" in [
        event.message for event in events if event.lasting
    ]
    assert weights(job) == uninterrupted() and not (Path(job.output_dir) / "rows").exists()


def test_a_run_with_a_flipped_byte_in_its_rows_packs_them_anew_and_ends_in_the_same_bits(
    job: Pretrain, uninterrupted: Callable[..., str]
) -> None:
    interrupt(job)
    flip(Path(job.output_dir + ".partial/rows"), "rows.i32")
    events: list[Event] = []
    pretrain(replace(job, resume=True), events.append)
    [said] = [event.message for event in events if "rows that an earlier run packed" in event.message]
    assert "are damaged (rows.i32: found sha256" in said and said.endswith("they are packed anew")
    assert weights(job) == uninterrupted()


def test_a_run_that_fails_while_it_packs_leaves_nothing(
    job: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "REPORT_ROWS", 10)
    seen: list[tuple[float, float]] = []

    def stop(event: Event) -> None:
        if event.done:
            seen.append((event.done, event.total))
            if event.done == 30:
                raise Stop

    with pytest.raises(Stop):
        pretrain(job, stop)
    assert seen == [(10, 96), (20, 96), (30, 96)]
    assert not Path(job.output_dir + ".partial").exists()


def press_control_c_in_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trainer.MICRO_BATCH_TOKENS, "cpu", 64)
    compute_loss = RowTrainer.compute_loss

    def press_control_c(*arguments: object, **keywords: object) -> object:
        if not pressed:
            pressed.append(os.kill(os.getpid(), signal.SIGINT))
        return compute_loss(*arguments, **keywords)  # pyright: ignore

    pressed: list[None] = []
    monkeypatch.setattr(RowTrainer, "compute_loss", press_control_c)


def flip(folder: Path, name: str = "optimizer.pt") -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def forge(folder: Path) -> None:
    """A record whose text was changed, though it is still JSON."""
    text = (folder / "checkpoint.json").read_text()
    (folder / "checkpoint.json").write_text(text.replace('"step": 6', '"step": 8'))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (flip, "optimizer.pt: found sha256 .*, expected"),
        (lambda folder: flip(folder, "trainer_state.json"), "trainer_state.json: found"),
        (truncate, "model.safetensors: found"),
        (lambda folder: (folder / "rng_state.pth").unlink(), "rng_state.pth: No such file"),
        (lambda folder: (folder / "checkpoint.json").write_text("{"), "checkpoint.json is not readable"),
        (forge, "checkpoint.json was changed"),
    ],
    ids=["flip", "flip-state", "truncate", "delete", "unreadable", "forge"],
)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    job: Pretrain, uninterrupted: Callable[..., str], spoil: Callable[[Path], None], reason: str
) -> None:
    """And that is said: as an event, in the result and in the manifest."""
    folder = interrupt(job)
    spoil(folder / "checkpoint-6")
    events: list[Event] = []
    result = pretrain(replace(job, resume=True), events.append)
    said, _ = [event.message for event in events if event.lasting]
    assert re.search(reason, said) and result.notes == (said,)
    assert "checkpoint-6 is damaged" in said and "going on from checkpoint-4" in said
    assert next(event.done for event in events if event.message == "training") == 5
    manifest = json.loads((Path(job.output_dir) / "gossamer.json").read_text())
    assert manifest["metrics"]["notes"] == [said]
    assert weights(job) == uninterrupted()


def test_copies_of_checkpoints_are_the_users(job: Pretrain, uninterrupted: Callable[..., str]) -> None:
    """They are neither resumed from nor counted nor removed."""
    folder = interrupt(job)
    for name in ("checkpoint-4-mine", "checkpoint-best", "checkpoint-04"):
        shutil.copytree(folder / "checkpoint-4", folder / name)
    with pytest.raises(Stop):
        pretrain(replace(job, resume=True), stop_at(11))
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint-04",
        "checkpoint-10",
        "checkpoint-4-mine",
        "checkpoint-8",
        "checkpoint-best",
    ]
    pretrain(replace(job, resume=True))
    assert weights(job) == uninterrupted()


def test_no_sound_checkpoint_is_an_error(job: Pretrain) -> None:
    folder = interrupt(job)
    flip(folder / "checkpoint-6")
    flip(folder / "checkpoint-4", "model.safetensors")
    with pytest.raises(CheckpointError, match=r"checkpoint-6 is damaged.*checkpoint-4 is.*--overwrite"):
        pretrain(replace(job, resume=True))
    assert len(list(folder.glob("checkpoint-*"))) == 2


def forge_weights(folder: Path, change: Callable[[torch.Tensor], None]) -> None:
    """Change a matrix in a checkpoint whose every hash is right all the same."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors[Q_PROJ])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    record = json.loads((folder / "checkpoint.json").read_text())
    record.pop("digest")
    record["files"]["model.safetensors"] = _sha256(folder / "model.safetensors")
    _write_record(folder, record)
    assert damage(folder) is None


def test_a_pruned_weight_that_came_to_life_in_a_checkpoint_is_an_error(job: Pretrain) -> None:
    newest = interrupt(job) / "checkpoint-6"
    forge_weights(newest, lambda weight: weight[0].copy_(weight[0].clone().roll(1)))
    with pytest.raises(CheckpointError, match=rf"checkpoint-6: \d+ pruned weights of {Q_PROJ} are not zero"):
        pretrain(replace(job, resume=True))


def test_a_mask_that_is_not_the_runs_is_an_error(job: Pretrain) -> None:
    newest = interrupt(job) / "checkpoint-6"
    record = json.loads((newest / "checkpoint.json").read_text())
    record.pop("digest")
    _write_record(newest, record | {"mask": "0" * 64})
    with pytest.raises(CheckpointError, match=r"checkpoint-6: its mask has sha256 0{12}, the run's has \w+"):
        pretrain(replace(job, resume=True))


def test_a_kept_weight_may_become_zero(job: Pretrain) -> None:
    """It is free again after a resume: the hash that is saved is that of the mask in force."""
    folder = interrupt(job)
    records = [json.loads((folder / f"checkpoint-{step}/checkpoint.json").read_text()) for step in (4, 6)]
    forge_weights(folder / "checkpoint-6", lambda weight: weight[:2].zero_())
    assert records[0]["mask"] == records[1]["mask"] == records[0]["decides"]["mask"]
    pretrain(replace(job, resume=True))
    before, after = (
        load_file(Path(path) / "model.safetensors")[Q_PROJ] for path in (job.model, job.output_dir)
    )
    assert torch.equal(before == 0, after == 0)


def test_a_pruned_weight_that_comes_to_life_after_the_step_is_not_saved(
    job: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_step_end = SaveEvery.on_step_end

    def spoil(callback: SaveEvery, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_step_end(callback, args, state, control)
        if state.global_step == 6:
            kwargs["model"].get_parameter(Q_PROJ).data.add_(1.0)

    monkeypatch.setattr(SaveEvery, "on_step_end", spoil)
    with pytest.raises(GossamerError, match=rf"checkpoint-6 was not written: \d+ pruned weights of {Q_PROJ}"):
        pretrain(job)
    folder = Path(job.output_dir + ".partial/checkpoints")
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize("limit", [100_000, 400_000])
def test_a_full_disk_keeps_the_checkpoints_before(
    job: Pretrain, uninterrupted: Callable[..., str], small_files: Callable[[int], None], limit: int
) -> None:
    """The model does not fit (100 kB), or the optimizer's state behind it does not (400 kB)."""

    def fill_disk(event: Event) -> None:
        if event.done == 5:
            small_files(limit)

    with pytest.raises(OSError, match="checkpoint-6"):
        pretrain(job, fill_disk)
    small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    folder = Path(job.output_dir + ".partial/checkpoints")
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    pretrain(replace(job, resume=True))
    assert weights(job) == uninterrupted()


def test_what_fails_beside_the_disk_is_not_laid_to_it(job: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is gone, or memory that is, while a checkpoint is gathered."""

    def whole(tensor: object) -> object:
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(parallel, "full_tensor_on_cpu", whole)
    with pytest.raises(RuntimeError, match="connection closed by peer"):
        pretrain(job)


def test_a_loss_that_is_not_finite_keeps_the_last_good_model(
    job: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names a checkpoint, and that is a model directory to begin from."""
    compute_loss = RowTrainer.compute_loss

    def poisoned(trainer: RowTrainer, *arguments: object, **keywords: object) -> object:
        loss = compute_loss(trainer, *arguments, **keywords)  # pyright: ignore
        return loss * float("nan") if trainer.state.global_step == 6 else loss

    monkeypatch.setattr(RowTrainer, "compute_loss", poisoned)
    with pytest.raises(ConfigError, match=r"step 7: the loss is nan.*checkpoint-6 is the last checkpoint"):
        pretrain(job)
    monkeypatch.undo()
    good = Path(job.output_dir + ".partial/checkpoints/checkpoint-6")
    result = pretrain(replace(job, model=str(good), output_dir=job.output_dir + "-2", learning_rate=1e-4))
    assert result.sparsity == pytest.approx(0.5, abs=0.02)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_take_it(
    job: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    training_step = RowTrainer.training_step

    def poisoned(trainer: RowTrainer, *arguments: object, **keywords: object) -> object:
        loss = training_step(trainer, *arguments, **keywords)  # pyright: ignore
        if trainer.state.global_step == 5:
            trainer.whole_model.model.norm.weight.grad.fill_(float("nan"))  # pyright: ignore
        return loss

    monkeypatch.setattr(RowTrainer, "training_step", poisoned)
    with pytest.raises(ConfigError, match=r"step 6: the gradient's norm is nan.*checkpoint-4 is the last"):
        pretrain(job)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.002}, r"learning_rate: found 0\.002, expected 0\.003"),
        ({"num_tokens": 4000}, "num_tokens: found 4000, expected 3072"),
        ({"seed": 5}, "seed: found 5, expected 0"),
        ({"precision": "bf16"}, "precision: found bf16, expected f32"),
    ],
)
def test_a_checkpoint_of_another_configuration(
    job: Pretrain, change: dict[str, object], message: str
) -> None:
    folder = interrupt(job)
    with pytest.raises(ConfigError, match=f"checkpoint-6 belongs to .*{message}.*--overwrite"):
        pretrain(replace(job, resume=True, **change))  # pyright: ignore
    assert (folder / "checkpoint-6").exists()


def test_a_checkpoint_of_another_model_or_text(job: Pretrain, tiny_llama: Llamas, tmp_path: Path) -> None:
    interrupt(job)
    differs = r"\(sha256\): found \w{12}, expected \w{12};"
    with pytest.raises(ConfigError, match=f"the model's files {differs} the model's zeros {differs}"):
        pretrain(replace(job, resume=True, model=str(tiny_llama("llama3"))))
    text = tmp_path / "other.txt"
    text.write_text(Path(job.dataset[0]).read_text().replace("e", "a"))
    with pytest.raises(ConfigError, match=f"the rows of tokens {differs}"):
        pretrain(replace(job, resume=True, dataset=(str(text),)))


def test_other_threads_are_allowed_and_said(job: Pretrain) -> None:
    interrupt(job)
    torch.set_num_threads(2)
    try:
        result = pretrain(replace(job, resume=True, save_steps=5, report_to="none"))
    finally:
        torch.set_num_threads(1)
    [said] = result.notes
    assert "num_threads: found 2, expected 1" in said and "not bit-identical" in said


def test_other_native_kernels_and_versions_are_said(job: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(job)
    found = _native.isa()
    monkeypatch.setattr(_native, "isa", lambda: "other")
    monkeypatch.setattr(trainer.transformers, "__version__", "5.99")
    result = pretrain(replace(job, resume=True))
    assert [note.split("(")[1].split(",")[0] for note in result.notes] == [
        "native_instructions: found other",
        "transformers: found 5.99",
    ]
    assert f"expected {found})" in result.notes[0]


def test_an_interrupted_run_is_not_touched_unasked(job: Pretrain) -> None:
    interrupt(job)
    with pytest.raises(ConfigError, match="--resume goes on with it, --overwrite starts anew"):
        pretrain(job)
    events: list[Event] = []
    pretrain(replace(job, overwrite=True), events.append)
    assert next(event.done for event in events if event.message == "training") == 1
    with pytest.raises(ConfigError, match="out exists"):
        pretrain(replace(job, resume=True))
    with pytest.raises(ConfigError, match=r"--resume: found no interrupted run in .*out\.partial"):
        pretrain(replace(job, resume=True, overwrite=True))


def test_ctrl_c_exits_130_and_the_command_it_names_goes_on(job: Pretrain) -> None:
    """In a process of its own, with SIGTERM for the second interruption."""
    flags = {name: str(getattr(job, name)) for name in ("max_length", "batch_tokens", "learning_rate")}
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
    words += [
        "--num-tokens",
        "400000",
        "--precision",
        "f32",
        "--kernel",
        "dense",
        "--dataset",
        job.dataset[0],
    ]
    command = [sys.executable, "-m", "gossamer", "pretrain", job.model, "-o", job.output_dir, *words]
    log = Path(job.output_dir + ".partial/metrics.jsonl")
    num_lines = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and len(log.read_text().splitlines()) > num_lines + 3:
                break
            time.sleep(0.02)
        process.send_signal(number)
        message = process.communicate(timeout=60)[1]
        assert process.returncode == 130 and "Traceback" not in message, message
        num_lines = len(log.read_text().splitlines())
        assert f"interrupted after step {num_lines} of" in message.replace("\n", " ")
        resuming = message[message.index("to go on: gossamer ") :].removeprefix("to go on: gossamer ")
        command = [sys.executable, "-m", "gossamer", *shlex.split(resuming)]
        assert command.count("--resume") == 1


@pytest.fixture(scope="module")
def nursery() -> Iterator[ForkServerContext]:
    """Forks processes that have everything imported, with one thread as here."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gossamer.stages.pretrain"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        context.Process(target=abs, args=(1,)).start()
        yield context


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(10 if TORTURE else 1))
def test_killed_at_any_moment_it_ends_in_the_same_bits(
    job: Pretrain, uninterrupted: Callable[..., str], nursery: ForkServerContext, seed: int
) -> None:
    """SIGKILL again and again, at moments of no one's choosing: while it loads, trains, saves or writes."""
    generator = np.random.default_rng(seed)
    partial, num_kills = Path(job.output_dir + ".partial"), 5 if TORTURE else 3
    expected = uninterrupted()
    while num_kills:
        resumable = any((partial / "checkpoints").glob("checkpoint-*"))
        run = nursery.Process(target=pretrain, args=(replace(job, resume=resumable, overwrite=True),))
        run.start()
        run.join(generator.uniform(0.1, 2.5))
        if run.exitcode is None:
            run.kill()
            num_kills -= 1
            run.join()
        else:
            assert run.exitcode == 0 and weights(job) == expected
    resumable = any((partial / "checkpoints").glob("checkpoint-*"))
    pretrain(replace(job, resume=resumable, overwrite=True))
    assert weights(job) == expected
    logged = (Path(job.output_dir) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == list(range(1, NUM_STEPS + 1))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_two(nursery: ForkServerContext, job: Pretrain) -> list[ForkServerProcess]:
    port = free_port()
    pair = [nursery.Process(target=one_of_two, args=(rank, port, job)) for rank in range(2)]
    for process in pair:
        process.start()
    return pair


def finish(pair: list[ForkServerProcess], job: Pretrain) -> str:
    for process in pair:
        process.join(120)
        assert process.exitcode == 0
    return weights(job)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_resume_after_ctrl_c_and_kills(
    job: Pretrain, nursery: ForkServerContext, parallel: str, tmp_path: Path
) -> None:
    """Ctrl-C that one of them hears stops both after the same step; SIGKILL strikes both at any moment."""
    job = replace(job, parallel=parallel)  # pyright: ignore
    whole = replace(job, output_dir=str(tmp_path / "whole"))
    expected = finish(start_two(nursery, whole), whole)
    partial, log = Path(job.output_dir + ".partial"), Path(job.output_dir + ".partial/metrics.jsonl")
    pair = start_two(nursery, job)
    while not (log.exists() and len(log.read_text().splitlines()) >= 3) and pair[0].exitcode is None:
        time.sleep(0.005)
    os.kill(pair[1].pid or 0, signal.SIGINT)
    for process in pair:
        process.join(60)
        assert process.exitcode == 1
    assert list((partial / "checkpoints").glob("checkpoint-*"))
    generator, num_kills = np.random.default_rng(0), 5 if TORTURE else 1
    while num_kills:
        resumable = any((partial / "checkpoints").glob("checkpoint-*"))
        pair = start_two(nursery, replace(job, resume=resumable, overwrite=True))
        pair[0].join(generator.uniform(0.5, 4))
        if pair[0].exitcode is None:
            for process in pair:
                process.kill()
                process.join()
            num_kills -= 1
        else:
            assert finish(pair, job) == expected
    resumable = any((partial / "checkpoints").glob("checkpoint-*"))
    assert finish(start_two(nursery, replace(job, resume=resumable, overwrite=True)), job) == expected


@pytest.mark.parametrize(
    "how",
    [
        {"kernel": "dense"},
        {"kernel": "sparse"},
        {"lora": 4},
        {"parallel": "fsdp", "prune_schedule": "cubic:0.8:0.1-0.9:1"},
    ],
    ids=str,
)
def test_three_processes_resume_to_the_same_bits(
    job: Pretrain, nursery: ForkServerContext, how: dict[str, Any], tmp_path: Path
) -> None:
    """Three, as two sum their gradients alike in any order."""
    stopped = replace(job, batch_tokens=9 * 32, num_tokens=NUM_STEPS * 9 * 32, **how)
    whole, port = replace(stopped, output_dir=str(tmp_path / "whole")), free_port()
    group = [nursery.Process(target=one_of_three, args=(rank, port, whole, stopped)) for rank in range(3)]
    for process in group:
        process.start()
    finish(group, whole)
    assert weights(stopped) == weights(whole)


def test_no_memory_is_the_environments_failure(job: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says it in a RuntimeError."""

    def step(*args: object, **kwargs: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 16777216 bytes")

    monkeypatch.setattr(RowTrainer, "training_step", step)
    with pytest.raises(MemoryError, match=r"16777216 bytes.*lower --max-length or --batch-tokens"):
        pretrain(job)
    assert left_behind(job) == ["beside: rows.i32", "beside: rows.json"]
