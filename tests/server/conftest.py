"""Real server processes: over tiny models, of chats and encoders, and where it is, a real one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from encoders import save_encoder
from gossamer.checkpoint.directory import Checkpoint
from gossamer.packed.from_checkpoint import pack_checkpoint

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'wizard' %}{{ raise_exception('no wizards here') }}{% endif %}"
    "{{ message.role }}: {{ message['content'] | trim }}\n{% endfor %}assistant:"
)
GENERATION_CONFIG = {"eos_token_id": 1, "do_sample": True, "temperature": 0.6, "top_k": 7, "top_p": None}
LABELS = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
SCRIPT = """
import json, sys
from gossamer.server import Serve, serve
options = json.loads(sys.argv[1])
try:
    serve(Serve(**options), lambda event: event.lasting or print(json.dumps(dict(event.metrics)), flush=True))
except KeyboardInterrupt:
    sys.exit(130)
"""


@dataclass(frozen=True)
class Running:
    """A server process, the address it reported, and the packed file it serves."""

    process: subprocess.Popen[str]
    url: str
    name: str
    path: Path

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)


def start(path: Path, **options: object) -> Running:
    arguments = json.dumps({"model": str(path), "port": 0, "threads": 1} | options)
    command = [sys.executable, "-c", SCRIPT, arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    assert line, process.stderr.read()
    ready = json.loads(line)
    return Running(process, ready["url"], ready["name"], path)


def end(running: Running) -> None:
    running.process.terminate()
    running.process.communicate(timeout=30)


@pytest.fixture(scope="session")
def packed(
    tiny_llama: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Callable[[str], Path]:
    """name -> a .goss file; "chat" and "sampling" are tiny with a chat template, "plain" without.

    "sampling" has options of its own in its generation config.
    """

    def make(name: str) -> Path:
        file = tmp_path_factory.mktemp("served") / f"{name}.goss"
        if name == "stories3m":
            source = request.getfixturevalue("shared_data") / "models" / name
        else:
            source = tmp_path_factory.mktemp("source") / name
            source.symlink_to(tiny_llama("llama3"))
        if name in ("chat", "sampling"):
            source = with_template(source, tmp_path_factory.mktemp("source") / name)
        if name == "sampling":
            (source / "generation_config.json").unlink()
            (source / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG))
        pack_checkpoint(Checkpoint.open(source), file)
        return file

    return make


def with_template(source: Path, copy: Path) -> Path:
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).symlink_to(file.resolve())
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    return copy


@pytest.fixture(scope="session")
def chat_server(packed: Callable[[str], Path]) -> Iterator[Running]:
    running = start(packed("chat"))
    yield running
    end(running)


def served(directory: Path, name: str, **config: Any) -> Iterator[Running]:
    """An encoder of the class `name` that reads 20 tokens of a text, and has a prompt."""
    save_encoder(directory, name, **config)
    modules = '[{"type": "sentence_transformers.models.Transformer", "path": ""}]'
    (directory / "modules.json").write_text(modules, encoding="utf-8")
    (directory / "sentence_bert_config.json").write_text('{"max_seq_length": 20}', encoding="utf-8")
    prompts = '{"prompts": {"query": "q "}}'
    (directory / "config_sentence_transformers.json").write_text(prompts, encoding="utf-8")
    pack_checkpoint(Checkpoint.open(directory), directory / f"{directory.name}.goss")
    running = start(directory / f"{directory.name}.goss")
    yield running
    end(running)


@pytest.fixture(scope="session")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    yield from served(tmp_path_factory.mktemp("served") / "vectors", "BertModel")


@pytest.fixture(scope="session")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path = tmp_path_factory.mktemp("served") / "labels"
    yield from served(path, "BertForSequenceClassification", **LABELS)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path = tmp_path_factory.mktemp("served") / "ranks"
    yield from served(path, "BertForSequenceClassification", num_labels=1)
