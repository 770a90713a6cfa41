"""`publish`: model cards, and pushing them with the model to a hub on loopback, in processes of their own."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from checkpoint.hub_server import CLOSED, GOOD_TOKEN, HubServer
from encoders import round_to_int8, save_encoder
from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import CheckpointError, ConfigError, FormatError
from gossamer.evaluation.kept import model_hash
from gossamer.packed.from_checkpoint import pack_checkpoint
from gossamer.stages.evaluate import Evaluate, evaluate
from gossamer.stages.pack import Pack, pack
from gossamer.stages.prune import Prune, prune
from gossamer.stages.quantize import Quantize, quantize
from gossamer.tools.bench import Bench, bench
from gossamer.tools.publish import Publish, publish

Tiny = Callable[[str], Path]
PARENT_CARD = (
    "---\nlicense: apache-2.0\nlanguage: [en]\nbase_model: org/grandparent\ntags: [theirs]\n---\n\n# Tiny\n"
)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def pruned(tiny_llama: Tiny, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with the card of its makers, pruned twice."""
    home = tmp_path_factory.mktemp("pruned")
    parent = home / "parent"
    parent.mkdir()
    for file in tiny_llama("llama3").iterdir():
        (parent / file.name).symlink_to(file.resolve())
    (parent / "README.md").write_text(PARENT_CARD)
    options: dict[str, Any] = {"num_calibration_samples": 4, "max_seq_length": 32, "method": "sparsegpt"}
    for source, out, sparsity in ((parent, "half", 0.5), (home / "half", "most", 0.7)):
        prune(Prune(str(source), str(home / out), dataset=(str(text_file),), sparsity=sparsity, **options))
    return home / "most"


