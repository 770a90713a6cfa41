"""OpenVINO's dense INT8 on the CPU, in two ways: run with a Python that has openvino.

`static`: inputs of every linear quantized per tensor with a fixed range, as a calibrated INT8 model has it.
`dynamic`: int8 weights with a scale a row, inputs quantized when they come, in groups of 128. The plugin does
this only under the precision hint f32; under bf16, its default on CPUs with bf16 instructions, it widens the
weights.

What was executed is read from the compiled graph and reported; results agree. One pair against float64:
`static` is within 0.05% of a product with inputs rounded to INT8. `dynamic`, whose kernel the graph names
after its float inputs, is 0.9% off with groups of 128 and 7e-7 without groups (32-bit floats then).
"""

import importlib
from collections import Counter
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

WAYS = ("static", "dynamic")
INPUT_RANGE = 4.0  # the stack keeps values near 1; four deviations


def graph(way: str, pairs: int, openvino: Any) -> Any:
    """The stack: int8 constants, widened and scaled; `static` also quantizes what enters each linear."""
    ops = importlib.import_module("openvino.opset13")
    first = ops.parameter([-1, HIDDEN], np.float32, name="x")
    x_TK = first
    for _ in range(pairs):
        for rows, columns in SHAPES.values():
            if way == "static":
                low, high = np.float32(-INPUT_RANGE), np.float32(INPUT_RANGE * 127 / 128)
                x_TK = ops.fake_quantize(x_TK, low, high, low, high, 256)
            codes = ops.constant(random_codes(rows, columns))
            scales = ops.constant(np.full((rows, 1), plausible_scale(columns), np.float32))
            weight = ops.multiply(ops.convert(codes, np.float32), scales)
            x_TK = ops.matmul(x_TK, weight, False, True)
    return openvino.Model([ops.result(x_TK)], [first], way)


def executed(compiled: Any) -> dict[str, int]:
    """How often the compiled graph runs each kernel for its linears: `type: input precision, kernel`."""
    kinds: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ordered_ops():
        about = {name: node.get_rt_info()[name].astype(str) for name in ("layerType", "primitiveType")}
        about["precision"] = node.get_rt_info()["runtimePrecision"].astype(str)
        if about["layerType"] in ("FullyConnected", "MatMul", "FakeQuantize"):
            kinds["{layerType}: {precision}, {primitiveType}".format(**about)] += 1
    return dict(kinds)


def measure(way: str, tokens: list[int], threads: int, repeats: int) -> Iterator[Row]:
    """Rows of the INT8 stack, one for each number of tokens."""
    openvino = importlib.import_module("openvino")
    pairs = num_pairs(8)
    settings: Row = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    if way == "dynamic":
        settings |= {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 128, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(graph(way, pairs, openvino), "CPU", settings)
    request = compiled.create_infer_request()
    num_bytes = pairs * sum(rows * columns for rows, columns in SHAPES.values())
    who = {"peer": "OpenVINO", "version": openvino.__version__, "what": f"dense INT8, {way}"}
    for count in tokens:
        request.set_input_tensor(openvino.Tensor(random_inputs(count)))
        seconds = timed(request.infer, repeats)
        about = {"threads": threads, "executed": executed(compiled)}
        yield stack_row(who | about, count, pairs, num_bytes, seconds)


def main() -> None:
    job = options(__doc__).parse_args()
    for way in WAYS:
        print_rows(measure(way, job.tokens, job.threads, job.repeats))


if __name__ == "__main__":
    main()
