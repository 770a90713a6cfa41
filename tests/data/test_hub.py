"""Datasets of the hub, streamed by the real library from a server on loopback."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from checkpoint.hub_server import GOOD_TOKEN, HubServer, Repository

READ = """
import json, sys
from gossamer.data.sources import documents
for name in sys.argv[1:]:
    try:
        print(json.dumps([name, list(documents(name))]))
    except Exception as error:
        print(json.dumps([name, f"{type(error).__name__}: {error}"]))
"""
MANIFEST_THEN_READ = """
import json, sys
from gossamer.data.sources import documents, manifest
print(json.dumps([manifest(source)["revision"] for source in sys.argv[1:]]), flush=True)
sys.stdin.readline()
print(json.dumps([list(documents(source)) for source in sys.argv[1:]]))
"""
TEXTS = ["one", "two – 2", "three"]
ROWS = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
REPOSITORIES: dict[str, dict[str, bytes]] = {
    "good": {"train.jsonl": ROWS},
    "gated": {"train.jsonl": ROWS},
    "private": {"train.jsonl": ROWS},
    "empty": {},
    "script": {"script.py": b"import datasets\n"},
    "broken": {"train.jsonl": ROWS + b"{\n"},
    "cut": {"train.parquet": b"PAR1" + b"x" * 100},
    "packed": {"train.jsonl.zst": b"no frame"},
    "latin": {"train.jsonl": '{"text": "café"}\n'.encode("latin-1")},
    "other": {"train.jsonl": b'{"body": "text"}\n'},
    "stack": {
        "data/python/train.jsonl": b'{"content": "import os"}\n',
        "data/rust/train.jsonl": b'{"content": "fn main"}\n',
    },
    "image": {"train.png": b"no picture"},
}
# name: words of the answer
REFUSED = {
    "gated": ("ConfigError", "is gated; ask for access on that page; then log in"),
    "private": (
        "ConfigError",
        "the hub shows no",
        "if it is private, log in (`hf auth login`) or set HF_TOKEN",
    ),
    "missing": ("ConfigError", "the hub shows no", "datasets/org/missing; check the name"),
    "empty": ("ConfigError", "doesn't contain any data files"),
    "script": ("ConfigError", "scripts are no longer supported", "download its files"),
    "broken": (
        "ConfigError",
        "JSON parse error",
        "--skip-bad-rows cannot go on after that",
        "download its files and give one of them",
    ),
    "cut": ("ConfigError", "Parquet magic bytes not found"),
    "packed": ("ConfigError", "zstd decompress error"),
    "latin": ("ConfigError", "can't decode byte 0xe9"),
    "other": (
        "ConfigError",
        "hf:org/other:1: expected text in the field text or content",
        "found fields ['body']",
    ),
    "image": ("ConfigError", "cannot identify image"),
    "good:en": ("ConfigError", "BuilderConfig 'en' not found. Available: ['default']"),
    "good:default:test": ("ConfigError", "Bad split: test. Available splits: ['train']"),
    "good@missing": (
        "ConfigError",
        "datasets/org/good has no such revision; give a branch, a tag or a commit",
    ),
    "name/of/three": ("ConfigError", "Couldn't find any data file"),
    "no name": ("ConfigError", "Repo id must use alphanumeric chars"),
}


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        for name, files in REPOSITORIES.items():
            repository = Repository(gated=name == "gated", private=name == "private")
            repository.commit({"README.md": b"# Data\n"} | files)
            server.repositories[f"datasets/org/{name}"] = repository
        yield server


def read(hub: HubServer, home: Path, names: list[str], **settings: str) -> dict[str, list[str] | str]:
    """What each source gives, its texts or its error, in a program whose hub is the server."""
    environment = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"} | settings
    sources = [f"hf:org/{name}" for name in names]
    completed = subprocess.run(
        [sys.executable, "-c", READ, *sources],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    found = dict(json.loads(line) for line in completed.stdout.splitlines())
    return {name: found[source] for name, source in zip(names, sources, strict=True)}


@pytest.fixture(scope="module")
def answers(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str] | str]:
    """Of all sources, without a token, in one program."""
    return read(
        hub, tmp_path_factory.mktemp("home"), ["good", "good:default:train", "stack:data/python", *REFUSED]
    )


def test_a_dataset_is_streamed(answers: dict[str, list[str] | str]) -> None:
    assert answers["good"] == answers["good:default:train"] == TEXTS


def test_a_folder_of_a_dataset_is_streamed_alone(answers: dict[str, list[str] | str]) -> None:
    """The Stack has a folder for each language, and its text in the field `content`."""
    assert answers["stack:data/python"] == ["import os"]


@pytest.mark.parametrize("name", REFUSED)
def test_the_error_names_what_was_asked_and_what_to_do(
    name: str, answers: dict[str, list[str] | str]
) -> None:
    answer = answers[name]
    assert isinstance(answer, str) and f"hf:org/{name}" in answer
    for words in REFUSED[name]:
        assert words in answer


def test_the_commit_of_the_manifest_is_the_one_that_is_read(hub: HubServer, tmp_path: Path) -> None:
    """Also where the hub has another between the two; a revision that is given stays what it is."""
    repository = hub.repositories["datasets/org/moving"] = Repository()
    old = repository.commit({"train.jsonl": b'{"text": "old"}\n'})
    new = repository.commit({"train.jsonl": b'{"text": "new"}\n'})
    repository.branches |= {"main": old, "next": new}
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    sources = [f"hf:org/moving{pin}" for pin in ("", "@next", f"@{new}", f"@{old}:default")]
    with subprocess.Popen(
        [sys.executable, "-c", MANIFEST_THEN_READ, *sources],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdin and program.stdout
        known = json.loads(program.stdout.readline())
        repository.branches |= {"main": new, "next": old}
        found = json.loads(program.communicate("go on\n", timeout=200)[0])
    assert known == [old, new, new, old]
    assert found == [["old"], ["new"], ["new"], ["old"]]


READ_CHATS = """
import json, sys
from gossamer.data.supervised import supervised_examples
from gossamer.tokens.tokenizer import Tokenizer
plain = Tokenizer.open(sys.argv[1])
template = "{% for m in messages %}{{ m.content + ';' }}{% endfor %}"
tokenizer = Tokenizer(plain.bytes, {"eos_token": "</s>"}, chat_template=template)
for form in ("chat", "prompt-completion"):
    found = supervised_examples(f"hf:org/{form}:default:train", form, tokenizer, 64)
    print(json.dumps([tokenizer.decode([label for label in labels if label >= 0]) for _, labels in found]))
