"""transformers' Trainer for rows of tokens, with a loss, a log and checkpoints of our own.

Every method of the Trainer that is overridden here is in `trainer_contract.SIGNATURES`.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from gossamer.checkpoint.directory import copy_companions
from gossamer.checkpoint.resumable import Checkpoints
from gossamer.errors import CheckpointError, ConfigError, GossamerError
from gossamer.job.processes import is_first, num_processes
from gossamer.modules.unfused import join, part
from gossamer.training.adamw import AdamW
from gossamer.training.distillation import Distillation
from gossamer.training.kernel_choice import TrainingKernel
from gossamer.training.lora import adapters
from gossamer.training.masks import MaskCallback
from gossamer.training.monitor import Monitor
from gossamer.training.objective import Objective, num_labels
from gossamer.training.parallel import gather_to_first, shard_like, wait_for_all
from gossamer.training.rows import Rows

WEIGHTS, ADAPTERS = "model.safetensors", "adapters.safetensors"
OPTIMIZER, SCHEDULE = "optimizer.pt", "scheduler.pt"


class RowTrainer(Trainer):
    """Trains on rows in their given order, and writes checkpoints that are complete or not there."""

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        rows: Rows,
        objective: Objective,
        checkpoints: Checkpoints,
        monitor: Monitor,
        masks: MaskCallback,
        callbacks: list[TrainerCallback],
        kernel: TrainingKernel,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows,
            data_collator=lambda indices: objective.batch(rows, indices),
            callbacks=[masks, *callbacks],
        )
        self.remove_callback(PrinterCallback)
        self.whole_model, self.rows, self.checkpoints = model, rows, checkpoints
        self.masks, self.monitor = masks, monitor
        self.objective: Objective = objective
        self.kernel: TrainingKernel = kernel
        self.distillation: Distillation | None = None
        self.rate: Callable[[int], float] | None = None  # a step's share of the highest learning rate
        self._parts = torch.zeros(2, device=args.device)  # of the step's loss so far, in this process

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        """Our AdamW, with the options that the Trainer would give to torch's."""
        return AdamW, Trainer.get_optimizer_cls_and_kwargs(args, model)[1]

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """By `rate`, or transformers' own where there is none."""
        if self.rate is not None and self.lr_scheduler is None:
            given = optimizer or self.optimizer
            assert isinstance(given, Optimizer)
            self.lr_scheduler = LambdaLR(given, self.rate)
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The sum of the labels' losses, divided by the number of them in the whole batch.

        The whole batch is what all processes accumulate for one optimizer step. Their gradients are averaged
        afterwards, so the loss is multiplied by the number of processes.
        """
        learned = self.distillation
        with self.accelerator.autocast():
            loss, own, outputs = self.objective.loss(model, inputs, learned)
        if num_items_in_batch is None:
            loss = loss / num_labels(inputs)
        else:
            scale = num_processes() / num_items_in_batch
            weight = 1.0 if learned is None else learned.own_weight
            self._parts += torch.stack([own, loss.detach() - weight * own]) * scale
            loss = loss * scale
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
        """Raise ConfigError for a norm that is not finite, before the optimizer can spoil the weights."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not math.isfinite(norm):
            raise self._diverged(f"step {self.state.global_step + 1}: the gradient's norm is {float(norm)}")
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the monitor's figures to the entry of every step, so that all reporters show the same."""
        if "loss" in logs:
            own_rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
            num_tokens = self.rows.num_tokens(self.state.global_step * own_rows * num_processes())
            logs |= self._parts_of(logs["loss"]) | self.monitor.figures(
                self.state.global_step, self.state.max_steps, num_tokens
            )
        super().log(logs, start_time)

    def _parts_of(self, loss: float) -> dict[str, float]:
        """Of a step's loss what the labels ask for and what the teacher's is; nothing without a teacher."""
        gathered = self.accelerator.gather(self._parts[None])
        assert isinstance(gathered, Tensor)
        own, at_the_head = gathered.mean(0).tolist()
        self._parts.zero_()
        if self.distillation is None:
            return {}
        rest = loss - self.distillation.own_weight * own - at_the_head
        parts = {self.objective.own: own, self.objective.at_the_head: at_the_head, "squarehead": rest}
        return {name: parts[name] for name in self.distillation.parts}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint of this step, unless there is one; all processes take part.

        Raises OSError if it cannot be written, GossamerError if a weight that the masks prune is not zero.
        """
        step = self.state.global_step
        if step in self.checkpoints.steps():
            return
        for name, count in self.masks.broken(self.whole_model).items():
            raise GossamerError(
                f"checkpoint-{step} was not written: {count} pruned weights of {name} are not zero; expected "
                "0: another callback writes to them; leave it out"
            )
        mask = self.masks.enforced_mask_hash()
        try:
            if is_first():
                self.checkpoints.discard_staged()
            wait_for_all()
            super()._save_checkpoint(model, trial)
            wait_for_all()
            if is_first():
                copy_companions(self.checkpoints.run_dir, self.checkpoints.staged(step))
                micro_rows = self.args.per_device_train_batch_size
                began_with = {"kernel": self.kernel, "micro_rows": micro_rows}
                self.checkpoints.publish(step, {"mask": mask, **began_with})
        finally:
            if is_first():
                self.checkpoints.discard_staged()
        wait_for_all()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write weights and configuration as a model directory has them: a tied weight is stored once.

        Of a model with adapters they alone are written: its weights are the parent's.
        """
        assert output_dir is not None
        if trained := adapters(self.whole_model):
            if is_first():
                Path(output_dir).mkdir(parents=True, exist_ok=True)
                with _writing(output_dir):
                    save_file(
                        {name: part.detach() for name, part in trained.items()}, Path(output_dir) / ADAPTERS
                    )
            return
        sharded = any(isinstance(weight, DTensor) for weight in self.whole_model.parameters())
        state = gather_to_first(self.whole_model.state_dict() if sharded or is_first() else {})
        if is_first():
            for name in _tied_weights(self.whole_model):
                del state[name]
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            with _writing(output_dir):
                save_file(join(self.whole_model, state), Path(output_dir) / WEIGHTS, {"format": "pt"})
            self.whole_model.config.save_pretrained(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write the moments gathered from all processes, so that another number of them can resume."""
        optimizer, schedule = self._optimizer_and_schedule()
        state = optimizer.state_dict()
        state["state"] = {index: gather_to_first(moments) for index, moments in state["state"].items()}
        if is_first():
            with _writing(output_dir):
                torch.save(state, Path(output_dir) / OPTIMIZER)
                torch.save(schedule.state_dict(), Path(output_dir) / SCHEDULE)

    def _save_rng_state(self, output_dir: str) -> None:
        with _writing(output_dir):
            super()._save_rng_state(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights; raises CheckpointError if the masks are not the run's or one does not hold."""
        folder, model = Path(resume_from_checkpoint), self.whole_model
        if adapters(model):
            model.load_state_dict(load_file(folder / ADAPTERS), strict=False)
        else:
            self._load_weights(folder)
        self.masks.take_up(model)
        found, expected = (
            self.masks.enforced_mask_hash(),
            self.checkpoints.recorded(int(folder.name.split("-")[1]))["mask"],
        )
        if found != expected:
            raise CheckpointError(
                f"{folder}: its mask has sha256 {expected[:12]}, the run's has {found[:12]}; expected the "
                "same: --overwrite starts anew"
            )
        for name, count in self.masks.broken(model).items():
            raise CheckpointError(
                f"{folder}: {count} pruned weights of {name} are not zero; expected 0: the file was changed; "
                "--overwrite starts anew"
            )

    def _load_weights(self, folder: Path) -> None:
        model = self.whole_model
        state = part(model, load_file(folder / WEIGHTS))
        for name, stored in _tied_weights(model).items():
            state[name] = state[stored]
        shards = model.state_dict()
        model.load_state_dict({name: shard_like(tensor, shards[name]) for name, tensor in state.items()})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        optimizer, schedule = self._optimizer_and_schedule()
        state = torch.load(Path(checkpoint) / OPTIMIZER, map_location="cpu", weights_only=True)
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        for index, moments in state["state"].items():
            for name, value in moments.items():
                moments[name] = shard_like(value, weights[index])
        optimizer.load_state_dict(state)
        schedule.load_state_dict(torch.load(Path(checkpoint) / SCHEDULE, weights_only=True))

    def _optimizer_and_schedule(self) -> tuple[Optimizer, LRScheduler]:
        assert isinstance(self.optimizer, Optimizer) and isinstance(self.lr_scheduler, LRScheduler)
        return self.optimizer, self.lr_scheduler

    def _diverged(self, found: str) -> GossamerError:
        steps = self.checkpoints.steps()
        model = "" if adapters(self.whole_model) else ", a model that another run can begin from"
        last_good = (
            f"; {self.checkpoints.path(steps[-1])} is the last checkpoint before that{model}; --overwrite "
            "replaces this run"
            if steps
            else ""
        )
        return ConfigError(
            f"{found}; expected a finite number: lower --learning-rate (it is {self.args.learning_rate:g}) "
            f"or look at the model's weights{last_good}"
        )


def _tied_weights(model: nn.Module) -> dict[str, str]:
    """name -> the first name of the same parameter, for each parameter that the model has by two names."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in named if name != first[id(parameter)]}


@contextlib.contextmanager
def _writing(folder: str) -> Iterator[None]:
    """Turn the RuntimeErrors by which torch reports failed writes (a full disk) into OSErrors.

    Only writes belong into this block: other RuntimeErrors must not be taken for the disk's.
    """
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        raise OSError(
            f"{Path(folder).name} could not be saved ({error}); mend that, then --resume"
        ) from error


class SaveEvery(TrainerCallback):
    """Asks for a checkpoint every `num_steps` steps and after the last one (0: never).

    The Trainer's own `save_steps` cannot be used: it refuses models that are already sharded.
    """

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if self.num_steps and (step % self.num_steps == 0 or step == state.max_steps):
            control.should_save = True
