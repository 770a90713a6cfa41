"""The kernels of `cuda/` as machine code of a GPU, by NVRTC, the compiler that torch's CUDA wheels bring.

It takes a second, once for each kind of GPU and each version of the kernels: what it makes is kept in the
cache.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gossamer.cuda import torch_cuda
from gossamer.errors import EngineError, UnsupportedError
from gossamer.machine import cache_directory

SOURCES = Path(__file__).with_name("cuda")
ROOTS = ("activations.cuh", "expand.cuh", "sparse_product.cuh")
LEAST = (8, 0)  # copies to shared memory that do not wait
LIBRARIES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


def cubin(capability: tuple[int, int]) -> bytes:
    """Machine code for a GPU of this compute capability, from the cache or made and kept there.

    UnsupportedError where the GPU is too old, NVRTC is not there, or does not know the GPU.
    """
    if capability < LEAST:
        raise UnsupportedError(
            f"found a GPU of compute capability {_dotted(capability)}; supported: {_dotted(LEAST)} and later "
            "(A100, A10, L4, H100 and their like)"
        )
    nvrtc = Nvrtc()
    architecture = nvrtc.architecture(capability)
    texts = {path.name: path.read_text() for path in sorted(SOURCES.glob("*.cuh"))}
    key = hashlib.sha256(repr((texts, architecture, nvrtc.version)).encode()).hexdigest()[:32]
    folder, name = cache_directory() / "gpu", f"{architecture}-{key}"
    for kept in folder.glob(f"{name}-*.cubin"):
        with contextlib.suppress(OSError):
            if kept.name == _named(name, code := kept.read_bytes()):
                return code
    made, _ = nvrtc.compile(texts, architecture)
    _keep(folder / _named(name, made), made)
    return made


class Nvrtc:
    """NVIDIA's compiler as a library."""

    def __init__(self) -> None:
        """UnsupportedError where it cannot be found."""
        self._library = _library()
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)

    def architecture(self, capability: tuple[int, int]) -> str:
        """Such as sm_90: the newest that it knows whose code the GPU can run, that of its own generation."""
        number = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(number))
        known = (ctypes.c_int * number.value)()
        self._call("nvrtcGetSupportedArchs", known)
        major, minor = capability
        fitting = [it for it in known if it // 10 == major and it % 10 <= minor]
        if not fitting:
            raise UnsupportedError(
                f"NVRTC {_dotted(self.version)} does not know GPUs of compute capability "
                f"{_dotted(capability)}; it knows {', '.join(map(str, known))}. A torch for a newer CUDA "
                "brings a newer one"
            )
        return f"sm_{max(fitting)}"

    def compile(self, texts: dict[str, str], architecture: str, *more: str) -> tuple[bytes, str]:
        """Machine code of the kernels in these files, by name, and what is said of it.

        `more` are further options. EngineError with what it says against the kernels.
        """
        source = "".join(f'#include "{name}"\n' for name in ROOTS)
        names = (ctypes.c_char_p * len(texts))(*(it.encode() for it in texts))
        contents = (ctypes.c_char_p * len(texts))(*(it.encode() for it in texts.values()))
        options = [f"--gpu-architecture={architecture}", "--std=c++17", "-default-device", *more]
        with self._program(source.encode(), len(texts), contents, names) as program:
            given = (ctypes.c_char_p * len(options))(*(it.encode() for it in options))
            failed = self._library.nvrtcCompileProgram(program, len(options), given)
            said = self._bytes("nvrtcGetProgramLog", program).decode(errors="replace")
            if failed:
                raise EngineError(f"NVRTC does not compile the kernels for {architecture}: {said}")
            return self._bytes("nvrtcGetCUBIN", program), said

    @contextlib.contextmanager
    def _program(self, *arguments: object) -> Iterator[ctypes.c_void_p]:
        program, (source, number, contents, names) = ctypes.c_void_p(), arguments
        by_address = ctypes.byref(program)
        self._call("nvrtcCreateProgram", by_address, source, b"kernels.cu", number, contents, names)
        try:
            yield program
        finally:
            self._call("nvrtcDestroyProgram", by_address)

    def _bytes(self, function: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"{function}Size", program, ctypes.byref(size))
        room = ctypes.create_string_buffer(size.value)
        self._call(function, program, room)
        return room.raw

    def _call(self, function: str, *arguments: object) -> None:
        if code := getattr(self._library, function)(*arguments):
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
            said = self._library.nvrtcGetErrorString(code).decode()
            raise EngineError(f"NVRTC's {function} failed: {said}")


def install() -> str:
    """The command that brings NVRTC of torch's CUDA, whose code a driver takes that torch runs on."""
    built = torch_cuda()
    if built is None:
        return "`pip install nvidia-cuda-nvrtc`"
    named = "nvidia-cuda-nvrtc-cu12" if built[0] == 12 else f"'nvidia-cuda-nvrtc=={built[0]}.*'"
    return f"`pip install {named}`"


def _library() -> ctypes.CDLL:
    """That of torch's CUDA first: of each as torch has loaded it, as the system finds it, or of a package."""
    built = torch_cuda()
    first = [f"libnvrtc.so.{built[0]}"] if built else []
    names = [*first, *(it for it in LIBRARIES if it not in first)]
    for name in names:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
        for path in _packaged(name):
            with contextlib.suppress(OSError):
                for part in path.parent.glob("libnvrtc-builtins.so.*"):
                    ctypes.CDLL(str(part), ctypes.RTLD_GLOBAL)
                return ctypes.CDLL(str(path))
    raise UnsupportedError(
        f"NVRTC, which compiles the GPU's kernels, was not found ({', '.join(names)}); torch's wheels "
        f"for CUDA bring it, and {install()} does"
    )


def _packaged(name: str) -> list[Path]:
    """Where the packages that torch's wheels bring have a library of this name."""
    packages = importlib.util.find_spec("nvidia")  # in as many folders as have such packages
    folders = (packages and packages.submodule_search_locations) or ()
    return [path for folder in folders for path in Path(folder).glob(f"*/lib/{name}")]


def _named(name: str, code: bytes) -> str:
    """Of a kept file: with what its content is checked by, for it may have been damaged."""
    return f"{name}-{hashlib.sha256(code).hexdigest()[:32]}.cubin"


def _keep(path: Path, content: bytes) -> None:
    """Under its name only when it is whole; a cache that cannot be written costs a second the next time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as part:
            try:
                part.write(content)
                part.flush()
                Path(part.name).replace(path)
            finally:
                Path(part.name).unlink(missing_ok=True)  # it is there where one of these failed


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
