"""`prune` and `quantize` go on after the last saved layer, and end in the bytes of an undisturbed run."""

import json
import multiprocessing
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from gossamer import cli
from gossamer.checkpoint import directory, partial
from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import CheckpointError, ConfigError, Interrupted
from gossamer.job.report import Event
from gossamer.layerwise import layer_checkpoint, saving
from gossamer.stages.prune import Prune
from gossamer.stages.quantize import Quantize
from llamas import save_random
from many_shards import SHARD_BYTES, Job, run, run_alone

TORTURE = bool(os.environ.get("GOSSAMER_TORTURE"))
NUM_LAYERS = 6
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 104,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@pytest.fixture(autouse=True)
def few_layers_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (directory, saving):
        monkeypatch.setattr(module, "SHARD_BYTES", SHARD_BYTES)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of six layers, in bfloat16, in float32 and with fused matrices, and a text."""
    place = tmp_path_factory.mktemp("layer-resume")
    save_random(LlamaConfig(**SIZES), place / "bf16", torch.bfloat16)
    save_random(LlamaConfig(**SIZES, tie_word_embeddings=True), place / "f32")
    save_random(Phi3Config(**SIZES, pad_token_id=None), place / "fused")
    (place / "text.txt").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return place


def pruning(place: Path, output: Path, model: str = "bf16", **changes: Any) -> Prune:
    """A job that saves after every layer."""
    options: dict[str, Any] = {"method": "sparsegpt", "num_calibration_samples": 8, "max_seq_length": 64}
    options |= {"save_seconds": 0.0} | changes
    return Prune(str(place / model), str(output), dataset=(str(place / "text.txt"),), **options)


def rounding(place: Path, output: Path, **changes: Any) -> Quantize:
    """The same, with one linear left as it is."""
    return Quantize(
        str(place / "bf16"),
        str(output),
        dataset=(str(place / "text.txt"),),
        ignore=("*.layers.5.mlp.down_proj",),
        num_calibration_samples=8,
        max_seq_length=64,
        save_seconds=0.0,
        **changes,
    )


JOBS: dict[str, Callable[[Path, Path], Job]] = {
    "prune": pruning,
    "prune-f32": lambda place, output: pruning(place, output, "f32", method="magnitude"),
    "prune-fused": lambda place, output: pruning(place, output, "fused"),
    "prune-and-round": lambda place, output: pruning(
        place, output, method="magnitude", scheme="W4A8", rounded_epochs=1
    ),
    "quantize": rounding,
    "quantize-trained": lambda place, output: rounding(
        place, output, scheme="W4A8", reconstruct_epochs=2, reconstruct_learning_rate=0.1
    ),
    "reconstruct": lambda place, output: pruning(place, output, method="admm"),
}
STAGES = ("prune", "quantize")


def contents(job: Job) -> dict[str, bytes]:
    """The output's files, but for its name in `gossamer.json`, and the report, which has the seconds."""
    files = {file.name: file.read_bytes() for file in Path(job.output_dir).iterdir()}
    assert len(files.pop("report.md")) > 1000
    files["gossamer.json"] = files["gossamer.json"].replace(job.output_dir.encode(), b"OUT")
    return files


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> Callable[[str], dict[str, bytes]]:
    """Kind of job -> the files of a run that nobody interrupted."""

    @cache
    def whole(kind: str) -> dict[str, bytes]:
        job = JOBS[kind](place, place / f"whole-{kind}")
        run(job)
        return contents(job)

    return whole


@pytest.fixture
def job(place: Path, tmp_path: Path) -> Prune:
    return pruning(place, tmp_path / "out")


class Stop(Exception):
    """Ends a run from outside, as if the machine had failed."""


def in_layer(layer: int, do: Callable[[], object]) -> Callable[[Event], None]:
    """Does something when the layer's first three linears are done."""
    return lambda event: do() if event.done == layer * 7 + 3 else None  # type: ignore[func-returns-value]


def stop() -> None:
    raise Stop


def interrupt(job: Job, layer: int = 4) -> Path:
    """Leave an interrupted run behind; returns the folder of its checkpoints."""
    with pytest.raises(Stop):
        run(job, in_layer(layer, stop))
    return Path(job.output_dir + ".partial") / "checkpoints"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", JOBS)
def test_a_resumed_run_ends_in_the_same_bytes(
    kind: str, place: Path, tmp_path: Path, undisturbed: Callable[[str], dict[str, bytes]]
) -> None:
    """Also after it was interrupted twice; it says where it goes on, and transformers loads the result."""
    job = JOBS[kind](place, tmp_path / "out")
    assert names(interrupt(job, 1)) == ["checkpoint-1"]
    events: list[Event] = []

    def watch(event: Event) -> None:
        events.append(event)
        in_layer(5, stop)(event)

    with pytest.raises(Stop):
        run(replace(job, resume=True), watch)
    assert names(tmp_path / "out.partial" / "checkpoints") == ["checkpoint-5"]
    assert [event.message for event in events if event.lasting][:1] == ["going on after layer 1 of 6"]
    assert next(event.done for event in events if not event.lasting) in (8, 10)
    run(replace(job, resume=True))
    assert contents(job) == undisturbed(kind)
    assert len([name for name in contents(job) if name.startswith("model-")]) > 1
    loaded: Any = AutoModelForCausalLM.from_pretrained(job.output_dir, output_loading_info=True)
    assert not loaded[1]["missing_keys"] and not loaded[1]["unexpected_keys"]


