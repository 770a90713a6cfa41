"""Rows of tokens and the trainer that eats them, against transformers run example by example."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, get_scheduler

from gossamer.checkpoint.directory import Checkpoint, Derived
from gossamer.errors import ConfigError
from gossamer.job.options import record
from gossamer.job.report import Event, quiet
from gossamer.stages.pretrain import Pretrain
from gossamer.training import preparation
from gossamer.training.memory import estimate_elsewhere, estimate_memory
from gossamer.training.rate import falling
from gossamer.training.row_trainer import RowTrainer
from gossamer.training.rows import Example, Rows, packed_rows
from gossamer.training.teacher import Teacher
from gossamer.training.trainer import train

JOB = Pretrain(
    "model",
    "out",
    dataset=("text",),
    batch_tokens=128,
    learning_rate=1e-3,
    warmup_ratio=0.0,
    weight_decay=0.0,
    precision="f32",
)


@pytest.fixture
def model(tiny_llama: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_llama("llama3"))


@pytest.fixture
def target(tiny_llama: Any, tmp_path: Path) -> Derived:
    """A place for runs; each begins anew."""
    return Derived(Checkpoint.open(tiny_llama("llama3")), tmp_path / "out", tmp_path, record(JOB), "test")


def examples(count: int) -> list[Example]:
    """Prompts of 2 to 5 tokens with answers of 1 to 6."""
    generator = np.random.default_rng(0)
    made = []
    for _ in range(count):
        prompt = generator.integers(2, 320, generator.integers(2, 6)).tolist()
        answer = generator.integers(2, 320, generator.integers(1, 7)).tolist()
        made.append((prompt + answer, [-100] * len(prompt) + answer))
    return made


@given(
    lengths=st.lists(st.integers(2, 20), min_size=1, max_size=60),
    num_epochs=st.integers(1, 3),
    seed=st.integers(0, 5),
)
@settings(max_examples=50, deadline=None)
def test_packing_keeps_every_example_whole(lengths: list[int], num_epochs: int, seed: int) -> None:
    """Reading the rows back by their positions gives each epoch's examples, nothing else."""
    made = [([n] * length, [-100] + [n] * (length - 1)) for n, length in enumerate(lengths)]
    packed = packed_rows(made, 24, num_epochs, seed)
    assert packed.lengths_S is not None
    found = []
    for row, length in enumerate(packed.lengths_S):
        batch = {name: tensor[0].numpy() for name, tensor in packed.collate([row]).items()}
        assert len(batch["input_ids"]) == length
        positions = batch.get("position_ids", np.arange(length))
        for piece, labels in zip(
            np.split(batch["input_ids"], np.flatnonzero(positions == 0)[1:]),
            np.split(batch["labels"], np.flatnonzero(positions == 0)[1:]),
            strict=True,
        ):
            found.append((piece.tolist(), labels.tolist()))
    assert sorted(found) == sorted(made * num_epochs)


@torch.no_grad()
def test_packed_loss_equals_example_by_example(model: LlamaForCausalLM, target: Derived) -> None:
    """Packed examples neither see nor predict one another: the mean loss is that of separate runs."""
    made = examples(12)
    summed, count = 0.0, 0
    for ids, labels in made:
        logits_TV = model(input_ids=torch.tensor([ids])).logits[0]
        summed += float(cross_entropy(logits_TV[:-1], torch.tensor(labels[1:]), reduction="sum"))
        count += sum(label != -100 for label in labels[1:])
    with torch.enable_grad():
        job = replace(JOB, batch_tokens=12 * 32)
        history = train(job, copy.deepcopy(model), packed_rows(made, 32, 1, seed=0), target, quiet)
    assert len(history.losses) == 1
    assert history.losses[0] == pytest.approx(summed / count, rel=1e-5)
    assert history.num_tokens == sum(len(ids) for ids, _ in made)


