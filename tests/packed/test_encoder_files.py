"""Encoders in files: what goes in comes out, and whatever contradicts it is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gossamer
from encoders import round_to_int8, save_encoder
from gossamer import _native
from gossamer.checkpoint.directory import Checkpoint
from gossamer.engine import LLM
from gossamer.errors import ConfigError, FormatError, UnsupportedError
from gossamer.packed.reader import Packed
from gossamer.stages.pack import Pack, pack
from gossamer.tokens.pooling import Pooling
from gossamer.tools.bench import Bench, bench
from gossamer.tools.inspect import Inspect, inspect
from gossamer.tools.verify import Verify, verify
from packed.damage import Header, join, set_entry, split
from packed.make_files import FILES

WORDS, POSITIONS = "embeddings.word_embeddings", "embeddings.position_embeddings.weight"
DOWN = "encoder.layer.0.output.dense"
UP = "encoder.layer.1.intermediate.dense"


def packed_encoder(directory: Path, name: str = "BertModel", **config: Any) -> Packed:
    save_encoder(directory / "model", name, **config)
    pack(Pack(str(directory / "model"), str(directory / "model.goss")))
    return Packed.open(directory / "model.goss")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return packed_encoder(tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize(
    "name",
    [
        "BertModel",
        "BertForMaskedLM",
        "RobertaForSequenceClassification",
        "XLMRobertaForQuestionAnswering",
        "ModernBertModel",
        "ModernBertForMaskedLM",
        "ModernBertForSequenceClassification",
    ],
)
def test_all_tensors_come_back(name: str, tmp_path: Path) -> None:
    packed, source = packed_encoder(tmp_path, name), Checkpoint.open(tmp_path / "model")
    packed.check()
    assert (
        packed.metadata["version"] == "6" and packed.matrices[packed.architecture.embedding].values == "f32"
    )
    assert {f"{matrix}.weight" for matrix in packed.matrices} == {
        f"{matrix}.weight" for matrix in [packed.architecture.embedding, *source.linears]
    }
    for tensor in source.names:
        matrix = tensor.removesuffix(".weight")
        found = packed.linear(matrix) if matrix in packed.matrices else packed.vector(tensor)
        np.testing.assert_array_equal(found, source.float32(tensor))
    assert "pooler.dense.weight" in packed.tensors or name != "BertModel"
    verify(Verify(str(packed.path), parent=str(source.path), skip_engine=True))


@pytest.mark.parametrize(
    ("sparsity", "together", "storage"), [(0, 1, "dense"), (0.7, 1, "sparse"), (0.7, 4, "blocks")]
)
def test_int8_linears_take_the_words_along(
    sparsity: float, together: int, storage: str, tmp_path: Path
) -> None:
    save_encoder(tmp_path / "model", intermediate_size=256, hidden_size=256)
    source = Checkpoint.open(round_to_int8(tmp_path / "model", sparsity, together))
    result = pack(Pack(str(source.path), str(tmp_path / "model.goss"), storage="smallest"))
    packed = Packed.open(tmp_path / "model.goss")
    packed.check()
    kinds = {(matrix.storage, matrix.values) for name, matrix in packed.matrices.items() if name != WORDS}
    assert kinds == {(storage, "i8")} and result.head == "none" and "gossamer.Encoder(" in result.closing[-1]
    words = packed.matrices[WORDS]
    assert (words.storage, words.values, [it.part for it in result.rounded]) == ("dense", "i8", ["embedding"])
    for name in source.linears:
        np.testing.assert_array_equal(packed.stored(name), source.raw(f"{name}.weight"))
    off = packed.linear(WORDS) - source.float32(f"{WORDS}.weight")
    assert np.abs(off).max() <= packed.scale(WORDS).max() / 2
    verify(Verify(str(packed.path), parent=str(source.path), skip_engine=True))


def test_the_words_stay_or_are_rounded_as_one_says(tmp_path: Path) -> None:
    save_encoder(tmp_path / "model")
    for values, stored in (("keep", "f32"), ("i8", "i8"), ("i4", "i4")):
        pack(Pack(str(tmp_path / "model"), str(tmp_path / f"{values}.goss"), embedding=values))
        assert Packed.open(tmp_path / f"{values}.goss").matrices[WORDS].values == stored
    with pytest.raises(ConfigError, match="an encoder has no head to store as i8"):
        pack(Pack(str(tmp_path / "model"), str(tmp_path / "head.goss"), head="i8"))


@pytest.mark.parametrize(
    ("purpose", "zeros", "expected"),
    [("auto", 0.92, "blocks"), ("decode", 0.92, "sparse"), ("auto", 0.7, "sparse")],
)
def test_an_encoder_s_file_is_for_whole_texts(
    purpose: str, zeros: float, expected: str, tmp_path: Path
) -> None:
    """What has few blocks that are live skips the others, where products do so."""
    if not _native.levels()["avx512"]:
        pytest.skip("no avx512 here")
    save_encoder(tmp_path / "model", hidden_size=64, intermediate_size=512)
    round_to_int8(tmp_path / "model", zeros)
    arguments = ["pack", str(tmp_path / "model"), "-o", str(tmp_path / "m.goss"), "--for", purpose]
    environment = os.environ | {"GOSSAMER_ISA": "avx512", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-m", "gossamer", *arguments], env=environment, check=True)
    assert Packed.open(tmp_path / "m.goss").matrices[DOWN].storage == expected


def test_the_file_says_how_texts_become_vectors(bert: Packed, tmp_path: Path) -> None:
    assert bert.pooling == Pooling(max_length=66)
    directory = bert.path.with_name("model")
    modules = [
        {"type": "sentence_transformers.models.Transformer", "path": ""},
        {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
        {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"},
    ]
    (directory / "1_Pooling").mkdir()
    (directory / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    text = json.dumps({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True})
    (directory / "1_Pooling" / "config.json").write_text(text, encoding="utf-8")
    pack(Pack(str(directory), str(tmp_path / "model.goss")))
    assert Packed.open(tmp_path / "model.goss").pooling == Pooling("cls", True, 66)


def test_inspect_describes_it(bert: Packed) -> None:
    result = inspect(Inspect(str(bert.path)))
    assert result.kind == "packed file, format version 6" and result.parts
    assert list(result.parts) == ["embedding", "linears", "tokenizer", "header, norms and biases"]
    assert sum(result.parts.values()) == bert.file_bytes == result.num_bytes
    assert len(result.matrices) == 13 and result.tables()


@pytest.mark.parametrize(
    ("name", "config", "facts"),
    [
        ("BertModel", {}, {"for": "vectors of texts, mean of their tokens", "reads": "at most 66 tokens"}),
        ("ModernBertForMaskedLM", {}, {"for": "masked words; vectors by the mean of their tokens"}),
        (
            "BertForSequenceClassification",
            {"num_labels": 3},
            {"for": "classes of texts", "classes": "3: LABEL_0, LABEL_1, LABEL_2"},
        ),
        ("RobertaForQuestionAnswering", {"max_position_embeddings": 68}, {"for": "answers in texts"}),
    ],
)
def test_inspect_says_what_an_encoder_is_for(
    name: str, config: dict[str, Any], facts: dict[str, str], tmp_path: Path
) -> None:
    """Of a directory and of the file alike, and nowhere that it were a decoder."""
    save_encoder(tmp_path / "model", name, **config)
    pack(Pack(str(tmp_path / "model"), str(tmp_path / "model.goss")))
    for path in ("model", "model.goss"):
        told = dict(inspect(Inspect(str(tmp_path / path))).tables()[0].rows)
        assert all(told[fact].startswith(says) for fact, says in facts.items())
        assert ("classes" in told) == ("classes" in facts)
        assert told["encoder zeros"] and not [it for it in told if "decoder" in it]


@pytest.mark.parametrize(
    "use",
    [
        lambda path: LLM(path),
        lambda path: bench(Bench(path)),
        lambda path: Packed.open(path).head,
    ],
)
def test_what_continues_texts_refuses_encoders(use: Callable[[str], Any], bert: Packed) -> None:
    with pytest.raises(UnsupportedError, match=r"model\.goss: a bert, an encoder.*gossamer\.Encoder"):
        use(str(bert.path))


def without(header: Header, data: bytes, name: str) -> bytes:
    """The data without those of one tensor, which leaves the header too."""
    begin, end = header.pop(name)["data_offsets"]
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [offset - (end - begin) for offset in entry["data_offsets"]]
    return data[:begin] + data[end:]


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        (POSITIONS, True),
        ("embeddings.LayerNorm.bias", True),
        (f"{UP}.bias", True),
        ("pooler.dense.bias", False),
    ],
)
def test_only_what_a_model_may_lack_may_be_missing(
    name: str, missing: bool, bert: Packed, tmp_path: Path
) -> None:
    header, data = split(bert.path)
    path = join(tmp_path / "less.goss", header, without(header, data, name))
    if not missing:
        Packed.open(path).check()
        return
    with pytest.raises(FormatError, match=f"lacks tensor '{name}'"):
        Packed.open(path)


def change(header: Header, **metadata: Any) -> None:
    header["__metadata__"] |= metadata


def set_config(header: Header, **changes: Any) -> None:
    config = json.loads(header["__metadata__"]["config"])
    change(header, config=json.dumps(config | changes))


def add_head(header: Header) -> None:
    table = json.loads(header["__metadata__"]["layers"])
    change(header, layers=json.dumps(table | {"lm_head": table[WORDS]}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda it: change(it, version="5"), "version 5 with a bert, which takes version 6"),
        (lambda it: change(it, pooling="[]"), "the pooling is a JSON list"),
        (lambda it: change(it, pooling="{"), "the pooling is not valid JSON"),
        (lambda it: change(it, pooling='{"mode": "lasttoken"}'), "says of pooling the pooling 'lasttoken'"),
        (lambda it: change(it, pooling='{"max_length": 1e9}'), "says of pooling the maximum length"),
        (lambda it: change(it, pooling='{"more": 1}'), "says of pooling"),
        (lambda it: set_config(it, max_position_embeddings=512), f"{POSITIONS} is F32 .*; expected F32"),
        (lambda it: set_config(it, type_vocab_size=9), "token_type_embeddings.weight is F32"),
        (lambda it: set_config(it, hidden_size=28), f"{WORDS} is 40 x 24; the config says 40 x 28"),
        (lambda it: set_config(it, num_hidden_layers=3), "disagree about"),
        (lambda it: set_config(it, num_attention_heads=5), "does not divide by 5 heads"),
        (lambda it: set_config(it, hidden_act="relu"), "hidden_act = 'relu'"),
        (lambda it: set_entry(it, WORDS, storage="sparse"), "expected dense"),
        (lambda it: set_entry(it, UP, storage="blocks"), "expected sparse or dense or blocks i8 there"),
        (add_head, "disagree about 'lm_head'"),
    ],
)  # fmt: skip
def test_a_header_that_contradicts_itself_is_refused(
    damage: Callable[[Header], None], message: str, bert: Packed, tmp_path: Path
) -> None:
    header, data = split(bert.path)
    damage(header)
    with pytest.raises(FormatError, match=message):
        Packed.open(join(tmp_path / "damaged.goss", header, data))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda it: change(it, version="5"), "version 5 with a modernbert, which takes version 6"),
        (lambda it: set_config(it, norm_bias=True), "lacks tensor 'embeddings.norm.bias'"),
        (lambda it: set_config(it, mlp_bias=True), "lacks tensor 'layers.0.mlp.Wo.bias'"),
        (lambda it: set_config(it, layer_types=["full_attention"]), "1 layer_types of 4 layers"),
        (lambda it: set_config(it, num_attention_heads=5), "does not divide by 5 heads"),
        (lambda it: set_config(it, intermediate_size=57), "gate_proj is 56 x 24; the config says 57"),
        (lambda it: set_config(it, local_attention=1.5), "local_attention is 1.5"),
        (
            lambda it: set_config(it, rope_parameters={"full_attention": {"rope_theta": -1}}),
            "rope_theta is -1",
        ),
        (lambda it: set_config(it, architectures=["ModernBertForMaskedLM"]), "disagree about"),
    ],
)  # fmt: skip
def test_a_header_that_contradicts_a_modernbert_is_refused(
    damage: Callable[[Header], None], message: str, tmp_path: Path
) -> None:
    header, data = split(packed_encoder(tmp_path, "ModernBertModel").path)
    damage(header)
    with pytest.raises(FormatError, match=message):
        Packed.open(join(tmp_path / "damaged.goss", header, data))


def test_a_decoder_says_nothing_of_pooling(tmp_path: Path) -> None:
    header, data = split(FILES / "v1-floats.goss")
    change(header, pooling="{}")
    with pytest.raises(FormatError, match="found a pooling with a llama; only an encoder's file has one"):
        Packed.open(join(tmp_path / "pooled.goss", header, data))
    with pytest.raises(UnsupportedError, match=r"v1-floats\.goss: a llama, a decoder.*gossamer\.LLM"):
        Packed.open(FILES / "v1-floats.goss").native_encoder_config()


@pytest.mark.parametrize(
    "task",
    ["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"],
)
def test_the_call_that_pack_tells_of_is_one_that_the_model_has(task: str, tmp_path: Path) -> None:
    save_encoder(tmp_path / "model", f"Bert{task}")
    told = pack(Pack(str(tmp_path / "model"), str(tmp_path / "model.goss"))).closing[-1]
    eval(told.removeprefix("Use it: "), {"gossamer": gossamer})
