"""`run --backend gpu`: the engine's own texts, greedy, sampled and in chats."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from encoders import round_to_int8, save_encoder
from gossamer import cli
from gossamer.checkpoint.directory import Checkpoint
from gossamer.engine import LLM, SamplingParams
from gossamer.errors import GossamerError
from gossamer.gpu.found import has_gpu
from gossamer.gpu.opening import loaded_bytes, open_sparse
from gossamer.gpu.transformers import GossamerQuantizer
from gossamer.packed.from_checkpoint import Types, pack_checkpoint
from gossamer.tools.conversation import Conversation
from gossamer.tools.on_gpu import open_on_gpu
from gossamer.tools.run import Run, run
from gossamer.tools.terminal import converse
from gpu.emulated import Emulated, needs_compiler
from gpu.test_transformers import sparse_bf16
from llamas import save_tiny

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}a: "
LONG = "def f(x): return " * 90


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random chat Llama in W8A8 with 70% zeros, and beside it the same as model.goss, with its head."""
    place = tmp_path_factory.mktemp("int8") / "model"
    round_to_int8(save_tiny("llama2", place), 0.7)
    (place / "chat_template.jinja").write_text(TEMPLATE)
    (place / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.7, "top_k": 9}')
    pack_checkpoint(Checkpoint.open(place), place.with_suffix(".goss"), types=Types(head="keep"))
    return place


