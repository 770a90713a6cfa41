"""SparseLinear against masked dense layers: products, training, and everything that saves or loads."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import CheckpointError
from gossamer.stages.pretrain import Pretrain
from gossamer.training import sparse_linear
from gossamer.training.adamw import AdamW
from gossamer.training.kernel_choice import masked_linears
from gossamer.training.masks import MaskCallback, decoder_zeros
from gossamer.training.rows import Rows
from gossamer.training.sparse_linear import SparseLinear, densify, sparsify
from gossamer.training.whole_model import load_model, write_model

SHAPES = [(1, 1), (7, 5), (48, 104), (200, 130)]


def pruned(rows: int, columns: int, sparsity: float, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A random layer of which a fraction is zero, whole rows and columns included."""
    generator = torch.Generator().manual_seed(rows * columns)
    layer = nn.Linear(columns, rows, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(rows, columns, generator=generator))
        layer.weight[torch.rand(rows, columns, generator=generator) < sparsity] = 0
        layer.weight[rows // 2 + 1 :: 3] = 0
    return layer


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
def test_gradcheck_of_the_torch_path(sparsity: float) -> None:
    layer = SparseLinear(pruned(7, 5, sparsity, torch.float64))
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, values: torch.func.functional_call(layer, {"values": values}, (x,)), (x, layer.values)
    )


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_products_equal_float64(shape: tuple[int, int], sparsity: float) -> None:
    """Within sqrt(terms) 2^-22 of the sum of absolute products, for odd and empty token counts too."""
    dense = pruned(*shape, sparsity)
    layer = SparseLinear(dense)
    for tokens in (0, 1, 65, 130):
        x = torch.randn(tokens, shape[1], requires_grad=True)
        dy = torch.randn(tokens, shape[0])
        y = layer(x)
        found = (y, *torch.autograd.grad(y, (x, layer.values), dy))
        w, wide, dwide = dense.weight.detach().double(), x.detach().double(), dy.double()
        live = layer.pattern.positions()
        expected = (wide @ w.T, dwide @ w, (dwide.T @ wide).view(-1)[live])
        w, wide, dwide = w.abs(), wide.abs(), dwide.abs()
        sums = (wide @ w.T, dwide @ w, (dwide.T @ wide).view(-1)[live])
        for one, exact, total, terms in zip(found, expected, sums, (*shape[::-1], tokens), strict=True):
            assert ((one - exact).abs() <= np.sqrt(terms) * 2.0**-22 * total).all()


