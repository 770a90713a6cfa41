"""Tasks of encoders against SciPy and scikit-learn, and through `evaluate`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import ndcg_score
from transformers import AutoModel, AutoTokenizer

from encoders import save_encoder
from gossamer.errors import ConfigError, UnsupportedError
from gossamer.evaluation.encoder_tasks import correlation, ndcg, read_encoder_tasks
from gossamer.evaluation.encoders import TorchEncoder
from gossamer.job.report import Event
from gossamer.stages.evaluate import Evaluate, evaluate

WORDS = [*"abcdefghijklmnopqrstuvwxyz"]


def sentences(number: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 60))) for _ in range(number)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder")
    save_encoder(path)
    return path


def pairs(number: int = 30) -> list[tuple[float, str, str]]:
    """Texts of which those with a high score begin alike."""
    scores = np.random.default_rng(1).uniform(0, 5, number).round(1).tolist()
    texts = zip(scores, sentences(number), sentences(number, 2), strict=True)
    return [(score, first, first + " a" if score > 2 else second) for score, first, second in texts]


def write_pairs(file: Path, columns: int = 3) -> None:
    before = ["genre", "file", "year", "4"][: columns - 3]
    text = "".join("\t".join([*before, str(score), *texts]) + "\n" for score, *texts in pairs())
    file.write_text(text, encoding="utf-8")


def pooled(path: Path, texts: list[str]) -> np.ndarray:
    """One text at a time, so that nothing is padded."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path)
    vectors = []
    for text in texts:
        with torch.no_grad():
            ids = tokenizer(text, truncation=True, max_length=66, return_tensors="pt")
            vectors.append(model(**ids).last_hidden_state[0].mean(0))
    return torch.nn.functional.normalize(torch.stack(vectors), dim=-1).numpy()


def test_correlation_is_scipys_and_its_error_that_of_a_bootstrap() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=400)
    y = np.round(x + rng.normal(size=400), 1)  # with ties
    scores = correlation(x, y)
    assert scores.value == pytest.approx(spearmanr(x, y)[0], abs=1e-12)
    drawn = [spearmanr(x[it], y[it])[0] for it in rng.integers(0, 400, (400, 400))]
    assert scores.standard_errors["spearman"] == pytest.approx(np.std(drawn), rel=0.15)
    assert correlation(np.ones(4), np.arange(4)).value == 0


@pytest.mark.parametrize("seed", range(5))
def test_ndcg_is_that_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    similarity = rng.normal(size=40)
    relevant = {int(it): int(rng.integers(1, 4)) for it in rng.choice(40, rng.integers(1, 20), replace=False)}
    truth = np.array([[relevant.get(it, 0) for it in range(40)]])
    assert ndcg(similarity, relevant) == pytest.approx(ndcg_score(truth, similarity[None], k=10))


@pytest.mark.parametrize(("columns", "backend"), [(3, "torch"), (7, "torch"), (3, "engine")])
def test_sts_is_the_correlation_of_transformers_cosines(
    tmp_path: Path, model: Path, columns: int, backend: Any
) -> None:
    file = tmp_path / "sts.tsv"
    write_pairs(file, columns=columns)
    result = evaluate(Evaluate(str(model), dataset=str(file), kind="sts", backend=backend, threads=1))
    scores, *texts = zip(*pairs(), strict=True)
    first_ND, second_ND = (pooled(model, [*side]) for side in texts)
    wanted = spearmanr((first_ND * second_ND).sum(1), scores)[0]
    assert result.metrics["sts.tsv"]["spearman"] == pytest.approx(wanted, abs=1e-6)
    assert result.num_examples["sts.tsv"] == 30


def test_a_folder_is_a_task_for_each_file_and_recovery_is_paired(tmp_path: Path, model: Path) -> None:
    for name in ("one.tsv", "two.csv"):
        write_pairs(tmp_path / name)
    rows = [
        {"sentence1": a, "sentence2": b, "score": i} for i, (a, b) in enumerate([("a", "b c"), ("d", "e")])
    ]
    (tmp_path / "three.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    job = Evaluate(str(model), dataset=str(tmp_path), kind="sts", baseline=str(model), threads=1)
    result = evaluate(job)
    assert set(result.metrics) == {"one.tsv", "two.csv", "three.jsonl"}
    assert result.recovery["one.tsv"] == 1 and result.recovery_errors["one.tsv"] == 0


def test_retrieval_finds_what_is_asked_by_its_own_words(tmp_path: Path, model: Path) -> None:
    texts = sentences(40)
    (tmp_path / "qrels").mkdir()
    lines = {
        "corpus.jsonl": [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts)],
        "queries.jsonl": [{"_id": f"q{i}", "text": texts[i]} for i in range(6)],
    }
    for name, rows in lines.items():
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    judged = "query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i in range(6))
    (tmp_path / "qrels" / "test.tsv").write_text(judged, encoding="utf-8")
    job = Evaluate(str(model), dataset=str(tmp_path), kind="retrieval", threads=1)
    assert evaluate(job).metrics[tmp_path.name] == {"ndcg_at_10": 1.0}
    assert evaluate(Evaluate(**vars(job) | {"limit": 2})).num_examples[tmp_path.name] == 2


