"""The options of every verb that trains."""

import math
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Literal

from gossamer.errors import ConfigError, UnsupportedError
from gossamer.job.options import ThreadOptions, option, record
from gossamer.job.processes import num_processes
from gossamer.job.threads import use_threads
from gossamer.training.device import check_device
from gossamer.training.gradual import CubicSchedule
from gossamer.training.monitor import check_reporter

CACHE_TOP_K = 128


@dataclass(frozen=True)
class TrainingOptions(ThreadOptions):
    """The options that `Pretrain` and `Finetune` share; all but model and output are given by keyword."""

    model: str = option(help="directory, or org/name[@revision] of the hub", positional=True)
    output_dir: str = option(help="directory to write", short="-o")
    _: KW_ONLY
    teacher: str | None = option(
        None, help="a dense model like MODEL, tuned on the same task if this is fine-tuning"
    )
    distill: Literal["squarehead", "kl", "both", "none"] = option(
        "squarehead",
        help="what is learned of the teacher: its hidden states after each layer (squarehead), what it "
        "expects next (kl), or both",
    )
    distill_temperature: float = option(1.0, help="by which logits are divided before kl compares them")
    cross_entropy_weight: float = option(
        1.0,
        help="of the text's own tokens in the loss, beside what is learned of the teacher (0: that alone)",
    )
    teacher_cache: str | None = option(
        None,
        help="a folder for what the teacher makes of this run's tokens: it is asked once, and is not in "
        "memory while the model is trained",
    )
    cache_layers: int | None = option(
        None,
        help="layers whose hidden states go there, evenly spread (default: as many as 5 kB a token hold, but "
        "at least 4)",
    )
    cache_top_k: int = option(CACHE_TOP_K, help="likeliest tokens whose probabilities go there")
    teacher_device: str | None = option(
        None, help="where the teacher computes: cpu, cuda:1, ... (default: where the model is trained)"
    )
    max_length: int = option(1024, help="tokens a row; the model's context where that is shorter")
    batch_tokens: int = option(16_384, help="tokens an optimizer step, prompts included")
    learning_rate: float = option(3e-4, help="highest learning rate; it falls to 0")
    warmup_ratio: float = option(0.02, help="share of the steps in which the learning rate rises")
    lr_schedule: Literal["linear", "cosine"] = option("linear", help="how the learning rate falls")
    lr_cycles: int = option(
        1, help="times that it falls, in equal parts of the steps: gradual pruning recovers in each"
    )
    weight_decay: float = option(0.1, help="AdamW's decay of matrices (norms have none)")
    max_grad_norm: float = option(1.0, help="gradients of a larger norm are scaled down to it (0: none are)")
    precision: Literal["auto", "f32", "bf16"] = option(
        "auto", help="of matrix products; weights are always trained in float32"
    )
    parallel: Literal["ddp", "fsdp"] = option(
        "ddp", help="under torchrun: each process holds the whole model (ddp) or its share of it (fsdp)"
    )
    kernel: Literal["auto", "dense", "sparse"] = option(
        "auto",
        help="products of all weights or of the nonzero ones; auto: measures both and takes the faster",
    )
    activation_checkpointing: bool = option(
        False,
        help="keep of each layer only what goes in, and compute the rest again in the backward pass: less "
        "memory for longer rows and larger steps, a quarter more time",
    )
    lora: int | None = option(
        None,
        help="train nothing but adapters of this rank in the decoder's linears, which takes less memory; it "
        "wants a learning rate about ten times as high",
    )
    prune_schedule: str | None = option(
        None,
        help="make more weights zero on the way, cubic:[START-]END[:BEGIN-LAST[:EVERY]]: shares of zeros; "
        "between which fractions of the steps they rise (0-0.5); every how many steps (10)",
    )
    pattern: str | None = option(
        None,
        help="of the zeros that --prune-schedule makes: unstructured, or 1xM such as 1x4, blocks of M "
        "weights (default: blocks where the model's zeros are in blocks)",
    )
    freeze: Literal["nothing", "embeddings"] = option(
        "nothing", help="weights that stay as they are: those that tokens and positions are looked up in"
    )
    skip_bad_rows: int = option(0, help="rows that cannot be used and are left out; one more is an error")
    seed: int = option(0, help="order of the data")
    save_steps: int = option(100, help="optimizer steps between two checkpoints; 0: save only on Ctrl-C")
    resume: bool = option(False, help="go on with the interrupted run in OUTPUT_DIR.partial")
    report_to: str = option(
        "tensorboard", help="none, tensorboard (in the output directory), wandb or another of transformers'"
    )
    overwrite: bool = option(False, help="replace the output directory")
    offline: bool = option(False, help="never touch the network")

    def batch_rows(self, row_length: int) -> int:
        """The rows of an optimizer step, of all processes."""
        return max(1, self.batch_tokens // row_length)


def inherited(parent: type, name: str, default: Any) -> Any:
    """The option `name` of the dataclass `parent`, with another default."""
    [field] = [field for field in fields(parent) if field.name == name]
    return option(default, **field.metadata)


WITHOUT_EFFECT = {
    "output_dir",
    "overwrite",
    "resume",
    "save_steps",
    "report_to",
    "offline",
    "parallel",
    "threads",
    "activation_checkpointing",
    "teacher_device",
}
PATHS = {"model", "dataset", "teacher", "teacher_cache"}


def check_options(job: TrainingOptions) -> None:
    """Raise ConfigError for a number that means nothing; take the threads that are asked for."""
    if job.max_length < 2 or job.batch_tokens < 1:
        raise ConfigError(
            f"--max-length {job.max_length}, --batch-tokens {job.batch_tokens}: expected at least 2 and 1"
        )
    if not (job.learning_rate > 0 and math.isfinite(job.learning_rate)) or not 0 <= job.warmup_ratio < 1:
        raise ConfigError(
            f"--learning-rate {job.learning_rate:g}, --warmup-ratio {job.warmup_ratio:g}: "
            "expected a rate above 0 and a ratio in [0, 1)"
        )
    if job.lr_cycles < 1:
        raise ConfigError(f"--lr-cycles {job.lr_cycles}: expected at least 1")
    if not (0 <= job.weight_decay < math.inf and 0 <= job.max_grad_norm < math.inf):
        raise ConfigError(
            f"--weight-decay {job.weight_decay:g}, --max-grad-norm {job.max_grad_norm:g}: expected numbers "
            "from 0 on; 0 is no decay, and gradients of any norm"
        )
    if not 0 <= job.seed < 1 << 32:
        raise ConfigError(
            f"--seed is {job.seed}; expected a number from 0 to {(1 << 32) - 1}, as NumPy's are"
        )
    if not 0 < job.distill_temperature < math.inf:
        raise ConfigError(f"--distill-temperature is {job.distill_temperature:g}; expected a number above 0")
    if not 0 <= job.cross_entropy_weight < math.inf:
        raise ConfigError(
            f"--cross-entropy-weight is {job.cross_entropy_weight:g}; expected a number from 0 on"
        )
    if job.cross_entropy_weight != 1 and job.teacher is None:
        raise ConfigError(
            f"--cross-entropy-weight {job.cross_entropy_weight:g} is beside what is learned of a teacher; "
            "expected --teacher DIR, the dense model, with it"
        )
    if job.distill_temperature != 1 and job.distill not in ("kl", "both"):
        raise ConfigError(
            f"--distill-temperature {job.distill_temperature:g} has no part in --distill {job.distill}; "
            "expected --distill kl or both with it"
        )
    if job.distill == "none" and job.teacher is not None:
        raise ConfigError(f"--teacher {job.teacher} has no part in --distill none; leave one of them out")
    if job.teacher_cache is not None and job.teacher is None:
        raise ConfigError(f"--teacher-cache {job.teacher_cache} needs --teacher DIR, the dense model")
    _check_teacher_device(job)
    if job.cache_top_k < 1:
        raise ConfigError(f"--cache-top-k is {job.cache_top_k}; expected at least 1 token")
    if job.cache_layers is not None and job.cache_layers < 1:
        raise ConfigError(f"--cache-layers is {job.cache_layers}; expected at least 1 layer")
    if job.cache_layers is not None and job.teacher_cache is None:
        raise ConfigError(f"--cache-layers {job.cache_layers} is for --teacher-cache FOLDER; give both")
    if job.cache_layers is not None and job.distill == "kl":
        raise ConfigError(
            f"--cache-layers {job.cache_layers}: --distill kl learns of no layer; leave one out"
        )
    if job.cache_top_k != CACHE_TOP_K and (job.teacher_cache is None or job.distill == "squarehead"):
        raise ConfigError(
            f"--cache-top-k {job.cache_top_k} is for --teacher-cache FOLDER and --distill kl or both; found "
            f"--distill {job.distill} and {'no' if job.teacher_cache is None else 'a'} --teacher-cache"
        )
    if job.skip_bad_rows < 0:
        raise ConfigError(f"--skip-bad-rows {job.skip_bad_rows}: expected a number of rows, or 0 for none")
    if job.save_steps < 0:
        raise ConfigError(f"--save-steps {job.save_steps}: expected at least 0")
    if job.prune_schedule is not None:
        CubicSchedule.parse(job.prune_schedule)
    if job.pattern is not None and job.prune_schedule is None:
        raise ConfigError(f"--pattern {job.pattern} is of the zeros of --prune-schedule; give both")
    _refuse_together(job)
    check_reporter(job.report_to)
    if job.threads is not None:
        use_threads(job.threads)


def _check_teacher_device(job: TrainingOptions) -> None:
    """Raise ConfigError where the teacher cannot compute, UnsupportedError where all processes would meet."""
    if job.teacher_device is None:
        return
    if job.teacher is None:
        raise ConfigError(f"--teacher-device {job.teacher_device} needs --teacher DIR, the dense model")
    check_device(job.teacher_device, "--teacher-device")
    if num_processes() > 1 and job.teacher_device != "cpu":
        raise UnsupportedError(
            f"--teacher-device {job.teacher_device}: {num_processes()} processes would each put a teacher "
            "there; expected cpu, or no --teacher-device: each process then has it on its own GPU"
        )


def _refuse_together(job: TrainingOptions) -> None:
    """Raise UnsupportedError for ways to train that exclude each other."""
    if job.prune_schedule is not None and job.kernel == "sparse":
        raise UnsupportedError(
            f"--kernel sparse multiplies the weights that are not zero when training begins; "
            f"--prune-schedule {job.prune_schedule} makes more of them zero: leave --kernel out"
        )
    if job.lora is None:
        return
    if job.prune_schedule is not None:
        raise UnsupportedError(
            f"--lora {job.lora} leaves weights as they are while it trains adapters, --prune-schedule "
            f"{job.prune_schedule} makes some of them zero: use one after the other"
        )
    if job.kernel == "sparse":
        raise UnsupportedError(
            f"--lora {job.lora} adds whole matrices to the weights, and --kernel sparse has no such: leave "
            "--kernel out"
        )
    if job.parallel == "fsdp":
        raise UnsupportedError(
            f"--lora {job.lora} needs whole weights in each process, and --parallel fsdp shards them: use "
            "one process, or --parallel ddp"
        )


def deciding_options(job: TrainingOptions) -> dict[str, Any]:
    """The options that change what is learned.

    Paths are left out: a run depends on the contents of a file, which are hashed, and not on its place.
    """
    return {name: value for name, value in record(job).items() if name not in WITHOUT_EFFECT | PATHS}
