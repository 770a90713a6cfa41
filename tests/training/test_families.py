"""Training of decoders that are not Llamas: biases, norms of queries and keys, head widths, windows."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

from gossamer.checkpoint.resumable import Checkpoints, RunIdentity
from gossamer.job.report import quiet
from gossamer.training.distillation import SquareHead
from gossamer.training.kernel_choice import masked_linears
from gossamer.training.masks import MaskCallback, model_mask_hash
from gossamer.training.monitor import Monitor
from gossamer.training.objective import NextToken
from gossamer.training.parallel import decoder_layers
from gossamer.training.row_trainer import RowTrainer
from gossamer.training.rows import Rows, packed_rows
from gossamer.training.sparse_linear import SparseLinear, densify, sparsify

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def qwen2() -> PreTrainedModel:
    """Biases of q, k and v; embeddings that are also the head."""
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True))


def qwen3() -> PreTrainedModel:
    """Norms of queries and keys; heads of width 24, which is not 32 / 4."""
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=24, tie_word_embeddings=False))


def mistral() -> PreTrainedModel:
    """Tokens see the last 4 positions, fewer than an example has."""
    return MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4))


def mixed() -> PreTrainedModel:
    """A layer that sees all positions, and one that sees 3."""
    windows: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, **windows))


@pytest.fixture(params=[qwen2, qwen3, mistral, mixed], ids=lambda made: made.__name__)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A random model with random biases, 60% of its decoder's linear weights zero."""
    torch.manual_seed(0)
    made: Callable[[], PreTrainedModel] = request.param
    model = made().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
            if "_proj.weight" in name:
                parameter.mul_(torch.rand_like(parameter) < 0.4)
    return model


@pytest.fixture
def rows() -> Rows:
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in (5, 9, 12, 7, 3, 14):
        ids = torch.randint(2, 96, (length,), generator=generator).tolist()
        made.append((ids, [-100, -100, *ids[2:]]))
    return packed_rows(made, 16, 1, seed=0)


def ids_of(shape: tuple[int, int]) -> Tensor:
    return torch.randint(2, 96, shape, generator=torch.Generator().manual_seed(1))


def test_sparse_layers_compute_what_masked_dense_ones_do(model: PreTrainedModel) -> None:
    """Loss, and gradients of every nonzero weight, bias, norm and embedding."""
    sparse, ids_BT = copy.deepcopy(model), ids_of((2, 12))
    sparsify(sparse, masked_linears(sparse))
    layers = {name: layer for name, layer in sparse.named_modules() if isinstance(layer, SparseLinear)}
    assert len(layers) == 14
    losses = [trained(input_ids=ids_BT, labels=ids_BT).loss for trained in (sparse, model)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    for name, found in sparse.named_parameters():
        expected = model.get_parameter(name.replace(".values", ".weight")).grad
        assert found.grad is not None and expected is not None
        if name.endswith(".values"):
            expected = expected.view(-1)[layers[name.removesuffix(".values")].pattern.positions()]
        torch.testing.assert_close(found.grad, expected, rtol=1e-4, atol=1e-6, msg=name)
    densify(sparse)
    assert sparse.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in sparse.state_dict().items())


class RandomRows(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids_T = torch.randint(2, 96, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids_T, "labels": ids_T}


def arguments(output_dir: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=2,
        max_steps=3,
        learning_rate=1e-2,
        weight_decay=0.1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )


def test_zeros_stay_in_a_plain_trainer_beside_a_teacher(model: PreTrainedModel, tmp_path: Path) -> None:
    before, mask = copy.deepcopy(model.state_dict()), model_mask_hash(model)
    distillation = SquareHead(copy.deepcopy(model))
    trainer = Trainer(model, arguments(tmp_path), train_dataset=RandomRows(), callbacks=[MaskCallback()])
    distillation.attach(trainer)
    trainer.train()
    assert model_mask_hash(model) == mask
    assert not any(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert 0 < distillation.last < 1


@pytest.mark.parametrize("kernel", ["dense", "sparse"])
def test_row_trainer_has_the_models_own_loss_and_files(
    model: PreTrainedModel, rows: Rows, tmp_path: Path, kernel: Any
) -> None:
    """Cross-entropy over packed rows; the weights that it writes are a model that transformers opens."""
    trained = copy.deepcopy(model)
    if kernel == "sparse":
        sparsify(trained, masked_linears(trained))
    checkpoints, monitor = Checkpoints(tmp_path, RunIdentity({}, {})), Monitor("test", quiet, tmp_path, 0.6)
    masks = MaskCallback(trained)
    trainer = RowTrainer(
        trained, arguments(tmp_path), rows, NextToken(trained), checkpoints, monitor, masks, [], kernel
    )
    batch = rows.collate(list(range(len(rows))))
    plain = {name: batch[name] for name in ("input_ids", "labels", "position_ids")}
    torch.testing.assert_close(trainer.compute_loss(trained, batch), model(**plain, use_cache=False).loss)

    trainer._save(str(tmp_path / "saved"))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, opened.state_dict()[name]), name


def test_examples_in_one_row_do_not_see_each_other(model: PreTrainedModel, rows: Rows) -> None:
    """Each has the logits that it has alone, whatever its layers attend to."""
    batch = rows.collate(list(range(len(rows))))
    ids_BT, positions_BT = batch["input_ids"], batch["position_ids"]
    found_BTV = model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).logits
    num_examples = 0
    for ids_T, positions_T, mask_T, found_TV in zip(
        ids_BT, positions_BT, batch["token_mask"], found_BTV, strict=True
    ):
        starts = torch.nonzero((positions_T == 0) & mask_T).flatten().tolist()
        for begin, end in zip(starts, [*starts[1:], int(mask_T.sum())], strict=True):
            alone_TV = model(input_ids=ids_T[None, begin:end], use_cache=False).logits[0]
            torch.testing.assert_close(found_TV[begin:end], alone_TV, rtol=1e-4, atol=1e-5)
            num_examples += 1
    assert num_examples == 6 > len(rows)


def test_the_layers_are_the_decoders(model: PreTrainedModel) -> None:
    layers = decoder_layers(model)
    assert len(layers) == 2 and isinstance(layers[0].get_submodule("mlp.up_proj"), nn.Linear)