"""


def test_examples_are_streamed(hub: HubServer, tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    rows = {"chat": {"messages": messages}, "prompt-completion": {"prompt": "a ", "completion": "b"}}
    for name, row in rows.items():
        repository = hub.repositories[f"datasets/org/{name}"] = Repository()
        repository.commit({"train.jsonl": (json.dumps(row) + "\n").encode() * 2})
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", READ_CHATS, str(tiny_llama("llama2"))]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert made.returncode == 0, made.stderr
    assert [json.loads(line) for line in made.stdout.splitlines()] == [["yes;", "yes;"], ["b", "b"]]


def test_a_token_opens_what_is_gated_or_private(hub: HubServer, tmp_path: Path) -> None:
    found = read(hub, tmp_path, ["gated", "private"], HF_TOKEN=GOOD_TOKEN)
    assert found == {"gated": TEXTS, "private": TEXTS}
    found = read(hub, tmp_path / "other", ["gated", "private"], HF_TOKEN="hf_other")
    assert "the token found here has no access yet" in found["gated"]
    assert "the token found here cannot see it" in found["private"]


def test_without_a_network_it_is_the_environment_that_fails(hub: HubServer, tmp_path: Path) -> None:
    [answer] = read(hub, tmp_path, ["good"], HF_HUB_OFFLINE="1").values()
    assert isinstance(answer, str) and answer.startswith("OSError: dataset 'hf:org/good'")
    assert "cannot be reached" in answer and "HF_HUB_OFFLINE is set; run it again with a network" in answer