def test_the_native_path_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 on the CPU writes no dense weight out."""
    layer = SparseLinear(pruned(40, 30, 0.5))
    monkeypatch.setattr(layer, "_scattered", None)
    layer(torch.randn(4, 30, requires_grad=True)).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(4, 30, dtype=torch.bfloat16))


def test_strided_inputs_and_gradients() -> None:
    dense = pruned(40, 30, 0.5)
    layer, weight = SparseLinear(dense), dense.weight.detach().requires_grad_()
    x = torch.randn(30, 3, 8).transpose(0, 2)
    y, expected = layer(x), linear(x, weight)
    torch.testing.assert_close(y, expected)
    for output in (y, expected):
        (output.permute(2, 0, 1) * torch.arange(8.0)[:, None]).sum().backward()
    assert layer.values.grad is not None and weight.grad is not None
    torch.testing.assert_close(layer.values.grad, weight.grad.view(-1)[layer.pattern.positions()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_its_type_and_float32_gradients(dtype: torch.dtype) -> None:
    """Inputs are not rounded: the product is nearer to the exact one than nn.Linear's in bfloat16."""
    dense = pruned(64, 96, 0.5)
    layer = SparseLinear(dense)
    x = torch.randn(10, 96).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, rounded = layer(x), dense(x)
    assert y.dtype == torch.bfloat16 == rounded.dtype
    y.float().square().sum().backward()
    assert layer.values.grad is not None and layer.values.grad.dtype == torch.float32
    assert x.grad is not None and x.grad.dtype == dtype
    exact = linear(x.detach().double(), dense.weight.detach().double())
    assert (y - exact).abs().sum() <= (rounded - exact).abs().sum()
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("native", [True, False])
def test_a_bias_is_added_and_trained(native: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradients of nn.Linear with the same bias, on both paths."""
    if not native:
        monkeypatch.setattr(sparse_linear, "_is_native", lambda values: False)
    dense = pruned(64, 96, 0.5)
    dense.bias = nn.Parameter(torch.randn(64))
    layer, x = SparseLinear(copy.deepcopy(dense)), torch.randn(10, 96)
    for module in (layer, dense):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(x)
        assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
        y.float().square().sum().backward()
    assert layer.bias is not None and layer.values.grad is not None and dense.weight.grad is not None
    torch.testing.assert_close(layer(x), dense(x))
    gradients = {
        layer.bias.grad: dense.bias.grad,
        layer.values.grad: dense.weight.grad.view(-1)[layer.pattern.positions()],
    }
    tolerance = 2**-6 if autocast else 1e-5
    for found, expected in gradients.items():
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def test_a_bias_is_saved_loaded_and_given_back() -> None:
    dense = pruned(8, 6, 0.5)
    dense.bias = nn.Parameter(torch.randn(8), requires_grad=False)
    layer = SparseLinear(copy.deepcopy(dense))
    assert list(layer.state_dict()) == list(dense.state_dict())
    layer.load_state_dict({name: 2 * tensor for name, tensor in dense.state_dict().items()})
    back = layer.to_linear()
    assert torch.equal(back.bias, 2 * dense.bias) and torch.equal(back.weight, 2 * dense.weight)
    assert not back.bias.requires_grad
    with pytest.raises(CheckpointError, match=r"bias has shape \[3\]; the model in training has \[8\]"):
        layer.load_state_dict({**dense.state_dict(), "bias": torch.ones(3)})
    with pytest.raises(RuntimeError, match=r'Missing key.*"bias"'):
        layer.load_state_dict({"weight": dense.weight})


def test_other_types_are_refused_as_by_nn_linear() -> None:
    layer = SparseLinear(pruned(8, 8, 0.5))
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.ones(1, 8, dtype=torch.float64))


@pytest.fixture
def model(tiny_llama: Any) -> LlamaForCausalLM:
    return sparse_llama(tiny_llama("llama3"))


def sparse_llama(path: Path, sparsity: float = 0.7) -> LlamaForCausalLM:
    """A tiny Llama whose decoder linears are pruned, all but one."""
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name and "layers.1.mlp.up_proj" not in name:
                weight[torch.rand(weight.shape, generator=generator) < sparsity] = 0
    return model


def sparse_copy(model: LlamaForCausalLM) -> LlamaForCausalLM:
    copied = copy.deepcopy(model)
    sparsify(copied, masked_linears(copied))
    return copied


def zeros_of(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """`decoder_zeros` of a model without SparseLinears."""
    found = decoder_zeros(model)
    return {name: zeros for name, zeros in found.items() if isinstance(zeros, Tensor)}


def assert_same_weights(found: nn.Module, expected: nn.Module) -> None:
    theirs = expected.state_dict()
    assert found.state_dict().keys() == theirs.keys()
    for name, weight in found.state_dict().items():
        assert torch.equal(weight, theirs[name]), name


def test_there_and_back_is_exact(model: LlamaForCausalLM) -> None:
    sparse = sparse_copy(model)
    layers = [module for module in sparse.modules() if isinstance(module, SparseLinear)]
    assert len(layers) == 13
    assert sum(layer.values.numel() for layer in layers) == sum(
        int(torch.count_nonzero(dense.weight)) for dense in masked_linears(model).values()
    )
    assert_same_weights(sparse, model)
    assert torch.equal(layers[0].pattern.mask_NK(), model.model.layers[0].self_attn.q_proj.weight != 0)
    densify(sparse)
    assert not any(isinstance(module, SparseLinear) for module in sparse.modules())
    assert_same_weights(sparse, model)


def test_copies_share_the_pattern_but_not_the_values(model: LlamaForCausalLM) -> None:
    sparse = sparse_copy(model)
    copied = copy.deepcopy(sparse)
    first, second = sparse.model.layers[0].mlp.up_proj, copied.model.layers[0].mlp.up_proj
    assert isinstance(first, SparseLinear) and isinstance(second, SparseLinear)
    assert first.pattern is second.pattern
    with torch.no_grad():
        second.values += 1
    assert not torch.equal(first.values, second.values)


def test_saved_in_every_way_it_is_the_dense_model(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    """save_pretrained and our own writer; the files are the same bytes as the dense model's."""
    model = sparse_llama(tiny_llama("llama3"))
    sparse = sparse_copy(model)
    model.save_pretrained(tmp_path / "dense")
    sparse.save_pretrained(tmp_path / "sparse")
    dense_file = (tmp_path / "dense/model.safetensors").read_bytes()
    assert (tmp_path / "sparse/model.safetensors").read_bytes() == dense_file
    assert_same_weights(LlamaForCausalLM.from_pretrained(tmp_path / "sparse"), model)
    source = Checkpoint.open(tmp_path / "dense")
    with source.derive(
        tmp_path / "ours", Pretrain("dense", "ours", dataset=("text",)), stage="pretrain"
    ) as target:
        write_model(sparse, target)
    assert_same_weights(load_model(Checkpoint.open(tmp_path / "ours")), model)


def test_loading_changes_the_values_and_never_the_mask(model: LlamaForCausalLM) -> None:
    sparse, other = sparse_copy(model), copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
        other.model.layers[0].mlp.up_proj.weight.view(-1)[0] = 0
    sparse.load_state_dict(other.state_dict())
    assert_same_weights(sparse, other)


def test_loading_another_mask_is_an_error_that_names_both(model: LlamaForCausalLM) -> None:
    sparse, name = sparse_copy(model), "model.layers.0.mlp.up_proj.weight"
    state = model.state_dict()
    live = int(torch.count_nonzero(state[name]))
    filled = {**state, name: torch.where(state[name] == 0, 1.0, state[name])}
    stray = state[name].numel() - live
    with pytest.raises(CheckpointError, match=f"{name} has {stray} nonzero .* lets {live} live"):
        sparse.load_state_dict(filled)
    with pytest.raises(CheckpointError, match=r"shape \[3, 48\].* \[104, 48\]"):
        sparse.load_state_dict({**state, name: torch.ones(3, 48)})
    without = {key: value for key, value in state.items() if key != name}
    with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
        sparse.load_state_dict(without)
    sparse.load_state_dict(without, strict=False)
    assert_same_weights(sparse, model)


class _Losses(TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            self.losses.append(kwargs["logs"]["loss"])
            self.norms.append(kwargs["logs"]["grad_norm"])


def text(num_rows: int) -> Rows:
    """Rows that count upwards from anywhere: something to learn."""
    generator = np.random.default_rng(0)
    return Rows(generator.integers(2, 250, (num_rows, 1), dtype=np.int32) + np.arange(32, dtype=np.int32))


def train(model: LlamaForCausalLM, directory: Path, resume: bool = False, **options: Any) -> _Losses:
    """20 steps of two micro-batches with decay and a norm that clips every step."""
    rows, losses = text(160), _Losses()
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=20,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        weight_decay=0.1,
        max_grad_norm=0.5,
        use_cpu=True,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        **{"save_strategy": "no", **options},
    )
    settings = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8}
    Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=rows.collate,
        callbacks=[MaskCallback(), losses],
        optimizer_cls_and_kwargs=(AdamW, settings),
    ).train(resume_from_checkpoint=resume)
    return losses


