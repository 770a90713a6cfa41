"""NVRTC makes the kernels for each generation of GPUs, once; what it cannot do is said."""

from pathlib import Path

import pytest

from gossamer.errors import EngineError, UnsupportedError
from gossamer.gpu import compiler


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gpu"


@pytest.fixture
def small_kernels(nvrtc: compiler.Nvrtc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of files that need no second to compile; those of the package have their own tests."""
    for number, name in enumerate(compiler.ROOTS):
        (tmp_path / name).write_text(f'extern "C" __global__ void kernel_{number}() {{}}')
    monkeypatch.setattr(compiler, "SOURCES", tmp_path)


@pytest.mark.usefixtures("small_kernels")
def test_kernels_are_compiled_once(cache: Path) -> None:
    made = compiler.cubin((9, 0))
    assert made.startswith(b"\x7fELF") and all(f"kernel_{it}".encode() in made for it in range(3))
    [kept] = cache.iterdir()
    assert kept.name.startswith("sm_90-") and kept.read_bytes() == made
    kept.write_bytes(b"what was kept")
    assert compiler.cubin((9, 0)) == b"what was kept"


@pytest.mark.usefixtures("small_kernels")
def test_a_cache_that_cannot_be_written_is_done_without(cache: Path) -> None:
    cache.parent.write_text("a file where a folder should be")
    assert compiler.cubin((8, 0)).startswith(b"\x7fELF")


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((9, 0), "sm_90"), ((10, 9), "sm_107")],
)
def test_code_is_for_the_gpu_or_for_an_older_one_of_its_generation(
    nvrtc: compiler.Nvrtc, capability: tuple[int, int], architecture: str
) -> None:
    if nvrtc.version < (13, 5):
        pytest.skip(f"NVRTC {nvrtc.version} knows fewer GPUs")
    assert nvrtc.architecture(capability) == architecture


def test_what_it_says_against_a_kernel_is_told(nvrtc: compiler.Nvrtc) -> None:
    with pytest.raises(EngineError, match=r"does not compile the kernels for sm_90: .*nothing_of_the_kind"):
        nvrtc.compile(dict.fromkeys(compiler.ROOTS, "int x = nothing_of_the_kind;"), "sm_90")


def test_a_gpu_that_is_too_old_is_named() -> None:
    with pytest.raises(UnsupportedError, match=r"compute capability 7\.5; supported: 8\.0 and later"):
        compiler.cubin((7, 5))


def test_a_gpu_that_is_too_new_is_named(nvrtc: compiler.Nvrtc) -> None:
    with pytest.raises(UnsupportedError, match=r"does not know GPUs of compute capability 99\.0; it knows"):
        nvrtc.architecture((99, 0))


def test_without_nvrtc_it_says_what_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "LIBRARIES", ["libnvrtc-of-no-version.so"])
    monkeypatch.setattr(compiler.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(UnsupportedError, match=r"libnvrtc-of-no-version.so.*pip install nvidia-cuda-nvrtc"):
        compiler.cubin((9, 0))
