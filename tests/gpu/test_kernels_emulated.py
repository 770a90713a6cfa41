"""The GPU's kernels, lane by lane on this CPU, against NumPy; and whether this notices mistakes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gossamer.gpu import layout
from gpu.emulated import CASES, COMPILER, KERNELS, Case, Emulated, build, is_equal, num_tiles, padded
from native.reference import rounded
from once import once

pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason=f"no {COMPILER} to compile GPU kernels for this CPU with"
)
TORTURE = bool(os.environ.get("GOSSAMER_TORTURE"))
QUICK = [CASES[1], CASES[2], CASES[4], CASES[7]]
# In sparse_i8.cuh, one at a time. Not among them: the barrier that ends a step, since products are one, too.
MISTAKES = {
    "rows_before = (1u << (4 * g)) - 1": "rows_before = (1u << (4 * g))",
    "at, at + num_upper}": "at, at}",
    "(4 * g + 30) % 32": "(4 * g + 28) % 32",
    "wait_copies<kSlots - 1>();\n        sync_warp();": "wait_copies<kSlots - 1>();",
    "wait_copies<kSlots - 1>();": "wait_copies<kSlots>();",
    "if (lane >= by) ends += before;": "ends += before;",
    "slot + starts[step] % 16 + ends": "slot + ends",
    "starts[step] & ~15u": "starts[step] & ~7u",
    "(8 * product + t + 4) * 16": "(8 * product + t + 2) * 16",
    "load_shared<4>(word), at * 8)": "load_shared<4>(word), at * 4)",
    "(live ? next : 4)": "(live ? next : 3)",
    "inputs += kTiles * kTileWords;": "",
    "at < size; at += kLanes * 16": "at + 16 < size; at += kLanes * 16",
    "slot == slots ? last_slot : slot - kSlotBytes": "slot",
    "share >= job.panels * job.shares": "share > job.panels * job.shares",
    "kSlotBytes = 2048 + 32": "kSlotBytes = 2048",
    "2 * t + part % 2": "2 * t + part / 2",
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "emulated-gpu", lambda folder: build(folder)) / "emulated.so"


@pytest.mark.parametrize("seed", [0, 1], ids=["in order", "shuffled"])
@pytest.mark.parametrize("eager", [False, True], ids=["late", "eager"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_are_exact(library: Path, case: Case, eager: bool, seed: int) -> None:
    assert is_equal(Emulated(library, seed, eager_copies=eager), case)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16], ids=["f32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 5, 13])
def test_a_linear_has_the_bits_of_the_format(library: Path, tokens: int, dtype: type) -> None:
    """Rounding, sums and scales: docs/format.md, as the CPU engine is held against it."""
    rng = np.random.default_rng(tokens)
    w_NK, _ = Case(40, 300, 0.7, tokens, 2).operands()
    scales_N = rng.uniform(0.001, 0.1, 40).astype(np.float32)
    x_TK = (rng.standard_normal((tokens, 300)) * 10.0 ** rng.integers(-3, 4, (tokens, 1))).astype(np.float32)
    x_TK[0, :5] = [0, -0.0, 1e-30, x_TK[0].max() * 0.5, -np.abs(x_TK[0]).max() * 2]
    if dtype == np.uint16:
        x_TK = floats(bfloat16(x_TK))
    given = bfloat16(x_TK) if dtype == np.uint16 else x_TK
    emulated, tiles = Emulated(library, 1), num_tiles(tokens)
    q_TK, scales_T1 = rounded(x_TK)
    fragments, scales_T = emulated.rounded(given, tiles)
    assert np.array_equal(fragments, layout.fragments(padded(q_TK.astype(np.int8), tiles)))
    assert np.array_equal(scales_T, scales_T1[:, 0])
    sums = emulated.sums(layout.from_weights(w_NK), fragments, 2)
    y_TN = emulated.scaled(sums, scales_T, scales_N, dtype)
    exact_TN = (q_TK.astype(np.float64) @ w_NK.T.astype(np.float64)).astype(np.float32)
    expected_TN = exact_TN * (scales_T1 * scales_N)
    assert np.array_equal(y_TN, bfloat16(expected_TN) if dtype == np.uint16 else expected_TN)


def test_a_token_of_zeros_has_the_scale_of_the_format(library: Path) -> None:
    fragments, scales_T = Emulated(library).rounded(np.zeros((2, 130), np.float32), 1)
    assert not fragments.any() and scales_T.tolist() == [2.0**-23] * 2


@pytest.mark.parametrize("text", list(MISTAKES) if TORTURE else list(MISTAKES)[3:5], ids=str)
@pytest.mark.timeout(300)
def test_a_planted_mistake_is_noticed(text: str, tmp_path: Path) -> None:
    assert not holds(tmp_path, text, MISTAKES[text])


def test_the_same_check_passes_without_mistakes(tmp_path: Path) -> None:
    assert holds(tmp_path, "kSlots = 3", "kSlots = 4")  # which is slower or faster, and no mistake


@pytest.mark.skipif(not TORTURE, reason="runs under sanitizers: make torture")
@pytest.mark.timeout(900)
def test_no_memory_is_touched_that_is_not_there(tmp_path: Path) -> None:
    """By address and undefined-behaviour sanitizers, which know the arrays' borders."""
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
    library = build(tmp_path, KERNELS, *flags)
    runtimes = [
        subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        for name in ("libasan.so", "libubsan.so")
    ]
    preload = " ".join(it.stdout.strip() for it in runtimes)
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    done = checked(library, {"LD_PRELOAD": preload, "ASAN_OPTIONS": options})
    assert done.returncode == 0, done.stderr[-2000:]


def holds(folder: Path, text: str, changed: str) -> bool:
    """Whether emulated kernels with this one change compute what they should, in a process of their own."""
    kernels = folder / "kernels"
    shutil.copytree(KERNELS, kernels)
    source = kernels / "sparse_i8.cuh"
    original = source.read_text()
    assert original.count(text) == 1, f"{text!r} is there {original.count(text)} times"
    source.write_text(original.replace(text, changed))
    return checked(build(folder, kernels), {}).returncode == 0


def checked(library: Path, environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    script = Path(__file__).with_name("emulated.py")
    command = [sys.executable, str(script), str(library), *map(str, QUICK)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | environment)


def bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, halves to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def floats(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)
