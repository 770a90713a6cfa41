"""`finetune`: answers learned under a fixed mask, beside a dense teacher."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import ConfigError, GossamerError
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
        ({"distill": "none", "learning_rate": 0.0}, "--learning-rate 0"),
        ({"distill": "none", "max_length": 3}, r"prompt alone takes 3 tokens \(--max-length\)"),
        ({"distill": "none", "format": "instruct"}, r"pairs\.jsonl:1"),
    ],
)
def test_bad_options(
    sparse: Path, tmp_path: Path, pairs: str, change: dict[str, object], message: str
) -> None:
    job = Finetune(str(sparse), str(tmp_path / "out"), dataset=(pairs,), **change)  # pyright: ignore
    with pytest.raises(GossamerError, match=message):
        finetune(job)
    assert not (tmp_path / "out").exists()
