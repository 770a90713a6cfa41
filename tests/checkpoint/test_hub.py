"""Models by their hub name: the hub's real client against a server on loopback, in processes of their own.

The client reads its settings when it is imported, so each case runs a program whose environment names the
server, a cache of its own, and whether there is a network.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from checkpoint.hub_server import GOOD_TOKEN, HubServer
from gossamer.checkpoint.directory import Checkpoint
from gossamer.checkpoint.hub import snapshot
from gossamer.errors import CheckpointError
from gossamer.packed.reader import Packed
from gossamer.stages.pack import Pack, pack
from gossamer.stages.prune import Prune, prune

Tiny = Callable[[str], Path]
OPEN = """
import sys
from gossamer.checkpoint.directory import Checkpoint
for name in sys.argv[1:]:
    try:
        source = Checkpoint.open(name)
        print(source.hash, source.downloaded)
    except Exception as error:
        print(type(error).__name__, error)
"""
CALIBRATE = ["--num-calibration-samples", "4", "--max-seq-length", "32", "--dataset"]
NO_SUCH_PORT = "http://127.0.0.1:9"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


class Client:
    """Programs that have the server as their hub, and a cache that no other test uses."""

    def __init__(self, url: str, home: Path) -> None:
        self.url, self.cache = url, home / "hub"
        self.settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        self.settings |= {"GOSSAMER_CACHE": str(home / "gossamer"), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0"}

    def environment(self, **settings: str) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"}
        return kept | self.settings | settings

    def open(self, *names: str, **settings: str) -> list[str]:
        """A line for each name: the model's hash and where it comes from, or the error."""
        command = [sys.executable, "-c", OPEN, *names]
        completed = subprocess.run(
            command, env=self.environment(**settings), capture_output=True, text=True, check=True, timeout=120
        )
        return completed.stdout.splitlines()

    def call(self, *arguments: str, code: int = 0, **settings: str) -> str:
        """Run a verb; returns what it printed on both outputs."""
        completed = subprocess.run(
            [sys.executable, "-m", "gossamer", *arguments],
            env=self.environment(**settings),
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
        assert completed.returncode == code, completed.stdout + completed.stderr
        return completed.stdout + completed.stderr


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    return Client(hub.url, tmp_path / "home")


def test_only_files_that_are_read_are_downloaded_and_once(
    hub: HubServer, client: Client, tiny_llama: Tiny
) -> None:
    others = {
        "pytorch_model.bin": b"\x80pickle",
        "original/model.safetensors": b"x",
        "consolidated.safetensors": b"x",
    }
    licenses = {"LICENSE.txt": b"Apache", "NOTICE": b"notice", "README.md": b"# card", "training.log": b"..."}
    commit = hub.add("org/tiny", tiny_llama("llama2"), **others, **licenses)
    expected = Checkpoint.open(tiny_llama("llama2")).hash
    origin = {"repository": "org/tiny", "revision": "main", "commit": commit}
    assert client.open("org/tiny") == [f"{expected} {origin}"]
    assert hub.downloaded() == [
        *("LICENSE.txt", "NOTICE", "README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    before = len(hub.requests)
    assert client.open("org/tiny") == [f"{expected} {origin}"]
    assert not any(method == "GET" and "/api/" not in path for method, path, _ in hub.requests[before:])


def test_offline_takes_what_is_in_the_cache_and_asks_nothing(
    hub: HubServer, client: Client, tiny_llama: Tiny
) -> None:
    hub.add("org/tiny", tiny_llama("sharded"))
    [found] = client.open("org/tiny")
    hub.requests.clear()
    assert client.open("org/tiny", HF_HUB_OFFLINE="1") == [found]
    assert "architecture" in client.call("inspect", "org/tiny", "--offline")
    assert hub.requests == []
    for settings, flags in (({"HF_HUB_OFFLINE": "1"}, []), ({}, ["--offline"])):
        said = client.call("inspect", "org/other", *flags, code=2, **settings)
        assert "org/other: no such directory or file here, nor a model in the hub's cache" in said


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: HubServer, client: Client, tiny_llama: Tiny) -> None:
    first = hub.add("org/tiny", tiny_llama("llama2"))
    hub.repositories["org/tiny"].branches["refs/pr/1"] = first
    second = hub.add("org/tiny", tiny_llama("llama3"))
    hashes = [Checkpoint.open(tiny_llama(variant)).hash for variant in ("llama2", "llama3")]
    names = ("org/tiny@refs/pr/1", f"org/tiny@{first}", "org/tiny", "org/tiny@main", "org/tiny@nowhere")
    *found, missing = client.open(*names)
    assert [line.split()[0] for line in found] == [hashes[0], hashes[0], hashes[1], hashes[1]]
    assert first in found[0] and "'revision': 'refs/pr/1'" in found[0] and second in found[2]
    assert missing.startswith(f"ConfigError org/tiny@nowhere: {hub.url}/org/tiny has no revision nowhere")
    hub.failing = 503  # a commit never changes: a copy of it needs no network
    assert client.open(f"org/tiny@{first}") == [found[1]]


def test_a_local_path_wins(hub: HubServer, client: Client, tiny_llama: Tiny, tmp_path: Path) -> None:
    hub.add("org/tiny", tiny_llama("llama2"))
    shutil.copytree(tiny_llama("llama3"), tmp_path / "org" / "tiny")
    command = [sys.executable, "-c", OPEN, "org/tiny"]
    found = subprocess.check_output(command, env=client.environment(), text=True, cwd=tmp_path)
    assert found.split() == [Checkpoint.open(tiny_llama("llama3")).hash, "None"]
    assert hub.requests == []


@pytest.mark.parametrize(
    "name", ["nowhere", "./org/name", "a/b/c", "/org/name", "out/model.goss", "org/name@", "a/-"]
)
def test_what_is_neither_a_path_nor_a_name_says_both(name: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"found nothing there; expected .* directory .* org/name\[@revision\]"
    ):
        snapshot(name)


def test_what_cannot_be_had_says_which_and_what_to_do(
    hub: HubServer, client: Client, tiny_llama: Tiny, tmp_path: Path
) -> None:
    for name in ("org/gated", "org/private"):
        hub.add(name, tiny_llama("llama2"))
    hub.repositories["org/gated"].gated = hub.repositories["org/private"].private = True
    names = ("org/missing", "org/gated", "org/private", "org/tw--o", "org/missing@main")
    missing, gated, private, malformed, _ = client.open(*names)
    assert missing.startswith("ConfigError org/missing: no such directory or file here, and the hub shows no")
    assert "hf auth login" in missing and "HF_TOKEN" in missing
    assert gated.startswith(f"ConfigError org/gated: {hub.url}/org/gated is gated; ask for access")
    assert "hf auth login" in gated and "HF_TOKEN" in gated
    assert private.startswith("ConfigError org/private: no such directory") and "if it is private" in private
    assert malformed.startswith("CheckpointError org/tw--o: found nothing there")
    without_access = client.open("org/gated", "org/private", HF_TOKEN="hf_othertoken")
    assert "has no access yet" in without_access[0] and "cannot see it" in without_access[1]
    expected = Checkpoint.open(tiny_llama("llama2")).hash
    with_access = client.open("org/gated", "org/private", HF_TOKEN=GOOD_TOKEN)
    assert [line.split()[0] for line in with_access] == [expected, expected]
    said = client.call("pack", "org/missing", "-o", str(tmp_path / "model.goss"), code=2)
    assert "the hub shows no" in said and not list(tmp_path.glob("*.goss*"))


def test_a_token_that_was_kept_by_logging_in_is_used(
    hub: HubServer, client: Client, tiny_llama: Tiny
) -> None:
    hub.add("org/gated", tiny_llama("llama2"))
    hub.repositories["org/gated"].gated = True
    home = Path(client.settings["HF_HOME"])
    home.mkdir()
    (home / "token").write_text(GOOD_TOKEN)
    assert client.open("org/gated")[0].split()[0] == Checkpoint.open(tiny_llama("llama2")).hash


def test_a_repository_that_cannot_be_read_is_refused_before_its_weights(
    hub: HubServer, client: Client, tiny_llama: Tiny, tmp_path: Path
) -> None:
    def variant(name: str, change: Callable[[Path], object]) -> None:
        change(Path(shutil.copytree(tiny_llama("llama2"), tmp_path / name)))
        hub.add(f"org/{name}", tmp_path / name)

    def other_family(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))

    variant("pickles", lambda model: (model / "model.safetensors").rename(model / "pytorch_model.bin"))
    variant("gguf", lambda model: (model / "model.safetensors").rename(model / "tiny-Q4_0.gguf"))
    variant("empty", lambda model: (model / "config.json").unlink())
    variant("gpt2", other_family)
    pickles, gguf, empty, gpt2 = client.open("org/pickles", "org/gguf", "org/empty", "org/gpt2")
    assert pickles.startswith("UnsupportedError org/pickles: the repository has no model.safetensors; found")
    assert "pytorch_model.bin" in pickles and "save_pretrained" in pickles
    assert "tiny-Q4_0.gguf" in gguf and "gossamer import" in gguf
    assert "the repository has no config.json" in empty
    assert gpt2.startswith("UnsupportedError") and "GPT2LMHeadModel" in gpt2
    assert not hub.downloaded("safetensors") + hub.downloaded(".bin") + hub.downloaded(".gguf")


def test_without_a_network_nothing_old_is_taken_in_silence(
    hub: HubServer, client: Client, tiny_llama: Tiny
) -> None:
    hub.add("org/tiny", tiny_llama("llama2"))
    [found] = client.open("org/tiny")
    said = client.call("inspect", "org/tiny", code=1, HF_ENDPOINT=NO_SUCH_PORT)
    assert f"org/tiny: no such directory or file here, and its download from {NO_SUCH_PORT} failed" in said
    assert "--offline" in said and "Traceback" not in said
    hub.failing = 503
    assert "503" in client.call("inspect", "org/tiny", code=1)
    assert client.open("org/tiny", HF_ENDPOINT=NO_SUCH_PORT, HF_HUB_OFFLINE="1") == [found]


def test_a_connection_that_breaks_off_is_taken_up_where_it_was(
    hub: HubServer, client: Client, tiny_llama: Tiny
) -> None:
    hub.add("org/tiny", tiny_llama("llama2"))
    hub.cuts["model.safetensors"] = 2
    small_pieces = (
        "import huggingface_hub.constants as c; c.DOWNLOAD_CHUNK_SIZE = 1 << 12\n"  # 10 MB by itself
    )
    command = [sys.executable, "-c", small_pieces + OPEN, "org/tiny"]
    found = subprocess.check_output(command, env=client.environment(), text=True)
    assert found.split()[0] == Checkpoint.open(tiny_llama("llama2")).hash
    size = (tiny_llama("llama2") / "model.safetensors").stat().st_size
    ranges = [asked for method, path, asked in hub.requests if method == "GET" and "/storage/" in path]
    starts = [int((asked or "bytes=0-")[6:-1]) for asked in ranges]
    assert (
        starts[0] == 0
        and size // 2 - 4096 <= starts[1] <= size // 2
        and starts[1] < starts[2]
        and not starts[3:]
    )


def test_a_killed_download_goes_on_with_what_is_missing(
    hub: HubServer, client: Client, tiny_llama: Tiny
) -> None:
    hub.add("org/tiny", tiny_llama("sharded"))
    last = sorted(tiny_llama("sharded").glob("model-*.safetensors"))[-1].name
    hub.stall_on = last
    child = subprocess.Popen([sys.executable, "-c", OPEN, "org/tiny"], env=client.environment())
    assert hub.stalled.wait(60)
    blobs = client.cache / "models--org--tiny" / "snapshots"
    deadline = time.monotonic() + 30
    while len(list(blobs.glob("*/model-*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    child.kill()
    child.wait()
    said = client.open("org/tiny", HF_HUB_OFFLINE="1")[0]
    assert (
        said.startswith("CheckpointError org/tiny: the copy in") and f"lacks {last} (1 files missing)" in said
    )
    hub.stall_on = ""
    hub.requests.clear()
    assert client.open("org/tiny")[0].split()[0] == Checkpoint.open(tiny_llama("sharded")).hash
    assert hub.downloaded() == [last]


def test_stages_and_packed_files_record_repository_revision_and_commit(
    hub: HubServer, client: Client, tiny_llama: Tiny, text_file: Path, tmp_path: Path
) -> None:
    commit = hub.add("org/tiny", tiny_llama("llama2"), **{"README.md": b"# card", "LICENSE": b"Apache"})
    origin = {"repository": "org/tiny", "revision": "main", "commit": commit}
    client.call("prune", "org/tiny", "-o", str(tmp_path / "pruned"), *CALIBRATE, str(text_file))
    options = {"dataset": (str(text_file),), "num_calibration_samples": 4, "max_seq_length": 32}
    prune(Prune(str(tmp_path / "pruned"), str(tmp_path / "again"), sparsity=0.7, **options))
    pack(Pack(str(tmp_path / "again"), str(tmp_path / "model.goss")))
    for directory in ("pruned", "again"):
        assert json.loads((tmp_path / directory / "gossamer.json").read_text())["origin"] == origin
    assert (tmp_path / "again" / "LICENSE").read_text() == "Apache"
    assert json.loads(Packed.open(tmp_path / "model.goss").metadata["origin"]) == origin


def test_the_engine_takes_a_hub_name_and_keeps_its_packed_file_under_it(
    hub: HubServer, client: Client, tiny_llama: Tiny
) -> None:
    hub.add("org/tiny", tiny_llama("llama2"))
    program = "from gossamer import LLM; import json, sys; "
    program += "print(json.dumps(LLM('org/tiny', offline=len(sys.argv) > 1).logits([5, 6, 7]).tolist()))"
    expected = subprocess.check_output(
        [sys.executable, "-c", program.replace("org/tiny", str(tiny_llama("llama2")))], text=True
    )
    for arguments in ([], ["offline"]):
        command = [sys.executable, "-c", program, *arguments]
        found = subprocess.check_output(command, text=True, env=client.environment())
        assert np.array_equal(json.loads(found), json.loads(expected))
    [packed] = Path(client.settings["GOSSAMER_CACHE"]).glob("*.goss")
    assert packed.name.startswith("org--tiny-")


def test_compress_sees_one_commit_in_all_its_steps(
    hub: HubServer, client: Client, tiny_llama: Tiny, text_file: Path, tmp_path: Path
) -> None:
    commit = hub.add("org/tiny", tiny_llama("llama2"))
    options = ["-o", str(tmp_path / "out"), "--sparsity", "0.5", *CALIBRATE, str(text_file)]
    client.call("compress", "org/tiny", *options)
    assert json.loads((tmp_path / "out" / "compress.json").read_text())["model"] == f"org/tiny@{commit}"
    assert json.loads(Packed.open(tmp_path / "out" / "model.goss").metadata["origin"])["commit"] == commit
    assert sum("/revision/" in path for _, path, _ in hub.requests) <= 2