def test_a_run_without_time_to_save_leaves_nothing(job: Prune) -> None:
    for seconds in (None, float("inf"), 100.0):
        with pytest.raises(Stop):
            run(replace(job, save_seconds=seconds), in_layer(4, stop))
        assert not Path(job.output_dir + ".partial").exists()


def test_saving_takes_a_small_share_of_the_time(job: Prune, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default at most a thirtieth: after a save of 2 s the next follows 60 s later."""
    now, saved = [0.0], []
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])

    def save(_: object, num_layers: int) -> None:
        saved.append(num_layers)
        now[0] += 2

    monkeypatch.setattr(layer_checkpoint, "save", save)

    def a_layer_takes_12_s(event: Event) -> None:
        now[0] += 12 / 7 if not event.lasting else 0

    run(replace(job, save_seconds=None), a_layer_takes_12_s)
    assert saved == [1]
    saved.clear()
    run(replace(job, save_seconds=20.0, overwrite=True), a_layer_takes_12_s)
    assert saved == [2, 4]


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_says_what_is_saved_and_the_run_goes_on(
    stage: str, place: Path, tmp_path: Path, undisturbed: Callable[[str], dict[str, bytes]]
) -> None:
    job = JOBS[stage](place, tmp_path / "out")
    with pytest.raises(Interrupted, match=r"interrupted; .*out\.partial/checkpoints/checkpoint-3 is saved"):
        run(job, in_layer(3, lambda: signal.raise_signal(signal.SIGINT)))
    run(replace(job, resume=True))
    assert contents(job) == undisturbed(stage)
    with pytest.raises(KeyboardInterrupt) as raised:
        run(replace(job, overwrite=True), in_layer(0, lambda: signal.raise_signal(signal.SIGINT)))
    assert not isinstance(raised.value, Interrupted) and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("stage", "limit", "failing"),
    [
        ("prune", 20_000, "model-00001"),
        ("prune", 180_000, "checkpoint-4/states"),
        ("quantize", 20_000, "checkpoint-4/states"),
    ],
)
def test_a_full_disk_keeps_the_checkpoint_before(
    stage: str,
    limit: int,
    failing: str,
    place: Path,
    tmp_path: Path,
    small_files: Callable[[int], None],
    undisturbed: Callable[[str], dict[str, bytes]],
) -> None:
    """A shard does not fit, or the hidden states do not."""
    job = JOBS[stage](place, tmp_path / "out")
    with pytest.raises(OSError, match=failing):
        run(job, in_layer(3, lambda: small_files(limit)))
    small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert names(tmp_path / "out.partial" / "checkpoints") == ["checkpoint-3"]
    run(replace(job, resume=True))
    assert contents(job) == undisturbed(stage)


def test_a_disk_without_room_is_told_before_the_start(job: Prune, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for the output and two checkpoints: weights up to a shard, and hidden states of both models."""
    weights = sum(entry.num_bytes for entry in Checkpoint.open(job.model).entries.values())
    needed = weights + 2 * (SHARD_BYTES + 2 * 8 * 64 * 48 * 4)
    free = [needed - 10_000]
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(partial.shutil, "disk_usage", lambda _: usage(0, 0, free[0]))
    events: list[Event] = []
    with pytest.raises(OSError, match=rf"need {needed / 1e6:.1f} MB, .* are free.*--save-seconds inf"):
        run(job, events.append)
    assert not events and not Path(job.output_dir + ".partial").exists()
    run(replace(job, save_seconds=float("inf")))
    free[0] = needed
    run(replace(job, overwrite=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 0.6}, r"sparsity: found 0\.6, expected 0\.5"),
        ({"method": "admm"}, "method: found admm, expected sparsegpt"),
        ({"num_calibration_samples": 9}, r"num_calibration_samples: found 9, expected 8; the rows of tokens"),
        ({"dampening_frac": 0.02}, r"dampening_frac: found 0\.02, expected 0\.01"),
        ({"threads": 2}, "num_threads: found 2, expected 1"),
    ],
)
def test_other_options_are_named_and_nothing_is_touched(
    job: Prune, change: dict[str, Any], message: str
) -> None:
    folder = interrupt(job)
    try:
        with pytest.raises(ConfigError, match=f"checkpoint-4 belongs to .*{message}.*--overwrite"):
            run(replace(job, resume=True, **change))
    finally:
        torch.set_num_threads(1)
    assert names(folder) == ["checkpoint-4"]


