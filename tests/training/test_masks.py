"""Fixed masks in real runs of transformers' Trainer and TRL's SFTTrainer."""

import copy
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoTokenizer, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from gossamer import _native
from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import EngineError, GossamerError, UnsupportedError
from gossamer.training import masks
from gossamer.training.masks import MaskCallback, decoder_zeros, model_mask_hash
from gossamer.training.sparse_linear import sparsify

ACCUMULATION, CLIP, LEARNING_RATE = 2, 0.05, 1e-2


def sparse_llama(path: Path) -> LlamaForCausalLM:
    """The random Llama with half of its decoder's weights zero, one of them -0.0, and a zero in its head."""
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight.mul_(torch.rand_like(weight) < 0.5)
        model.get_parameter("model.layers.0.self_attn.q_proj.weight")[0, 0] = -0.0
        model.lm_head.weight[5, 5] = 0.0
    return model


@pytest.fixture
def sparse_model(tiny_llama: Any) -> LlamaForCausalLM:
    return sparse_llama(tiny_llama("llama2"))


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
        "learning_rate": LEARNING_RATE,
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


@dataclass(frozen=True)
class Case:
    """One way to train: what the Trainer is told and what the reference does."""

    accumulation: int = ACCUMULATION
    bf16: bool = False
    checkpointing: Literal["none", "reentrant", "saved"] = "none"
    clip: float = CLIP
    weight_decay: float = 0.1
    variant: str = "llama2"

    def arguments(self, output_dir: Path) -> TrainingArguments:
        return arguments(
            output_dir,
            gradient_accumulation_steps=self.accumulation,
            bf16=self.bf16,
            activation_checkpointing=self.checkpointing != "none",
            activation_checkpointing_kwargs={"use_reentrant": self.checkpointing == "reentrant"},
            max_grad_norm=self.clip,
            weight_decay=self.weight_decay,
        )


def every_case() -> list[Case]:
    """Accumulation, precision, checkpointing and tied weights, each with each; clip and decay take turns."""
    choices = itertools.product((1, 2), (False, True), ("none", "reentrant", "saved"), ("llama2", "llama3"))
    turns = itertools.cycle([(CLIP, 0.1), (CLIP, 0.0), (0.0, 0.1)])
    return [
        Case(accumulation, bf16, checkpointing, *turn, variant)
        for (accumulation, bf16, checkpointing, variant), turn in zip(choices, turns, strict=False)
    ]