@pytest.mark.parametrize(
    "options", [{}, {"activation_checkpointing": True}], ids=["plain", "gradient-checkpointing"]
)
def test_training_is_that_of_masked_dense_layers(
    model: LlamaForCausalLM, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Losses within 1e-4, clipped norms within 1e-3 of themselves: float32 sums in another order."""
    sparse = sparse_copy(model)
    zeros = zeros_of(model)
    expected = train(model, tmp_path / "dense", **options)
    found = train(sparse, tmp_path / "sparse", **options)
    assert sparse.is_gradient_checkpointing == bool(options)
    assert len(found.losses) == 20 and found.losses[-1] < found.losses[0] - 0.2
    np.testing.assert_allclose(found.losses, expected.losses, atol=1e-4)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=1e-3)
    assert min(found.norms) > 0.5
    weights = sparse.state_dict()
    for name, zeros_NK in zeros.items():
        assert not weights[name][zeros_NK].any() and weights[name][~zeros_NK].all()
        torch.testing.assert_close(weights[name], model.state_dict()[name], rtol=0, atol=2e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_torchs_products_and_optimizer_train_alike(
    model: LlamaForCausalLM, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU runs, on the CPU: weights written out dense, AdamW of torch on the values."""
    monkeypatch.setattr(sparse_linear, "_is_native", lambda values: False)
    nn.Module.to(model, dtype)
    models = sparse_copy(model), model
    masks = {name: ~zeros_NK for name, zeros_NK in zeros_of(model).items()}
    losses: tuple[list[float], list[float]] = [], []
    for trained, found in zip(models, losses, strict=True):
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3, weight_decay=0.1)
        for step in range(5):
            ids_BT = torch.arange(2, 66).view(2, 32) + step
            loss = trained(ids_BT, labels=ids_BT).loss
            optimizer.zero_grad()
            loss.backward()
            for name, weight in trained.named_parameters():
                if name in masks and weight.grad is not None:
                    weight.grad *= masks[name]
            optimizer.step()
            found.append(loss.item())
    np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=tolerance)
    assert losses[0][-1] < losses[0][0] - 0.1


