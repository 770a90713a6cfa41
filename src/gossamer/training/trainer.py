"""The Hugging Face Trainer, fed with rows of tokens, under fixed masks and beside a teacher."""

import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from gossamer.errors import ConfigError
from gossamer.report import Event, Progress
from gossamer.training.adamw import AdamW
from gossamer.training.distillation import SquareHead
from gossamer.training.kernel import KernelChoice
from gossamer.training.masks import MaskCallback
from gossamer.training.memory import HeldBytes
from gossamer.training.options import TrainingOptions
from gossamer.training.parallel import distribute, num_processes, share_of_rows
from gossamer.training.preparation import prepare
from gossamer.training.rows import IGNORED, Rows
from gossamer.training.sparse_linear import densify

MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}
EAGER_ROW_LENGTH = 512


@dataclass(frozen=True)
class TrainingResult:
    """What a training stage returns. `losses`: one per optimizer step, the teacher's part included."""

    output_dir: str
    sparsity: float
    num_tokens: int
    num_steps: int
    loss_first: float
    loss_last: float
    tokens_per_s: float
    seconds: float
    losses: tuple[float, ...]


@dataclass(frozen=True)
class History:
    """What happened: the loss of every optimizer step, and how fast it went."""

    losses: tuple[float, ...]
    num_tokens: int
    seconds: float
    precision: str
    num_threads: int
    kernel: KernelChoice
    optimizer_gradient_bytes: int

    def metrics(self) -> dict[str, Any]:
        """For `gossamer.json`: first and last loss are means over a twentieth of the steps (at least one)."""
        count = max(1, len(self.losses) // 20)
        return {
            "num_steps": len(self.losses),
            "num_tokens": self.num_tokens,
            "tokens_per_s": round(self.num_tokens / self.seconds, 1),
            "seconds": round(self.seconds, 1),
            "loss_first": round(sum(self.losses[:count]) / count, 4),
            "loss_last": round(sum(self.losses[-count:]) / count, 4),
            "precision": self.precision,
            **self.kernel.metrics(),
            "optimizer_gradient_bytes": self.optimizer_gradient_bytes,
        }

    def result(self, output_dir: str, sparsity: float) -> TrainingResult:
        """The stage's result, for its caller."""
        names = {field.name for field in fields(TrainingResult)}
        figures = {name: value for name, value in self.metrics().items() if name in names}
        return TrainingResult(output_dir, sparsity, losses=self.losses, **figures)


def train(
    stage: str,
    job: TrainingOptions,
    model: LlamaForCausalLM,
    rows: Rows,
    progress: Progress,
    teacher: LlamaForCausalLM | None = None,
) -> History:
    """Train `model` in place, on the GPU if there is one; its zeros stay zeros.

    Raises ConfigError when the loss is not finite, UnsupportedError on several GPUs in one process.
    """
    distribute(model, job.parallel)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = choose_precision(job.precision, device)
    for llama in (model, teacher):
        if llama is not None:
            eager = device == "cpu" and precision == "bf16" and rows.input_ids_ST.shape[1] <= EAGER_ROW_LENGTH
            llama.set_attn_implementation("eager" if eager else "sdpa")
    monitor, held = _Monitor(stage, progress), HeldBytes()
    with tempfile.TemporaryDirectory(prefix="gossamer-") as scratch:
        arguments = _arguments(rows, job, device, precision, scratch)
        micro_batch = arguments.per_device_train_batch_size, rows.input_ids_ST.shape[1]
        choice = prepare(stage, job, model, teacher, micro_batch, device, precision, progress)
        shared = rows.padded(num_processes() * arguments.per_device_train_batch_size)
        trainer = _RowTrainer(model, arguments, shared, callbacks=[MaskCallback(model), monitor, held])
        trainer.remove_callback(PrinterCallback)
        if teacher is not None:
            nn.Module.to(teacher, torch.bfloat16 if precision == "bf16" else torch.float32)
            SquareHead(teacher).attach(trainer)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    if job.parallel == "ddp":
        nn.Module.to(model, "cpu")
    densify(model.eval())
    num_tokens = rows.input_ids_ST.size if rows.lengths_S is None else int(rows.lengths_S.sum())
    return History(
        tuple(monitor.losses), num_tokens, seconds, precision, torch.get_num_threads(), choice, held.num_bytes
    )


def choose_precision(wanted: Literal["auto", "f32", "bf16"], device: str) -> Literal["f32", "bf16"]:
    """`auto`: bf16 matrix products where the hardware has them (1.5 to 2 times faster), float32 elsewhere."""
    if wanted != "auto":
        return wanted
    fast = torch.cuda.is_bf16_supported() if device == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "f32"


def _arguments(
    rows: Rows, job: TrainingOptions, device: str, precision: str, scratch: str
) -> TrainingArguments:
    batch_rows = max(1, job.batch_tokens // rows.input_ids_ST.shape[1])
    own_rows = share_of_rows(batch_rows, rows.input_ids_ST.shape[1])
    micro_rows = _micro_rows(own_rows, rows.input_ids_ST.shape[1], MICRO_BATCH_TOKENS[device])
    num_steps = math.ceil(len(rows) / batch_rows)
    return TrainingArguments(
        output_dir=scratch,
        num_train_epochs=1,
        per_device_train_batch_size=micro_rows,
        gradient_accumulation_steps=own_rows // micro_rows,
        learning_rate=job.learning_rate,
        lr_scheduler_type=job.lr_schedule,
        warmup_steps=round(job.warmup_ratio * num_steps),
        weight_decay=job.weight_decay,
        max_grad_norm=job.max_grad_norm,
        adam_beta2=0.95,
        optim="adamw_torch_fused",
        bf16=precision == "bf16",
        use_cpu=device == "cpu",
        seed=job.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        train_sampling_strategy="sequential",
        dataloader_pin_memory=device == "cuda",
        ddp_find_unused_parameters=False,
    )


def _micro_rows(batch_rows: int, row_length: int, limit_tokens: int) -> int:
    """The largest divisor of `batch_rows` whose rows hold at most `limit_tokens` (at least one row)."""
    fitting = [n for n in range(1, batch_rows + 1) if batch_rows % n == 0 and n * row_length <= limit_tokens]
    return max(fitting, default=1)


class _RowTrainer(Trainer):
    """Rows in their order; logits only where a label asks for them."""

    def __init__(
        self, model: LlamaForCausalLM, args: TrainingArguments, rows: Rows, callbacks: list[TrainerCallback]
    ) -> None:
        super().__init__(
            model=model, args=args, train_dataset=rows, data_collator=rows.collate, callbacks=callbacks
        )
        self.llama = model

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
            raise ConfigError(
                f"step {self.state.global_step + 1}: the loss is {loss.item()}; expected a finite number: "
                f"lower --learning-rate (it is {self.args.learning_rate:g}) or look at the model's weights"
            )
        return loss


class _Monitor(TrainerCallback):
    """Collects the losses and passes progress on."""

    def __init__(self, stage: str, progress: Progress) -> None:
        self.stage, self.progress = stage, progress
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs: Mapping[str, Any] = kwargs["logs"]
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))
            metrics = {name: logs[name] for name in ("loss", "grad_norm", "learning_rate") if name in logs}
            self.progress(Event(self.stage, "training", state.global_step, state.max_steps, metrics))
