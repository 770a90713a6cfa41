"""Texts to vectors: what transformers makes of each text by itself, whatever is given together."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gossamer
from encoders import save_encoder
from gossamer.engine import Encoder
from gossamer.errors import ConfigError, FormatError, UnsupportedError
from gossamer.job.report import Event
from packed.make_files import FILES

TEXTS = ["a b c", "d", "", "e f g h i j k l m n o p q r s t u v w x y z " * 4, "z y"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with prompts, whose texts are cut at 20 tokens."""
    path = tmp_path_factory.mktemp("encoder") / "model"
    save_encoder(path)
    modules = [{"type": "sentence_transformers.models.Transformer", "path": ""}]
    (path / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (path / "sentence_bert_config.json").write_text('{"max_seq_length": 20}', encoding="utf-8")
    prompts = json.dumps({"prompts": {"query": "q ", "passage": "p "}})
    (path / "config_sentence_transformers.json").write_text(prompts, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def encoder(directory: Path) -> Encoder:
    return Encoder(directory, 1)


def token_ids(text: str) -> list[int]:
    """[CLS], the letters, which have the ids from 5 on, and [SEP]: 20 at most."""
    return [2, *(5 + ord(letter) - ord("a") for letter in text.split()[:18]), 3]


def expected(directory: Path, ids: Sequence[int], type_ids: Sequence[int] = ()) -> np.ndarray:
    """float32 [T, D] of transformers."""
    from transformers import BertModel

    model: Any = BertModel.from_pretrained(directory, local_files_only=True)
    types = torch.tensor([type_ids or [0] * len(ids)])
    with torch.no_grad():
        return model(torch.tensor([ids]), token_type_ids=types).last_hidden_state[0].numpy()


def test_vectors_are_means_of_transformers_hidden_states(directory: Path, encoder: Encoder) -> None:
    states = [expected(directory, token_ids(text)) for text in TEXTS]
    assert [len(h_TD) for h_TD in states] == [5, 3, 2, 20, 4]
    vectors_ND = encoder.encode(TEXTS)
    assert isinstance(vectors_ND, np.ndarray) and vectors_ND.dtype == np.float32
    np.testing.assert_allclose(vectors_ND, [h_TD.mean(axis=0) for h_TD in states], rtol=0, atol=1e-5)
    for found_TD, expected_TD in zip(encoder.hidden_states(TEXTS), states, strict=True):
        np.testing.assert_allclose(found_TD, expected_TD, rtol=0, atol=1e-5)


def test_company_changes_no_bit(directory: Path, encoder: Encoder) -> None:
    many = TEXTS * 400  # more tokens than one native call gets
    vectors_ND = encoder.encode(many)
    np.testing.assert_array_equal(vectors_ND, np.tile(vectors_ND[: len(TEXTS)], (400, 1)))
    for others in (encoder.encode(many, batch_size=7), Encoder(directory, 2).encode(many)):
        np.testing.assert_array_equal(others, vectors_ND)
    for text, vector_D in zip(TEXTS, vectors_ND, strict=False):
        np.testing.assert_array_equal(encoder.encode(text), vector_D)


def test_the_forms_of_the_answer(encoder: Encoder) -> None:
    vectors_ND = encoder.encode(TEXTS)
    as_list = encoder.encode(TEXTS, convert_to_numpy=False)
    assert isinstance(as_list, list) and np.array_equal(np.stack(as_list), vectors_ND)
    one = encoder.encode(TEXTS, normalize_embeddings=True)
    lengths_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    np.testing.assert_allclose(one, np.asarray(vectors_ND) / lengths_N1, rtol=1e-6)
    empty = encoder.encode([])
    assert isinstance(empty, np.ndarray) and empty.shape == (0, encoder.dimension) == (0, 24)
    assert encoder.hidden_states([]) == []


def test_options_are_those_of_sentence_transformers(directory: Path, encoder: Encoder) -> None:
    """In its order, and refused where they ask for anything else."""
    whole_ND = encoder.encode(TEXTS)
    given = (None, None, 2, False, "sentence_embedding", "float32", True, False, "cpu", False, 7)
    np.testing.assert_array_equal(encoder.encode(TEXTS, *given), np.asarray(whole_ND)[:, :7])
    short_ND = np.asarray(encoder.encode(TEXTS, truncate_dim=7, normalize_embeddings=True))
    np.testing.assert_allclose(np.linalg.norm(short_ND, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(short_ND[0] / short_ND[0, 0], whole_ND[0][:7] / whole_ND[0][0], rtol=1e-5)
    seen: list[Event] = []
    watched = Encoder(directory, progress=seen.append)
    seen.clear()
    watched.encode(TEXTS, batch_size=2)
    assert not seen
    watched.encode(TEXTS, batch_size=2, show_progress_bar=True)
    assert [(it.stage, it.done, it.total) for it in seen] == [("encode", it, 5) for it in (2, 4, 5)]
    refused: list[tuple[dict[str, Any], str]] = [
        ({"output_value": "token_embeddings"}, "output_value='token_embeddings' .hidden_states"),
        ({"precision": "int8"}, "precision='int8'"),
        ({"convert_to_tensor": True}, "convert_to_tensor=True .torch.from_numpy"),
        ({"device": "cuda"}, "device='cuda'"),
    ]
    for options, says in refused:
        with pytest.raises(UnsupportedError, match=f"encode has no {says}"):
            encoder.encode(TEXTS, **options)


def test_the_second_text_of_a_pair_is_of_another_type(directory: Path, encoder: Encoder) -> None:
    expected_TD = expected(directory, [2, 5, 6, 3, 7, 3], [0, 0, 0, 0, 1, 1])
    [found_TD] = encoder.hidden_states([("a b", "c")])
    np.testing.assert_allclose(found_TD, expected_TD, rtol=0, atol=1e-5)
    assert np.abs(found_TD - expected(directory, [2, 5, 6, 3, 7, 3])).max() > 1e-3


def test_pairs_have_types_and_what_is_cut_says_so(directory: Path, encoder: Encoder) -> None:
    pair, long = encoder.token_ids([("a b", "c"), TEXTS[3]])
    assert (pair.ids, pair.type_ids, pair.is_cut) == ([2, 5, 6, 3, 7, 3], [0, 0, 0, 0, 1, 1], False)
    assert (long.ids, long.is_cut) == (token_ids(TEXTS[3]), True)
    states_TD = expected(directory, pair.ids, pair.type_ids)
    np.testing.assert_allclose(encoder.pooled([pair])[0], states_TD.mean(axis=0), rtol=0, atol=1e-5)


def test_prompts_go_before_texts(encoder: Encoder) -> None:
    expected_D = encoder.encode("q a b")
    np.testing.assert_array_equal(encoder.encode("a b", prompt_name="query"), expected_D)
    np.testing.assert_array_equal(encoder.encode(["a b"], prompt="q ")[0], expected_D)
    with pytest.raises(ConfigError, match="found the prompt_name 'title'; this model's prompts: query, pass"):
        encoder.encode("a b", prompt_name="title")


def test_the_files_say_whether_vectors_have_length_1(directory: Path, tmp_path: Path) -> None:
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    modules = json.loads((tmp_path / "modules.json").read_text(encoding="utf-8"))
    modules.append({"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"})
    (tmp_path / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    vectors_ND = Encoder(tmp_path).encode(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(vectors_ND, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("sentences", "options", "message"),
    [
        (["a", 3], {}, "found 3 among the sentences"),
        (["a"], {"batch_size": 0}, "batch_size is 0"),
        (["a"], {"truncate_dim": 25}, "truncate_dim is 25; expected 1 to 24"),
        ([b"a"], {}, "found b'a' among"),
        (5, {}, "found 5; expected a text, or a list of texts"),
        (["a"], {"prompt": 5}, "found 5 among the sentences"),
    ],
)
def test_what_is_no_text_is_refused(
    sentences: Any, options: dict[str, Any], message: str, encoder: Encoder
) -> None:
    with pytest.raises(ConfigError, match=message):
        encoder.encode(sentences, **options)


def test_what_is_too_long_is_refused_where_it_may_not_be_cut(encoder: Encoder) -> None:
    says = "found 1 of 5 texts, the first of them number 3 from 0 on, of more than 20 tokens.*truncate=True"
    with pytest.raises(ConfigError, match=says):
        encoder.encode(TEXTS, truncate=False)
    with pytest.raises(ConfigError, match=says):
        encoder.rerank(TEXTS[0], TEXTS[1:], truncate=False)
    before = encoder.num_cut
    np.testing.assert_array_equal(encoder.encode(TEXTS[:3], truncate=False), encoder.encode(TEXTS)[:3])
    assert encoder.num_cut == before + 1


def test_documents_are_several(encoder: Encoder) -> None:
    with pytest.raises(ConfigError, match="found 'b c'; expected a list of documents"):
        encoder.rerank("a", "b c")
    assert encoder.rerank("a", iter(["b", "c"])) == encoder.rerank("a", ["b", "c"])  # type: ignore[arg-type]


def test_files_that_are_no_encoders_with_a_tokenizer_are_refused(directory: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"a llama, a decoder.*gossamer\.LLM"):
        Encoder(FILES / "v1-integers.goss")
    with pytest.raises(FormatError, match="holds no tokenizer"):
        Encoder(FILES / "v6-bert-floats.goss")
    with pytest.raises(ConfigError, match="num_threads is 0"):
        Encoder(directory, 0)
    with pytest.raises(UnsupportedError, match=r"a bert, an encoder.*gossamer\.Encoder"):
        gossamer.LLM(directory)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("deberta-v2", "DebertaV2Model"), ("mpnet", "MPNetModel"), ("mpnet", "MPNetForMaskedLM")],
)
def test_encoders_of_other_kinds_are_refused_by_name(kind: str, name: str, tmp_path: Path) -> None:
    save_encoder(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_bytes()) | {"model_type": kind, "architectures": [name]}
    file.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UnsupportedError, match=rf"{name}.*BertModel"):
        Encoder(tmp_path)


def test_ten_thousand_texts_are_those_one_by_one(encoder: Encoder) -> None:
    few = encoder.encode(TEXTS)
    np.testing.assert_array_equal(encoder.encode(TEXTS * 2000), np.tile(few, (2000, 1)))


def test_it_takes_neither_torch_nor_transformers(directory: Path, encoder: Encoder) -> None:
    program = (
        "import sys, gossamer; "
        f"print(gossamer.Encoder({str(encoder.path)!r}).encode('a b').shape, "
        "sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "(24,) []\n"