def test_values_decay_and_norms_do_not(model: LlamaForCausalLM, tmp_path: Path) -> None:
    sparse = sparse_copy(model)
    trainer = Trainer(sparse, TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True))
    decayed = set(trainer.get_decay_parameter_names(sparse))
    names = {name for name, _ in sparse.named_parameters()}
    assert {name for name in names if name.endswith(".values")} <= decayed
    assert {name.replace(".values", ".weight") for name in decayed} == set(
        trainer.get_decay_parameter_names(model)
    )


def test_bf16_training_follows_float32(model: LlamaForCausalLM, tmp_path: Path) -> None:
    sparse = sparse_copy(model)
    expected = train(copy.deepcopy(sparse), tmp_path / "f32")
    found = train(sparse, tmp_path / "bf16", bf16=True)
    np.testing.assert_allclose(found.losses, expected.losses, atol=0.05)


def test_trainer_checkpoints_resume_to_the_bit(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """Checkpoints hold dense weights; a run that goes on from one ends as if it had not stopped."""
    whole, half = sparse_copy(model), sparse_copy(model)
    train(whole, tmp_path / "run", save_strategy="steps", save_steps=10)
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "run/checkpoint-10")
    found, expected = zeros_of(saved), zeros_of(model)
    assert {name: int(zeros.sum()) for name, zeros in found.items()} == {
        name: int(zeros.sum()) for name, zeros in expected.items()
    }
    (tmp_path / "run/checkpoint-20").rename(tmp_path / "done")
    train(half, tmp_path / "run", resume=True, save_strategy="steps", save_steps=10)
    assert_same_weights(half, whole)


def test_gradients_and_moments_are_as_short_as_the_values() -> None:
    layer = SparseLinear(pruned(64, 96, 0.75))
    optimizer = AdamW(layer.parameters())
    layer(torch.ones(4, 96)).sum().backward()
    optimizer.step()
    state: dict[str, Tensor] = optimizer.state[layer.values]
    live = int(torch.count_nonzero(layer.dense_weight()))
    assert layer.values.grad is not None
    assert {tensor.numel() for tensor in (layer.values.grad, state["exp_avg"], state["exp_avg_sq"])} == {live}
