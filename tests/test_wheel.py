"""What is published: the sdist, the wheel of its files, and that the wheel runs a model without torch.

To compile the native part takes a core two minutes, and `make` has done it: here the wheel is built where
that was, and all that was compiled and packaged is held against the archive. With `make torture` the archive
itself is built, as it is for every release.
"""

import email.message
import email.parser
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from gossamer.engine import LLM, SamplingParams
from gossamer.stages.pack import Pack, pack
from once import once

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).resolve().parents[1]
TORTURE = bool(os.environ.get("GOSSAMER_TORTURE"))
PROGRAM = """
import json, sys, time
start = time.perf_counter()
from gossamer import LLM, SamplingParams
seconds = time.perf_counter() - start
[answer] = LLM(sys.argv[1]).generate("Once upon", SamplingParams(max_tokens=12))
heavy = sorted({"torch", "transformers", "datasets", "matplotlib"} & set(sys.modules))
print(json.dumps({"ids": list(answer.token_ids), "heavy": heavy, "seconds": seconds}))
"""


PIP = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
SDIST = "import sys; from scikit_build_core.build import build_sdist; print(build_sdist(sys.argv[1]))"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of sources."""
    directory = once(
        tmp_path_factory, "sdist", lambda made: run([sys.executable, "-c", SDIST, str(made)], cwd=ROOT)
    )
    [archive] = directory.glob("gossamer-*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def source(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel is built of: this repository, with what is compiled of it, or the archive."""
    if not TORTURE:
        return ROOT
    [directory] = once(tmp_path_factory, "source", lambda made: unpack(sdist, made)).iterdir()
    return directory


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = [*PIP, "wheel", "--no-deps", "--no-build-isolation", str(source), "-w"]
    [made] = once(tmp_path_factory, "wheel", lambda made: run([*build, str(made)])).glob("gossamer-*.whl")
    return made