def reference_run(
    model: LlamaForCausalLM, data: RandomRows, num_steps: int, case: Case
) -> tuple[list[float], list[float]]:
    """Masked AdamW written out: returns the norm of each step before clipping, masked and unmasked."""
    zeros = zeros_of(model)
    decayed = [p for name, p in model.named_parameters() if "norm" not in name]
    others = [p for name, p in model.named_parameters() if "norm" in name]
    groups = [
        {"params": decayed, "weight_decay": case.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8)
    masked_norms, unmasked_norms = [], []
    per_step = 2 * case.accumulation
    for step in range(num_steps):
        ids_BT = data.ids_ST[step * per_step : (step + 1) * per_step]
        for micro_BT in ids_BT.split(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=case.bf16):
                loss = model(input_ids=micro_BT, labels=micro_BT).loss
            (loss / case.accumulation).backward()
        unmasked_norms.append(norm_of(model))
        for name, parameter in model.named_parameters():
            if name in zeros:
                assert parameter.grad is not None
                parameter.grad[zeros[name]] = 0
        masked_norms.append(norm_of(model))
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(min(1.0, case.clip / masked_norms[-1]) if case.clip else 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return masked_norms, unmasked_norms


def norm_of(model: nn.Module) -> float:
    return float(sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None) ** 0.5)


@pytest.mark.parametrize("case", every_case(), ids=str)
def test_trainer_equals_masked_adamw_written_out(tiny_llama: Any, tmp_path: Path, case: Case) -> None:
    """Accumulated and clipped gradients count only kept weights: same norms, then same weights.

    In bf16 a difference in a weight's last bit may round to another bf16, in a step of 2 ** -9. AdamW's first
    steps are as long as the learning rate however small a gradient is: where one is only rounding noise,
    which depends on the processor, its sign may differ, and the weight by twice the learning rate a step.
    """
    model = sparse_llama(tiny_llama(case.variant))
    data, zeros = RandomRows(12), zeros_of(model)
    reference = copy.deepcopy(model)
    masked_norms, unmasked_norms = reference_run(reference, data, num_steps=3, case=case)
    trainer = Trainer(model, case.arguments(tmp_path), train_dataset=data, callbacks=[MaskCallback()])
    trainer.train()

    assert model.is_activation_checkpointing == (case.checkpointing != "none")
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx(masked_norms, rel=2e-3 if case.bf16 else 1e-4)
    assert min(masked_norms) > CLIP
    assert all(abs(m - u) > 0.01 * u for m, u in zip(masked_norms, unmasked_norms, strict=True))
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        if case.bf16:
            far = ~torch.isclose(ours, theirs, rtol=1e-4, atol=2e-3)
            assert int(far.sum()) <= ours.numel() / 1000, name
            assert (ours - theirs).abs().max() <= 2 * 3 * LEARNING_RATE, name
        else:
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
    assert "lm_head.weight" not in decoder_zeros(sparse_model)
    assert len(decoder_zeros(sparse_model)) == 14


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


class WritesEverywhere(torch.optim.AdamW):
    """A faulty optimizer: also adds to what it should not."""

    def __init__(self, params: Any, what: str) -> None:
        super().__init__(params, lr=1e-2)
        self.what = what

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for weight, state in self.state.items():
            {"weights": weight, "gradients": weight.grad, **state}[self.what].add_(1e-3)
        return loss


@pytest.mark.parametrize("what", ["weights", "gradients", "exp_avg", "exp_avg_sq"])
def test_an_optimizer_that_writes_everywhere_is_caught_at_the_first_step(
    sparse_model: LlamaForCausalLM, tmp_path: Path, what: str
) -> None:
    optimizer = WritesEverywhere(sparse_model.parameters(), what)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = Trainer(
        sparse_model,
        arguments(tmp_path),
        train_dataset=RandomRows(12),
        callbacks=[MaskCallback()],
        optimizers=(optimizer, schedule),
    )
    found = rf"moments of model\S+ \({what}\)" if what.startswith("exp") else f"{what} of model"
    with pytest.raises(GossamerError, match=rf"step 1: \d+ pruned {found}.*expected 0: the optimizer"):
        trainer.train()


class Meddler(TrainerCallback):
    """Before the optimizer's second step, does `act` to the model."""

    def __init__(self, act: Callable[[LlamaForCausalLM], None]) -> None:
        self.act = act

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.act(kwargs["model"])


def add_to_weight(model: LlamaForCausalLM) -> None:
    model.get_parameter("model.layers.1.mlp.up_proj.weight").add_(1e-3)


def add_to_gradient(model: LlamaForCausalLM) -> None:
    gradient = model.get_parameter("model.layers.1.mlp.up_proj.weight").grad
    assert gradient is not None
    gradient.add_(1e-9)


@pytest.mark.parametrize(
    ("act", "what"), [(add_to_weight, "weights"), (add_to_gradient, "gradients")], ids=["weight", "gradient"]
)
def test_a_callback_that_writes_fails_the_run(
    sparse_model: LlamaForCausalLM, tmp_path: Path, act: Callable[[LlamaForCausalLM], None], what: str
) -> None:
    callbacks: list[TrainerCallback] = [MaskCallback(), Meddler(act)]
    trainer = Trainer(sparse_model, arguments(tmp_path), train_dataset=RandomRows(12), callbacks=callbacks)
    with pytest.raises(GossamerError, match=rf"step 2: \d+ pruned {what} of model\.layers\.1\.mlp\.up_proj"):
        trainer.train()


def test_a_parameter_that_is_replaced_fails_the_run(sparse_model: LlamaForCausalLM, tmp_path: Path) -> None:
    """The new one has no hook; the old one, which has, gets no gradient any more."""

    def replace(model: LlamaForCausalLM) -> None:
        projection = model.get_submodule("model.layers.1.mlp.up_proj")
        projection.weight = nn.Parameter(model.get_parameter("model.layers.1.mlp.up_proj.weight").clone())

    callbacks: list[TrainerCallback] = [MaskCallback(), Meddler(replace)]
    trainer = Trainer(sparse_model, arguments(tmp_path), train_dataset=RandomRows(12), callbacks=callbacks)
    with pytest.raises(
        GossamerError,
        match=r"step 3: the gradient of model\.layers\.1\.mlp\.up_proj\.weight was never masked .*1 of 14",
    ):
        trainer.train()


def test_frozen_weights_need_no_gradient(sparse_model: LlamaForCausalLM, tmp_path: Path) -> None:
    """As under LoRA: what does not train has no hook, and is looked at all the same."""
    sparse_model.get_submodule("model.layers.0").requires_grad_(False)
    trainer = Trainer(
        sparse_model, arguments(tmp_path), train_dataset=RandomRows(12), callbacks=[MaskCallback()]
    )
    trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("size", [0, 1, 16_383, 16_384, 100_003])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_native_marks_are_those_of_numpy(size: int, num_threads: int) -> None:
    random = np.random.default_rng(size)
    values = random.standard_normal(size).astype(np.float32)
    values[random.random(size) < 0.3] = -0.0
    values[random.random(size) < 0.1] = np.nan
    marks = random.random(size) < 0.5
    assert _native.count_marked(values, marks, num_threads) == np.count_nonzero((values != 0) & marks)
    expected = np.where(marks, np.float32(0), values)
    _native.zero_marked(values, marks, num_threads)
    assert values.tobytes() == expected.tobytes()
    with pytest.raises(EngineError, match="as long as"):
        _native.zero_marked(values, np.zeros(size + 1, bool), num_threads)


def test_only_linears_of_decoder_layers_are_masked() -> None:
    """Another module's parameters are its own affair, even if it sits where a linear did."""

    class Values(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 4))

    layer = nn.ModuleDict({"up": nn.Linear(4, 4), "packed": Values(), "norm": nn.LayerNorm(4)})
    model = nn.ModuleDict({"layers": nn.ModuleList([layer]), "head": nn.Linear(4, 4)})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert list(decoder_zeros(model)) == ["layers.0.up.weight"]


