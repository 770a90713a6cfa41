"""Distillation from a dense teacher in any transformers `Trainer`: `SquareHead(teacher).attach(trainer)`.

`RowTrainer` may learn of the teacher's logits as well, or only of them (`Distillation`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from gossamer.compress.squarehead import squarehead_loss
from gossamer.errors import UnsupportedError
from gossamer.training.compiled import fused
from gossamer.training.head_loss import HeadTeacher
from gossamer.training.teacher import LiveTeacher, TeacherStates


class SquareHead:
    """Adds `weight` times the SquareHead loss to whatever loss a trainer computes.

        trainer = SFTTrainer(model, args, ..., callbacks=[MaskCallback()])
        SquareHead(teacher).attach(trainer)
        trainer.train()

    The teacher is given the inputs that the student's decoder was given, and computes in its own dtype; or it
    is what was written down of it (`CachedTeacher`). The loss is over the tokens at which the batch's
    `token_mask`, or else its 2-d `attention_mask`, is nonzero, and over all tokens if the batch has neither.
    A micro-batch is weighted by its share of the tokens that all processes accumulate for an optimizer step.
    Where the teacher has states of some layers only, their mean counts for every layer: the size of the loss
    does not depend on how many there are.
    `last` is the latest value of the loss.
    With a `weight` of 0 the teacher only watches, for what is learned of it at the head.
    """

    def __init__(self, teacher: PreTrainedModel | TeacherStates, weight: float = 1.0) -> None:
        self.teacher = LiveTeacher(teacher) if isinstance(teacher, PreTrainedModel) else teacher
        self.weight = weight
        self.last = float("nan")
        self._seen: dict[str, Any] = {}
        self._step_tokens = 0

    def attach(self, trainer: Trainer) -> None:
        """Wrap `trainer.compute_loss`, so that it adds the teacher's loss.

        Raises ConfigError unless the trainer's model has as many layers and the same hidden size as the
        teacher, UnsupportedError if it is not a model of transformers. While training, raises
        UnsupportedError for a model that calls its decoder otherwise than by `input_ids=...` or hides its
        hidden states.
        """
        model = trainer.model
        if not isinstance(model, PreTrainedModel):
            raise UnsupportedError(
                f"SquareHead: found a {type(model).__name__}; expected a transformers PreTrainedModel: give "
                "the Trainer the model itself, without a wrapper (merge adapters into it first)"
            )
        self.teacher.prepare(model, trainer.args.device)
        decoder: nn.Module = model.base_model
        self._count_tokens(trainer)
        compute_loss = trainer.compute_loss

        def with_squarehead(
            model: nn.Module,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Tensor | int | None = None,
        ) -> Any:
            mask_BT, num_tokens = _token_mask(inputs), _num_tokens(inputs)
            self._seen = {"batch": inputs}
            with self._watching(decoder):
                result = compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss, outputs = result if isinstance(result, tuple) else (result, None)
            if torch.is_grad_enabled() and num_tokens and self.weight:
                # Gradients are averaged over processes and, without num_items_in_batch, over micro-batches.
                steps = trainer.current_gradient_accumulation_steps if num_items_in_batch is None else 1
                share = num_tokens * steps * trainer.args.world_size / self._step_tokens
                loss = loss + self._loss(mask_BT) * (self.weight * share)
            self._seen = {}
            self.teacher.forget()
            return (loss, outputs) if return_outputs else loss

        trainer.compute_loss = with_squarehead

    def _count_tokens(self, trainer: Trainer) -> None:
        """Wrap `trainer.get_batch_samples`, to count the tokens of a step before its first micro-batch."""
        get_batch_samples = trainer.get_batch_samples

        def with_token_count(epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
            batches, num_items_in_batch = get_batch_samples(epoch_iterator, num_batches, device)
            own = torch.tensor(sum(map(_num_tokens, batches)), device=device)
            gathered = trainer.accelerator.gather(own)
            assert isinstance(gathered, Tensor)
            self._step_tokens = int(gathered.sum())
            return batches, num_items_in_batch

        trainer.get_batch_samples = with_token_count

    @contextmanager
    def _watching(self, decoder: nn.Module) -> Iterator[None]:
        """Record the decoder's inputs and hidden states while the student computes its loss."""
        before = decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True)
        after = decoder.register_forward_hook(self._after_decoder)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _loss(self, mask_BT: Tensor | None) -> Tensor:
        ours = [self._seen["hidden"][layer] for layer in self.teacher.layers]
        scale = (len(self._seen["hidden"]) - 1) / len(ours)  # the first is the embeddings
        of_layers = fused(squarehead_loss, ours[0].device.type)
        loss = of_layers(ours, self.teacher.states(), mask_BT) * scale
        self.last = loss.item()
        return loss

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) == 1 and hasattr(module, "embeddings"):  # an encoder's tokens come by position
            args, kwargs = (), {**kwargs, "input_ids": args[0]}
        if args or kwargs.get("input_ids") is None:
            raise UnsupportedError(
                f"SquareHead: the student calls its {type(module).__name__} with {len(args)} positional "
                f"arguments and the keywords {', '.join(kwargs)}; expected keywords alone, with input_ids"
            )
        names = ("input_ids", "attention_mask", "position_ids")
        inputs = {name: kwargs.get(name) for name in names}
        if kwargs.get("token_type_ids") is not None:
            inputs["token_type_ids"] = kwargs["token_type_ids"]
        self.teacher.read(self._seen["batch"], inputs)
        return args, {**kwargs, "output_hidden_states": True}

    def _after_decoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = getattr(output, "hidden_states", None)
        if hidden is None:
            raise UnsupportedError(
                f"SquareHead: the student's {type(module).__name__} returned no hidden_states though asked "
                "to; expected those of every layer: leave the teacher out for this model"
            )
        self._seen["hidden"] = hidden


@dataclass(frozen=True)
class Distillation:
    """What a run learns of its teacher: `parts` are those of the loss, what the labels ask for among them.

    That has a weight; the teacher's parts have none.
    """

    teacher: TeacherStates
    parts: tuple[str, ...]
    temperature: float
    own_weight: float

    def at_the_head(self, kept_BT: Tensor, means_of: Tensor | None = None) -> HeadTeacher | None:
        """What it makes of the kept tokens [B, T], or of their texts' means, if that is learned."""
        if "kl" not in self.parts:
            return None
        return self.teacher.at_the_head(kept_BT, self.temperature, means_of)


def _token_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    mask = inputs.get("token_mask", inputs.get("attention_mask"))
    return mask if mask is not None and mask.ndim == 2 else None


def _num_tokens(inputs: Mapping[str, Any]) -> int:
    """How many tokens of a micro-batch are not padding."""
    if "input_ids" not in inputs:
        raise UnsupportedError(
            f"SquareHead: found a batch of {', '.join(inputs)}; expected input_ids too: the teacher is "
            "given the tokens that the student is given"
        )
    mask_BT = _token_mask(inputs)
    return inputs["input_ids"].numel() if mask_BT is None else int(mask_BT.count_nonzero())
