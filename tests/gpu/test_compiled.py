"""What NVIDIA's compiler makes of the kernels, without a GPU: no spills, and no more instructions."""

import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from gossamer.gpu import compiler
from gossamer.gpu.kernels import all_kernels
from once import once

MOST_REGISTERS = {  # by tiles of tokens: 48 leave room for 10 blocks of 4 warps
    "i8": {1: 48, 2: 48, 4: 64, 8: 72},
    "bf16": {1: 48, 2: 48, 4: 64, 8: 72},
    "i4": {1: 56, 2: 64, 4: 80, 8: 128},  # sums of a step beside those of all
}
# Architecture -> instructions of a step of one tile, a round of its copies among them: INT8, bfloat16, INT4.
# They decide on cards with fast memory, so that more of them have to be meant.
STEP = {
    80: (326, 433, 357),
    86: (327, 434, 359),
    89: (327, 434, 359),
    90: (331, 426, 358),
    100: (316, 426, 352),
    120: (308, 418, 348),
}
COUNTED_BY = (13, 5)  # this version; another one makes other code

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module", params=STEP, ids=lambda it: f"sm_{it}")
def compiled(
    request: pytest.FixtureRequest, nvrtc: compiler.Nvrtc, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with kernels.cubin and said.txt, what the assembler says of each kernel."""

    def build(folder: Path) -> None:
        texts = {path.name: path.read_text() for path in compiler.SOURCES.glob("*.cuh")}
        code, said = nvrtc.compile(texts, f"sm_{request.param}", "--ptxas-options=-v")
        (folder / "kernels.cubin").write_bytes(code)
        (folder / "said.txt").write_text(said)

    return once(tmp_path_factory, f"sm_{request.param}", build)


def test_nothing_is_spilled_and_registers_leave_room(compiled: Path) -> None:
    said = (compiled / "said.txt").read_text()
    found = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        said,
        re.DOTALL,
    )
    assert {name for name, *_ in found} == {it.name for it in all_kernels()}
    for name, stores, loads, registers in found:
        assert (int(stores), int(loads)) == (0, 0), name
        if name.startswith("sparse_"):
            _, weights, tiles = name.split("_")
            assert int(registers) <= MOST_REGISTERS[weights][int(tiles)], name


def test_a_step_takes_no_more_instructions(compiled: Path, nvrtc: compiler.Nvrtc) -> None:
    if nvrtc.version != COUNTED_BY:
        pytest.skip(f"instructions were counted with NVRTC {COUNTED_BY}, this is {nvrtc.version}")
    if (tool := disassembler()) is None:
        pytest.skip("no nvdisasm: pip install nvidia-cuda-nvdisasm")
    command = [str(tool), "-c", str(compiled / "kernels.cubin")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [(name, it) for name, it in loops(text) if it["LDGSTS"]]
    most = STEP[int(compiled.name.removeprefix("sm_"))]
    for kernel, product, products, limit in zip(
        ("sparse_i8_1", "sparse_bf16_1", "sparse_i4_1"),
        ("IMMA", "HMMA", "IMMA"),
        (4, 8, 4),
        most,
        strict=True,
    ):
        steps = [it for name, it in found if name == kernel and it[product]]
        assert steps and {it[product] for it in steps} == {products}
        assert max(it.total() for it in steps) <= limit, steps


def disassembler() -> Path | None:
    packaged = [*Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvdisasm")]
    found = str(packaged[0]) if packaged else shutil.which("nvdisasm")
    return None if found is None else Path(found)


def loops(text: str) -> Iterator[tuple[str, Counter[str]]]:
    """(kernel, how often each instruction is in a loop of it), of what nvdisasm writes."""
    for part in re.split(r"\.section\s+\.text\.", text)[1:]:
        labels, code = dict[str, int](), list[str]()
        for line in part.splitlines():
            if label := re.match(r"\s*(\.L_x?_?\d+):", line):
                labels[label[1]] = len(code)
            elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
                code.append(instruction[1])
        for index, instruction in enumerate(code):
            jump = re.search(r"BRA.*`\((\.L_x?_?\d+)\)", instruction)
            if jump and labels.get(jump[1], index + 1) <= index:
                words = [re.sub(r"^@!?U?P\w+\s+", "", it) for it in code[labels[jump[1]] : index + 1]]
                yield part.split(",")[0], Counter(re.split(r"[.\s]", it)[0] for it in words)