def test_another_parent_or_text_is_named(job: Prune, place: Path, tmp_path: Path) -> None:
    interrupt(job)
    shutil.copytree(job.model, tmp_path / "same")
    other = save_random(LlamaConfig(**SIZES), tmp_path / "other", torch.bfloat16)
    with pytest.raises(ConfigError, match=r"the model's files \(sha256\): found \w{12}, expected \w{12};"):
        run(replace(job, model=str(other), resume=True))
    text = tmp_path / "text.txt"
    text.write_text(Path(job.dataset[0]).read_text(encoding="utf-8").replace("e", "a"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"configuration: the rows of tokens \(sha256\): found \w{12}, exp"):
        run(replace(job, dataset=(str(text),), resume=True))
    run(replace(job, model=str(tmp_path / "same"), resume=True))


def test_other_instructions_and_versions_are_said(job: Prune, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(job)
    monkeypatch.setattr(layer_checkpoint._native, "isa", lambda: "other")
    events: list[Event] = []
    run(replace(job, resume=True), events.append)
    _, said = [event.message for event in events if event.lasting]
    assert "native_instructions: found other" in said and "not bit-identical" in said
    manifest = json.loads((Path(job.output_dir) / "gossamer.json").read_text())
    assert manifest["metrics"]["notes"] == [said]


def test_an_interrupted_run_is_not_touched_unasked(job: Prune) -> None:
    interrupt(job)
    with pytest.raises(ConfigError, match="--resume goes on with it, --overwrite starts anew"):
        run(job)
    run(replace(job, overwrite=True))
    assert not (Path(job.output_dir) / "checkpoints").exists()
    with pytest.raises(ConfigError, match=r"--resume: found no interrupted run in .*out\.partial"):
        run(replace(job, resume=True, overwrite=True))


def test_a_damaged_checkpoint_and_a_missing_shard_are_errors(job: Prune) -> None:
    folder = interrupt(job) / "checkpoint-4"
    [shard] = folder.parents[1].glob("model-00001.safetensors")
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"model-00001\.safetensors is missing.*--overwrite"):
        run(replace(job, resume=True))
    content = bytearray((folder / "states.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "states.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"states.safetensors: found sha256 .*--overwrite"):
        run(replace(job, resume=True))


def test_shards_that_have_their_last_names_already_are_taken_up(
    job: Prune, undisturbed: Callable[[str], dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed among the renames at the end."""
    rename, renamed = Path.rename, []

    def fail_second(path: Path, target: Path) -> Path:
        if "-of-" in target.name:
            renamed.append(target)
        if len(renamed) == 2:
            raise Stop
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Path, "rename", fail_second)
        run(job)
    assert renamed[0].exists()
    run(replace(job, resume=True))
    assert contents(job) == undisturbed("prune")


@pytest.fixture(scope="module")
def nursery() -> Iterator[ForkServerContext]:
    """Forks processes that have everything imported, with one thread as here."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["gossamer.stages.prune", "gossamer.stages.quantize", "many_shards", "matplotlib.figure"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        context.Process(target=abs, args=(1,)).start()
        yield context


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_moment_it_ends_in_the_same_bytes(
    stage: str,
    place: Path,
    tmp_path: Path,
    undisturbed: Callable[[str], dict[str, bytes]],
    nursery: ForkServerContext,
) -> None:
    """SIGKILL again and again, at moments of no one's choosing: while it loads, prunes, saves or writes."""
    job, expected = JOBS[stage](place, tmp_path / "out"), undisturbed(stage)
    generator, num_kills = np.random.default_rng(0), 100 if TORTURE else 12
    folder = tmp_path / "out.partial" / "checkpoints"
    whole_s = [1.0]
    while num_kills:
        resumable, begun = any(folder.glob("checkpoint-*")), time.monotonic()
        process = nursery.Process(target=run_alone, args=(replace(job, resume=resumable, overwrite=True),))
        process.start()
        process.join(generator.uniform(0, whole_s[-1]))
        if process.exitcode is None:
            process.kill()
            num_kills -= 1
            process.join()
        else:
            assert process.exitcode == 0 and contents(job) == expected
            whole_s.append(time.monotonic() - begun)
    run(replace(job, resume=any(folder.glob("checkpoint-*")), overwrite=True))
    assert contents(job) == expected


def test_ctrl_c_exits_130_and_the_command_it_names_goes_on(place: Path, tmp_path: Path) -> None:
    words = [
        *("prune", str(place / "bf16"), "-o", str(tmp_path / "out")),
        *("--dataset", str(place / "text.txt")),
    ]
    words += ["--num-calibration-samples", "64", "--max-seq-length", "64", "--save-seconds", "0"]
    command = [sys.executable, "-m", "gossamer", *words, "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob("out.partial/checkpoints/checkpoint-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1].replace("\n", " ")
    assert process.returncode == 130 and "Traceback" not in message, message
    resuming = message[message.index("to go on: gossamer ") :].removeprefix("to go on: gossamer ")
    assert shlex.split(resuming).count("--resume") == 1
    assert cli.call(shlex.split(resuming)) == 0
    assert Checkpoint.open(tmp_path / "out").sparsity() == pytest.approx(0.5, abs=1e-3)
