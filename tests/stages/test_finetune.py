"""`finetune`: answers learned under a fixed mask, beside a dense teacher."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import ConfigError, GossamerError
from gossamer.job.report import Event
from gossamer.stages.finetune import Finetune, finetune
from gossamer.tokens.tokenizer import Tokenizer
from pruned import copy_with_zeros

Llamas = Callable[[str], Path]
PAIRS = {f"{a} + {b} = ": f"{a + b}" for a in range(4) for b in range(4)}


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    file = tmp_path / "pairs.jsonl"
    rows = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in PAIRS.items()]
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(file)


@pytest.fixture
def sparse(tiny_llama: Llamas, tmp_path: Path) -> Path:
    """The tiny Llama with 60% of its decoder's weights zero."""
    return copy_with_zeros(tiny_llama("llama3"), tmp_path / "sparse", 0.4)


def test_learns_answers_and_keeps_zeros(tiny_llama: Llamas, sparse: Path, tmp_path: Path, pairs: str) -> None:
    """After enough epochs on sixteen sums, transformers answers them, with the zeros in place."""
    job = Finetune(
        str(sparse),
        str(tmp_path / "out"),
        dataset=(pairs,),
        teacher=str(tiny_llama("llama3")),
        num_train_epochs=60,
        batch_tokens=256,
        learning_rate=5e-3,
        precision="f32",
    )
    result = finetune(job)
    before, after = Checkpoint.open(sparse), Checkpoint.open(tmp_path / "out")
    for name in before.linears:
        assert not after.float32(f"{name}.weight")[before.zeros(f"{name}.weight")].any()
    assert result.sparsity == pytest.approx(0.6, abs=0.01)
    assert after.manifest is not None
    assert after.manifest["metrics"]["num_examples"] == 16
    assert after.manifest["job"]["distill"] == "squarehead"

    tokenizer = Tokenizer.open(tmp_path / "out")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    right = 0
    for prompt, answer in PAIRS.items():
        ids = tokenizer.encode(prompt)
        for _ in answer:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        right += tokenizer.decode(ids[-len(answer) :]).startswith(answer)
    assert right >= 14


def test_prompts_carry_no_loss(sparse: Path, tmp_path: Path, pairs: str) -> None:
    """The first step's loss is transformers' own, with the prompt's labels at -100, one example at a time."""
    job = Finetune(
        str(sparse),
        str(tmp_path / "out"),
        dataset=(pairs,),
        distill="none",
        num_train_epochs=1,
        precision="f32",
    )
    result = finetune(job)
    tokenizer, model = Tokenizer.open(sparse), LlamaForCausalLM.from_pretrained(sparse)
    summed = count = 0
    for prompt, answer in PAIRS.items():
        length = len(tokenizer.encode(prompt))
        ids_T = torch.tensor([*tokenizer.encode(prompt + answer), *tokenizer.eos_ids])
        labels_T = torch.where(torch.arange(len(ids_T)) < length, -100, ids_T)
        num = len(ids_T) - length
        with torch.no_grad():
            summed += float(model(input_ids=ids_T[None], labels=labels_T[None]).loss) * num
        count += num
    assert result.num_steps == 1
    assert result.losses[0] == pytest.approx(summed / count, rel=1e-5)


def test_text_is_learned_as_transformers_does(sparse: Path, tmp_path: Path) -> None:
    """The first step's loss is transformers' own, of every token but the first."""
    text = "A tree has leaves. " * 3
    (tmp_path / "text.txt").write_text(text)
    job = Finetune(
        str(sparse),
        str(tmp_path / "out"),
        dataset=(str(tmp_path / "text.txt"),),
        format="text",
        distill="none",
        num_train_epochs=1,
        precision="f32",
    )
    result = finetune(job)
    tokenizer, model = Tokenizer.open(sparse), LlamaForCausalLM.from_pretrained(sparse)
    ids_T = torch.tensor([*tokenizer.encode(text), *tokenizer.eos_ids])
    with torch.no_grad():
        expected = float(model(input_ids=ids_T[None], labels=ids_T[None]).loss)
    assert result.losses == (pytest.approx(expected, rel=1e-5),)


def mixture(sparse: Path, output: Path, pairs: str, **changes: object) -> Finetune:
    """Twelve steps by two sources in given shares, of which the smaller begins again."""
    other = Path(pairs).with_name("other.jsonl")
    rows = [json.dumps({"prompt": f"{n} - {n} = ", "completion": "0"}) for n in range(5)]
    other.write_text("\n".join(rows) + "\n", encoding="utf-8")
    settings = {
        "dataset": (f"{pairs}@3", f"{other}@1"),
        "num_examples": 48,
        "repeat": True,
        "distill": "none",
        "num_train_epochs": 2,
        "batch_tokens": 128,
        "precision": "f32",
        "save_steps": 1,
        "seed": 3,
    }
    return Finetune(str(sparse), str(output), **(settings | changes))  # pyright: ignore