@pytest.mark.parametrize("backend", ["torch", "engine"])
def test_classification_counts_the_likeliest_label(tmp_path: Path, backend: Any) -> None:
    path = tmp_path / "model"
    whole = save_encoder(path, "BertForSequenceClassification", id2label={0: "no", 1: "yes"})
    texts, tokenizer = sentences(12), AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        likeliest = [
            whole(**tokenizer(it, truncation=True, max_length=66, return_tensors="pt")).logits.argmax().item()
            for it in texts
        ]
    labels = [["no", "yes"][it if index % 4 else 1 - it] for index, it in enumerate(likeliest)]
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    file = tmp_path / "it.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    job = Evaluate(str(path), dataset=str(file), kind="classification", backend=backend, threads=1)
    result = evaluate(job)
    assert result.accuracy == {"it.jsonl": 0.75}


@pytest.mark.parametrize("backend", ["torch", "engine"])
def test_what_is_cut_is_counted_also_from_the_cache(tmp_path: Path, model: Path, backend: Any) -> None:
    write_pairs(tmp_path / "it.tsv")
    (tmp_path / "it.tsv").open("a").write(f"3\ta\t{'b ' * 70}\n")
    for _ in range(2):
        events: list[Event] = []
        job = Evaluate(str(model), dataset=str(tmp_path / "it.tsv"), kind="sts", backend=backend, threads=1)
        evaluate(job, events.append)
        notes = [it.message for it in events if it.lasting]
        assert notes == [f"it.tsv: cut 1 texts that are longer than the limit of {model}"]


@pytest.mark.parametrize("backend", ["torch", "engine"])
def test_vectors_of_a_head_s_are_refused(tmp_path: Path, backend: Any) -> None:
    save_encoder(tmp_path / "model", "BertForSequenceClassification")
    write_pairs(tmp_path / "it.tsv")
    job = Evaluate(str(tmp_path / "model"), dataset=str(tmp_path / "it.tsv"), kind="sts", backend=backend)
    with pytest.raises(UnsupportedError, match=r"scores whole texts.*cannot encode"):
        evaluate(job)


def test_prompts_are_put_before_texts(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    (tmp_path / "modules.json").write_text("[]", encoding="utf-8")
    prompts = {"prompts": {"query": "q: ", "document": "d: "}, "default_prompt_name": "document"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts), encoding="utf-8")
    vectors = TorchEncoder(str(tmp_path)).vectors
    np.testing.assert_allclose(vectors(["a b"], "query"), pooled(tmp_path, ["q: a b"]), atol=1e-6)
    np.testing.assert_allclose(vectors(["a b"]), pooled(tmp_path, ["d: a b"]), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "name", "content", "words"),
    [
        ("sts", "it.tsv", "3.0\tone text\n", "expected a score and two texts"),
        ("sts", "it.tsv", "good\ta\tb\n", "expected a score and two texts"),
        ("sts", "it.tsv", "1\ta\tb\n1\tc\td\n", "2 pairs with one score"),
        ("sts", "it.tsv", "", "0 pairs with one score"),
        ("sts", "it.jsonl", '{"sentence1": "a", "sentence2": "b", "score": "1"}', "score is '1'; expected"),
        ("sts", "it.xml", "", "expected a file of"),
        ("classification", "it.xml", "a\t1", "found another kind of file; expected a file of"),
        (
            "classification",
            "it.jsonl",
            '{"text": "a", "label": null}',
            "label None; expected a name or a number",
        ),
        ("classification", "it.jsonl", '{"text": "", "label": 1}', "text"),
        ("classification", "it.jsonl", "", "has no examples"),
        ("retrieval", "it.jsonl", "{}", "expected a folder as BEIR has it"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, kind: Any, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=words):
        read_encoder_tasks(tmp_path / name, kind, 0)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it.tsv, for --kind sts: found no such file; expected a file of"):
        read_encoder_tasks(tmp_path / "it.tsv", "sts", 0)
    with pytest.raises(ConfigError, match="found a folder without them; expected a file of"):
        read_encoder_tasks(tmp_path, "sts", 0)


def test_unknown_labels_and_other_heads_are_refused(tmp_path: Path, model: Path) -> None:
    file = tmp_path / "it.jsonl"
    file.write_text('{"text": "a", "label": "maybe"}', encoding="utf-8")
    with pytest.raises(ConfigError, match="this one's is for embedding"):
        evaluate(Evaluate(str(model), dataset=str(file), kind="classification", threads=1))
    save_encoder(tmp_path / "model", "BertForSequenceClassification")
    with pytest.raises(
        ConfigError, match=r"it.jsonl:1: found label 'maybe'; expected one of LABEL_0, LABEL_1"
    ):
        evaluate(Evaluate(str(tmp_path / "model"), dataset=str(file), kind="classification", threads=1))
    with pytest.raises(UnsupportedError, match="is a file"):
        evaluate(Evaluate(str(file), dataset=str(file), kind="classification", backend="torch"))
