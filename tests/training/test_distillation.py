"""The SquareHead teacher inside transformers' Trainer and TRL's SFTTrainer, against the loss written out."""

import copy
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase, Trainer, TrainingArguments
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from gossamer.errors import ConfigError, UnsupportedError
from gossamer.training.distillation import SquareHead
from gossamer.training.masks import MaskCallback
from gossamer.training.teacher import LiveTeacher


@pytest.fixture
def pair(tiny_llama: Any) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A sparse student and its dense teacher."""
    teacher = LlamaForCausalLM.from_pretrained(tiny_llama("llama3"))
    student = copy.deepcopy(teacher)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if "_proj" in name:
                weight.mul_(torch.rand_like(weight) < 0.6)
    return student, teacher


@pytest.fixture
def tokenizer(tiny_llama: Any) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama("llama3"))
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def settings(output_dir: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    } | changes


@torch.no_grad()
def squarehead_written_out(
    student: LlamaForCausalLM, teacher: LlamaForCausalLM, ids_BT: Tensor, mask_BT: Tensor
) -> float:
    hidden = [
        model(input_ids=ids_BT, attention_mask=mask_BT, output_hidden_states=True).hidden_states
        for model in (student, teacher)
    ]
    total = 0.0
    for s_BTD, t_BTD in zip(hidden[0][1:], hidden[1][1:], strict=True):
        s_ND, t_ND = s_BTD[mask_BT.bool()], t_BTD[mask_BT.bool()]
        total += float((((s_ND - t_ND) ** 2).sum(-1) / (t_ND**2).sum(-1)).mean())
    return total


@pytest.mark.parametrize("accumulation", [1, 2])
def test_adds_the_loss_inside_sft_trainer(
    pair: tuple[LlamaForCausalLM, LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    accumulation: int,
) -> None:
    """First logged loss = cross-entropy + SquareHead, averaged over accumulated tokens, without padding."""
    texts = ["def f(x):", "import os\nimport sys, json\n", "x = 1", "class A:\n    pass\n"][
        : 2 * accumulation
    ]
    losses = []
    for teacher in (None, pair[1]):
        trainer = SFTTrainer(
            copy.deepcopy(pair[0]),
            args=SFTConfig(**settings(tmp_path, gradient_accumulation_steps=accumulation), max_length=64),
            train_dataset=datasets.Dataset.from_dict({"text": texts}),
            processing_class=tokenizer,
            callbacks=[MaskCallback()],
        )
        if teacher is not None:
            SquareHead(teacher, weight=0.5).attach(trainer)
        batches = list(trainer.get_train_dataloader())
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert any((batch["attention_mask"] == 0).any() for batch in batches)
    expected = [squarehead_written_out(*pair, b["input_ids"], b["attention_mask"]) for b in batches]
    num_tokens = [int(b["attention_mask"].sum()) for b in batches]
    mean = sum(loss * count for loss, count in zip(expected, num_tokens, strict=True)) / sum(num_tokens)
    assert losses[1] - losses[0] == pytest.approx(0.5 * mean, rel=1e-4)


def test_a_student_that_is_its_teacher_loses_nothing(
    pair: tuple[LlamaForCausalLM, LlamaForCausalLM], tmp_path: Path
) -> None:
    row = {"input_ids": list(range(2, 30)), "labels": list(range(2, 30))}
    _, teacher = pair
    student, distillation = copy.deepcopy(teacher), SquareHead(teacher)
    trainer = Trainer(
        student,
        TrainingArguments(**settings(tmp_path)),
        train_dataset=datasets.Dataset.from_list([row, row]),
    )
    distillation.attach(trainer)
    trainer.train()
    assert distillation.last == pytest.approx(0.0, abs=1e-9)
    assert all(parameter.grad is None for parameter in teacher.parameters())


class SomeLayers(LiveTeacher):
    """Gives the states of the last layer alone."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__(model)
        self.layers = self.layers[-1:]

    def states(self) -> tuple[Tensor, ...]:
        return super().states()[-1:]