def shown(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli.call(words) == 0
    return capsys.readouterr().out


@needs_compiler
def test_the_gpus_kernels_write_what_the_engine_writes(
    int8: Path, emulated_gpu: Emulated, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["def f", "--max-tokens", "3", "--temperature", "0"]
    expected = shown(["run", f"{int8}.goss", *words, "--kv-cache-dtype", "f32"], capsys)
    assert shown(["run", str(int8), *words, "--backend", "gpu"], capsys) == expected
    assert {"sparse_i8_1", "round_inputs", "scale_sums"} <= set(emulated_gpu.launched)


@pytest.mark.usefixtures("cpu_as_gpu")
@pytest.mark.parametrize(
    "more",
    [
        ["--temperature", "0"],
        ["--seed", "3"],  # with the model's own temperature and top-k
        ["--seed", "4", "--temperature", "1.5", "--top-p", "0.8", "--min-p", "0.01", "--chat"],
        ["--seed", "5", "--generation-config", "none", "--repetition-penalty", "1.3", "--stop", "e"],
    ],
    ids=["greedy", "own options", "sampled chat", "penalty and stop"],
)
def test_every_option_means_what_it_means_in_the_engine(
    more: list[str], int8: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["def f", "--max-tokens", "30", *more]
    found = shown(["run", str(int8), *words, "--backend", "gpu", "--json"], capsys)
    assert found == shown(["run", f"{int8}.goss", *words, "--kv-cache-dtype", "f32", "--json"], capsys)
    assert len(found.splitlines()) > 2


@pytest.mark.usefixtures("cpu_as_gpu")
def test_long_prompts_and_what_follows_them_are_the_engines(int8: Path) -> None:
    engine, gpu = LLM(f"{int8}.goss", 1, kv_cache_dtype="f32"), open_on_gpu(str(int8), offline=True)
    ids = engine.tokenizer.prompt(LONG)[:505]
    assert len(ids) == 505
    assert gpu.generate([ids], SamplingParams(max_tokens=None))[0].token_ids == (
        engine.generate([ids], SamplingParams(max_tokens=None))[0].token_ids
    )
    assert abs(gpu.logits(ids[:300]) - engine.logits(ids[:300])).max() < 0.05 * abs(engine.logits(ids)).max()


@pytest.mark.usefixtures("cpu_as_gpu")
def test_a_talk_has_the_engines_answers(int8: Path) -> None:
    params = SamplingParams(max_tokens=8)
    answers = []
    for llm in (LLM(f"{int8}.goss", 1, kv_cache_dtype="f32"), open_on_gpu(str(int8), offline=True)):
        talk = Conversation(llm, params)
        answers.append(["".join(it.text for it in talk.answer(text)) for text in ("hello", "more")])
    assert answers[0] == answers[1] and all(answers[0])


@pytest.mark.usefixtures("cpu_as_gpu")
def test_a_bfloat16_model_goes_on_as_in_transformers(tmp_path: Path) -> None:
    place = sparse_bf16(tmp_path / "model")
    llm = open_on_gpu(str(place), offline=True)
    [found] = llm.generate("def f", SamplingParams(max_tokens=40))
    dense = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16)
    ids = torch.tensor([llm.tokenizer.prompt("def f")])
    made = dense.generate(ids, max_new_tokens=40, do_sample=False)
    assert found.token_ids == made[0, ids.shape[1] :].tolist()


def w8a8_in_bfloat16(place: Path) -> Path:
    config = json.loads((place / "config.json").read_text()) | {"dtype": "bfloat16"}
    (place / "config.json").write_text(json.dumps(config))
    return place


@pytest.mark.usefixtures("cpu_as_gpu")
def test_what_is_no_linear_has_the_type_that_the_directory_names(tmp_path: Path, int8: Path) -> None:
    place = w8a8_in_bfloat16(round_to_int8(save_tiny("llama2", tmp_path / "model"), 0.7))
    for path, dtype in ((int8, "torch.float32"), (place, "torch.bfloat16")):
        model = open_on_gpu(str(path), offline=True).model.native._model  # type: ignore[attr-defined]
        assert str(model.lm_head.weight.dtype) == dtype


@pytest.mark.usefixtures("cpu_as_gpu")
def test_what_only_the_engine_has_is_refused(int8: Path, tmp_path: Path) -> None:
    save_encoder(tmp_path)
    tries = [
        (Run(f"{int8}.goss", "a", backend="gpu"), "is a file; the gpu backend reads directories"),
        (Run(str(int8), "a", backend="gpu", threads=2), "--threads is the engine's; add --backend engine"),
        (Run(str(int8), "a", backend="gpu", kv_cache_dtype="i8"), "--kv-cache-dtype is the engine's"),
        (Run(str(tmp_path), "a", backend="gpu"), "an encoder, which continues no text"),
    ]
    for job, says in tries:
        with pytest.raises(GossamerError, match=says):
            run(job)


@pytest.mark.usefixtures("cpu_as_gpu")
def test_memory_that_ends_is_said(
    int8: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = open_on_gpu(str(int8), offline=True)

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LlamaForCausalLM, "forward", full)
    with pytest.raises(MemoryError, match="memory ended while 4 tokens were computed behind 0; give shorter"):
        llm.generate([[0, 5, 77, 200]])
    lines, notes = iter(["a", "b", "/quit"]), list[str]()
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))
    converse(Conversation(llm, SamplingParams(max_tokens=4)), notes.append)
    assert sum("tokens were computed behind 0; give shorter texts" in it for it in notes) == 2
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", full)
    assert cli.call(["run", str(int8), "a", "--backend", "gpu"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "the environment failed: the GPU's memory ended while" in said
    assert (
        "was loaded; before its linears are packed its weights take 0.00 GB, and the largest linear" in said
    )


@pytest.mark.usefixtures("cpu_as_gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_loading_takes_is_what_is_said(
    dtype: torch.dtype, int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    pack_all = GossamerQuantizer._process_model_after_weight_loading

    def noting(quantizer: GossamerQuantizer, model: Any, **how: Any) -> Any:
        found.append(sum(it.nbytes for it in model.parameters()))
        return pack_all(quantizer, model, **how)

    monkeypatch.setattr(GossamerQuantizer, "_process_model_after_weight_loading", noting)
    directories = [Checkpoint.open(it) for it in (int8, sparse_bf16(tmp_path / "model"))]
    for source in directories:
        open_sparse(source, "cpu", dtype=dtype)
    assert found == [loaded_bytes(directories[0], dtype), loaded_bytes(directories[1], torch.bfloat16)]


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_missed(int8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.call(["run", str(int8), "a", "--backend", "gpu"]) == 2
    assert "no GPU was found: CUDA's driver" in " ".join(capsys.readouterr().err.split())