def test_a_mixture_is_recorded_and_resumes_to_the_same_bits(sparse: Path, tmp_path: Path, pairs: str) -> None:
    class Stop(Exception):
        pass

    def stop(event: Event) -> None:
        if event.done == 3 and event.total and event.message != "tokenizing":
            raise Stop

    whole = mixture(sparse, tmp_path / "whole", pairs)
    finetune(whole)
    job = mixture(sparse, tmp_path / "out", pairs)
    with pytest.raises(Stop):
        finetune(job, stop)
    assert (tmp_path / "out.partial" / "checkpoints").is_dir()
    with pytest.raises(ConfigError, match="seed: found 4, expected 3"):
        finetune(replace(job, resume=True, seed=4))
    finetune(replace(job, resume=True))
    found, expected = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole"))
    assert found == expected
    manifest = Checkpoint.open(tmp_path / "out").manifest
    assert manifest is not None and manifest["metrics"]["num_examples"] == 48
    sums, zeros = manifest["data"]
    assert (sums["weight"], zeros["weight"]) == (3.0, 1.0)
    assert (sums["num_documents"], zeros["num_documents"]) == (16, 5)
    assert sums["num_tokens"] == pytest.approx(3 * zeros["num_tokens"], rel=0.1)


def test_the_source_that_ends_a_mixture_is_named(sparse: Path, tmp_path: Path, pairs: str) -> None:
    events: list[Event] = []
    finetune(mixture(sparse, tmp_path / "out", pairs, repeat=False, num_train_epochs=1), events.append)
    [said] = [event.message for event in events if "used up" in event.message]
    assert "other.jsonl is used up, and the mixture ends there, after " in said
    assert "fewer than --num-examples 48: training on those (--repeat goes on" in said


def small_llama(path: Path, model: Path, **changes: int) -> Path:
    """A random Llama like the tiny one but for `changes`, with its tokenizer."""
    config = LlamaConfig.from_pretrained(model)
    for name, value in changes.items():
        setattr(config, name, value)
    LlamaForCausalLM(config).save_pretrained(path)
    for file in model.glob("tokenizer*"):
        shutil.copy(file, path)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, r"has num_layers 3, the model .* has 2"),
        ({"hidden_size": 96}, r"has hidden_size 96, the model .* has 48"),
        ({"vocab_size": 321}, r"has vocab_size 321, the model .* has 320"),
        ({}, r"another tokenizer \(tokenizer.json sha256 [0-9a-f]{12}\) than the model .* \([0-9a-f]{12}\)"),
    ],
)
def test_teacher_of_another_shape(
    sparse: Path, tmp_path: Path, pairs: str, change: dict[str, int], message: str
) -> None:
    teacher = small_llama(tmp_path / "teacher", sparse, **change)
    if not change:
        text = (teacher / "tokenizer.json").read_text(encoding="utf-8")
        (teacher / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        finetune(Finetune(str(sparse), str(tmp_path / "out"), dataset=(pairs,), teacher=str(teacher)))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "--distill squarehead needs --teacher DIR"),
        ({"distill": "none", "teacher": "x"}, "--teacher x has no part in --distill none"),
        ({"distill": "none", "num_train_epochs": 0}, "--num-train-epochs 0"),
        ({"distill": "none", "num_examples": 0}, "--num-examples 0: expected at least 1"),
        (
            {"distill": "none", "dataset": ("preset:sparse-llama",)},
            "preset:sparse-llama has more text than memory holds.*: give --num-examples N",
        ),
        ({"distill": "none", "learning_rate": 0.0}, "--learning-rate 0"),
        ({"distill": "none", "max_length": 3}, r"prompt alone takes 3 tokens \(--max-length\)"),
        ({"distill": "none", "format": "instruct"}, r"pairs\.jsonl:1"),
    ],
)
def test_bad_options(
    sparse: Path, tmp_path: Path, pairs: str, change: dict[str, object], message: str
) -> None:
    options = {"dataset": (pairs,), **change}
    job = Finetune(str(sparse), str(tmp_path / "out"), **options)  # pyright: ignore
    with pytest.raises(GossamerError, match=message):
        finetune(job)
    assert not (tmp_path / "out").exists()
