"""The engine on a processor without kernels of its own (aarch64, emulated): the bits of x86 at scalar."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gossamer.architecture.anatomy import EMBEDDING
from gossamer.architecture.families import read_anatomy
from gossamer.packed.reader import Packed
from gossamer.packed.rounding import round_rows
from gossamer.packed.writer import PackedWriter
from native.conftest import CONFIG as LLAMA

NATIVE = Path(__file__).parents[2] / "native"
CROSS, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [tool for tool in (CROSS, QEMU) if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.skipif(
        not os.environ.get("GOSSAMER_TORTURE"),
        reason="compiles the engine for another processor: make torture",
    ),
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"no {' and no '.join(MISSING)}; Debian: apt-get install g++-aarch64-linux-gnu qemu-user",
    ),
    pytest.mark.timeout(1800),
]
CONFIG = LLAMA | {"architectures": ["MistralForCausalLM"], "sliding_window": 16}
FLAGS = ["-std=c++20", "-O2", "-ffp-contract=off", "-fno-math-errno", "-pthread"]
IDS = np.random.default_rng(1).integers(0, CONFIG["vocab_size"], 37).astype(np.int32)
EXPECTED = """
import sys
import numpy as np
from gossamer import _native
from gossamer.packed.reader import Packed
path, kv, out = sys.argv[1:4]
ids = np.array(list(map(int, sys.argv[4:])), np.int32)
packed = Packed.open(path)
model = _native.Model(packed.buffer, packed.native_tensors(), packed.native_config(), 2, kv)
assert _native.isa() == "scalar"
sequence = model.new_sequence(ids.size + 1)
rows = model.forward([sequence], [ids], True), model.forward([sequence], [ids[-1:]])
np.save(out, np.concatenate(rows))
"""


def build(compiler: str, driver: str, to: Path) -> Path:
    """native/tests/<driver>.cpp with every source that names no processor."""
    sources = [
        *(path for path in (NATIVE / "base").glob("*.cpp") if path.stem != "processor_x86"),
        *(NATIVE / "engine").glob("*.cpp"),
        NATIVE / "kernels" / "table.cpp",
        *(NATIVE / "kernels" / "scalar").glob("*.cpp"),
        NATIVE / "tests" / f"{driver}.cpp",
    ]
    folders = [f"-I{NATIVE}", f"-I{NATIVE / 'kernels' / 'portable'}"]
    subprocess.run([compiler, *FLAGS, *folders, *sources, "-o", to], check=True)
    return to


def emulated(*command: str | Path) -> str:
    line = [QEMU, "-L", "/usr/aarch64-linux-gnu", *map(str, command)]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


def test_every_kernel_gives_the_bits_of_x86(tmp_path: Path) -> None:
    here = build("g++", "kernels", tmp_path / "here")
    expected = subprocess.run([here], check=True, capture_output=True, text=True).stdout
    assert len(expected.splitlines()) == 19
    assert emulated(build(CROSS, "kernels", tmp_path / "there")) == expected


@pytest.fixture(scope="module")
def forward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(CROSS, "forward", tmp_path_factory.mktemp("aarch64") / "forward")


@pytest.mark.parametrize("kv", ["f32", "bf16", "i8"])
@pytest.mark.parametrize("sparsity", [0.7, 0.0], ids=["sparse", "dense"])
@pytest.mark.parametrize("values", ["f32", "bf16", "i8", "i4"])
def test_logits_have_the_bits_of_x86(
    values: str, sparsity: float, kv: str, forward: Path, tmp_path: Path
) -> None:
    packed = write_model(tmp_path / "model.goss", values, sparsity)
    (tmp_path / "description").write_text("\n".join(describe(packed, kv)))
    emulated(forward, tmp_path / "description", tmp_path / "model.goss", tmp_path / "logits")
    environment = os.environ | {"GOSSAMER_ISA": "scalar", "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [tmp_path / "model.goss", kv, tmp_path / "expected.npy", *map(str, IDS)]
    subprocess.run([sys.executable, "-c", EXPECTED, *arguments], check=True, env=environment)
    expected_TV = np.load(tmp_path / "expected.npy")
    found_TV = np.fromfile(tmp_path / "logits", np.float32).reshape(len(expected_TV), -1)
    np.testing.assert_array_equal(found_TV[:, : expected_TV.shape[1]], expected_TV)


def write_model(path: Path, values: str, sparsity: float) -> Packed:
    """A random Mistral whose linears are of `values`, sparse or dense."""
    rng, storage = np.random.default_rng(5), "sparse" if sparsity else "dense"
    with PackedWriter(path, config=json.dumps(CONFIG)) as writer:
        for tensor, shape in read_anatomy(CONFIG).tensor_shapes.items():
            name = tensor.removesuffix(".weight")
            w_NK = rng.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(shape[-1]))
            w_NK[rng.random(shape) < sparsity] = 0
            if len(shape) == 1:
                writer.vector(tensor, 1 + w_NK)
            elif name == EMBEDDING or values == "f32":
                writer.floats(name, w_NK, storage)
            elif values == "bf16":
                writer.floats(name, (w_NK.view(np.uint32) >> 16).astype(np.uint16), storage)
            elif values == "i8":
                writer.int8(name, *round_rows(w_NK), storage)
            else:
                q_NK, scale_N = round_rows(w_NK)
                multiplier_NG = rng.integers(1, 17, (shape[0], -(-shape[1] // 128)))
                writer.int4(name, q_NK // 16, multiplier_NG.astype(np.uint8), scale_N, storage)
    return Packed.open(path)


def describe(packed: Packed, kv: str) -> Iterator[str]:
    """What native/tests/forward.cpp reads; numbers in full, so that they are read as the same bits."""
    config = packed.native_config()
    matrices, blocks, frequencies = (config.pop(key) for key in ("linears", "blocks", "inverse_frequencies"))
    yield f"kv {kv}"
    for key, found in config.items():
        yield f"name {key} {found}" if isinstance(found, str) else f"size {key} {found!r}"
    for block in blocks:
        yield f"block {int(block['rope'])} {block['window']}"
        yield from (f"is {role} {name}" for role, name in block["linears"].items())
        yield from (f"bias {role} {name}" for role, name in block["biases"].items())
        yield from (f"norm {key} {name}" for key, name in block.items() if key.endswith("_norm") and name)
    yield f"frequencies {len(frequencies)} {' '.join(repr(float(x)) for x in frequencies)}"
    yield f"ids {len(IDS)} {' '.join(map(str, IDS))}"
    for name, (dtype, shape, offset, num_bytes) in packed.native_tensors().items():
        extents = " ".join(map(str, shape))
        yield f"tensor {name} {dtype} {offset} {num_bytes} {len(shape)} {extents}"
    for name, matrix in matrices.items():
        yield f"matrix {name} {matrix['storage']} {matrix['values']} {matrix['rows']} {matrix['columns']}"
