"""ModernBERT as sentence-transformers' directories hold it, from the dense model to the engine's vectors."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from encoders import save_encoder
from gossamer.checkpoint.directory import Checkpoint
from gossamer.engine import Encoder
from gossamer.evaluation.encoders import TorchEncoder
from gossamer.packed.reader import Packed
from gossamer.stages.evaluate import Evaluate, evaluate
from gossamer.stages.pack import Pack, pack
from gossamer.stages.pretrain import Pretrain, pretrain
from gossamer.stages.prune import Prune, prune
from gossamer.stages.quantize import Quantize, quantize
from gossamer.tools.inspect import Inspect, inspect
from gossamer.tools.verify import Verify, verify

SPECIAL = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
IDS = dict(zip(("cls", "sep", "pad"), (1, 2, 3), strict=True))
PROMPTS = {"query": "search_query: ", "document": "search_document: "}


def texts(count: int, seed: int = 0) -> list[str]:
    """Of 1 to 60 words, far more than a window holds."""
    rng = np.random.default_rng(seed)
    words = [
        "the",
        "a",
        "of",
        "river",
        "stone",
        "bridge",
        "city",
        "light",
        "dark",
        "cold",
        "warm",
        "north",
        "south",
        "ran",
        "fell",
        "rose",
    ]
    return [" ".join(rng.choice(words, rng.integers(1, 60))) for _ in range(count)]


def save(directory: Path, pooling: str, **config: Any) -> Path:
    """As nomic-ai/modernbert-embed-base and Alibaba-NLP/gte-modernbert-base are laid out: byte-level BPE,
    modules.json, a pooling, prompts, and the model's class without a head."""
    sizes = {"vocab_size": 300, "max_position_embeddings": 128, "hidden_size": 32, "intermediate_size": 48}
    ids = {f"{name}_token_id": index for name, index in IDS.items()} | {"bos_token_id": 1, "eos_token_id": 2}
    save_encoder(directory, "ModernBertModel", **sizes | ids | config)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(50), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {f"{it[1:-1].lower()}_token": it for it in SPECIAL}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **names)
    wrapped.save_pretrained(directory)
    modules = ["Transformer", "Pooling", "Normalize"]
    files: dict[str, Any] = {
        "modules.json": [
            {
                "idx": index,
                "name": str(index),
                "path": f"{index}_{kind}" if index else "",
                "type": f"sentence_transformers.models.{kind}",
            }
            for index, kind in enumerate(modules)
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": 32,
            **{
                f"pooling_mode_{it}_token{'s' if it == 'mean' else ''}": it == pooling
                for it in ("cls", "mean")
            },
            "include_prompt": True,
        },
        "sentence_bert_config.json": {"max_seq_length": 128, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": PROMPTS, "similarity_fn_name": "cosine"},
    }
    (directory / "1_Pooling").mkdir()
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("modern")
    save(place / "dense", "mean")
    (place / "text.txt").write_text("\n".join(texts(300)), encoding="utf-8")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts(150))
    (place / "text.jsonl").write_text(lines, encoding="utf-8")
    few: dict[str, Any] = {"dataset": (str(place / "text.txt"),), "num_calibration_samples": 16}
    prune(Prune(str(place / "dense"), str(place / "50"), sparsity=0.5, max_seq_length=64, **few))
    quantize(Quantize(str(place / "50"), str(place / "int8"), max_seq_length=64, **few))
    for name in ("dense", "50", "int8"):
        pack(Pack(str(place / name), str(place / f"{name}.goss"), storage="smallest"))
    return place


def torchs(directory: Path, found: list[str], pooling: str) -> np.ndarray:
    """transformers' vectors of length 1, a text at a time."""
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory)
    vectors = []
    for text in found:
        with torch.no_grad():
            ids = tokenizer(text, truncation=True, max_length=128, return_tensors="pt")["input_ids"]
            h_TD = model(ids).last_hidden_state[0]
        vectors.append(h_TD[0] if pooling == "cls" else h_TD.mean(0))
    return torch.nn.functional.normalize(torch.stack(vectors), dim=-1).numpy()


@pytest.mark.parametrize("name", ["dense", "50"])
def test_vectors_of_a_batch_are_those_of_transformers(place: Path, name: str) -> None:
    found, encoder = texts(24, seed=1), Encoder(place / f"{name}.goss", 2)
    assert max(len(row.ids) for row in encoder.token_ids(found)) > 60
    np.testing.assert_allclose(encoder.encode(found), torchs(place / name, found, "mean"), atol=1e-5)
    asked = encoder.encode(found, prompt_name="query")
    prompted = [PROMPTS["query"] + text for text in found]
    np.testing.assert_allclose(asked, torchs(place / name, prompted, "mean"), atol=1e-5)


