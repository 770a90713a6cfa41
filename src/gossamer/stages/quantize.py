"""`quantize`: weights and activations of few bits in the compressed-tensors format, every zero kept."""

import fnmatch
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch

from gossamer.checkpoint.directory import Checkpoint
from gossamer.checkpoint.schemes import SCHEMES
from gossamer.compress.hessian import dampened_more
from gossamer.data.calibration import calibration_ids, check_options
from gossamer.data.sources import manifest
from gossamer.errors import ConfigError
from gossamer.job.options import option
from gossamer.job.report import Event, Progress, Result, Table, quiet
from gossamer.layerwise.finite import telling_text
from gossamer.layerwise.options import check_training
from gossamer.layerwise.report import report_rounding, rounded_errors
from gossamer.layerwise.rounded import quantization_config, shared_group, write_rounded, write_unquantized
from gossamer.layerwise.rounding import Rounded, RoundingOptions, round_block, smooth
from gossamer.layerwise.saving import Saving
from gossamer.layerwise.states import at_the_start
from gossamer.modules.decoder import blocks, embed, refuse_quantized


@dataclass(frozen=True)
class Quantize(RoundingOptions):
    """Round the decoder's linears to INT8, INT4 or FP8 (SmoothQuant, then GPTQ under the mask)."""

    model: str = option(help="directory, or org/name[@revision] of the hub", positional=True)
    output_dir: str = option(help="directory to write", short="-o")
    overwrite: bool = option(False, help="replace the output directory")


@dataclass(frozen=True)
class QuantizeResult(Result):
    """What rounding cost, on rows held out from calibration.

    `mean_error`: mean over the linears of the squared output error over the squared output, a token's, with
    activations rounded; `errors`: the same of each kind of linear (q, k, v, o, gate, up, down); `worst`: the
    three linears that lose most. `strengths`: mean smoothing strength of each kind. `reconstruction`: of each
    layer that was trained, how far hidden states are from the unrounded model's (see `round_and_train`), as
    rounded and after each epoch; `errors` are those before training.
    """

    output_dir: str
    scheme: str
    sparsity: float
    num_quantized: int
    ignored: list[str]
    mean_error: float
    errors: dict[str, float]
    strengths: dict[str, float]
    worst: dict[str, float]
    reconstruction: list[list[float]]
    seconds: float

    def tables(self) -> list[Table]:
        """What was reached, and which linears pay for it."""
        figures = (f"{self.sparsity:.2%}", f"{self.mean_error:.2g}", f"{self.seconds:.1f}")
        columns = (f"linears in {self.scheme}", "left as they are", "zeros", "mean error", "seconds")
        rows = [(f"{self.num_quantized}", f"{len(self.ignored)}", *figures)]
        costs = cost_tables(self.errors, self.strengths, self.worst, self.reconstruction)
        return [Table(self.output_dir, columns, rows), *costs]


