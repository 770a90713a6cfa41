"""A dense teacher beside any transformers `Trainer`: `SquareHead(teacher).attach(trainer)`."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel, Trainer

from gossamer.checkpoint import Checkpoint
from gossamer.compress.squarehead import squarehead_loss
from gossamer.decoder import load_model
from gossamer.errors import ConfigError


class SquareHead:
    """Adds `weight` x the SquareHead loss to whatever loss a trainer computes.

        trainer = SFTTrainer(model, args, ..., callbacks=[MaskCallback()])
        SquareHead(teacher).attach(trainer)
        trainer.train()

    The teacher sees the very inputs that the student's decoder saw, in its own dtype. Tokens count where the
    batch's `token_mask` or 2-d `attention_mask` is nonzero, all of them where there is neither.
    `last` is the latest value.
    """

    def __init__(self, teacher: PreTrainedModel, weight: float = 1.0) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.weight = weight
        self.last = float("nan")
        self._seen: dict[str, Any] = {}

    def attach(self, trainer: Trainer) -> None:
        """Wrap `trainer.compute_loss`; the trainer's model must pair up with the teacher's layers."""
        model = trainer.model
        assert isinstance(model, PreTrainedModel)
        nn.Module.to(self.teacher, trainer.args.device)
        decoder: nn.Module = model.base_model
        compute_loss = trainer.compute_loss

        def with_squarehead(
            model: nn.Module,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Tensor | int | None = None,
        ) -> Any:
            mask_BT = _token_mask(inputs)
            with self._watching(decoder):
                result = compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss, outputs = result if isinstance(result, tuple) else (result, None)
            if torch.is_grad_enabled() and (mask_BT is None or mask_BT.any()):
                # A loss / num_items_in_batch is already spread over the accumulated batches; ours is a mean.
                steps = 1 if num_items_in_batch is None else trainer.current_gradient_accumulation_steps
                loss = loss + self._loss(mask_BT) * (self.weight / steps)
            self._seen = {}
            return (loss, outputs) if return_outputs else loss

        trainer.compute_loss = with_squarehead

    @contextmanager
    def _watching(self, decoder: nn.Module) -> Iterator[None]:
        """Note the decoder's inputs and hidden states while the student computes its loss."""
        before = decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True)
        after = decoder.register_forward_hook(self._after_decoder)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _loss(self, mask_BT: Tensor | None) -> Tensor:
        with torch.no_grad():
            outputs = self.teacher.base_model(
                **self._seen["inputs"], output_hidden_states=True, use_cache=False
            )
        loss = squarehead_loss(self._seen["hidden"][1:], outputs.hidden_states[1:], mask_BT)
        self.last = loss.item()
        return loss

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert not args, "decoders are called with keywords"
        names = ("input_ids", "attention_mask", "position_ids")
        self._seen = {"inputs": {name: kwargs.get(name) for name in names}}
        return args, {**kwargs, "output_hidden_states": True}

    def _after_decoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._seen["hidden"] = output.hidden_states


def load_teacher(path: str | Path, student: Checkpoint) -> LlamaForCausalLM:
    """The model at `path`; raises ConfigError unless its layers, width and tokenizer are the student's."""
    teacher = Checkpoint.open(path)
    for field in ("num_layers", "hidden_size", "vocab_size"):
        theirs, ours = getattr(teacher.architecture, field), getattr(student.architecture, field)
        if theirs != ours:
            raise ConfigError(
                f"--teacher {path} has {field} {theirs}, the model {student.path} has {ours}; they must "
                "be equal: the teacher is the dense model that the student was pruned from"
            )
    digests = [_tokenizer_digest(checkpoint.path) for checkpoint in (teacher, student)]
    if digests[0] != digests[1]:
        raise ConfigError(
            f"--teacher {path} has another tokenizer (tokenizer.json sha256 {digests[0]}) than the model "
            f"{student.path} ({digests[1]}); expected the same file in both"
        )
    return load_model(teacher)


def _tokenizer_digest(path: Path) -> str:
    file = path / "tokenizer.json"
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12] if file.exists() else "none"


def _token_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    mask = inputs.get("token_mask", inputs.get("attention_mask"))
    return mask if mask is not None and mask.ndim == 2 else None
