"""Presets: named mixtures, and what is said where one of their sources cannot be had."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from checkpoint.hub_server import HubServer, Repository
from gossamer.data.presets import expand
from gossamer.data.sources import documents
from gossamer.errors import ConfigError

PYTHON = "".join(
    json.dumps({"content": f"def f{i}(x):\n    return x + {i}\n"}) + "\n" for i in range(400)
).encode()
WEB = "".join(json.dumps({"text": f"The {i}th page says little. " * 9}) + "\n" for i in range(400)).encode()
INSTEAD = "or take --dataset preset:sparse-llama-open instead of preset:sparse-llama"


def test_a_preset_stands_for_its_sources() -> None:
    assert expand(["a.txt@2", "preset:sparse-llama"]) == (
        "a.txt@2",
        "hf:cerebras/SlimPajama-627B@0.9",
        "hf:bigcode/the-stack-dedup:data/python@0.1",
    )
    assert expand(["preset:sparse-llama-open@3"]) == (
        "hf:HuggingFaceFW/fineweb-edu:sample-100BT@2.7",
        "hf:bigcode/the-stack-smol:data/python@0.3",
    )
    with pytest.raises(ConfigError, match="no such preset; there are preset:sparse-llama, preset:"):
        expand(["preset:pile"])


def test_offline_the_error_names_what_to_take_instead() -> None:
    with pytest.raises(ConfigError, match=f"hf:cerebras/SlimPajama-627B' has to be streamed.*{INSTEAD}"):
        next(documents("hf:cerebras/SlimPajama-627B", offline=True))


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """The paper's sources: one is gone, one is gated; and what takes their place."""
    files: dict[str, dict[str, bytes]] = {
        "bigcode/the-stack-dedup": {"data/python/train.jsonl": PYTHON},
        "HuggingFaceFW/fineweb-edu": {
            "sample/100BT/train.jsonl": WEB,
            "README.md": b"---\nconfigs:\n- config_name: sample-100BT\n  data_files: sample/100BT/*\n---\n",
        },
        "bigcode/the-stack-smol": {"data/python/train.jsonl": PYTHON, "data/rust/train.jsonl": b"{}\n"},
    }
    with HubServer() as server:
        for name, content in files.items():
            server.repositories[f"datasets/{name}"] = repository = Repository(gated=name.endswith("dedup"))
            repository.commit({"README.md": b"# Data\n"} | content)
        yield server


def pretrain(hub: HubServer, model: Path, output: Path, preset: str) -> subprocess.CompletedProcess[str]:
    """The verb, in a program whose hub is the server."""
    environment = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(output / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "gossamer", "pretrain", str(model), "-o", str(output / "out")]
    options = ["--dataset", preset, "--num-tokens", "2048", "--max-length", "64", "--report-to", "none"]
    return subprocess.run(
        [*command, *options], env=environment, capture_output=True, text=True, check=False, timeout=200
    )


def test_the_paper_s_mix_says_what_is_missing_and_the_other_trains(
    hub: HubServer, tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    """By the real loading code: SlimPajama is gone, The Stack gated, and the preset instead trains."""
    model = tiny_llama("llama2")
    failed = pretrain(hub, model, tmp_path, "preset:sparse-llama")
    said = " ".join(failed.stderr.split())
    assert failed.returncode == 2 and "the hub shows no" in said and INSTEAD in said
    slim = hub.repositories["datasets/cerebras/SlimPajama-627B"] = Repository()
    slim.commit({"train.jsonl": WEB})
    failed = pretrain(hub, model, tmp_path, "preset:sparse-llama")
    said = " ".join(failed.stderr.split())
    assert failed.returncode == 2 and "the-stack-dedup is gated" in said and INSTEAD in said
    trained = pretrain(hub, model, tmp_path, "preset:sparse-llama-open")
    assert trained.returncode == 0, trained.stderr
    manifest = json.loads((tmp_path / "out" / "gossamer.json").read_text(encoding="utf-8"))
    assert manifest["job"]["dataset"] == list(expand(["preset:sparse-llama-open"]))
    assert [part["source"] for part in manifest["data"]] == [
        "hf:HuggingFaceFW/fineweb-edu:sample-100BT",
        "hf:bigcode/the-stack-smol:data/python",
    ]
    assert all(part["num_tokens"] > 0 and part["revision"] for part in manifest["data"])
