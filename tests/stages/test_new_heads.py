"""`finetune` of encoders that have no head for the examples' classes: they get one, and keep their bodies."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from encoders import save_encoder
from gossamer.checkpoint.directory import Checkpoint
from gossamer.engine import Encoder
from gossamer.errors import ConfigError
from gossamer.job.report import Event
from gossamer.stages.evaluate import Evaluate, evaluate
from gossamer.stages.finetune import Finetune, finetune
from gossamer.stages.pack import Pack, pack
from gossamer.stages.prune import Prune, prune
from gossamer.stages.quantize import Quantize, quantize
from gossamer.training.new_head import with_new_head

CLASSES = ["high", "low", "middle"]
HEADS = {
    ("BertModel", "classification"): "BertForSequenceClassification",
    ("BertModel", "tokens"): "BertForTokenClassification",
    ("BertForMaskedLM", "classification"): "BertForSequenceClassification",
    ("RobertaModel", "tokens"): "RobertaForTokenClassification",
    ("RobertaForMaskedLM", "classification"): "RobertaForSequenceClassification",
    ("BertForSequenceClassification", "tokens"): "BertForTokenClassification",
    ("BertForTokenClassification", "classification"): "BertForSequenceClassification",
    ("ModernBertForMaskedLM", "classification"): "ModernBertForSequenceClassification",
    ("ModernBertModel", "tokens"): "ModernBertForTokenClassification",
}


def rows(format: str, count: int = 300) -> list[dict[str, Any]]:
    """The first word of a text says its class, and every word its own."""
    generator, found = np.random.default_rng(0), []
    for _ in range(count):
        words = generator.choice([*"abcdefghi"], generator.integers(1, 9)).tolist()
        names = [("low", "middle", "high")[(ord(word) - ord("a")) // 3] for word in words]
        text = {"text": " ".join(words), "label": names[0]}
        found.append(text if format == "classification" else {"tokens": words, "labels": names})
    return found


def write(file: Path, content: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(file)


def prepared(folder: Path, kind: str, format: str, **changes: Any) -> Finetune:
    """A job for a model of this class, half of whose weights are zero."""
    save_encoder(folder / "model", kind)
    tensors = load_file(folder / "model" / "model.safetensors")
    torch.manual_seed(0)
    for name, weight in tensors.items():
        if ".layer" in f".{name}" and weight.dim() == 2:
            tensors[name] = weight * (torch.rand(weight.shape) < 0.5)
    save_file(tensors, folder / "model" / "model.safetensors", {"format": "pt"})
    settings: dict[str, Any] = {
        "dataset": (write(folder / "rows.jsonl", rows(format)),),
        "format": format,
        "distill": "none",
        "num_train_epochs": 3,
        "batch_tokens": 256,
        "learning_rate": 1e-2,
        "precision": "f32",
        "report_to": "none",
    }
    return Finetune(str(folder / "model"), str(folder / "out"), **settings | changes)


@pytest.mark.parametrize(("kind", "format"), HEADS)
def test_a_new_head_is_transformers_own_and_learns(tmp_path: Path, kind: str, format: str) -> None:
    job, said = prepared(tmp_path, kind, format), []
    result = finetune(job, lambda event: said.append(event.message))
    assert any("a new head of random weights for 3 classes (high, low, middle)" in it for it in said)
    assert result.loss_last < 0.75 * result.loss_first
    whole, info = getattr(transformers, HEADS[kind, format]).from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert [whole.config.id2label[it] for it in range(3)] == CLASSES
    assert whole.config.label2id == {name: number for number, name in enumerate(CLASSES)}
    source, child = (Checkpoint.open(tmp_path / it) for it in ("model", "out"))
    for before, after in zip(source.linears, child.linears, strict=True):
        assert np.array_equal(source.zeros(f"{before}.weight"), child.zeros(f"{after}.weight"))
    assert child.manifest is not None and child.manifest["parent"]["hash"] == source.hash
    tokenizer, given = AutoTokenizer.from_pretrained(tmp_path / "out"), "a e i c"
    with torch.no_grad():
        wanted = whole.eval()(**tokenizer(given, return_tensors="pt")).logits[0]
    if format == "classification":
        encoder = Encoder(tmp_path / "out", 1)
        found = encoder.classifier().scores(encoder.pooled(encoder.token_ids([given])))[0]
        np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("kind", ["BertModel", "RobertaForMaskedLM"])
def test_the_body_is_kept_and_the_head_is_drawn_by_the_seed(tmp_path: Path, kind: str) -> None:
    save_encoder(tmp_path, kind, hidden_size=64, initializer_range=0.3)
    source = Checkpoint.open(tmp_path)
    made, again, other = (with_new_head(source, "sequence", CLASSES, seed) for seed in (7, 7, 8))
    body = source.architecture.embedding.removesuffix("embeddings.word_embeddings")
    for name in source.names:
        if name.startswith(("cls.", "lm_head.")):
            continue
        renamed = made.architecture.embedding.split(".")[0] + "." + name.removeprefix(body)
        np.testing.assert_array_equal(made.raw(renamed), source.raw(name))
    last = "classifier.weight" if kind == "BertModel" else "classifier.out_proj.weight"
    assert made.raw(last).shape == (3, 64) and np.std(made.raw(last)) == pytest.approx(0.3, rel=0.2)
    assert not made.raw(last.replace("weight", "bias")).any()
    assert np.array_equal(made.raw(last), again.raw(last))
    assert not np.array_equal(made.raw(last), other.raw(last))


@pytest.mark.parametrize("has_pooler", [True, False])
def test_a_pooler_that_another_head_leaves_unread_is_kept(tmp_path: Path, has_pooler: bool) -> None:
    """BERT as it was published calls itself a masked model, and has the pooler of its second task."""
    save_encoder(tmp_path, "BertForMaskedLM", initializer_range=0.1)
    file = tmp_path / "model.safetensors"
    pooler = {"bert.pooler.dense.weight": torch.ones(24, 24), "bert.pooler.dense.bias": torch.ones(24)}
    save_file({**load_file(file), **(pooler if has_pooler else {})}, file, {"format": "pt"})
    weight = with_new_head(Checkpoint.open(tmp_path), "sequence", CLASSES, 0).raw("bert.pooler.dense.weight")
    assert (weight == 1).all() if has_pooler else np.std(weight) == pytest.approx(0.1, rel=0.1)


class Stop(Exception):
    """Ends a run from outside, as if the machine had failed."""


def stop_at_7(event: Event) -> None:
    if event.done == 7 and event.message == "training":
        raise Stop


@pytest.mark.parametrize(("kind", "format"), [("BertModel", "classification"), ("RobertaModel", "tokens")])
def test_a_run_with_a_new_head_resumes_to_the_same_bits(tmp_path: Path, kind: str, format: str) -> None:
    job = prepared(tmp_path, kind, format)
    whole = finetune(job)
    stopped = replace(job, output_dir=str(tmp_path / "resumed"), save_steps=2)
    with pytest.raises(Stop):
        finetune(stopped, stop_at_7)
    assert finetune(replace(stopped, resume=True)).losses == whole.losses
    files = [tmp_path / it / "model.safetensors" for it in ("out", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_embedding_model_becomes_a_classifier_through_all_stages(tmp_path: Path) -> None:
    job = prepared(tmp_path, "BertModel", "classification", num_train_epochs=8)
    model = tmp_path / "model"
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling")]
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds]
    (model / "modules.json").write_text(json.dumps(modules))
    (model / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 8}))
    (model / "README.md").write_text("---\npipeline_tag: sentence-similarity\n---\n")
    (model / "LICENSE").write_text("theirs")
    finetune(job)
    left = {it.name for it in (tmp_path / "out").rglob("*")}
    assert not left & {"modules.json", "1_Pooling", "sentence_bert_config.json", "README.md"}
    assert "LICENSE" in left
    (tmp_path / "text.txt").write_text(" ".join(row["text"] for row in rows("classification")))
    few: dict[str, Any] = {
        "dataset": (str(tmp_path / "text.txt"),),
        "num_calibration_samples": 8,
        "max_seq_length": 16,
        "threads": 1,
    }
    pruned = prune(Prune(str(tmp_path / "out"), output_dir=str(tmp_path / "pruned"), sparsity=0.55, **few))
    quantize(Quantize(pruned.output_dir, output_dir=str(tmp_path / "int8"), **few))
    pack(Pack(str(tmp_path / "int8"), output_file=str(tmp_path / "it.goss")))
    for name in ("out", "int8", "it.goss"):
        measured = Evaluate(
            str(tmp_path / name), dataset=job.dataset[0], kind="classification", backend="engine", threads=1
        )
        assert evaluate(measured).accuracy["rows.jsonl"] > 0.9, name


def test_a_head_for_other_classes_is_kept_unless_a_new_one_is_asked_for(tmp_path: Path) -> None:
    job = prepared(tmp_path, "BertForSequenceClassification", "classification")
    with pytest.raises(ConfigError, match=r"expected one of LABEL_0, LABEL_1, .*--new-head"):
        finetune(job)
    finetune(replace(job, new_head=True))
    child = Checkpoint.open(tmp_path / "out")
    assert list(child.config["id2label"].values()) == CLASSES
    head = child.raw("classifier.weight")
    again = replace(job, model=str(tmp_path / "out"), output_dir=str(tmp_path / "again"), learning_rate=1e-9)
    finetune(again)
    np.testing.assert_allclose(Checkpoint.open(tmp_path / "again").raw("classifier.weight"), head, atol=1e-6)


def test_a_teacher_has_the_same_head_for_the_same_classes(tmp_path: Path) -> None:
    job = prepared(tmp_path, "BertModel", "classification")
    finetune(job)
    shutil.move(tmp_path / "out", tmp_path / "dense")
    taught = replace(job, distill="both", teacher=str(tmp_path / "dense"))
    result = finetune(taught)
    assert result.kl_last is not None and result.kl_first is not None and result.kl_last < result.kl_first
    for refused in (tmp_path / "model", tmp_path / "other"):
        if refused.name == "other":
            save_encoder(refused, "BertForSequenceClassification", num_labels=3)
        with pytest.raises(ConfigError, match="expected one for sequence, of high, low, middle"):
            finetune(replace(taught, teacher=str(refused), overwrite=True))


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([1, 2, 3], "found labels 1, 2, 3; expected two classes or more"),
        (["a", 0], "found labels 'a', 0; "),
        (["a", "a"], "found labels 'a'; "),
        ([0, None], "rows.jsonl:2: found label None; expected a name or a number"),
    ],
    ids=str,
)
def test_labels_that_are_no_classes(tmp_path: Path, labels: list[Any], says: str) -> None:
    job = prepared(tmp_path, "BertModel", "classification")
    write(tmp_path / "rows.jsonl", [{"text": "a", "label": label} for label in labels])
    with pytest.raises(ConfigError, match=says):
        finetune(job)


def test_classes_that_are_numbers_have_transformers_names(tmp_path: Path) -> None:
    job = prepared(tmp_path, "BertModel", "tokens", num_train_epochs=1)
    numbered = [{"tokens": ["a", "b", "c"], "labels": [0, 2, 1]}]
    finetune(replace(job, dataset=(write(tmp_path / "numbers.jsonl", numbered * 9),)))
    assert Checkpoint.open(tmp_path / "out").config["id2label"] == {str(it): f"LABEL_{it}" for it in range(3)}
