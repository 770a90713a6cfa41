"""Gradual pruning: the law, what each step of pruning does to weights and moments, and whole runs of it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM, TrainerCallback

from gossamer.checkpoint.directory import Checkpoint
from gossamer.checkpoint.resumable import _sha256, _write_record
from gossamer.errors import CheckpointError, ConfigError
from gossamer.job.report import Event
from gossamer.stages.finetune import Finetune, finetune
from gossamer.stages.pretrain import Pretrain, pretrain
from gossamer.training.gradual import CubicSchedule, GradualPruning
from gossamer.training.masks import model_mask_hash
from short_run import NUM_STEPS, model_and_text, short_run, weights
from two_processes import trainer

Llamas = Callable[[str], Path]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def test_the_law_is_zhu_and_guptas() -> None:
    """Five steps of pruning, after 10, 20, 30, 40 and 50 of 100: worked out by hand, and nothing between."""
    schedule = CubicSchedule.parse("cubic:0.0-0.8:0.1-0.5:10")
    found = {step: schedule.share_after(step, 100) for step in range(101)}
    expected = {10: 0.0, 20: 0.4625, 30: 0.7, 40: 0.7875, 50: 0.8}
    assert {step: share for step, share in found.items() if share is not None} == pytest.approx(expected)


@pytest.mark.parametrize("text", ["cubic:0.25-0.9:0.0-1.0:7", "cubic:.5-.75:.2-.6:1", "cubic:0.3-0.7"])
def test_the_law_between_other_ends(text: str) -> None:
    """s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3; the last step is one of pruning in any case."""
    schedule = CubicSchedule.parse(text)
    first, last = schedule.window(200)
    steps = [step for step in range(201) if schedule.share_after(step, 200) is not None]
    assert steps == sorted({*range(first, last + 1, schedule.every), last})
    for t in steps:
        expected = schedule.end + (schedule.start - schedule.end) * (1 - (t - first) / (last - first)) ** 3
        assert schedule.share_after(t, 200) == pytest.approx(expected)
    assert schedule.share_after(last, 200) == schedule.end


def test_what_is_left_out_has_defaults() -> None:
    assert CubicSchedule.parse("cubic:0.7", 0.5) == CubicSchedule(0.5, 0.7, begin=0.0, last=0.5, every=10)
    assert CubicSchedule.parse("cubic:0-0.7:0.1-0.6") == CubicSchedule(0.0, 0.7, 0.1, 0.6, every=10)
    assert CubicSchedule.parse("cubic:0.4999-0.7", 0.5).start == 0.4999  # a share that was rounded


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("linear:0-0.7", "expected cubic:.START-.END"),
        ("cubic:70%", "expected cubic:"),
        ("cubic:0-0.7:0.1", "expected cubic:"),
        ("cubic:0-0.7:0.1-0.6:2.5", "expected cubic:"),
        ("cubic:-0.1-0.7", "expected cubic:"),
        ("cubic:0.7-0.5", r"goes from 0\.7 to 0\.5.*stays zero"),
        ("cubic:0.3", r"goes from 0\.5 to 0\.3"),
        ("cubic:0.5-1.0", r"goes from 0\.5 to 1.*below 1"),
        (
            "cubic:0.2-0.7",
            r"begins at 0\.2 and would raise weights from zero.*0\.5000 sparse.*leave START out",
        ),
        ("cubic:0.7:0.6-0.1", r"between 0\.6 and 0\.1 of the steps.*the second above the first"),
        ("cubic:0.7:0.5-1.5", r"between 0\.5 and 1\.5"),
        ("cubic:0.7:0.5-0.5", r"between 0\.5 and 0\.5"),
        ("cubic:0.7:0.0-0.5:0", "every 0 steps; expected at least 1"),
    ],
)
def test_schedules_that_are_none(text: str, says: str) -> None:
    """For a model that is half zero."""
    with pytest.raises(ConfigError, match=f"--prune-schedule.*{says}"):
        CubicSchedule.parse(text, 0.5)


class Watch(TrainerCallback):
    """Notes every linear's weight as it is when a step ends, and what the optimizer holds of it."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.moments: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = {name: weight for name, weight in kwargs["model"].named_parameters() if "_proj" in name}
        assert all(weight.grad is None for weight in named.values())
        self.weights.append({name: weight.clone() for name, weight in named.items()})
        moments = {}
        for name, weight in named.items():
            state = kwargs["optimizer"].state[weight]
            moments[name] = torch.stack([state["exp_avg"], state["exp_avg_sq"]])
        self.moments.append(moments)