def test_packed_teacher_sees_the_same_and_padding_does_not_count(
    model: LlamaForCausalLM, target: Derived
) -> None:
    """Logged loss - cross-entropy = SquareHead over the examples' tokens, each run alone."""
    made, teacher = examples(6), copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight.mul_(0.9)
    error, num_tokens = 0.0, 0
    with torch.no_grad():
        for ids, _ in made:
            ours, theirs = (
                llama(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[1:]
                for llama in (model, teacher)
            )
            for s_1TD, t_1TD in zip(ours, theirs, strict=True):
                error += float(((s_1TD - t_1TD).square().sum(-1) / t_1TD.square().sum(-1)).sum())
            num_tokens += len(ids)
    job = replace(JOB, batch_tokens=6 * 24)
    alone = train(job, copy.deepcopy(model), packed_rows(made, 24, 1, seed=0), target, quiet)
    taught = train(job, model, packed_rows(made, 24, 1, seed=0), target, quiet, Teacher(teacher, "hash"))
    assert taught.losses[0] - alone.losses[0] == pytest.approx(error / num_tokens, rel=1e-4)
    assert taught.parts["cross_entropy"] == pytest.approx(alone.losses, rel=1e-5) and alone.parts == {}
    metrics = taught.metrics()
    assert metrics["squarehead_last"] == pytest.approx(error / num_tokens, rel=1e-3)
    assert metrics["cross_entropy_last"] == pytest.approx(alone.losses[0], rel=1e-3)
    assert taught.result("out", 0.5).squarehead_first == metrics["squarehead_first"]
    assert alone.result("out", 0.5).squarehead_first is None and "squarehead_first" not in alone.metrics()


@pytest.mark.parametrize(("distill", "weight"), [("kl", 1.0), ("both", 1.0), ("kl", 0.0), ("both", 0.25)])
def test_what_the_teacher_expects_next_is_learned_at_a_temperature(
    model: LlamaForCausalLM, target: Derived, distill: Any, weight: float
) -> None:
    """The first logged divergence is t^2 KL over the answers' tokens, run alone; training then heeds it."""
    made, teacher = examples(6), copy.deepcopy(model)

    @torch.no_grad()
    def divergence(student: LlamaForCausalLM) -> float:
        total, count = 0.0, 0
        for ids, labels in made:
            kept = torch.tensor(labels[1:]) != -100
            q_NV, p_NV = (
                (llama(input_ids=torch.tensor([ids])).logits[0, :-1][kept] / 2).log_softmax(-1)
                for llama in (student, teacher)
            )
            total, count = total + float(4 * (p_NV.exp() * (p_NV - q_NV)).sum()), count + int(kept.sum())
        return total / count

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                parameter.mul_(0.7)
    before, untaught = divergence(model), copy.deepcopy(model)
    rows = packed_rows(made, 24, 10, seed=0)
    job = replace(JOB, batch_tokens=6 * 24, distill=distill, distill_temperature=2.0)
    job = replace(job, cross_entropy_weight=weight)
    history = train(job, model, rows, target, quiet, Teacher(teacher, "hash"))
    train(replace(job, distill="none"), untaught, rows, target, quiet)
    parts = dict(history.parts)
    assert parts["kl"][0] == pytest.approx(before, rel=1e-3)
    assert divergence(model) < 0.9 * divergence(untaught) and ("squarehead" in parts) == (distill == "both")
    parts["cross_entropy"] = tuple(weight * value for value in parts["cross_entropy"])
    sums = [sum(values) for values in zip(*parts.values(), strict=True)]
    assert sums == pytest.approx(history.losses, rel=1e-4)
    assert history.result("out", 0.5).kl_first == history.metrics()["kl_first"]


def test_training_is_deterministic_and_learns(model: LlamaForCausalLM, target: Derived) -> None:
    rows = Rows(np.tile(np.arange(2, 34, dtype=np.int32), (64, 1)))
    twin = copy.deepcopy(model)
    events: list[Event] = []
    first = train(JOB, model, rows, target, events.append)
    second = train(JOB, twin, rows, target, quiet)
    assert first.losses == second.losses
    assert len(first.losses) == 16 and first.losses[-1] < 0.7 * first.losses[0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert [event.done for event in events if event.total] == list(range(1, 17))
    assert events[-1].metrics["learning_rate"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_the_rate_falls_as_transformers_has_it_and_as_often_as_asked(
    model: LlamaForCausalLM, target: Derived, shape: Any
) -> None:
    theirs = get_scheduler(shape, torch.optim.SGD(model.parameters(), 1.0), 3, 20)
    for step in range(20):
        assert falling(shape, 3, 20, 1)(step) == pytest.approx(theirs.get_last_lr()[0])
        theirs.optimizer.step()
        theirs.step()
    rows, events = Rows(np.tile(np.arange(2, 34, dtype=np.int32), (64, 1))), list[Event]()
    train(replace(JOB, lr_schedule=shape, lr_cycles=4), model, rows, target, events.append)
    rates = [event.metrics["learning_rate"] for event in events if event.total]
    part = [falling(shape, 0, 4, 1)(step) * 1e-3 for step in range(4)]
    assert rates == pytest.approx(4 * part)


def test_micro_batches_are_as_large_as_memory_has_room_for(
    model: LlamaForCausalLM, target: Derived, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to a row, and the steps stay the same; below that it says what to do in the options' words."""
    rows, seen, losses = Rows(np.tile(np.arange(2, 34, dtype=np.int32), (24, 1))), [], []
    job, compute_loss = replace(JOB, batch_tokens=12 * 32), RowTrainer.compute_loss

    def watch(trainer: RowTrainer, model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
        seen.append(len(inputs["input_ids"]))
        return compute_loss(trainer, model, inputs, *more, **named)

    monkeypatch.setattr(RowTrainer, "compute_loss", watch)

    def largest(num_bytes: int, **changes: Any) -> int:
        seen.clear()
        monkeypatch.setattr(preparation, "available_bytes", lambda device: num_bytes)
        events: list[Event] = []
        history = train(replace(job, **changes), copy.deepcopy(model), rows, target, events.append)
        losses.append(history.losses)
        [said] = [event.message for event in events if event.lasting]
        assert f"in micro-batches of {32 * seen[0]} tokens" in said
        assert seen == [seen[0]] * (24 // seen[0]) and ("(more do not fit)" in said) == (seen[0] < 12)
        return seen[0]

    needed = [estimate_memory(model, count, 32, "f32").total for count in (1, 2, 3, 4, 6, 12)]
    assert largest(needed[5]) == 12 and largest(needed[5] - 1) == 6
    assert largest(math.ceil(needed[2] / 0.9)) == 3
    assert largest(needed[0]) == 1
    assert all(each == pytest.approx(losses[0], rel=1e-5) for each in losses)
    with pytest.raises(ConfigError, match="for 32 tokens at a time") as raised:
        largest(needed[0] - 1)
    assert "--activation-checkpointing" in str(raised.value) and "--batch" not in str(raised.value)


def test_a_row_that_does_not_fit_is_advised_to_be_shorter(
    model: LlamaForCausalLM, target: Derived, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, teacher = Rows(np.ones((2, 1024), np.int32)), Teacher(copy.deepcopy(model), "hash")
    needed = estimate_memory(model, 1, 256, "f32", teacher=teacher.model, recompute=True).total
    monkeypatch.setattr(preparation, "available_bytes", lambda device: needed)
    advice = "lower --max-length to 256 or less; --teacher-cache FOLDER asks the .*; free memory"
    with pytest.raises(ConfigError, match=f"for 1,024 tokens at a time; found .* available: {advice}"):
        train(replace(JOB, activation_checkpointing=True), model, rows, target, quiet, teacher)


def test_what_a_run_could_do_with_less_memory_is_named(
    model: LlamaForCausalLM, target: Derived, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of options that go with those that are given: adapters need whole weights and a dense kernel."""
    rows = Rows(np.ones((2, 64), np.int32))
    monkeypatch.setattr(preparation, "available_bytes", lambda device: 1000)
    lora = "--lora RANK trains adapters alone"
    for changes, is_named in (({}, True), ({"lora": 2}, False), ({"prune_schedule": "0.5:1"}, False)):
        with pytest.raises(ConfigError, match="training needs about") as raised:
            train(replace(JOB, **changes), copy.deepcopy(model), rows, target, quiet)
        assert (lora in str(raised.value)) == is_named
        assert "--teacher" not in str(raised.value)
    cache, machine = "--teacher-cache FOLDER asks", "--teacher-device cpu leaves"
    for device, elsewhere, resume, expected in (
        ("cuda", None, False, [cache, machine]),
        ("cuda", "cpu", False, [cache]),
        ("cpu", None, False, [cache]),
        ("cuda", None, True, [machine]),
    ):
        advice = list(preparation._without_teacher(replace(JOB, resume=resume), device, elsewhere))
        assert [line.startswith(start) for line, start in zip(advice, expected, strict=True)]


def test_a_teacher_elsewhere_is_fitted_into_the_memory_there(
    model: LlamaForCausalLM, target: Derived, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that this machine need not have: it is measured before anything goes there."""
    rows, teacher = Rows(np.ones((4, 64), np.int32)), Teacher(copy.deepcopy(model), "hash")
    job = replace(JOB, teacher="dense", teacher_device="cuda:1", batch_tokens=4 * 64)
    there = estimate_elsewhere(teacher.model, 1, 64, "cuda:1")
    assert there.weights == sum(weight.nbytes for weight in model.parameters())
    for num_bytes, says in (
        (there.total - 1, "the teacher on cuda:1 needs about"),
        (there.total, "for 64 tok"),
    ):
        room = {"cuda:1": num_bytes, "cpu": 10**12 if num_bytes < there.total else 1000}
        monkeypatch.setattr(preparation, "available_bytes", room.get)
        with pytest.raises(ConfigError, match=says) as raised:
            train(job, copy.deepcopy(model), rows, target, quiet, teacher)
        assert ("give another --teacher-device" in str(raised.value)) == (num_bytes < there.total)


def test_a_teacher_on_a_device_that_is_named_teaches_the_same(
    model: LlamaForCausalLM, target: Derived
) -> None:
    rows = Rows(np.tile(np.arange(2, 34, dtype=np.int32), (8, 1)))
    losses = [
        train(
            replace(JOB, distill="both", teacher_device=device),
            copy.deepcopy(model),
            rows,
            target,
            quiet,
            Teacher(copy.deepcopy(model), "hash"),
        ).losses
        for device in (None, "cpu")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kernel", ["dense", "sparse"])
def test_layers_that_are_computed_again_train_the_same(
    model: LlamaForCausalLM, target: Derived, kernel: Any
) -> None:
    """Activation checkpointing changes no loss and no weight, with a teacher beside."""
    rows, found = packed_rows(examples(40), 32, 1, seed=0), []
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight[weight.abs() < weight.abs().median()] = 0
    for recompute in (False, True):
        trained, teacher = copy.deepcopy(model), Teacher(copy.deepcopy(model), "hash")
        job = replace(JOB, distill="both", kernel=kernel, activation_checkpointing=recompute)
        history = train(job, trained, rows, target, quiet, teacher)
        found.append((history.losses, list(trained.parameters())))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(*pair) for pair in zip(found[0][1], found[1][1], strict=True))


def test_bf16_is_near_float32(model: LlamaForCausalLM, target: Derived) -> None:
    rows = Rows(np.tile(np.arange(2, 34, dtype=np.int32), (16, 1)))
    exact = train(JOB, copy.deepcopy(model), rows, target, quiet)
    rounded = train(replace(JOB, precision="bf16"), model, rows, target, quiet)
    assert rounded.losses == pytest.approx(exact.losses, rel=0.03)
    assert rounded.losses != exact.losses
    assert model.lm_head.weight.dtype == torch.float32


def test_a_loss_that_is_not_finite_stops(model: LlamaForCausalLM, target: Derived) -> None:
    rows = Rows(np.tile(np.arange(2, 34, dtype=np.int32), (64, 1)))
    with pytest.raises(
        ConfigError, match=r"step \d+: the loss is (nan|inf).*--learning-rate \(it is 1e\+18\)"
    ):
        train(replace(JOB, learning_rate=1e18), model, rows, target, quiet)
