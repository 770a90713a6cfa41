"""transformers' Trainer over rows of tokens: its loss, its log and its checkpoints."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from gossamer.errors import CheckpointError, ConfigError, GossamerError
from gossamer.job.processes import is_first, num_processes
from gossamer.training.adamw import AdamW
from gossamer.training.checkpoints import Checkpoints
from gossamer.training.kernel import Kernel
from gossamer.training.masks import MaskCallback
from gossamer.training.monitor import Monitor
from gossamer.training.parallel import gathered, share, wait_for_all
from gossamer.training.rows import IGNORED, Rows

WEIGHTS, OPTIMIZER, SCHEDULE = "model.safetensors", "optimizer.pt", "scheduler.pt"


class RowTrainer(Trainer):
    """Rows in their order; logits only where a label asks for them; checkpoints that are whole."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        args: TrainingArguments,
        rows: Rows,
        checkpoints: Checkpoints,
        monitor: Monitor,
        masks: MaskCallback,
        callbacks: list[TrainerCallback],
        kernel: Kernel,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows,
            data_collator=rows.collate,
            callbacks=[masks, *callbacks],
        )
        self.remove_callback(PrinterCallback)
        self.llama, self.rows, self.checkpoints, self.monitor = model, rows, checkpoints, monitor
        self.masks = masks
        self.kernel: Kernel = kernel

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        """torch's options, for our AdamW."""
        return AdamW, Trainer.get_optimizer_cls_and_kwargs(args, model)[1]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Summed cross-entropy of the labelled tokens / their number in the accumulated batch.

        That batch is the one of all processes, whose gradients are then averaged: hence times their number.
        """
        ids_BT, labels_BT = inputs["input_ids"], inputs["labels"]
        outputs = model(
            input_ids=ids_BT,
            position_ids=inputs.get("position_ids"),
            output_hidden_states=True,
            logits_to_keep=1,
            use_cache=False,
        )
        targets_BT = labels_BT[:, 1:]
        kept_BT = targets_BT != IGNORED
        hidden = outputs.hidden_states[-1][:, :-1][kept_BT]
        with self.accelerator.autocast():
            logits = self.llama.lm_head(hidden)
        loss = cross_entropy(logits.float(), targets_BT[kept_BT], reduction="sum")
        if num_items_in_batch is None:
            loss = loss / kept_BT.sum()
        else:
            loss = loss * (num_processes() / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise self._diverged(f"step {self.state.global_step + 1}: the loss is {loss.item()}")
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Looked at before the optimizer steps, so that weights stay finite."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not math.isfinite(norm):
            raise self._diverged(f"step {self.state.global_step + 1}: the gradient's norm is {float(norm)}")
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Every step's entry gets the monitor's figures, for all reporters alike."""
        if "loss" in logs:
            own_rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
            num_tokens = self.rows.num_tokens(self.state.global_step * own_rows * num_processes())
            logs |= self.monitor.figures(self.state.global_step, self.state.max_steps, num_tokens)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Once a step, by all processes together.

        Raises OSError when the disk does not take it, GossamerError unless all that the mask in
        force prunes is zero.
        """
        step = self.state.global_step
        if step in self.checkpoints.steps():
            return
        for name, count in self.masks.broken(self.llama).items():
            raise GossamerError(
                f"checkpoint-{step} was not written: {count} pruned weights of {name} are not zero; expected "
                "0: another callback writes to them; leave it out"
            )
        mask = self.masks.mask_hash()
        try:
            if is_first():
                self.checkpoints.discard_staged()
            wait_for_all()
            super()._save_checkpoint(model, trial)
            wait_for_all()
            if is_first():
                self.checkpoints.publish(step, mask, self.kernel)
        finally:
            if is_first():
                self.checkpoints.discard_staged()
        wait_for_all()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Weights and configuration, as a model directory has them: a tied head is not stored."""
        assert output_dir is not None
        sharded = any(isinstance(weight, DTensor) for weight in self.llama.parameters())
        state = gathered(self.llama.state_dict() if sharded or is_first() else {})
        if is_first():
            if self.llama.config.tie_word_embeddings:
                del state["lm_head.weight"]
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            with _writing(output_dir):
                save_file(state, Path(output_dir) / WEIGHTS, {"format": "pt"})
            self.llama.config.save_pretrained(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Whole moments, whoever holds their shards: any number of processes can resume."""
        optimizer, schedule = self._optimizer_and_schedule()
        state = optimizer.state_dict()
        state["state"] = {index: gathered(moments) for index, moments in state["state"].items()}
        if is_first():
            with _writing(output_dir):
                torch.save(state, Path(output_dir) / OPTIMIZER)
                torch.save(schedule.state_dict(), Path(output_dir) / SCHEDULE)

    def _save_rng_state(self, output_dir: str) -> None:
        with _writing(output_dir):
            super()._save_rng_state(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Raises CheckpointError unless the mask is that of the run and all that it prunes is zero."""
        folder = Path(resume_from_checkpoint)
        state = load_file(folder / WEIGHTS)
        if self.llama.config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        shards = self.llama.state_dict()
        self.llama.load_state_dict({name: share(tensor, shards[name]) for name, tensor in state.items()})
        found, expected = self.masks.mask_hash(), self.checkpoints.mask_hash(int(folder.name.split("-")[1]))
        if found != expected:
            raise CheckpointError(
                f"{folder}: its mask has sha256 {expected[:12]}, the run's has {found[:12]}; expected the "
                "same: --overwrite starts anew"
            )
        for name, count in self.masks.broken(self.llama).items():
            raise CheckpointError(
                f"{folder}: {count} pruned weights of {name} are not zero; expected 0: the file was changed; "
                "--overwrite starts anew"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        optimizer, schedule = self._optimizer_and_schedule()
        state = torch.load(Path(checkpoint) / OPTIMIZER, map_location="cpu", weights_only=True)
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        for index, moments in state["state"].items():
            for name, value in moments.items():
                moments[name] = share(value, weights[index])
        optimizer.load_state_dict(state)
        schedule.load_state_dict(torch.load(Path(checkpoint) / SCHEDULE, weights_only=True))

    def _optimizer_and_schedule(self) -> tuple[Optimizer, LRScheduler]:
        assert isinstance(self.optimizer, Optimizer) and isinstance(self.lr_scheduler, LRScheduler)
        return self.optimizer, self.lr_scheduler

    def _diverged(self, found: str) -> GossamerError:
        steps = self.checkpoints.steps()
        last_good = (
            f"; {self.checkpoints.path(steps[-1])} is the last checkpoint before that, a model that another "
            "run can begin from; --overwrite replaces this run"
            if steps
            else ""
        )
        return ConfigError(
            f"{found}; expected a finite number: lower --learning-rate (it is {self.args.learning_rate:g}) "
            f"or look at the model's weights{last_good}"
        )


@contextlib.contextmanager
def _writing(folder: str) -> Iterator[None]:
    """Only around writes, whose failures (a full disk) are RuntimeErrors in torch: raises OSError instead."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        raise OSError(
            f"{Path(folder).name} could not be saved ({error}); mend that, then --resume"
        ) from error


class SaveEvery(TrainerCallback):
    """Asks for a checkpoint every `num_steps` and after the last one (0: never).

    The Trainer's own `save_steps` refuses models that are sharded already.
    """

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if self.num_steps and (step % self.num_steps == 0 or step == state.max_steps):
            control.should_save = True
