"""The GPU's kernels, lane by lane on this CPU, against NumPy; and whether this notices mistakes."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gossamer.errors import EngineError
from gossamer.gpu import kernels
from gossamer.gpu.driver import Module
from gpu.emulated import (
    CASES,
    COMPILER,
    KERNELS,
    WAYS,
    Case,
    Emulated,
    build,
    is_equal,
    needs_compiler,
)

pytestmark = needs_compiler
TORTURE = bool(os.environ.get("GOSSAMER_TORTURE"))
QUICK = [*CASES[1:5], CASES[7], CASES[10], CASES[11], CASES[13], CASES[20], CASES[22], CASES[26]]
# One at a time. Not among them: the barrier that ends a step, since products are one, too.
MISTAKES = {
    "(1u << (4 * g)) - 1, (4 * g + 30)": "1u << (4 * g), (4 * g + 30)",
    "(1u << (4 * g)) - 1, (4 * g + 29)": "1u << (4 * g), (4 * g + 29)",
    "at, at + W::kBytes * num_upper}": "at, at}",
    "(4 * g + 30) % 32": "(4 * g + 28) % 32",
    "(4 * g + 29) % 32": "(4 * g + 28) % 32",
    "wait_copies<kSlots - 1>();\n        sync_warp();": "wait_copies<kSlots - 1>();",
    "wait_copies<kSlots - 1>();": "wait_copies<kSlots>();",
    "wait_copies<0>();\n    sync_warp();": "wait_copies<0>();",
    "wait_copies<0>();": "wait_copies<1>();",
    "if (lane % (kStepVectors / W::kRuns) >= by) ends += before;": "ends += before;",
    "(start % (kCopyBytes / W::kBytes) + ends - num)": "(ends - num)",
    "(number + 4) * kVectorBytes": "(number + 2) * kVectorBytes",
    "number = 4 * product + t;": "number = 4 * t + product;",
    "bits = at * 8 +": "bits = at * 4 +",
    "(has_low_nibbles(vector) ? 4 : 0)": "0",
    "&= 0xf0f0f0f0u": "&= 0xfffffff0u",
    "W::has_low_nibbles(lane) ? 1 : 0": "0",
    "vector < kStepVectors / 2": "vector < kStepVectors / 4",
    "lane % (kStepVectors / W::kRuns) >= by": "lane >= by",
    "sixteenfold[part] >> 4": "sixteenfold[part] / 16 - 1",
    "part < 2 ? multipliers & 255": "part % 2 ? multipliers & 255",
    "(first + step) * kStepMultipliers": "step * kStepMultipliers",
    "two & 255": "two >> 8",
    "(by & 0x7f7f7f7fu)": "by",
    "kStepWeights * W::kBytes / W::kRuns + 32": "kStepWeights * W::kBytes / W::kRuns",
    "load_shared<8>(word)": "load_shared<4>(word)",
    "(live ? next : 4)": "(live ? next : 3)",
    "place >= 2 && live": "place > 2 && live",
    "selector >> 16": "selector >> 8",
    "inputs += kTiles * kTileWords<W>;": "",
    "at < size; at += kLanes": "at + 16 < size; at += kLanes",
    "slot == slots ? last_slot : slot - kSlotBytes<W>": "slot",
    "unit >= job.panels * job.shares": "unit > job.panels * job.shares",
    "step >= static_cast<int64_t>(job.panels) * job.steps": "false",
    "2 * t + part % 2": "2 * t + part / 2",
    "share * kTiles * kTileTokens * rows": "share * kTileTokens * rows",
    "(g + 8) * row_words": "(g + 7) * row_words",
}
PLANTED = ("wait_copies<0>();", "&= 0xf0f0f0f0u")  # two of them


@pytest.mark.parametrize(("seed", "eager"), WAYS, ids=["in order", "shuffled", "eager"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_are_exact(library: Path, case: Case, seed: int, eager: bool) -> None:
    assert is_equal(Emulated(library, seed, eager_copies=eager), case)


def test_a_driver_refuses_what_is_no_code_and_a_launch_that_it_cannot_do(library: Path) -> None:
    with pytest.raises(EngineError, match="cuModuleLoadData failed: CUDA_ERROR_INVALID_IMAGE"):
        Module(ctypes.CDLL(str(library)), b"PTX")
    with pytest.raises(EngineError, match="cuLaunchKernel failed: CUDA_ERROR_INVALID_VALUE"):
        Emulated(library).launch(kernels.SCALE_SUMS, 0, kernels.ScaleSums())


@pytest.mark.parametrize("texts", [(it,) for it in MISTAKES] if TORTURE else [PLANTED], ids=" and ".join)
@pytest.mark.timeout(600)
def test_planted_mistakes_are_noticed(library: Path, texts: tuple[str, ...], tmp_path: Path) -> None:
    """And nothing is, where there are none."""
    mistaken = [changed(tmp_path / str(number), it, MISTAKES[it]) for number, it in enumerate(texts)]
    assert verdicts([*mistaken, library]) == ["different"] * len(texts) + ["equal"]


@pytest.mark.skipif(not TORTURE, reason="compiles the kernels once more: make torture")
def test_a_change_that_is_no_mistake_is_let_through(tmp_path: Path) -> None:
    assert verdicts([changed(tmp_path, "kSlots = 3", "kSlots = 2")]) == ["equal"]


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
    assert verdicts([library], {"LD_PRELOAD": preload, "ASAN_OPTIONS": options}) == ["equal"]


def changed(folder: Path, text: str, to: str) -> Path:
    """The library of kernels with this one change."""
    kernels = folder / "kernels"
    shutil.copytree(KERNELS, kernels)
    having = [it for it in kernels.glob("*.cuh") if text in it.read_text()]
    assert [it.read_text().count(text) for it in having] == [1], f"{text!r} is not there once"
    having[0].write_text(having[0].read_text().replace(text, to))
    return build(folder, kernels, "-O0")


def verdicts(libraries: list[Path], environment: dict[str, str] | None = None) -> list[str]:
    """ "equal" or "different" of each, found out in a process that has one thread."""
    script = Path(__file__).with_name("emulated.py")
    command = [sys.executable, str(script), *map(str, libraries), "--", *map(str, QUICK)]
    alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | alone | (environment or {})
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()