def test_a_given_mask_outlives_a_kept_weight_that_became_zero(
    sparse_model: LlamaForCausalLM, tmp_path: Path
) -> None:
    """A resumed run has the masks it began with: `MaskCallback(model)` read them before the load."""
    callback = MaskCallback(sparse_model)
    weight, zeros = sparse_model.get_parameter("model.layers.0.mlp.up_proj.weight"), zeros_of(sparse_model)
    before = model_mask_hash(sparse_model)
    with torch.no_grad():
        weight[~zeros["model.layers.0.mlp.up_proj.weight"]] = 0
    trainer = Trainer(sparse_model, arguments(tmp_path), train_dataset=RandomRows(12), callbacks=[callback])
    trainer.train()
    assert model_mask_hash(sparse_model) == before == callback.enforced_mask_hash()
    assert torch.equal(weight == 0, zeros["model.layers.0.mlp.up_proj.weight"])


def test_a_given_mask_that_the_loaded_weights_broke_fails_the_run(
    sparse_model: LlamaForCausalLM, tmp_path: Path
) -> None:
    callback = MaskCallback(sparse_model)
    add_to_weight_now = torch.no_grad()(add_to_weight)
    add_to_weight_now(sparse_model)
    trainer = Trainer(sparse_model, arguments(tmp_path), train_dataset=RandomRows(12), callbacks=[callback])
    with pytest.raises(GossamerError, match=r"step 0: \d+ pruned weights of model\.layers\.1\.mlp\.up_proj"):
        trainer.train()