def test_each_step_of_pruning_takes_the_smallest_of_each_linear_and_its_moments(
    tiny_llama: Llamas, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_llama("llama2"))
    schedule, risen = CubicSchedule(0.2, 0.8, begin=0.0, last=0.75, every=2), []
    before, after = Watch(), Watch()
    trainer(tmp_path, model, before, GradualPruning(schedule, risen.append), after, max_steps=8).train()

    shares = [schedule.share_after(step, 8) for step in range(9)]
    assert [share is not None for share in shares] == [
        True,
        False,
        True,
        False,
        True,
        False,
        True,
        False,
        False,
    ]
    assert risen == pytest.approx([share for share in shares if share is not None], abs=1e-4)
    reached = shares[0]
    for step, (unpruned, pruned, moments) in enumerate(
        zip(before.weights, after.weights, after.moments, strict=True), 1
    ):
        reached = shares[step] if shares[step] is not None else reached
        assert reached is not None
        for name, weight_NK in pruned.items():
            zeros_NK, earlier_NK = weight_NK == 0, unpruned[name] == 0
            assert int(zeros_NK.sum()) == round(reached * weight_NK.numel()), (step, name)
            assert bool((zeros_NK | ~earlier_NK).all())
            assert unpruned[name][zeros_NK].abs().max() <= weight_NK[~zeros_NK].abs().min()
            assert torch.equal(unpruned[name][~zeros_NK], weight_NK[~zeros_NK])
            assert not moments[name][:, zeros_NK].any() and moments[name][:, ~zeros_NK].any()
    assert reached == 0.8


def test_a_weight_that_training_brings_to_zero_stays_there(tiny_llama: Llamas, tmp_path: Path) -> None:
    """Between two steps of pruning; for the mask is what a checkpoint would have of it, its zeros."""

    class BringsToZero(TrainerCallback):
        @torch.no_grad()
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                model.get_parameter(Q_PROJ)[1, 1:3] = 0

    model, after = LlamaForCausalLM.from_pretrained(tiny_llama("llama2")), Watch()
    masks = GradualPruning(CubicSchedule(0.0, 0.1, begin=0.8, last=1.0))
    trainer(tmp_path, model, BringsToZero(), masks, after, max_steps=5).train()
    zeros = [int((weights[Q_PROJ] == 0).sum()) for weights in after.weights]
    assert zeros == [0, 2, 2, 2, round(0.1 * 48 * 48)]
    assert not after.weights[3][Q_PROJ][1, 1:3].any()
    assert not after.moments[2][Q_PROJ][:, 1, 1:3].any()
    assert masks.enforced_mask_hash() == model_mask_hash(model)