def test_what_some_layers_add_counts_for_all(
    pair: tuple[LlamaForCausalLM, LlamaForCausalLM], tmp_path: Path
) -> None:
    """The last of two layers counts twice, in the loss that is logged too."""
    ids_BT = torch.arange(2, 30).expand(2, -1)
    student, teacher = pair
    row = {"input_ids": ids_BT[0].tolist(), "labels": ids_BT[0].tolist()}
    losses = []
    for states in (None, SomeLayers(teacher)):
        trainer = trainer_of(copy.deepcopy(student), tmp_path, **row)
        if states is not None:
            distillation = SquareHead(states)
            distillation.attach(trainer)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    with torch.no_grad():
        s_BTD, t_BTD = (m.model(ids_BT).last_hidden_state for m in (student, teacher))
        expected = 2 * float((((s_BTD - t_BTD) ** 2).sum(-1) / (t_BTD**2).sum(-1)).mean())
    assert distillation.last == pytest.approx(expected, rel=1e-4)
    assert losses[1] - losses[0] == pytest.approx(expected, rel=1e-3)


class Odd(LlamaForCausalLM):
    """A Llama that calls its decoder in a way of its own."""

    call: Any = None

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        hidden = type(self).call(self.model, input_ids)
        return {"loss": hidden.float().square().mean()}


def positional(decoder: nn.Module, ids_BT: Tensor) -> Tensor:
    return decoder(ids_BT).last_hidden_state


def embedded(decoder: nn.Module, ids_BT: Tensor) -> Tensor:
    return decoder(inputs_embeds=decoder.get_input_embeddings()(ids_BT)).last_hidden_state  # pyright: ignore


def as_tuple(decoder: nn.Module, ids_BT: Tensor) -> Tensor:
    return decoder(input_ids=ids_BT, return_dict=False)[0]


def trainer_of(model: Any, tmp_path: Path, **row: Any) -> Trainer:
    row = row or {"input_ids": list(range(2, 30)), "labels": list(range(2, 30))}
    return Trainer(
        model,
        TrainingArguments(**settings(tmp_path, remove_unused_columns=False)),
        train_dataset=datasets.Dataset.from_list([row, row]),
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (positional, "calls its LlamaModel with 1 positional arguments .*expected keywords alone"),
        (embedded, "0 positional arguments and the keywords inputs_embeds; expected .* input_ids"),
        (as_tuple, "LlamaModel returned no hidden_states though asked to"),
    ],
)
def test_a_student_that_cannot_be_watched_is_refused(
    pair: tuple[LlamaForCausalLM, LlamaForCausalLM], tmp_path: Path, call: Any, message: str
) -> None:
    student, teacher = Odd(pair[0].config), pair[1]
    trainer = trainer_of(student, tmp_path)
    SquareHead(teacher).attach(trainer)
    Odd.call = staticmethod(call)
    with pytest.raises(UnsupportedError, match=f"SquareHead: .*{message}"):
        trainer.train()


def test_a_batch_without_tokens_is_refused(
    pair: tuple[LlamaForCausalLM, LlamaForCausalLM], tmp_path: Path
) -> None:
    trainer = trainer_of(pair[0], tmp_path, inputs_embeds=[[0.0] * 48] * 4, labels=[2] * 4)
    SquareHead(pair[1]).attach(trainer)
    with pytest.raises(UnsupportedError, match="a batch of inputs_embeds, labels; expected input_ids"):
        trainer.train()


def test_a_student_that_is_no_match_is_refused(
    pair: tuple[LlamaForCausalLM, LlamaForCausalLM], tmp_path: Path
) -> None:
    class Wrapped(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

    student, teacher = pair
    with pytest.raises(UnsupportedError, match="found a Wrapped; expected a transformers PreTrainedModel"):
        SquareHead(teacher).attach(trainer_of(Wrapped(student), tmp_path))
    for changed in ({"num_hidden_layers": 3}, {"hidden_size": 96}):
        [(field, value)] = changed.items()
        config = copy.deepcopy(student.config)
        setattr(config, field, value)
        with pytest.raises(ConfigError, match=f"the teacher has {field} {value}, the trainer's model has"):
            SquareHead(LlamaForCausalLM(config)).attach(trainer_of(student, tmp_path))
