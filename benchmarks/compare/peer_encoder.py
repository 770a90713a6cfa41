"""ONNX Runtime's or OpenVINO's INT8 of an exported BERT, or sentence-transformers' model in float32.

Run with a Python that has the one that is asked for. onnxruntime: the graph fused by its own optimizer for
BERTs, then dynamic quantization. openvino: NNCF's static quantization for transformers, calibrated on 40
batches of made-up texts. What they make is kept. sentence-transformers: the directory as it is, by torch.
"""

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from encoder_texts import Ids, made_up, padded, pooled, time_workloads, vocabulary_of

CALIBRATION = 40
Run = Callable[[dict[str, np.ndarray]], np.ndarray]


def onnxruntime(graph: Path, threads: int, heads: int, width: int) -> tuple[str, Run]:
    runtime = importlib.import_module("onnxruntime")
    quantized = graph.with_suffix(".ort-int8.onnx")
    if not quantized.exists():
        optimizer = importlib.import_module("onnxruntime.transformers.optimizer")
        quantization = importlib.import_module("onnxruntime.quantization")
        fused = graph.with_suffix(".fused.onnx")
        about = {"model_type": "bert", "num_heads": heads, "hidden_size": width, "opt_level": 0}
        found = optimizer.optimize_model(str(graph), **about)
        found.save_model_to_file(str(fused))
        extra = {"DefaultTensorType": importlib.import_module("onnx").TensorProto.FLOAT}
        quantization.quantize_dynamic(str(fused), str(quantized), extra_options=extra)
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = runtime.InferenceSession(str(quantized), settings, providers=["CPUExecutionProvider"])
    names = {it.name for it in session.get_inputs()}
    return f"ONNX Runtime {runtime.__version__}", lambda batch: session.run(
        None, {name: value for name, value in batch.items() if name in names}
    )[0]


def openvino(graph: Path, threads: int, vocabulary: int) -> tuple[str, Run]:
    ov: Any = importlib.import_module("openvino")
    quantized = graph.with_suffix(".nncf.xml")
    core = ov.Core()
    if not quantized.exists():
        nncf: Any = importlib.import_module("nncf")
        lengths = np.random.default_rng(1).integers(8, 128, (CALIBRATION, 4)).tolist()
        batches = [padded(made_up(it, seed, vocabulary)) for seed, it in enumerate(lengths)]
        kind = nncf.ModelType.TRANSFORMER
        found = nncf.quantize(core.read_model(graph), nncf.Dataset(batches), model_type=kind)
        ov.save_model(found, quantized)
    hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(quantized), "CPU", hints)
    return f"OpenVINO {ov.__version__}", lambda batch: compiled(batch)[0]


def sentence_transformers(model: Path, threads: int) -> tuple[str, Run]:
    """Vectors instead of hidden states, by the modules that the directory lists."""
    torch: Any = importlib.import_module("torch")
    library: Any = importlib.import_module("sentence_transformers")
    torch.set_num_threads(threads)
    found = library.SentenceTransformer(str(model), device="cpu").eval()

    def run(batch: dict[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
            return found(tensors)["sentence_embedding"].numpy()

    return f"sentence-transformers {library.__version__}", run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runtime", choices=["onnxruntime", "openvino", "sentence-transformers"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--graph", type=Path, help="the model as ONNX, for the first two")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--heads", type=int, required=True)
    parser.add_argument("--width", type=int, required=True)
    job = parser.parse_args()
    vocabulary, pools = vocabulary_of(job.model), job.runtime == "sentence-transformers"
    if job.runtime == "onnxruntime":
        name, run = onnxruntime(job.graph, job.threads, job.heads, job.width)
    elif job.runtime == "openvino":
        name, run = openvino(job.graph, job.threads, vocabulary)
    else:
        name, run = sentence_transformers(job.model, job.threads)

    def encode(texts: list[Ids]) -> np.ndarray:
        batch = padded(texts)
        found = run(batch)
        return found if pools else pooled(found, batch["attention_mask"])

    who = {"who": name.rpartition(" ")[0], "version": name, "threads": job.threads}
    time_workloads(who, encode, job.repeats, vocabulary)


if __name__ == "__main__":
    main()