@pytest.fixture(scope="module")
def place(tiny_llama: Llamas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is 30% zeros, and a text."""
    place = tmp_path_factory.mktemp("gradual")
    return model_and_text(place, tiny_llama("llama3"), 0.7, Path(__file__))


def twelve_steps(place: Path, output: Path, **changes: object) -> Pretrain:
    """Zeros rise after steps 2, 5, 8 and 9."""
    settings = {"prune_schedule": "cubic:0.75:0.2-0.75:3", "report_to": "none"}
    return short_run(place, output, **(settings | changes))


def logged(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("taught", [False, True])
def test_a_directory_with_more_zeros(place: Path, tiny_llama: Llamas, tmp_path: Path, taught: bool) -> None:
    events: list[Event] = []
    changes = {"teacher": str(tiny_llama("llama3")), "distill": "both"} if taught else {}
    result = pretrain(job := twelve_steps(place, tmp_path / "out", **changes), events.append)
    parent, child = Checkpoint.open(place / "model"), Checkpoint.open(tmp_path / "out")
    for name in (f"{linear}.weight" for linear in parent.linears):
        zeros_NK = child.zeros(name)
        assert zeros_NK.sum() == round(0.75 * zeros_NK.size)
        assert not (parent.zeros(name) & ~zeros_NK).any()
    assert result.sparsity == child.sparsity() == pytest.approx(0.75, abs=1e-4)
    assert result.losses[-1] > 0 and (result.kl_last is not None) == taught

    said = next(event.message for event in events if event.message.startswith("kernel "))
    assert said.startswith("kernel dense: --prune-schedule cubic:0.75:0.2-0.75:3 makes more weights zero; ")
    begun, schedule = parent.sparsity(), CubicSchedule.parse("cubic:0.75:0.2-0.75:3", parent.sparsity())
    shares = {step: schedule.share_after(step, NUM_STEPS) for step in (2, 5, 8, 9)}
    expected = [begun, *[shares[2]] * 3, *[shares[5]] * 3, shares[8], *[shares[9]] * 4]
    for shown in (
        [entry["sparsity"] for entry in logged(job.output_dir)],
        [event.metrics["sparsity"] for event in events if event.message == "training"],
    ):
        assert shown == pytest.approx(expected, abs=4e-3)  # linears with more than the rest keep them
    manifest = json.loads((tmp_path / "out" / "gossamer.json").read_text())
    assert manifest["job"]["prune_schedule"] == job.prune_schedule
    found = manifest["metrics"]["pruning"]
    assert found == {"first_step": 2, "last_step": 9, "sparsity": round(child.sparsity(), 6)}


class Stop(Exception):
    """Ends a run from outside, as if the machine had failed."""


def interrupt(job: Pretrain, step: int) -> Path:
    """Leave a run behind that was killed in that step; returns the folder of its checkpoints."""

    def progress(event: Event) -> None:
        if event.done == step:
            raise Stop

    with pytest.raises(Stop):
        pretrain(job, progress)
    return Path(job.output_dir + ".partial") / "checkpoints"


@pytest.fixture(scope="module")
def whole(place: Path) -> Pretrain:
    """A run that nothing disturbs."""
    pretrain(job := twelve_steps(place, place / "whole"))
    return job


@pytest.mark.parametrize("step", [3, 6, 9, 11])
def test_killed_and_resumed_it_ends_in_the_same_bits(
    place: Path, whole: Pretrain, tmp_path: Path, step: int
) -> None:
    """From a checkpoint right after a step of pruning (2, 8), between two (4) and after the last (10)."""
    folder = interrupt(job := twelve_steps(place, tmp_path / "out"), step)
    assert (folder / f"checkpoint-{(step - 1) // 2 * 2}").exists()
    result = pretrain(replace(job, resume=True))
    assert weights(job) == weights(whole) and result.num_steps == NUM_STEPS
    assert [entry["sparsity"] for entry in logged(job.output_dir)] == [
        entry["sparsity"] for entry in logged(whole.output_dir)
    ]


def test_another_schedule_is_another_run(place: Path, tmp_path: Path) -> None:
    job = twelve_steps(place, tmp_path / "out")
    interrupt(job, 5)
    with pytest.raises(
        ConfigError, match=r"prune_schedule: found cubic:0\.8, expected cubic:0\.75:0\.2-0\.75:3"
    ):
        pretrain(replace(job, resume=True, prune_schedule="cubic:0.8"))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_checkpoint_whose_zeros_are_not_its_mask(place: Path, tmp_path: Path, value: float) -> None:
    """One zero more or fewer than was recorded, in files that are otherwise whole."""
    job = twelve_steps(place, tmp_path / "out", save_steps=4)
    [folder] = interrupt(job, 5).iterdir()
    file, record = folder / "model.safetensors", json.loads((folder / "checkpoint.json").read_text())
    tensors = load_file(file)
    zeros_NK = tensors[Q_PROJ] == 0
    place_of = (zeros_NK if value else ~zeros_NK).nonzero()[0].tolist()
    tensors[Q_PROJ][*place_of] = value
    save_file(tensors, file, {"format": "pt"})
    record["files"]["model.safetensors"] = _sha256(file)
    _write_record(folder, {name: value for name, value in record.items() if name != "digest"})
    with pytest.raises(CheckpointError, match=r"checkpoint-4: its mask has sha256 \w+, the run's has \w+"):
        pretrain(replace(job, resume=True))


def test_finetuning_prunes_too(place: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"{a} + 1 = ", "completion": f"{a + 1}"} for a in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    job = Finetune(
        str(place / "model"),
        str(tmp_path / "out"),
        dataset=(str(tmp_path / "pairs.jsonl"),),
        batch_tokens=256,
        distill="none",
        prune_schedule="cubic:0.6:0-1:1",
    )
    assert finetune(job).sparsity == pytest.approx(0.6, abs=1e-4)
