"""NVRTC makes the kernels for each generation of GPUs, once; what it cannot do is said."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gossamer.errors import EngineError, UnsupportedError
from gossamer.gpu import compiler

pytestmark = pytest.mark.usefixtures("kernel_cache")


@pytest.mark.usefixtures("small_kernels")
def test_kernels_are_compiled_once(kernel_cache: Path) -> None:
    made = compiler.cubin((9, 0))
    assert made.startswith(b"\x7fELF") and all(f"kernel_{it}".encode() in made for it in range(3))
    [kept] = kernel_cache.iterdir()
    assert kept.name.startswith("sm_90-") and kept.read_bytes() == made
    name = kept.name.rpartition("-")[0]
    kept.unlink()
    compiler._keep(kept.with_name(compiler._named(name, b"what was kept")), b"what was kept")
    assert compiler.cubin((9, 0)) == b"what was kept"


@pytest.mark.usefixtures("small_kernels")
@pytest.mark.parametrize(
    "damage",
    [lambda code: code[:-1], lambda code: bytes(len(code)), lambda _: b""],
    ids=["cut", "zeros", "empty"],
)
def test_a_kept_file_that_is_damaged_is_made_again(
    kernel_cache: Path, damage: Callable[[bytes], bytes]
) -> None:
    made = compiler.cubin((9, 0))
    [kept] = kernel_cache.iterdir()
    kept.write_bytes(damage(made))
    assert compiler.cubin((9, 0)) == made
    assert [*kernel_cache.iterdir()] == [kept] and kept.read_bytes() == made


@pytest.mark.usefixtures("small_kernels")
def test_a_cache_that_cannot_be_written_is_done_without(kernel_cache: Path) -> None:
    kernel_cache.parent.write_text("a file where a folder should be")
    assert compiler.cubin((8, 0)).startswith(b"\x7fELF")


@pytest.mark.usefixtures("small_kernels")
def test_what_cannot_be_kept_leaves_nothing_behind(kernel_cache: Path) -> None:
    made = compiler.cubin((9, 0))
    [kept] = kernel_cache.iterdir()
    kept.unlink()
    kept.mkdir()
    assert compiler.cubin((9, 0)) == made
    assert [*kernel_cache.iterdir()] == [kept]


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


def test_without_nvrtc_it_says_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "LIBRARIES", ["libnvrtc-of-no-version.so"])
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UnsupportedError, match=r"libnvrtc-of-no-version.so.*pip install nvidia-cuda-nvrtc"):
        compiler.cubin((9, 0))


@pytest.mark.parametrize(
    ("cuda", "package"), [("12.8", "nvidia-cuda-nvrtc-cu12`"), ("99.1", r"'nvidia-cuda-nvrtc==99\.\*'`")]
)
def test_without_nvrtc_it_says_what_brings_that_of_torch(
    cuda: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "LIBRARIES", ["libnvrtc-of-no-version.so"])
    monkeypatch.setattr(compiler, "_packaged", lambda _: [])
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(
        UnsupportedError, match=rf"libnvrtc.so.{cuda[:2]}, libnvrtc-of.*pip install {package}"
    ):
        compiler.cubin((9, 0))


@pytest.mark.parametrize(("cuda", "major"), [("12.8", 12), ("13.0", 13), (None, 13)])
def test_the_nvrtc_of_torchs_cuda_comes_first(
    cuda: str | None, major: int, nvrtc: compiler.Nvrtc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a path of Python has packages of NVIDIA's; what is called 12 here is the same library."""
    [path, *_] = compiler._packaged("libnvrtc.so.13") or [None]
    if path is None:
        pytest.skip("no NVRTC 13 in a package: pip install nvidia-cuda-nvrtc")
    other = tmp_path / "nvidia" / "cuda_nvrtc" / "lib"
    other.mkdir(parents=True)
    (other / "libnvrtc.so.12").symlink_to(path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert Path(compiler._library()._name).name == f"libnvrtc.so.{major}"
    assert compiler.Nvrtc().version == nvrtc.version