@pytest.fixture(scope="module")
def runtime(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of a fresh environment that holds the wheel and what it requires, nothing else."""

    def make(directory: Path) -> None:
        run([sys.executable, "-m", "venv", "--without-pip", str(directory)])
        pip = [*PIP, "--python", str(directory / "bin" / "python"), "install", "--no-compile"]
        run([*pip, "-c", str(ROOT / "constraints.txt"), str(wheel)])

    return once(tmp_path_factory, "runtime", make) / "bin"


def run(command: list[str], cwd: Path | None = None, **options: str) -> str:
    completed = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | options, timeout=600, check=False, cwd=cwd
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def unpack(archive: Path, target: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")


def contents_of(archive: Path) -> dict[str, bytes]:
    """The files of an sdist by their paths in the repository."""
    with tarfile.open(archive) as tar:
        return {
            str(Path(*Path(member.name).parts[1:])): file.read()
            for member in tar
            if (file := tar.extractfile(member))
        }


def sources_of(build: Path, source: Path) -> set[str]:
    """The files of the repository that the compiler read for what lies in a build folder."""
    said = run([sys.executable, "-m", "ninja", "-C", str(build), "-t", "deps"])
    names = [line.strip() for line in said.splitlines() if line.startswith("    ")]
    paths = {Path(os.path.normpath(build / name)) for name in names}
    others = (build, Path(sys.prefix))  # nanobind lies in the environment, which may lie in the repository
    return {
        str(path.relative_to(source))
        for path in paths
        if path.is_relative_to(source) and not any(path.is_relative_to(other) for other in others)
    }


def metadata_of(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.parser.BytesParser().parsebytes(archive.read(name))


def test_the_sdist_has_what_is_built_and_tested_and_no_results(sdist: Path) -> None:
    names = set(contents_of(sdist))
    tracked = set(run(["git", "ls-files", "src", "native", "tests"], cwd=ROOT).splitlines())
    assert tracked - names == set()
    assert {"CMakeLists.txt", "LICENSE", "README.md", "PKG-INFO", "pyproject.toml"} <= names
    left_out = ("build/", "benchmarks/", "docs/results/", ".ci/", ".github/", ".git/", ".venv/")
    assert not [name for name in names if name.startswith(left_out) or "__pycache__" in name]
    assert sdist.stat().st_size < 8e6


def test_the_wheel_is_made_of_files_of_the_sdist(sdist: Path, source: Path, wheel: Path) -> None:
    """Byte for byte: what was compiled, how, and every file of the package."""
    archive = contents_of(sdist)
    compiled = sources_of(source / "build" / wheel.stem.split("-", 2)[2], source)
    assert {"native/python/bindings.cpp", "native/kernels/kernels.hpp"} <= compiled
    for name in {*compiled, "CMakeLists.txt", "pyproject.toml"}:
        assert archive[name] == (source / name).read_bytes(), name
    with zipfile.ZipFile(wheel) as package:
        names = {name for name in package.namelist() if name.startswith("gossamer/")}
        for name in (name for name in names if not name.endswith(".so")):
            assert archive[f"src/{name}"] == package.read(name), name
    assert {f"src/{name}" for name in names} >= {name for name in archive if name.startswith("src/gossamer/")}


def test_the_wheel_has_the_package_its_types_and_no_sources_of_the_native_part(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"gossamer/py.typed", "gossamer/_native.pyi", "gossamer/checkpoint/hub.py"} <= names
    assert "gossamer/models/python-llama/model.safetensors" in names
    others = {name for name in names if not re.match(r"gossamer(-[^/]*\.dist-info)?/", name)}
    assert not others and not [name for name in names if name.endswith((".cpp", ".hpp", ".o", ".pyc"))]
    [native] = [name for name in names if name.endswith(".so")]
    stable = sys.version_info >= (3, 12)
    tag = "cp312-abi3" if stable else f"cp3{sys.version_info.minor}-cp3{sys.version_info.minor}"
    assert wheel.name.split("-", 2)[2].startswith(f"{tag}-linux_")
    assert native.endswith(
        ".abi3.so" if stable else f".cpython-3{sys.version_info.minor}-{os.uname().machine}-linux-gnu.so"
    )


def test_the_native_part_needs_no_library_that_a_manylinux_system_lacks(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".so")]
        library = archive.extract(name, tmp_path)
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", run(["readelf", "-d", library])))
    allowed = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libpthread.so.0", "libdl.so.2"}
    assert {name for name in needed if not name.startswith("ld-linux")} <= allowed


def test_the_metadata_are_complete_and_the_extras_resolve(wheel: Path) -> None:
    found = metadata_of(wheel)
    assert (found["License-Expression"], found["License-File"]) == ("Apache-2.0", "LICENSE")
    assert found["Requires-Python"] == ">=3.11" and found["Description-Content-Type"] == "text/markdown"
    assert "pip install" in str(found.get_payload())
    pythons = {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)}
    assert pythons | {"Typing :: Typed"} <= set(found.get_all("Classifier", []))
    constraints = str(ROOT / "constraints.txt")  # the set that is installed here, so no index is asked
    run([*PIP, "install", "--dry-run", "--no-index", "-c", constraints, f"{wheel}[compress,test]"])


def test_a_wheel_without_torch_runs_a_packed_model(
    runtime: Path, tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    pack(Pack(str(tiny_llama("llama3")), str(tmp_path / "model.goss")))
    [expected] = LLM(tmp_path / "model.goss").generate("Once upon", SamplingParams(max_tokens=12))
    clean = {"PYTHONPATH": "", "GOSSAMER_CACHE": str(tmp_path / "cache")}
    found = json.loads(run([str(runtime / "python"), "-c", PROGRAM, str(tmp_path / "model.goss")], **clean))
    assert found["ids"] == list(expected.token_ids)
    assert found["heavy"] == []
    text = run(
        [str(runtime / "gossamer"), "run", str(tmp_path / "model.goss"), "Once upon", "--max-tokens", "4"],
        **clean,
    )
    assert text.strip()


def test_the_runtime_packs_a_directory_itself(
    runtime: Path, tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    clean = {"PYTHONPATH": "", "GOSSAMER_CACHE": str(tmp_path / "cache")}
    command = [str(runtime / "gossamer"), "run", str(tiny_llama("bf16")), "Once upon", "--max-tokens", "4"]
    assert run(command, **clean) == run(command, **clean)
    assert len(list((tmp_path / "cache").glob("*.goss"))) == 1


def test_a_verb_that_needs_torch_says_what_to_install(runtime: Path, tmp_path: Path) -> None:
    completed = subprocess.run(
        [
            str(runtime / "gossamer"),
            "prune",
            "model",
            "-o",
            str(tmp_path / "out"),
            "--dataset",
            "python:stdlib",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": ""},
        check=False,
    )
    assert completed.returncode == 1
    assert "pip install 'gossamer[compress]'" in completed.stderr