def test_the_first_token_s_vector_where_the_files_say_so(tmp_path: Path) -> None:
    directory, found = save(tmp_path / "model", "cls", norm_bias=True, mlp_bias=True), texts(9)
    encoder = Encoder(directory, offline=True)
    np.testing.assert_allclose(encoder.encode(found), torchs(directory, found, "cls"), atol=1e-5)


def test_int8_vectors_are_near_and_smoothing_folds(place: Path) -> None:
    found = texts(24, seed=1)
    ours, dense = (Encoder(place / f"{name}.goss").encode(found) for name in ("int8", "50"))
    cosines = (np.asarray(ours) * np.asarray(dense)).sum(1)
    assert cosines.min() > 0.999
    packed = Packed.open(place / "int8.goss")
    kinds = {it.values for name, it in packed.matrices.items() if ".Wo" in name or "_proj" in name}
    assert kinds == {"i8"} and packed.metadata["version"] == "6"
    before, after = (Checkpoint.open(place / name) for name in ("50", "int8"))
    for linear in before.linears:
        assert not (before.zeros(f"{linear}.weight") & ~after.zeros(f"{linear}.weight")).any()
    norms = [name for name in before.names if name.endswith("mlp_norm.weight")]
    assert not all(np.array_equal(before.raw(name), after.raw(name)) for name in norms)


def test_directories_are_sound_and_read_by_transformers(place: Path) -> None:
    for parent, child in (("dense", "50"), ("50", "int8")):
        verify(Verify(str(place / child), parent=str(place / parent)))
    assert abs(Checkpoint.open(place / "50").sparsity() - 0.5) < 0.02
    verify(Verify(str(place / "int8.goss"), parent=str(place / "int8")))
    assert AutoModel.from_pretrained(place / "50").layers[0].attn.Wqkv.weight.eq(0).float().mean() > 0.4
    described = inspect(Inspect(str(place / "50.goss")))
    assert described.architecture["windows"] == (None, 11, 11, None) and described.tables()


def job(place: Path, output: Path, **changes: Any) -> Pretrain:
    settings: dict[str, Any] = {
        "dataset": (str(place / "text.jsonl"),),
        "teacher": str(place / "dense"),
        "num_tokens": 12 * 256,
        "max_length": 64,
        "batch_tokens": 256,
        "learning_rate": 3e-3,
        "precision": "f32",
        "report_to": "none",
    }
    return Pretrain(str(place / "50"), str(output), **(settings | changes))


@pytest.mark.parametrize("kernel", ["dense", "sparse"])
def test_vectors_are_learned_of_a_teacher_and_zeros_stay(place: Path, tmp_path: Path, kernel: Any) -> None:
    result = pretrain(job(place, tmp_path / "out", kernel=kernel, freeze="embeddings"))
    assert result.cosine_last is not None and result.loss_last < result.loss_first
    before, after = Checkpoint.open(place / "50"), Checkpoint.open(tmp_path / "out")
    for name in before.linears:
        np.testing.assert_array_equal(before.zeros(f"{name}.weight"), after.zeros(f"{name}.weight"))
    same = {name for name in before.names if np.array_equal(before.raw(name), after.raw(name))}
    assert same == {"embeddings.tok_embeddings.weight", "embeddings.norm.weight"}


def test_zeros_rise_while_it_learns(place: Path, tmp_path: Path) -> None:
    rising = replace(job(place, tmp_path / "out", prune_schedule="cubic:0.7"), model=str(place / "dense"))
    pretrain(rising)
    assert Checkpoint.open(tmp_path / "out").sparsity() == pytest.approx(0.7, abs=0.01)


def test_both_backends_measure_the_same(place: Path, tmp_path: Path) -> None:
    pairs = zip(texts(30, seed=3), texts(30, seed=4), strict=True)
    lines = "".join(f"{number % 6}.0\t{one}\t{other}\n" for number, (one, other) in enumerate(pairs))
    (tmp_path / "sts.tsv").write_text(lines, encoding="utf-8")
    settings: dict[str, Any] = {"dataset": str(tmp_path / "sts.tsv"), "kind": "sts", "threads": 1}
    engine = evaluate(Evaluate(str(place / "50.goss"), **settings))
    torchs = evaluate(Evaluate(str(place / "50"), backend="torch", **settings))
    found, wanted = (it.metrics["sts.tsv"]["spearman"] for it in (engine, torchs))
    assert found == pytest.approx(wanted, abs=1e-4)


def test_torch_pads_and_the_engine_does_not(place: Path) -> None:
    found = texts(12, seed=4)
    padded = TorchEncoder(str(place / "50")).vectors(found)
    np.testing.assert_allclose(Encoder(place / "50.goss").encode(found), padded, atol=1e-5)
