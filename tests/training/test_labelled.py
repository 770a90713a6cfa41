"""Encoders with a head: their losses against transformers' own, and masked tokens as a verb."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div

from encoders import save_encoder
from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import ConfigError
from gossamer.job.report import Event
from gossamer.stages.pretrain import Pretrain, pretrain
from gossamer.training.distillation import Distillation
from gossamer.training.heads import head_of
from gossamer.training.labelled import MaskedTokens
from gossamer.training.rows import IGNORED, Rows, packed_rows
from gossamer.training.teacher import LiveTeacher
from gossamer.training.text_rows import begins, encoder_inputs
from gossamer.training.whole_model import load_model

MASK, VOCABULARY = 4, 40


def rows_of_texts(seed: int = 0) -> Rows:
    generator = np.random.default_rng(seed)
    texts = [[2, *generator.integers(5, 31, n).tolist(), 3] for n in (1, 9, 4, 17, 2, 6, 11)]
    return packed_rows([(ids, [IGNORED] * len(ids)) for ids in texts], 24, 1, seed=0)


@pytest.fixture(params=["BertForMaskedLM", "RobertaForMaskedLM", "ModernBertForMaskedLM"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save_encoder(tmp_path / "model", request.param)
    save_encoder(tmp_path / "dense", request.param, seed=1)
    return tmp_path


def test_the_loss_of_masked_tokens_is_transformers_own(saved: Path) -> None:
    """Of the same batch, each text on its own; and beside it KL to a teacher, at a temperature."""
    student, dense = (load_model(Checkpoint.open(saved / name)) for name in ("model", "dense"))
    anatomy = Checkpoint.open(saved / "model").architecture
    objective = MaskedTokens(student, anatomy, MASK, seed=5)
    rows = rows_of_texts()
    batch = objective.batch(rows, [*range(len(rows))])
    loss = objective.loss(student, batch, None)
    summed, divergence, count, t = 0.0, 0.0, 0, 3.0
    with torch.no_grad():
        for index in range(int(batch["texts"].max()) + 1):
            there = batch["texts"] == index
            ids, labels = batch["input_ids"][there][None], batch["labels"][there][None]
            if not (labels != IGNORED).any():
                continue
            ours, theirs = (model(input_ids=ids, labels=labels) for model in (student, dense))
            kept = labels != IGNORED
            summed += float(ours.loss * kept.sum())
            q, p = ((found.logits[kept] / t).log_softmax(-1) for found in (ours, theirs))
            divergence += float(t**2 * kl_div(q, p, reduction="sum", log_target=True))
            count += int(kept.sum())
    assert count == int((batch["labels"] != IGNORED).sum())
    assert float(loss.own) == pytest.approx(summed, rel=1e-4)
    assert float(loss.total) == pytest.approx(summed, rel=1e-4)
    teacher = LiveTeacher(dense)
    teacher.read(batch, encoder_inputs(anatomy, batch))
    taught = objective.loss(student, batch, Distillation(teacher, ("cross_entropy", "kl"), t, 0.5))
    assert float(taught.total) == pytest.approx(0.5 * summed + divergence, rel=1e-3)


def test_gradients_are_transformers_own(saved: Path) -> None:
    """Of the tied embedding, the head and its bias too."""
    ours, theirs = (load_model(Checkpoint.open(saved / "model")) for _ in range(2))
    objective = MaskedTokens(ours, Checkpoint.open(saved / "model").architecture, MASK, seed=5)
    batch = objective.batch(rows_of_texts(), [0, 1])
    objective.loss(ours, batch, None).total.backward()
    inputs = encoder_inputs(objective.anatomy, batch)
    found = theirs(**inputs, labels=batch["labels"])
    (found.loss * (batch["labels"] != IGNORED).sum()).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and expected[name].grad is not None, name
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-4)


def test_what_is_masked(saved: Path) -> None:
    """15% of the tokens, in the shares of BERT, the same for a row in whichever batch; no marks."""
    generator = np.random.default_rng(0)
    texts = [[2, *generator.integers(5, 31, 62).tolist(), 3] for _ in range(400)]
    rows = packed_rows([(ids, [IGNORED] * 64) for ids in texts], 200, 1, seed=0).padded(7)
    model = load_model(Checkpoint.open(saved / "model"))
    objective = MaskedTokens(model, Checkpoint.open(saved / "model").architecture, MASK, seed=5)
    whole = objective.batch(rows, [*range(len(rows))])
    plain = rows.collate([*range(len(rows))])["input_ids"]
    chosen = whole["labels"] != IGNORED
    words = (plain >= 5) & (whole["texts"] >= 0)
    assert not (chosen & ~words).any() and not (chosen & begins(whole["texts"])).any()
    assert (whole["labels"][chosen] == plain[chosen]).all()
    assert (whole["input_ids"][~chosen] == plain[~chosen]).all()
    assert int(chosen.sum()) / int(words.sum()) == pytest.approx(0.15, abs=0.005)
    shown = whole["input_ids"][chosen]
    assert float((shown == MASK).float().mean()) == pytest.approx(0.8, abs=0.03)
    assert float((shown == plain[chosen]).float().mean()) == pytest.approx(0.1, abs=0.03)
    one = objective.batch(rows, [3])
    assert torch.equal(one["input_ids"][0], whole["input_ids"][3, : one["input_ids"].shape[1]])
    other = MaskedTokens(model, objective.anatomy, MASK, seed=6).batch(rows, [3])
    assert not torch.equal(one["labels"], other["labels"])


@pytest.mark.parametrize("family", ["Bert", "Roberta", "ModernBert"])
def test_heads_are_transformers_own(tmp_path: Path, family: str) -> None:
    name = f"{family}ForSequenceClassification"
    model = save_encoder(tmp_path / "model", name, num_labels=3, classifier_pooling="cls")
    ids = torch.tensor([[2, 7, 8, 9, 3]])
    with torch.no_grad():
        found = model(ids, output_hidden_states=True)
        torch.testing.assert_close(head_of(model)(found.hidden_states[-1][:, 0]), found.logits)


def job(saved: Path, output: Path, **changes: Any) -> Pretrain:
    texts = [" ".join("abcdefgh"[at % 8 :]) for at in range(400)]
    (saved / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = {
        "dataset": (str(saved / "text.jsonl"),),
        "num_tokens": 12 * 128,
        "max_length": 32,
        "batch_tokens": 128,
        "learning_rate": 3e-3,
        "precision": "f32",
        "report_to": "none",
    }
    return Pretrain(str(saved / "model"), str(output), **(settings | changes))


class Stop(Exception):
    """Ends a run from outside, as if the machine had failed."""


def stop_at_7(event: Event) -> None:
    if event.done == 7 and event.message == "training":
        raise Stop


@pytest.mark.parametrize("distill", ["none", "both"])
def test_masked_pretraining_resumes_to_the_same_bits(saved: Path, distill: Any) -> None:
    teacher = None if distill == "none" else str(saved / "dense")
    changes: dict[str, Any] = {"teacher": teacher, "prune_schedule": "cubic:0.6:0.1-0.5:2"}
    if teacher is not None:
        changes |= {"distill": distill, "cross_entropy_weight": 0.5, "distill_temperature": 2.0}
    whole = pretrain(job(saved, saved / "whole", **changes))
    stopped = job(saved, saved / "resumed", save_steps=2, **changes)
    with pytest.raises(Stop):
        pretrain(stopped, stop_at_7)
    resumed = pretrain(replace(stopped, resume=True))
    assert resumed.losses == whole.losses
    assert whole.sparsity == pytest.approx(0.6, abs=0.01)
    files = [saved / name / "model.safetensors" for name in ("whole", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (whole.kl_first is None) == (teacher is None)


def test_masked_pretraining_learns(saved: Path) -> None:
    result = pretrain(job(saved, saved / "out", num_tokens=100 * 128, repeat=True, learning_rate=1e-2))
    assert result.loss_last < 0.6 * result.loss_first


def test_logits_are_learned_of_the_same_head(saved: Path) -> None:
    [name] = Checkpoint.open(saved / "model").config["architectures"]
    save_encoder(saved / "headless", name.replace("ForMaskedLM", "Model"))
    taught = {"teacher": str(saved / "headless"), "distill": "kl"}
    with pytest.raises(ConfigError, match="has a head for embedding; expected one for masked"):
        pretrain(job(saved, saved / "out", **taught))


def test_a_tokenizer_that_hides_nothing(saved: Path) -> None:
    file = saved / "model" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["mask_token"]
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="names no token that hides another"):
        pretrain(job(saved, saved / "out"))
