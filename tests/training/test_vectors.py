"""Embedding models learn a dense teacher's vectors: against transformers, text by text, and as a verb."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from encoders import save_encoder
from gossamer.checkpoint.directory import Checkpoint, Derived
from gossamer.errors import ConfigError, UnsupportedError
from gossamer.job.options import record
from gossamer.job.report import Event, quiet
from gossamer.stages.pretrain import Pretrain, pretrain
from gossamer.tokens.pooling import Pooling
from gossamer.training.memory import estimate_memory
from gossamer.training.rows import packed_rows
from gossamer.training.teacher import Teacher
from gossamer.training.trainer import train
from gossamer.training.vectors import TextVectors
from gossamer.training.whole_model import load_model

JOB = Pretrain(
    "model",
    "out",
    dataset=("text",),
    teacher="dense",
    batch_tokens=10**4,
    learning_rate=1e-3,
    warmup_ratio=0.0,
    weight_decay=0.0,
    precision="f32",
    report_to="none",
)


def vector(hidden_TD: Tensor, mode: str) -> Tensor:
    return {"mean": hidden_TD.mean(0), "cls": hidden_TD[0], "max": hidden_TD.max(0).values}[mode]


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
@pytest.mark.parametrize("name", ["BertModel", "RobertaModel", "ModernBertModel"])
@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_the_loss_is_that_of_each_text_alone(tmp_path: Path, name: str, mode: Any, precision: Any) -> None:
    """SquareHead over all tokens, and 1 - cosine over all texts: none sees another, nor padding."""
    dense = save_encoder(tmp_path / "dense", name, seed=1)
    student = save_encoder(tmp_path / "model", name)
    source = Checkpoint.open(tmp_path / "model")
    generator = np.random.default_rng(0)
    texts = [[2, *generator.integers(5, 31, n).tolist(), 3] for n in (1, 9, 4, 17, 2, 6, 11)]
    layers, cosines = 0.0, 0.0
    with torch.no_grad():
        for ids in texts:
            ours, theirs = (
                model(torch.tensor([ids]), output_hidden_states=True).hidden_states
                for model in (student, dense)
            )
            for s, t in zip(ours[1:], theirs[1:], strict=True):
                layers += float(((s - t).square().sum(-1) / t.square().sum(-1)).sum())
            u, v = (vector(states[-1][0], mode) for states in (ours, theirs))
            cosines += 1 - float(torch.cosine_similarity(u, v, 0))
    squarehead, cosine = layers / sum(map(len, texts)), 3.0 * (len(ours) - 1) * cosines / len(texts)
    rows = packed_rows([(ids, [-100] * len(ids)) for ids in texts], 24, 1, seed=0)
    target = Derived(source, tmp_path / "out", tmp_path, record(JOB), "test")
    job = replace(JOB, precision=precision)
    objective = TextVectors(source.architecture, Pooling(mode), 3.0)
    teacher = Teacher(load_model(Checkpoint.open(tmp_path / "dense")), "dense")
    history = train(job, load_model(source), rows, target, quiet, teacher, objective)
    near = 1e-4 if precision == "f32" else 0.05
    assert history.parts["squarehead"] == (pytest.approx(squarehead, rel=near),)
    assert history.parts["cosine"] == (pytest.approx(cosine, rel=near),)
    assert history.losses == (pytest.approx(squarehead + cosine, rel=near),)
    assert history.num_tokens == sum(map(len, texts))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, the same with two thirds of the weights of its layers zero, in blocks too, and texts."""
    place = tmp_path_factory.mktemp("vectors")
    save_encoder(place / "dense")
    for name, size in (("sparse", 1), ("blocks", 4)):
        shutil.copytree(place / "dense", place / name)
        tensors = load_file(place / name / "model.safetensors")
        torch.manual_seed(0)
        for key, weight in tensors.items():
            if ".layer." in key and weight.dim() == 2:
                kept = torch.rand(len(weight), weight.shape[1] // size) < 1 / 3
                tensors[key] = weight * kept.repeat_interleave(size, 1)
        save_file(tensors, place / name / "model.safetensors", {"format": "pt"})
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice([*"abcdefgh"], generator.integers(1, 30))) for _ in range(200)]
    (place / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return place


def job(place: Path, output: Path, **changes: Any) -> Pretrain:
    settings = {
        "dataset": (str(place / "text.jsonl"),),
        "teacher": str(place / "dense"),
        "num_tokens": 12 * 128,
        "max_length": 32,
        "batch_tokens": 128,
        "learning_rate": 3e-3,
        "precision": "f32",
        "report_to": "none",
    }
    return Pretrain(str(place / "sparse"), str(output), **(settings | changes))


def zeros(directory: Path) -> dict[str, np.ndarray]:
    source = Checkpoint.open(directory)
    return {name: source.zeros(f"{name}.weight") for name in source.linears}


@pytest.mark.parametrize("kernel", ["dense", "sparse"])
def test_a_sparse_encoder_learns_and_keeps_its_zeros(place: Path, tmp_path: Path, kernel: str) -> None:
    result = pretrain(job(place, tmp_path / "out", kernel=kernel, num_tokens=40 * 128, repeat=True))
    assert result.loss_last < 0.9 * result.loss_first
    assert result.cosine_last is not None and result.squarehead_last is not None
    assert result.cross_entropy_first is None and result.kl_first is None
    before, after = zeros(place / "sparse"), zeros(tmp_path / "out")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    entry = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert entry["loss"] == pytest.approx(entry["cosine"] + entry["squarehead"], rel=1e-5)
    assert {"tokens_per_s", "sparsity", "num_tokens", "grad_norm"} <= entry.keys()


def test_frozen_embeddings_stay_and_the_rest_learns(place: Path, tmp_path: Path) -> None:
    pretrain(job(place, tmp_path / "out", freeze="embeddings"))
    before, after = (load_file(at / "model.safetensors") for at in (place / "sparse", tmp_path / "out"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith(("embeddings.", "pooler."))}


class Stop(Exception):
    """Ends a run from outside, as if the machine had failed."""


def stop_at_7(event: Event) -> None:
    if event.done == 7 and event.message == "training":
        raise Stop


@pytest.mark.parametrize(
    "changes", [{}, {"prune_schedule": "cubic:0.8:0.1-0.9:2"}, {"kernel": "sparse"}], ids=str
)
def test_resumed_it_ends_in_the_same_bits(place: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    whole = pretrain(job(place, tmp_path / "whole", **changes))
    stopped = job(place, tmp_path / "resumed", save_steps=2, **changes)
    with pytest.raises(Stop):
        pretrain(stopped, stop_at_7)
    resumed = pretrain(replace(stopped, resume=True))
    assert resumed.losses == whole.losses
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(("model", "pattern"), [("blocks", None), ("dense", "1x4")])
def test_zeros_rise_in_blocks(place: Path, tmp_path: Path, model: str, pattern: str | None) -> None:
    """Where --pattern asks for them, and where the model has its zeros in blocks already."""
    schedule = "cubic:0.8:0.1-0.9:2"
    rising = job(place, tmp_path / "out", prune_schedule=schedule, pattern=pattern)
    pretrain(replace(rising, model=str(place / model)))
    before, after = zeros(place / model), zeros(tmp_path / "out")
    for name, found_NK in after.items():
        blocks = found_NK.reshape(-1, 4)
        assert np.array_equal(blocks.any(1), blocks.all(1))
        assert found_NK.mean() == pytest.approx(0.8, abs=4 / found_NK.size)
        assert (found_NK | ~before[name]).all()


def test_zeros_rise_one_by_one_where_they_are_asked_to(place: Path, tmp_path: Path) -> None:
    rising = job(place, tmp_path / "out", prune_schedule="cubic:0.8", pattern="unstructured")
    pretrain(replace(rising, model=str(place / "blocks")))
    blocks = next(iter(zeros(tmp_path / "out").values())).reshape(-1, 4)
    assert not np.array_equal(blocks.any(1), blocks.all(1))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"teacher": None}, ConfigError, "expected --teacher DIR, the dense model whose vectors"),
        ({"distill": "kl"}, UnsupportedError, "--distill kl.* has no logits"),
        ({"cross_entropy_weight": 0.5}, UnsupportedError, "--cross-entropy-weight 0.5.* has no logits"),
        ({"lora": 4}, UnsupportedError, "--lora 4 is for decoders"),
        ({"teacher_cache": "cache"}, UnsupportedError, "--teacher-cache cache is for decoders"),
        ({"parallel": "fsdp"}, UnsupportedError, "--parallel fsdp is for decoders"),
        ({"max_length": 2}, ConfigError, "--max-length 2: expected at least 3"),
        ({"cosine_weight": -1.0}, ConfigError, "--cosine-weight is -1"),
        ({"pattern": "1x4"}, ConfigError, "--pattern 1x4 .* --prune-schedule; give both"),
        ({"pattern": "2:4", "prune_schedule": "cubic:0.8"}, ConfigError, "--pattern 2:4 fixes the share"),
        ({"pattern": "1x5", "prune_schedule": "cubic:0.8"}, UnsupportedError, "24 inputs, .*--pattern 1x5"),
    ],
    ids=str,
)
def test_options_that_do_not_apply(
    place: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        pretrain(job(place, tmp_path / "out", **changes))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["BertForTokenClassification", "BertForSequenceClassification"])