def test_a_mask_of_another_shape_is_refused(sparse_model: LlamaForCausalLM, tmp_path: Path) -> None:
    callback = MaskCallback(sparse_model)
    sparse_model.get_submodule("model.layers.0.mlp").up_proj = nn.Linear(48, 96, bias=False)
    trainer = Trainer(sparse_model, arguments(tmp_path), train_dataset=RandomRows(12), callbacks=[callback])
    with pytest.raises(GossamerError, match=r"up_proj\.weight has shape \[104, 48\].*has \[96, 48\]"):
        trainer.train()


def test_sparse_linears_train_beside_masked_ones(sparse_model: LlamaForCausalLM, tmp_path: Path) -> None:
    """They need no mask; the others keep theirs, and the run's hash is the same."""
    before, zeros = model_mask_hash(sparse_model), zeros_of(sparse_model)
    sparsify(sparse_model, [f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")])
    callback = MaskCallback()
    trainer = Trainer(sparse_model, arguments(tmp_path), train_dataset=RandomRows(12), callbacks=[callback])
    trainer.train()
    weights = sparse_model.state_dict()
    assert trainer.state.global_step == 3
    assert callback.enforced_mask_hash() == model_mask_hash(sparse_model) == before
    assert all(not weights[name][zero].any() for name, zero in zeros.items())


def test_deepspeed_is_refused(
    sparse_model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plugin is what TrainingArguments makes of `deepspeed=` and of ACCELERATE_USE_DEEPSPEED."""
    trainer = Trainer(
        sparse_model, arguments(tmp_path), train_dataset=RandomRows(12), callbacks=[MaskCallback()]
    )
    monkeypatch.setattr(trainer.args, "deepspeed_plugin", object())
    with pytest.raises(UnsupportedError, match="found DeepSpeed; masks hold under DDP and FSDP2"):
        trainer.train()


def test_the_first_fsdp_is_refused(sparse_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch makes no FSDP1 module without an accelerator: another wrapper stands in for it."""

    class Wrapper(nn.Sequential):
        pass

    monkeypatch.setattr(masks, "FullyShardedDataParallel", Wrapper)
    with pytest.raises(UnsupportedError, match="found FSDP1; masks hold under FSDP2"):
        MaskCallback().on_train_begin(None, None, None, model=Wrapper(sparse_model))


def test_mask_hash_is_sha256_over_names_shapes_and_bits(sparse_model: LlamaForCausalLM) -> None:
    digest = hashlib.sha256()
    for name, zeros_NK in sorted(zeros_of(sparse_model).items()):
        digest.update(f"{name} {list(zeros_NK.shape)}\n".encode())
        bits = "".join("1" if zero else "0" for zero in zeros_NK.flatten().tolist())
        bits += "0" * (-len(bits) % 8)
        digest.update(int(bits, 2).to_bytes(len(bits) // 8, "big"))
    assert model_mask_hash(sparse_model) == digest.hexdigest()


def test_mask_hash_of_sparse_linears_is_that_of_their_pattern(sparse_model: LlamaForCausalLM) -> None:
    """A value that became exactly 0 in training is still one that lives."""
    before = model_mask_hash(sparse_model)
    sparsify(sparse_model, ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"])
    with torch.no_grad():
        sparse_model.get_parameter("model.layers.0.mlp.up_proj.values")[3] = 0.0
    assert model_mask_hash(sparse_model) == before


def test_mask_hash_of_directory_and_model_agree(sparse_model: LlamaForCausalLM, tmp_path: Path) -> None:
    """Values do not count, places do; a dense model has no mask."""
    sparse_model.save_pretrained(tmp_path)
    before = model_mask_hash(sparse_model)
    assert model_mask_hash(Checkpoint.open(tmp_path)) == before
    weight = sparse_model.get_parameter("model.layers.1.mlp.down_proj.weight")
    with torch.no_grad():
        weight.mul_(2)
        assert model_mask_hash(sparse_model) == before
        weight.copy_(weight.flip(0))
        assert model_mask_hash(sparse_model) != before
        for parameter in sparse_model.parameters():
            parameter.add_(100.0)
    assert model_mask_hash(sparse_model) == hashlib.sha256().hexdigest()


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
