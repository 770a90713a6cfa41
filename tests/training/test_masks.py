"""Fixed masks in real runs of transformers' Trainer and TRL's SFTTrainer."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoTokenizer, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from gossamer.errors import GossamerError
from gossamer.training.masks import MaskCallback, masked_weights

ACCUMULATION, CLIP = 2, 0.05


@pytest.fixture
def sparse_model(tiny_llama: Any) -> LlamaForCausalLM:
    """The random Llama with half of its decoder's weights zero, one of them -0.0, and a zero in its head."""
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(tiny_llama("llama2"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight.mul_(torch.rand_like(weight) < 0.5)
        model.get_parameter("model.layers.0.self_attn.q_proj.weight")[0, 0] = -0.0
        model.lm_head.weight[5, 5] = 0.0
    return model


class RandomRows(Dataset[dict[str, Tensor]]):
    def __init__(self, count: int, length: int = 12) -> None:
        self.ids_ST = torch.randint(2, 320, (count, length), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids_ST)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids_ST[index], "labels": self.ids_ST[index]}


def arguments(output_dir: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_grad_norm": CLIP,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    return TrainingArguments(**(settings | changes))


def zeros_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach() == 0 for name, weight in model.named_parameters() if "_proj" in name}


def reference_run(
    model: LlamaForCausalLM, data: RandomRows, num_steps: int
) -> tuple[list[float], list[float]]:
    """Masked AdamW written out: returns the clipped-over norm of each step, masked and unmasked."""
    zeros = zeros_of(model)
    decayed = [p for name, p in model.named_parameters() if "norm" not in name]
    others = [p for name, p in model.named_parameters() if "norm" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    masked_norms, unmasked_norms = [], []
    per_step = 2 * ACCUMULATION
    for step in range(num_steps):
        ids_BT = data.ids_ST[step * per_step : (step + 1) * per_step]
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        unmasked_norms.append(norm_of(model))
        for name, parameter in model.named_parameters():
            if name in zeros:
                assert parameter.grad is not None
                parameter.grad[zeros[name]] = 0
        masked_norms.append(norm_of(model))
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(min(1.0, CLIP / masked_norms[-1]))
        optimizer.step()
        optimizer.zero_grad()
    return masked_norms, unmasked_norms


def norm_of(model: nn.Module) -> float:
    return float(sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None) ** 0.5)


def test_trainer_equals_masked_adamw_written_out(sparse_model: LlamaForCausalLM, tmp_path: Path) -> None:
    """Accumulated and clipped gradients count only kept weights: same norms, then same weights."""
    data, zeros = RandomRows(12), zeros_of(sparse_model)
    reference = copy.deepcopy(sparse_model)
    masked_norms, unmasked_norms = reference_run(reference, data, num_steps=3)
    trainer = Trainer(sparse_model, arguments(tmp_path), train_dataset=data, callbacks=[MaskCallback()])
    trainer.train()

    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx(masked_norms, rel=1e-4)
    assert min(masked_norms) > CLIP
    assert all(abs(m - u) > 0.01 * u for m, u in zip(masked_norms, unmasked_norms, strict=True))
    for (name, ours), theirs in zip(sparse_model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5, msg=name)
        if name in zeros:
            assert not ours[zeros[name]].any(), name
            assert isinstance(trainer.optimizer, AcceleratedOptimizer)
            state = trainer.optimizer.state[ours]
            assert not state["exp_avg"][zeros[name]].any()
            assert not state["exp_avg_sq"][zeros[name]].any()


def test_zeros_outside_the_decoder_linears_are_free(sparse_model: LlamaForCausalLM, tmp_path: Path) -> None:
    trainer = Trainer(
        sparse_model, arguments(tmp_path), train_dataset=RandomRows(12), callbacks=[MaskCallback()]
    )
    trainer.train()
    assert sparse_model.lm_head.weight[5, 5] != 0
    assert "lm_head.weight" not in masked_weights(sparse_model)
    assert len(masked_weights(sparse_model)) == 14


def test_sft_trainer_keeps_zeros(sparse_model: LlamaForCausalLM, tiny_llama: Any, tmp_path: Path) -> None:
    import datasets
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    zeros, before = zeros_of(sparse_model), copy.deepcopy(sparse_model.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama("llama2"))
    tokenizer.pad_token = tokenizer.eos_token
    pairs = [{"prompt": f">>> {n} + {n}\n", "completion": f"{n + n}\n"} for n in range(16)]
    trainer = SFTTrainer(
        sparse_model,
        args=SFTConfig(**arguments(tmp_path).to_dict() | {"bf16": False, "max_length": 64}),
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tokenizer,
        callbacks=[MaskCallback()],
    )
    trainer.train()
    for name, weight in sparse_model.named_parameters():
        if name in zeros:
            assert torch.equal(weight == 0, zeros[name]), name
            assert not torch.equal(weight, before[name]), name


def test_a_weight_that_moves_all_the_same_fails_the_run(
    sparse_model: LlamaForCausalLM, tmp_path: Path
) -> None:
    class Vandal(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                with torch.no_grad():
                    sparse_model.get_parameter("model.layers.1.mlp.up_proj.weight").add_(1e-3)

    callbacks: list[TrainerCallback] = [Vandal(), MaskCallback()]
    trainer = Trainer(sparse_model, arguments(tmp_path), train_dataset=RandomRows(12), callbacks=callbacks)
    with pytest.raises(GossamerError, match=r"step 2: \d+ pruned weights of model\.layers\.1\.mlp\.up_proj"):
        trainer.train()


def test_moments_of_a_resumed_optimizer_are_cleared(sparse_model: LlamaForCausalLM, tmp_path: Path) -> None:
    """AdamW alone would move pruned weights by the moments of an earlier, dense run."""
    zeros = zeros_of(sparse_model)
    optimizer = torch.optim.AdamW(sparse_model.parameters(), lr=1e-2)
    for parameter in sparse_model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 1e-2
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = Trainer(
        sparse_model,
        arguments(tmp_path),
        train_dataset=RandomRows(12),
        callbacks=[MaskCallback()],
        optimizers=(optimizer, schedule),
    )
    trainer.train()
    for name, weight in sparse_model.named_parameters():
        if name in zeros:
            assert not weight[zeros[name]].any(), name


def test_hooks_end_with_the_run(sparse_model: LlamaForCausalLM, tmp_path: Path) -> None:
    """After training, a masked weight gets its gradient again: the model is the caller's."""
    zeros = zeros_of(sparse_model)
    trainer = Trainer(
        sparse_model, arguments(tmp_path), train_dataset=RandomRows(12), callbacks=[MaskCallback()]
    )
    trainer.train()
    ids_BT = RandomRows(1).ids_ST
    sparse_model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    name = "model.layers.0.mlp.down_proj.weight"
    grad = sparse_model.get_parameter(name).grad
    assert grad is not None
    assert grad[zeros[name]].any()