def test_text_teaches_no_other_heads(place: Path, tmp_path: Path, name: str) -> None:
    save_encoder(tmp_path / "model", name)
    with pytest.raises(UnsupportedError, match="which is learned of examples"):
        pretrain(replace(job(place, tmp_path / "out"), model=str(tmp_path / "model")))


def test_the_weight_of_vectors_is_for_embedding_models(place: Path, tmp_path: Path, tiny_llama: Any) -> None:
    decoder = job(place, tmp_path / "out", cosine_weight=2.0, teacher=None)
    with pytest.raises(ConfigError, match="--cosine-weight 2 is of the vectors"):
        pretrain(replace(decoder, model=str(tiny_llama("llama2"))))


def test_gradients_and_moments_are_of_what_is_trained(place: Path, tmp_path: Path) -> None:
    """As the run's record has them, and as they were estimated."""
    pretrain(job(place, tmp_path / "out", freeze="embeddings"))
    metrics = json.loads((tmp_path / "out" / "gossamer.json").read_text())["metrics"]
    model: Any = load_model(Checkpoint.open(place / "sparse"))
    model.embeddings.requires_grad_(False)
    model.pooler.requires_grad_(False)
    estimate = estimate_memory(model, 4, 32, "f32")
    assert metrics["optimizer_gradient_bytes"] == estimate.gradients + estimate.moments
    assert estimate.logits == 0
