"""`evaluate --backend gpu` and `verify` with a GPU, which is an emulated one: the engine's figures."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import AutoModel

from encoders import round_to_int8, save_encoder
from gossamer import cli
from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import UnsupportedError
from gossamer.evaluation.backends import open_backend
from gossamer.evaluation.encoders import open_encoder
from gossamer.gpu.found import why_no_gpu
from gossamer.packed.from_checkpoint import Types, pack_checkpoint
from gossamer.stages.evaluate import Evaluate, evaluate
from gossamer.tools.verify import Verify, verify
from gpu.emulated import Emulated, needs_compiler
from gpu.test_transformers import sparse_bf16
from llamas import save_tiny

pytestmark = needs_compiler
PROMPTS = ["def ", "import numpy as np\n", "x"]
TEXTS = ["a b c", "d", "e f g h i j k l"]


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in W8A8 with 70% zeros, and beside it the same as model.goss, with its head."""
    place = tmp_path_factory.mktemp("int8") / "model"
    round_to_int8(save_tiny("llama2", place), 0.7)
    pack_checkpoint(Checkpoint.open(place), place.with_suffix(".goss"), types=Types(head="keep"))
    return place


def test_a_w8a8_model_has_the_engines_perplexity(int8: Path, text_file: Path, emulated_gpu: Emulated) -> None:
    job = Evaluate(str(int8), dataset=str(text_file), row_length=20, limit=2, backend="gpu")
    found = evaluate(job)
    on_cpu = replace(job, model=f"{int8}.goss", backend="engine", kv_cache_dtype="f32")
    assert found.backend == "gpu" and found.num_tokens == 40
    assert found.perplexity == pytest.approx(evaluate(on_cpu).perplexity, rel=1e-3)
    assert "sparse_i8_8" in emulated_gpu.launched


def test_a_bfloat16_model_has_nearly_the_perplexity_in_float32(
    tmp_path: Path, text_file: Path, emulated_gpu: Emulated
) -> None:
    place = sparse_bf16(tmp_path / "model")
    job = Evaluate(str(place), dataset=str(text_file), row_length=20, limit=2, backend="gpu")
    exact = evaluate(replace(job, backend="torch")).perplexity
    assert not emulated_gpu.launched
    assert evaluate(job).perplexity == pytest.approx(exact, rel=1e-2)
    assert "sparse_bf16_8" in emulated_gpu.launched


@pytest.mark.usefixtures("cpu_as_gpu")
def test_what_it_writes_and_what_the_harness_asks_are_the_engines(int8: Path) -> None:
    engine, gpu = open_backend(f"{int8}.goss", "engine", 1, "f32"), open_backend(str(int8), "gpu")
    assert gpu.complete(PROMPTS, "\n", 6) == engine.complete(PROMPTS, "\n", 6)
    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=(prompt, " 1, 2"), idx=index)
        for index, prompt in enumerate(PROMPTS)
    ]
    found, expected = (it.for_harness().loglikelihood(asked) for it in (gpu, engine))
    assert np.allclose([it for it, _ in found], [it for it, _ in expected], rtol=1e-4)
    assert [it for _, it in found] == [it for _, it in expected]


@pytest.mark.usefixtures("cpu_as_gpu")
def test_an_encoders_vectors_are_the_engines(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    round_to_int8(tmp_path, 0.6)
    pack_checkpoint(Checkpoint.open(tmp_path), tmp_path / "model.goss", Types(embedding="keep"))
    found = open_encoder(str(tmp_path), "gpu", None, offline=True).vectors(TEXTS)
    expected = open_encoder(str(tmp_path / "model.goss"), "engine", 1, offline=True).vectors(TEXTS)
    assert np.abs(found - expected).max() <= 1e-4


@pytest.mark.usefixtures("cpu_as_gpu")
def test_figures_of_bfloat16_models_are_not_rounded_to_it(tmp_path: Path) -> None:
    """Log probabilities of a decoder, and the vectors of an encoder, which are nearly those in float32."""
    ids_BT = np.array([[0, 5, 77, 200, 31], [0, 7, 8, 9, 10]])
    log_probs = open_backend(str(sparse_bf16(tmp_path / "llama")), "gpu").log_probs(ids_BT)
    assert log_probs.shape == (2, 4) and not np.array_equal(log_probs, rounded_to_bfloat16(log_probs))
    save_encoder(tmp_path / "bert")
    encoder = open_encoder(str(tmp_path / "bert"), "torch", None, offline=True)
    AutoModel.from_pretrained(tmp_path / "bert", dtype=torch.bfloat16).save_pretrained(tmp_path / "bert")
    found = open_encoder(str(tmp_path / "bert"), "gpu", None, offline=True).vectors(TEXTS)
    assert np.abs(found - encoder.vectors(TEXTS)).max() <= 0.02
    assert not np.array_equal(found, rounded_to_bfloat16(found))


def rounded_to_bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).bfloat16().to(torch.float64).numpy()


@pytest.mark.usefixtures("cpu_as_gpu")
def test_verify_compares_the_gpu_with_the_engine(int8: Path) -> None:
    [check] = [it for it in verify(Verify(str(int8))).checks if it.name == "the GPU agrees"]
    assert check.detail.startswith("logits of 24 tokens differ by") and not check.skipped


@pytest.mark.usefixtures("cpu_as_gpu")
@pytest.mark.parametrize("variant", ["llama2", "fp16"])
def test_other_floats_are_refused_and_verify_leaves_the_gpu_out(
    variant: str, tiny_llama: Callable[[str], Path], text_file: Path
) -> None:
    place = str(tiny_llama(variant))
    says = rf"{place}: found linears in F(32|16); supported on a GPU: BF16, and W8A8"
    with pytest.raises(UnsupportedError, match=says):
        evaluate(Evaluate(place, dataset=str(text_file), limit=1, backend="gpu"))
    [check] = [it for it in verify(Verify(place)).checks if it.name == "the GPU agrees"]
    assert check.skipped and "found linears in" in check.detail


@pytest.mark.usefixtures("cpu_as_gpu")
@pytest.mark.parametrize(
    ("model", "more", "says"),
    [
        ("{}.goss", [], "is a file; the gpu backend reads directories (try --backend engine)"),
        ("{}", ["--kv-cache-dtype", "i8"], "--kv-cache-dtype is the engine's; add --backend engine"),
    ],
    ids=["file", "cache"],
)
def test_what_only_the_engine_has_is_refused(
    model: str, more: list[str], says: str, int8: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", model.format(int8), "--dataset", str(text_file), "--backend", "gpu"]
    assert cli.call([*words, *more]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(not why_no_gpu(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_missed(
    int8: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.call(["evaluate", str(int8), "--dataset", str(text_file), "--backend", "gpu"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "no GPU was found: CUDA's driver" in said and "--backend engine computes on this CPU" in said
