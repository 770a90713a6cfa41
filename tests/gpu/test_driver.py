"""A driver as CUDA's is, emulated: its contexts, devices of several kinds, and what it refuses."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gossamer import cuda
from gossamer.errors import ConfigError, EngineError, UnsupportedError
from gossamer.gpu import compiler, found, kernels
from gossamer.gpu.driver import Gpu, Module, gpu
from gossamer.training.device import check_device
from gpu.emulated import needs_compiler

pytestmark = needs_compiler
Kinds = list[tuple[int, int]]


def ordered(device: Gpu) -> Tensor:
    """What the device makes of one token of 128 numbers."""
    x, y = torch.arange(128).bfloat16(), torch.zeros(8 * 128, dtype=torch.bfloat16)
    job = kernels.OrderInputs(x=x, ordered=y, tokens=1, inputs=128, steps=1, tiles=1)
    device.launch(kernels.ORDER_INPUTS, 8, job)
    return y


def test_each_device_has_code_of_its_kind_in_its_own_context(
    capabilities: Kinds, kernel_cache: Path, emulated_driver: ctypes.CDLL
) -> None:
    """Launches find it whichever device's context is current."""
    first, second = gpu(0), gpu(1)
    assert gpu(1) is second
    assert {it.name[:6] for it in kernel_cache.iterdir()} == {"sm_80-", "sm_90-"}
    for index, device in ((0, first), (1, second), (1, second), (0, first)):
        assert ordered(device).any()
        current = ctypes.c_int()
        assert emulated_driver.cuCtxGetDevice(ctypes.byref(current)) == 0 and current.value == index


def test_a_thread_that_has_no_context_yet_launches(capabilities: Kinds, emulated_driver: ctypes.CDLL) -> None:
    device = gpu(1)
    expected = ordered(device)
    with ThreadPoolExecutor(1) as fresh:
        none = fresh.submit(emulated_driver.cuCtxGetDevice, ctypes.byref(ctypes.c_int()))
        assert none.result() == 201  # CUDA_ERROR_INVALID_CONTEXT
        assert torch.equal(fresh.submit(ordered, device).result(), expected)


def test_without_a_context_the_emulated_driver_refuses_as_cuda_does(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Module(ctypes.CDLL(str(library)), b"\x7fELF")
    monkeypatch.setattr(Module, "_enter", lambda _: None)
    job = kernels.OrderInputs(x=0, ordered=0, tokens=0, inputs=128, steps=1, tiles=1)
    with ThreadPoolExecutor(1) as fresh:
        launched = fresh.submit(module.launch, kernels.ORDER_INPUTS, 8, job, 0)
        with pytest.raises(EngineError, match="cuLaunchKernel failed: CUDA_ERROR_INVALID_CONTEXT"):
            launched.result()


def test_code_that_the_driver_refuses_is_told_with_all_versions(
    emulated_driver: ctypes.CDLL, nvrtc: compiler.Nvrtc, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulated_driver.emulate_version(12040)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    says = (
        r"cuModuleLoadData failed: CUDA_ERROR_INVALID_IMAGE; the driver supports CUDA 12.4, NVRTC is of "
        rf"{nvrtc.version[0]}.{nvrtc.version[1]}, and torch is built for 12.8.* update the driver, or `pip "
        "install nvidia-cuda-nvrtc-cu12`"
    )
    with pytest.raises(EngineError, match=says):
        Module(emulated_driver, b"of a newer CUDA")


def test_doctor_loads_the_kernels_on_each_gpu(capabilities: Kinds, emulated_driver: ctypes.CDLL) -> None:
    capabilities.append((9, 0))
    capabilities[1] = (7, 5)
    first, second, third = found.found_gpus()
    assert first == "Emulated, 24 GB, compute capability 8.0: sparse kernels compiled and loaded"
    assert "7.5: no sparse kernels, found a GPU of compute capability 7.5; supported: 8.0 and" in second
    assert "no sparse kernels, CUDA's cuDeviceGet failed: CUDA_ERROR_INVALID_DEVICE" in third


def test_verbs_ask_for_kernels_before_anything_is_packed(
    capabilities: Kinds, kernel_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found.gpu_device() == "cuda"
    [kept] = kernel_cache.iterdir()
    assert kept.name.startswith("sm_80-")
    gpu.cache_clear()
    capabilities[0] = (7, 5)
    with pytest.raises(UnsupportedError, match=r"compute capability 7\.5; supported: 8\.0 and later"):
        found.gpu_device()
    capabilities[0] = (8, 0)
    monkeypatch.setattr(compiler, "LIBRARIES", [])
    with pytest.raises(UnsupportedError, match="NVRTC, which compiles the GPU's kernels, was not found"):
        found.gpu_device()


WAYS = {
    "torch for CPUs": (13000, None, r"torch \S+ is built without CUDA: install a torch for CUDA 13 or older"),
    "old driver": (
        12040,
        "13.0",
        r"driver supports CUDA 12\.4, but torch \S+ is built for CUDA 13\.0: update the driver, or install a "
        "torch for CUDA 12",
    ),
    "no device": (
        12040,
        "12.8",
        r"for CUDA 12\.8 are here, but no GPU is visible: .*CUDA_VISIBLE_DEVICES is '-1'",
    ),
}


@pytest.mark.parametrize(("version", "built", "says"), WAYS.values(), ids=WAYS)
def test_what_is_in_the_way_of_a_gpu_is_told_apart(
    version: int, built: str | None, says: str, emulated_driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To whoever asks: `--backend gpu`, `--device cuda` and `doctor`."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    emulated_driver.emulate_version(version)
    with pytest.raises(ConfigError, match=f"no GPU was found: .*{says}"):
        found.gpu_device()
    with pytest.raises(ConfigError, match=rf"--device cuda is not there; found cpu \(.*{says}\): give one"):
        check_device("cuda", "--device")
    [line] = found.found_gpus()
    assert line == f"none: {cuda.why_no_gpu()}"
