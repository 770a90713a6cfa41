"""Where the peers live and how they get there: each in an environment of its own, outside the repository."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path("/tmp/peers")
CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"  # by which torch is what it is here
PACKAGES = {
    "llama.cpp": ["gguf", "numpy"],
    "openvino": ["openvino", "nncf", "numpy"],
    "onnxruntime": ["onnxruntime", "onnx", "sympy", "numpy"],
    "sentence-transformers": ["sentence-transformers", "-c", str(CONSTRAINTS)],
}
SOURCES = "llama-cpp-python"  # its source archive carries llama.cpp
CMAKE = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "GGML_NATIVE": "ON",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
}


def python(peer: str, root: Path = ROOT) -> Path:
    """The interpreter of a peer's environment; torch is part of our own (the extra `compress`)."""
    return root / peer / "venv" / "bin" / "python" if peer in PACKAGES else Path(sys.executable)


def llama_bench(root: Path = ROOT) -> Path:
    return root / "llama.cpp" / "build" / "bin" / "llama-bench"


def installed(peer: str, root: Path = ROOT) -> bool:
    if peer == "llama.cpp":
        return llama_bench(root).is_file()
    command = [python(peer, root), "-c", f"import {peer.replace('-', '_')}"]
    return Path(command[0]).is_file() and subprocess.run(command, capture_output=True).returncode == 0


def how_to_install(peer: str, root: Path = ROOT) -> str:
    """A command line."""
    if peer == "torch":
        return "pip install '.[compress]'"
    where = "" if root == ROOT else f" --root {root}"
    return f"python benchmarks/compare/run.py --install {peer}{where}"


def install(peer: str, root: Path = ROOT, jobs: int = 2) -> None:
    """Make the peer's environment; build llama-bench for this very CPU (some minutes)."""
    if peer not in PACKAGES:
        raise SystemExit(f"{peer} has no environment of its own: {how_to_install(peer)}")
    home = root / peer
    home.mkdir(parents=True, exist_ok=True)
    call(sys.executable, "-m", "venv", home / "venv")
    call(python(peer, root), "-m", "pip", "install", "-q", *PACKAGES[peer])
    if peer == "llama.cpp":
        build_llama_bench(home, jobs)


def build_llama_bench(home: Path, jobs: int) -> None:
    """Fetch the newest source archive, unpack it and build the one program."""
    sources, build = home / "src", home / "build"
    for stale in (sources, build):
        shutil.rmtree(stale, ignore_errors=True)
    pip = (home / "venv" / "bin" / "python", "-m", "pip")
    call(*pip, "download", "-q", "--no-deps", "--no-binary", SOURCES, "-d", sources, SOURCES)
    [archive] = sources.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(sources, filter="data")
    [vendored] = sources.glob("*/vendor/llama.cpp")
    cmake = shutil.which("cmake") or Path(sys.executable).with_name("cmake")
    call(cmake, "-S", vendored, "-B", build, *(f"-D{name}={value}" for name, value in CMAKE.items()))
    call(cmake, "--build", build, "--target", "llama-bench", "-j", jobs)


def call(*words: object) -> None:
    """Run a command, shown first; its failure is ours."""
    command = [str(word) for word in words]
    print("+", *command, file=sys.stderr, flush=True)
    subprocess.run(command, check=True)
