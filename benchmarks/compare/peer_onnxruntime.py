"""ONNX Runtime's INT8 and INT4 linears on the CPU: run with a Python that has onnxruntime and onnx.

`dynamic`: DynamicQuantizeLinear and MatMulInteger, int8 weights with a scale an output, uint8 inputs.
`nbits8`, `nbits4`: MatMulNBits, a scale for every 32 inputs, accuracy level 4 (inputs quantized to int8).
"""

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from stack import (
    HIDDEN,
    SHAPES,
    Row,
    num_pairs,
    options,
    plausible_scale,
    print_rows,
    random_codes,
    random_inputs,
    stack_row,
    timed,
)

WAYS = {"dynamic": 8, "nbits8": 8, "nbits4": 4}
BLOCK = 32
INT8_COMPUTE = 4


class Graph:
    """An ONNX graph as it grows: nodes, constants and their bytes."""

    def __init__(self) -> None:
        self.onnx = importlib.import_module("onnx")
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.num_bytes = 0

    def constant(self, name: str, value: np.ndarray) -> str:
        self.constants.append(self.onnx.numpy_helper.from_array(value, name))
        self.num_bytes += value.nbytes
        return name

    def node(self, kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, outputs, **attributes))

    def dynamic(self, x: str, name: str, rows: int, columns: int) -> str:
        """x, quantized as it comes, times int8 weights [columns, rows]; the name of the float32 product."""
        weight = self.constant(f"{name}.w", np.ascontiguousarray(random_codes(rows, columns).T))
        scale = self.constant(f"{name}.s", np.full(rows, plausible_scale(columns), np.float32))
        zero = self.constant(f"{name}.z", np.zeros(rows, np.int8))
        self.node("DynamicQuantizeLinear", [x], [f"{name}.q", f"{name}.qs", f"{name}.qz"])
        self.node("MatMulInteger", [f"{name}.q", weight, f"{name}.qz", zero], [f"{name}.i"])
        self.node("Cast", [f"{name}.i"], [f"{name}.f"], to=self.onnx.TensorProto.FLOAT)
        self.node("Mul", [f"{name}.qs", scale], [f"{name}.ss"])
        self.node("Mul", [f"{name}.f", f"{name}.ss"], [f"{name}.y"])
        return f"{name}.y"

    def blocks(self, x: str, name: str, rows: int, columns: int, bits: int) -> str:
        """x times weights of `bits` bits in blocks; the name of the product."""
        groups = columns // BLOCK
        codes = random_codes(rows, columns * bits // 8).view(np.uint8)
        weight = self.constant(f"{name}.w", codes.reshape(rows, groups, BLOCK * bits // 8))
        size = plausible_scale(columns) * (1 if bits == 8 else 16)
        scale = self.constant(f"{name}.s", np.full((rows, groups), size, np.float32))
        about = {"K": columns, "N": rows, "bits": bits, "block_size": BLOCK, "accuracy_level": INT8_COMPUTE}
        self.node("MatMulNBits", [x, weight, scale], [f"{name}.y"], domain="com.microsoft", **about)
        return f"{name}.y"

    def model(self, result: str) -> bytes:
        make, number = self.onnx.helper, self.onnx.TensorProto.FLOAT
        first = make.make_tensor_value_info("x", number, ["tokens", HIDDEN])
        last = make.make_tensor_value_info(result, number, ["tokens", HIDDEN])
        graph = make.make_graph(self.nodes, "stack", [first], [last], self.constants)
        imports = [make.make_opsetid("", 21), make.make_opsetid("com.microsoft", 1)]
        return make.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()


def stack(way: str, pairs: int) -> tuple[bytes, int]:
    """The stack as a serialized model, and the bytes of its weights and scales."""
    graph, x = Graph(), "x"
    for index in range(pairs):
        for name, (rows, columns) in SHAPES.items():
            if way == "dynamic":
                x = graph.dynamic(x, f"{name}{index}", rows, columns)
            else:
                x = graph.blocks(x, f"{name}{index}", rows, columns, WAYS[way])
    return graph.model(x), graph.num_bytes


def measure(way: str, tokens: list[int], threads: int, repeats: int) -> Iterator[Row]:
    """Rows of the stack, one for each number of tokens."""
    runtime = importlib.import_module("onnxruntime")
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    pairs = num_pairs(WAYS[way])
    model, num_bytes = stack(way, pairs)
    session = runtime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    del model
    for count in tokens:
        x_TK = random_inputs(count)
        seconds = timed(lambda x_TK=x_TK: session.run(None, {"x": x_TK}), repeats)
        who = {"peer": "ONNX Runtime", "version": runtime.__version__, "what": way, "threads": threads}
        yield stack_row(who, count, pairs, num_bytes, seconds)


def main() -> None:
    job = options(__doc__).parse_args()
    for way in WAYS:
        print_rows(measure(way, job.tokens, job.threads, job.repeats))


if __name__ == "__main__":
    main()