def quantize(job: Quantize, progress: Progress = quiet) -> QuantizeResult:
    """Quantize layer by layer; later groups and layers see earlier weights and activations rounded.

    Two copies of the model go in step, the one that is rounded and the one that is not. The last eighth of
    the rows is held out from calibration: the strength of smoothing is chosen there, and errors are of it.
    """
    start, source = time.monotonic(), Checkpoint.open(job.model, offline=job.offline)
    ignored = check(job, source)
    config = quantization_config(source, job.scheme, ignored)
    group_size = shared_group(source, job.scheme, ignored)
    num_linears, num_held = len(source.linears) - len(ignored), max(1, job.num_calibration_samples // 8)
    with (
        source.derive(
            job.output_dir, job, stage="quantize", overwrite=job.overwrite, resume=job.resume
        ) as output,
        telling_text(source, job),
    ):
        output.data = [manifest(name, offline=job.offline) for name in job.dataset]
        ids_BT, num_rows = calibration_ids(source, job), job.num_calibration_samples - num_held
        rows, held = at_the_start(embed(source, ids_BT).to(job.device), num_rows)
        output.metrics |= {"linear_errors": {}, "linear_strengths": {}, "dampening": {}, "reconstruction": []}
        saving = Saving(output, job, ids_BT, rows.tensors("rows") | held.tensors("held_out"), start)
        first = saving.begin(progress)
        errors, strengths, dampening, reconstruction = (
            output.metrics[name]
            for name in ("linear_errors", "linear_strengths", "dampening", "reconstruction")
        )
        round_layer: Callable[..., Iterator[Rounded]] = round_block
        if job.reconstruct_epochs:
            from gossamer.layerwise.through_rounding import as_read_by_head, round_and_train

            read_DD = as_read_by_head(source).to(job.device)
            round_layer = partial(round_and_train, read_DD=read_DD, reconstruction=reconstruction)
        for block in blocks(source, first, job.device):
            smoothed = smooth(block, source, held.ours_BTD, job.smoothing_strength, ignored, job.scheme)
            for group, found in zip(block.groups, smoothed, strict=True):
                strengths |= {name: found.strength for name in group if name not in ignored}
            for rounded in round_layer(block, smoothed, (rows, held), source, job, ignored, dampening):
                if rounded.name in dampening:
                    message = dampened_more(rounded.name, dampening[rounded.name])
                    progress(Event("quantize", message, lasting=True))
                write_rounded(output, rounded, SCHEMES[job.scheme], group_size)
                errors[rounded.name] = rounded.error
                metrics = {"error": rounded.error}
                progress(Event("quantize", rounded.name, len(errors), num_linears, metrics))
            if reconstruction and reconstruction[-1][0] <= min(reconstruction[-1]):
                failed = f"layer {block.index} stays as rounded: training it did not lower its error"
                progress(Event("quantize", f"{failed} on held-out rows", lasting=True))
            write_unquantized(output, block, ignored)
            saving.after(block.index + 1)
        output.copy_rest()
        output.config["quantization_config"] = config
        output.num_threads = torch.get_num_threads()
        figures = summary(source, errors, strengths)
        output.metrics |= figures
        title = f"{source.path.name} in {job.scheme}"
        facts = [
            f"Mean error {figures['mean_error']:.2g}.",
            f"It took {saving.seconds():.1f} s on {output.num_threads} threads.",
        ]
        tables = cost_tables(figures["errors"], figures["strengths"], figures["worst"], reconstruction)
        output.report = lambda _: report_rounding(output, title, facts, tables)
    return QuantizeResult(
        output_dir=job.output_dir,
        scheme=job.scheme,
        sparsity=output.sparsity,
        num_quantized=len(errors),
        ignored=ignored,
        **figures,
        reconstruction=reconstruction,
        seconds=saving.seconds(),
    )


def check(job: Quantize, source: Checkpoint) -> list[str]:
    """The ignored linears; ConfigError or UnsupportedError for a job that cannot be done."""
    check_options(job)
    refuse_quantized(source)
    if job.smoothing_strength != "auto" and not 0 <= job.smoothing_strength <= 1:
        raise ConfigError(
            f"--smoothing-strength is {job.smoothing_strength:g}; expected auto or a number from 0 to 1"
        )
    check_training(job.reconstruct_epochs, job.reconstruct_learning_rate)
    if job.device != "cpu":
        from gossamer.layerwise.gpu import check_gpu

        check_gpu(source, job, job.reconstruct_epochs)
    return matching(source.linears, job.ignore)


def summary(
    source: Checkpoint, errors: Mapping[str, float], strengths: Mapping[str, float]
) -> dict[str, Any]:
    """Means over all linears and over each kind, and the three linears with the largest errors."""
    kinds: dict[str, list[str]] = {}
    for index, block in enumerate(source.architecture.blocks):
        for linear in block.linears.values():
            name = f"{source.architecture.prefix(index)}{linear.name}"
            if name in errors:
                kinds.setdefault(linear.role, []).append(name)
    return {
        "mean_error": fmean(errors.values()),
        "errors": {kind: fmean(errors[name] for name in names) for kind, names in kinds.items()},
        "strengths": {kind: fmean(strengths[name] for name in names) for kind, names in kinds.items()},
        "worst": {name: errors[name] for name in sorted(errors, key=lambda name: -errors[name])[:3]},
    }


def cost_tables(
    errors: Mapping[str, float],
    strengths: Mapping[str, float],
    worst: Mapping[str, float],
    reconstruction: Sequence[Sequence[float]],
) -> list[Table]:
    """Which kinds of linears pay for rounding, which linears most, and what training gained."""
    kinds = [(kind, f"{error:.2g}", f"{strengths[kind]:.2f}") for kind, error in errors.items()]
    lose_most = [(name, f"{e:.2g}") for name, e in worst.items()]
    tables = [
        Table("kinds of linears", ("", "mean error", "smoothing strength"), kinds),
        Table("linears that lose most", ("", "error"), lose_most),
    ]
    if reconstruction:
        tables.append(rounded_errors(reconstruction))
    return tables


def matching(names: Collection[str], patterns: Collection[str]) -> list[str]:
    """The linears that shell patterns select; ConfigError for a pattern without any, or if none is left."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(
                f"--ignore {pattern!r} matches none of the decoder's linears; "
                f"they are named like {next(iter(names))}"
            )
    matched = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if len(matched) == len(names):
        raise ConfigError("--ignore matches every linear of the decoder; nothing is left to quantize")
    return matched