def call(hub: HubServer, home: Path, *arguments: str, code: int = 0, **settings: str) -> str:
    """Run the verb with the server as its hub; returns what it printed on both outputs."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    completed = subprocess.run(
        [sys.executable, "-m", "gossamer", "publish", *arguments],
        env=environment | {"HF_TOKEN": GOOD_TOKEN} | settings,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    output = completed.stdout + completed.stderr
    assert completed.returncode == code, output
    return output


def put(hub: HubServer) -> list[str]:
    return [path for method, path, _ in hub.requests if method == "PUT"]


def head(hub: HubServer, name: str, branch: str = "main") -> dict[str, bytes]:
    repository = hub.repositories[name]
    return repository.commits[repository.branches[branch]]


def test_a_directory_arrives_whole_with_its_card(hub: HubServer, pruned: Path, tmp_path: Path) -> None:
    output = call(hub, tmp_path, str(pruned), "org/most", "--private", "--base-model", "org/tiny")
    assert f"{hub.url}/org/most/commit/" in output and hub.repositories["org/most"].private
    files = head(hub, "org/most")
    here = {file.name: file.read_bytes() for file in pruned.iterdir() if file.is_file()}
    rewritten = ("README.md", "gossamer.json", "report.md")
    assert {name: files[name] for name in here if name not in rewritten} == {
        name: content for name, content in here.items() if name not in rewritten
    }
    assert files.keys() == here.keys() | {".gitattributes"}
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.license, card.data.language) == ("org/tiny", "apache-2.0", ["en"])
    assert {"gossamer", "sparse", "f32"} <= set(card.data.tags or ()) and "theirs" not in (
        card.data.tags or ()
    )
    assert here["README.md"].decode() == PARENT_CARD  # what lies here is not touched
    assert len(put(hub)) == len([content for content in here.values() if len(content) > 50_000]) > 0


def test_the_card_tells_the_recipe_the_data_and_the_sizes(pruned: Path, text_file: Path) -> None:
    card = publish(Publish(str(pruned), "org/most", dry_run=True)).card
    assert str(text_file.parent) not in card and str(pruned.parent) not in card  # no folders of this computer
    found = re.search(r"```yaml\n(.*?)```", card, re.DOTALL)
    assert found is not None
    steps = yaml.safe_load(found[1])
    assert [(step["stage"], step["options"]["sparsity"]) for step in steps] == [
        ("prune", 0.5),
        ("prune", 0.7),
    ]
    assert steps[0]["options"]["num_calibration_samples"] == 4
    assert "70.0% of its decoder's linear weights are zero" in card
    manifest = Checkpoint.open(pruned).manifest
    assert manifest is not None
    digest = manifest["lineage"][0]["data"][0]["sha256"]
    of = f"1 files, {text_file.stat().st_size:,} bytes, sha256 `{digest[:16]}`"
    assert card.count(f"| prune | text.txt | 1.0 |  | {of} |") == 2
    assert "base_model" not in card.split("---")[1]  # nobody knows it
    assert f"| bytes | {(pruned / 'model.safetensors').stat().st_size:,} |" in card


@pytest.mark.parametrize(
    ("name", "config", "pipeline", "tried"),
    [
        ("BertModel", {}, "sentence-similarity", "gossamer embed {} TEXTS.txt"),
        ("ModernBertForMaskedLM", {}, "fill-mask", "gossamer.Encoder('{}').encode("),
        ("BertForSequenceClassification", {}, "text-classification", "gossamer.Encoder('{}').classify("),
        ("BertForSequenceClassification", {"num_labels": 1}, "text-ranking", "gossamer.Encoder('{}')."),
        ("BertForTokenClassification", {}, "token-classification", "gossamer.Encoder('{}').tag("),
    ],
)
def test_the_card_of_an_encoder(
    name: str, config: dict[str, Any], pipeline: str, tried: str, tmp_path: Path
) -> None:
    """Of a dense INT8 one, some of whose weights are rounded to zero."""
    save_encoder(tmp_path / "model", name, **config)
    round_to_int8(tmp_path / "model")
    pack(Pack(str(tmp_path / "model"), str(tmp_path / "model.goss")))
    for path, called in (("model", "org/it"), ("model.goss", "model.goss")):
        card = publish(Publish(str(tmp_path / path), "org/it", dry_run=True)).card
        front = ModelCard(card).data
        assert front.pipeline_tag == pipeline and "sparse" not in (front.tags or ())
        assert tried.format(called) in card and "gossamer run" not in card
        assert "they are stored as dense i8" in card and "decoder" not in card


def test_results_become_a_model_index_with_their_errors(
    pruned: Path, tiny_llama: Tiny, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    rows = [{"query": f"x = {n}", "choices": ["a", "def f("], "gold": n % 2} for n in range(6)]
    examples = tmp_path / "choices.jsonl"
    examples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    jobs = [
        Evaluate(
            str(pruned),
            dataset=str(examples),
            kind="multiple-choice",
            backend="engine",
            baseline=str(tiny_llama("llama3")),
        ),
        Evaluate(
            str(pruned),
            dataset=str(text_file),
            row_length=64,
            limit=4,
            backend="engine",
            output=str(tmp_path / "text.json"),
        ),
    ]
    found = [evaluate(job) for job in jobs]
    names = [str(tmp_path / "choices.json"), jobs[1].output]
    line = json.dumps({"result": asdict(found[0])})  # as `--json` prints it
    Path(names[0]).write_text('{"event": {}}\n' + line + "\n")
    card = ModelCard(publish(Publish(str(pruned), "org/most", dry_run=True, results=tuple(names))).card)
    assert card.data.model_name == "most" and card.data.eval_results is not None
    told = {(of.dataset_name, of.metric_type): of for of in card.data.eval_results}
    task, text = found
    for metric, value in task.metrics["choices.jsonl"].items():
        of = told["choices.jsonl", metric]
        assert of.metric_value == value and of.metric_args is not None
        assert of.metric_args["standard_error"] == task.standard_errors["choices.jsonl"][metric]
        assert of.metric_args["num_examples"] == 6
    of = told["choices.jsonl", "acc_norm"]
    assert of.metric_args is not None
    assert of.metric_args["recovery"] == task.recovery["choices.jsonl"]
    assert of.metric_args["recovery_standard_error"] == task.recovery_errors["choices.jsonl"]
    assert told["perplexity", "perplexity"].metric_value == text.perplexity
    error = text.standard_errors["perplexity"]["perplexity"]
    assert f"| perplexity | perplexity | {text.perplexity:.4g} ± {error:.2g} |" in card.content
    with pytest.raises(ConfigError, match=r"results of .*most, whose content has the hash"):
        publish(Publish(str(pruned.parent / "half"), "org/half", dry_run=True, results=tuple(names)))


def test_only_shares_are_percentages(pruned: Path, tmp_path: Path) -> None:
    values = {"bits_per_byte,none": 0.95, "bleu,none": 23.4, "acc,none": 0.5, "word_perplexity,none": 7.5}
    row = {"model_hash": model_hash(str(pruned)), "accuracy": {"task": 0.5}, "metrics": {"task": values}}
    file = tmp_path / "results.json"
    file.write_text(json.dumps(row | {"num_examples": {"task": 8}}, indent=1))
    card = publish(Publish(str(pruned), "org/most", dry_run=True, results=(str(file),))).card
    shown = dict(re.findall(r"\| task \| (\w+),none \| ([^|]+) \|", card))
    assert shown == {"bits_per_byte": "0.95", "bleu": "23.4", "acc": "50.0%", "word_perplexity": "7.5"}


def test_where_files_lie_here_is_not_published(
    hub: HubServer, pruned: Path, text_file: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "model"
    copytree(pruned, copy)
    manifest = json.loads((copy / "gossamer.json").read_text())
    first = manifest["lineage"][0]
    first["job"] |= {
        "dataset": ["data/private/x.txt@0.5", "hf:org/text:default:train"],
        "teacher": "org/dense",
    }
    first["data"][0]["source"] = "private/x.txt"
    manifest["origin"] = {"repository": "org/tiny", "revision": "main", "commit": "0" * 40}
    (copy / "gossamer.json").write_text(json.dumps(manifest))
    (copy / "report.md").write_bytes((copy / "report.md").read_bytes() + b"caf\xe9\n")
    call(hub, tmp_path, str(copy), "org/most")
    files = head(hub, "org/most")
    for name in ("gossamer.json", "report.md", "README.md"):
        text = files[name].decode(errors="replace")
        assert text_file.name in text
        assert not [word for word in (str(text_file.parent), str(pruned.parent), "private/") if word in text]
    assert files["report.md"].endswith(b"caf\xe9\n")  # whatever its bytes are, the rest of it stays
    sent = json.loads(files["gossamer.json"])
    assert sent["lineage"][0]["job"]["dataset"] == ["x.txt@0.5", "hf:org/text:default:train"]
    assert sent["lineage"][0]["job"]["teacher"] == "org/dense"
    assert sent["lineage"][0]["data"][0]["source"] == "x.txt"
    assert (sent["lineage"][1]["job"]["model"], sent["parent"]["path"]) == ("half", "half")
    assert {name: sent[name] for name in ("tensors", "origin", "metrics")} == {
        name: manifest[name] for name in ("tensors", "origin", "metrics")
    }
    assert json.loads((copy / "gossamer.json").read_text()) == manifest  # what lies here is not touched


def test_a_packed_file_goes_beside_a_directory(
    hub: HubServer, pruned: Path, tiny_llama: Tiny, tmp_path: Path
) -> None:
    file = tmp_path / "most.goss"
    pack_checkpoint(Checkpoint.open(pruned), file)
    speeds, dense = tmp_path / "bench.jsonl", tmp_path / "dense.goss"  # bench wants a file of some size
    pack_checkpoint(Checkpoint.open(tiny_llama("llama3")), dense)
    found = bench(Bench(str(dense), threads=1, prompt=(8,), new=4, repeats=1))
    row = asdict(found.rows[0]) | {"impossible": []}  # so small a model is in the processor's cache
    speeds.write_text('{"event": {}}\n' + json.dumps({"result": row}) + "\n")
    call(hub, tmp_path, str(pruned), "org/most")
    call(hub, tmp_path, str(file), "org/most@packed", "--speeds", str(speeds))
    files = head(hub, "org/most", "packed")
    assert files["most.goss"] == file.read_bytes() and "model.safetensors" in files
    card = ModelCard(files["README.md"].decode())
    assert (card.data.library_name, card.data.license) == ("gossamer", "apache-2.0")
    assert f"| 1 | 8 | {row['decode_tokens_per_s']:.4g} |" in card.content
    assert "- {stage: prune}\n- {stage: prune}\n- {stage: pack}" in card.content
    assert "most.goss" not in head(hub, "org/most")


def test_an_upload_that_failed_goes_on_where_it_was(hub: HubServer, pruned: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    copytree(pruned, copy)
    (copy / "more.bin").write_bytes(os.urandom(60_000))
    hub.room = 1
    output = call(hub, tmp_path, str(copy), "org/name", code=1)
    assert "run the same command again" in output and "Traceback" not in output
    assert head(hub, "org/name").keys() == {".gitattributes"} and len(hub.stored) == 1
    [arrived], hub.room = hub.stored, 1000
    hub.requests.clear()
    call(hub, tmp_path, str(copy), "org/name")
    assert put(hub) and not any(path.endswith(arrived) for path in put(hub))
    assert head(hub, "org/name")["more.bin"] == (copy / "more.bin").read_bytes()
    hub.requests.clear()
    call(hub, tmp_path, str(copy), "org/name")
    assert not put(hub) and len(hub.repositories["org/name"].commits) == 2  # nothing is new: no commit


def test_an_upload_that_failed_goes_on_with_the_card_it_had_written(
    hub: HubServer, pruned: Path, tmp_path: Path
) -> None:
    options = ("--card", str(tmp_path / "card.md"), "--base-model", "org/tiny")
    hub.failing = 500
    call(hub, tmp_path, str(pruned), "org/name", *options, code=1)
    hub.failing = 0
    call(hub, tmp_path, str(pruned), "org/name", *options)
    assert head(hub, "org/name")["README.md"] == (tmp_path / "card.md").read_bytes()


def test_what_others_see_is_not_private(hub: HubServer, pruned: Path, tmp_path: Path) -> None:
    (tmp_path / "older").mkdir()
    hub.add("org/most", tmp_path / "older")
    refused = call(hub, tmp_path, str(pruned), "org/most", "--private", code=2)
    assert "--private is for a new repository" in refused
    assert not put(hub) and not head(hub, "org/most")
    hub.repositories["org/most"].private = True
    call(hub, tmp_path, str(pruned), "org/most", "--private")
    assert "model.safetensors" in head(hub, "org/most")


def test_with_a_card_of_ones_own_only_a_model_is_sent(pruned: Path, tmp_path: Path) -> None:
    card, file, folder = (tmp_path / name for name in ("card.md", "letter.txt", "letters"))
    card.write_text("# Mine\n")
    file.write_text("Dear Sir")
    folder.mkdir()
    for path, error in ((file, FormatError), (folder, CheckpointError)):
        with pytest.raises(error):
            publish(Publish(str(path), "org/name", card=str(card), dry_run=True))


def test_a_link_out_of_the_model_is_not_followed(pruned: Path, tmp_path: Path) -> None:
    copy, file = tmp_path / "model", tmp_path / "letter.txt"
    copytree(pruned, copy)
    file.write_text("Dear Sir")
    (copy / "config-again.json").symlink_to("config.json")
    files = publish(Publish(str(copy), "org/name", dry_run=True)).files
    assert files["config-again.json"] == files["config.json"]
    (copy / "letter.txt").symlink_to(file)
    with pytest.raises(ConfigError, match=r"letter\.txt is a link to .*outside"):
        publish(Publish(str(copy), "org/name", dry_run=True))


def test_weights_of_an_older_directory_are_taken_out(hub: HubServer, pruned: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    older.mkdir()
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "other.safetensors"):
        (older / name).write_bytes(name.encode())
    hub.add("org/most", older)
    call(hub, tmp_path, str(pruned), "org/most")
    left = {name for name in head(hub, "org/most") if "safetensors" in name}
    assert left == {"model.safetensors", "other.safetensors"}


def test_failures_say_what_to_do(hub: HubServer, pruned: Path, tmp_path: Path) -> None:
    model = str(pruned)
    assert "log in (`hf auth login`)" in call(hub, tmp_path, model, "org/a", code=2, HF_TOKEN="")
    assert "refuses the token" in call(hub, tmp_path, model, "org/a", code=2, HF_TOKEN="hf_other")
    assert "refuses the token" in call(hub, tmp_path, model, f"{CLOSED}/a", code=2)
    assert "HF_HUB_OFFLINE is set" in call(hub, tmp_path, model, "org/a", code=2, HF_HUB_OFFLINE="1")
    gone = call(hub, tmp_path, model, "org/a", code=1, HF_ENDPOINT="http://127.0.0.1:9")
    assert "the environment failed: org/a: the upload to http://127.0.0.1:9/org/a failed" in gone
    hub.failing = 500
    assert "run the same command again" in call(hub, tmp_path, model, "org/a", code=1)
    assert not hub.repositories


def test_a_dry_run_sends_nothing_and_the_card_can_be_edited(
    hub: HubServer, pruned: Path, tmp_path: Path
) -> None:
    card = tmp_path / "card.md"
    output = call(hub, tmp_path, str(pruned), "org/most", "--dry-run", "--card", str(card), HF_TOKEN="")
    assert "## Recipe" in output and "model.safetensors" in output and not hub.requests
    card.write_text(card.read_text() + "\nMade by hand.\n")
    call(hub, tmp_path, str(pruned), "org/most", "--card", str(card))
    assert head(hub, "org/most")["README.md"].decode() == card.read_text()
    refused = call(hub, tmp_path, str(pruned), "org/most", "--card", str(card), "--base-model", "a/b", code=2)
    assert "is sent as it is" in refused
    card.write_text("---\na: [\n---\n")
    assert "does not take" in call(hub, tmp_path, str(pruned), "org/most", "--card", str(card), code=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"repository": "name"}, "no repository of the hub"),
        ({"repository": "org/name/more"}, "no repository of the hub"),
        ({"model": "nowhere"}, "nowhere: found nothing there"),
        ({"base_model": "tiny"}, "expected a model of the hub"),
        ({"results": ("nowhere.json",)}, "gossamer evaluate --json"),
        ({"results": (__file__,)}, "gossamer evaluate --json"),
        ({"speeds": (__file__,)}, "gossamer bench --json"),
    ],
)
def test_what_cannot_be_published_is_refused(pruned: Path, options: dict[str, Any], words: str) -> None:
    job: dict[str, Any] = {"model": str(pruned), "repository": "org/name", "dry_run": True}
    with pytest.raises(ConfigError, match=re.escape(words)):
        publish(Publish(**(job | options)))


def test_results_that_are_no_use_are_refused(pruned: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.jsonl"
    file.write_text('{"event": {}}\n{"result": {"decode_tokens_per_s": 5.0}}\n')
    with pytest.raises(ConfigError, match="found no result with model_hash"):
        publish(Publish(str(pruned), "org/name", results=(str(file),), dry_run=True))
    file.write_text('{"result": {"decode_tokens_per_s": 5.0, "impossible": ["more than all."]}}\n')
    with pytest.raises(ConfigError, match="not to be quoted: more than all"):
        publish(Publish(str(pruned), "org/name", speeds=(str(file),), dry_run=True))


def test_datasets_of_the_hub_are_named(pruned: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    copytree(pruned, copy)
    manifest = json.loads((copy / "gossamer.json").read_text())
    manifest["origin"] = {"repository": "org/tiny", "revision": "main", "commit": "0" * 40}
    manifest["lineage"][1]["data"] = [
        {"source": "hf:org/text:default:train", "weight": 3.0, "num_tokens": 1234, "revision": "abc"},
        {"source": "hf:org/pinned@main", "weight": 1.0, "revision": "abc"},
    ]
    (copy / "gossamer.json").write_text(json.dumps(manifest))
    card = ModelCard(publish(Publish(str(copy), "org/name", dry_run=True)).card)
    assert (card.data.datasets, card.data.base_model) == (["org/pinned", "org/text"], "org/tiny")
    assert "| prune | hf:org/text:default:train | 3.0 | 1,234 | revision `abc` |" in card.content


@pytest.mark.parametrize(
    "text", ["# No front matter\n", "---\n- a list\n---\n", "---\na: [\n---\n", "\ufeff---\n"]
)
def test_a_card_that_says_nothing_is_no_licence(text: str, pruned: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    copytree(pruned, copy)
    (copy / "README.md").write_text(text)
    assert ModelCard(publish(Publish(str(copy), "org/name", dry_run=True)).card).data.license is None
    (copy / "LICENSE").write_text("Some Community License\n")
    card = ModelCard(publish(Publish(str(copy), "org/name", dry_run=True)).card)
    assert (card.data.license, card.data.license_link) == ("other", "LICENSE")
    assert "| licence | Some Community License |" in card.content


def test_the_scheme_of_a_quantized_directory_is_told(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_calibration_samples": 4, "max_seq_length": 32}
    quantize(Quantize(str(pruned), str(tmp_path / "w8a8"), dataset=(str(text_file),), **options))
    card = ModelCard(publish(Publish(str(tmp_path / "w8a8"), "org/name", dry_run=True)).card)
    assert {"w8a8", "compressed-tensors", "sparse"} <= set(card.data.tags or ())
    assert "| scheme | W8A8 |" in card.content and "- stage: quantize" in card.content
