"""`quantize`: INT8 weights and activations in the compressed-tensors format, every zero kept."""

import fnmatch
import time
from collections.abc import Collection
from dataclasses import dataclass

import torch

from gossamer.checkpoint.directory import Checkpoint, Derived
from gossamer.checkpoint.fused import stored_names
from gossamer.checkpoint.schemes import SCHEMES
from gossamer.compress.gptq import hessian
from gossamer.compress.hessian import dampened_more
from gossamer.data.calibration import calibration_ids, check_options
from gossamer.data.sources import manifest
from gossamer.decoder import Block, blocks, embed, refuse_quantized, write_tensor
from gossamer.errors import ConfigError
from gossamer.job.options import option
from gossamer.job.report import Event, Progress, Result, Table, quiet
from gossamer.layerwise.finite import finite, telling_text
from gossamer.layerwise.report import report_rounding
from gossamer.layerwise.rounding import RoundingOptions, quantize_group, smooth
from gossamer.layerwise.saving import Saving


@dataclass(frozen=True)
class Quantize(RoundingOptions):
    """Round the decoder's linears to INT8 (SmoothQuant, then GPTQ under the mask)."""

    model: str = option(help="directory, or org/name[@revision] of the hub", positional=True)
    output_dir: str = option(help="directory to write", short="-o")
    overwrite: bool = option(False, help="replace the output directory")


@dataclass(frozen=True)
class QuantizeResult(Result):
    """`mean_error`: mean over the linears of the squared output error relative to the squared outputs."""

    output_dir: str
    sparsity: float
    num_quantized: int
    ignored: list[str]
    mean_error: float
    seconds: float

    def tables(self) -> list[Table]:
        """What was reached."""
        figures = (f"{self.sparsity:.2%}", f"{self.mean_error:.2g}", f"{self.seconds:.1f}")
        columns = ("linears in INT8", "left as they are", "zeros", "mean error", "seconds")
        rows = [(f"{self.num_quantized}", f"{len(self.ignored)}", *figures)]
        return [Table(self.output_dir, columns, rows)]


def quantize(job: Quantize, progress: Progress = quiet) -> QuantizeResult:
    """Quantize layer by layer; later groups and layers see earlier weights and activations rounded."""
    start, source = time.monotonic(), Checkpoint.open(job.model, offline=job.offline)
    check_options(job)
    refuse_quantized(source)
    ignored = matching(source.linears, job.ignore)
    stored = stored_names(source.architecture, ignored)
    if not 0 <= job.smoothing_strength <= 1:
        raise ConfigError(
            f"--smoothing-strength is {job.smoothing_strength:g}; expected a number from 0 to 1"
        )
    with (
        source.derive(
            job.output_dir, job, stage="quantize", overwrite=job.overwrite, resume=job.resume
        ) as target,
        telling_text(source, job),
    ):
        target.data = [manifest(name) for name in job.dataset]
        hidden_BTD = embed(source, ids_BT := calibration_ids(source, job))
        target.metrics |= {"errors": {}, "dampening": {}}
        saving = Saving(target, job, ids_BT, {"hidden": hidden_BTD}, start)
        first = saving.begin(progress)
        errors, dampening = target.metrics["errors"], target.metrics["dampening"]
        for block in blocks(source, first):
            smooth(block, source, hidden_BTD, job.smoothing_strength, ignored)
            for group, inputs in block.walk(hidden_BTD):
                rounded = {name: linear for name, linear in group.items() if name not in ignored}
                if rounded:
                    found = quantize_group(target, rounded, hessian(finite(inputs, group)), job, dampening)
                    errors |= zip(rounded, found, strict=True)
                for name in dampening.keys() & rounded.keys():
                    progress(Event("quantize", dampened_more(name, dampening[name]), lasting=True))
                progress(
                    Event("quantize", next(iter(group)), len(errors), len(source.linears) - len(ignored))
                )
            write_unquantized(target, block, ignored)
            saving.after(block.index + 1)
        target.copy_rest()
        target.config["quantization_config"] = SCHEMES[job.scheme].config(stored)
        target.num_threads = torch.get_num_threads()
        target.report = lambda _: report_rounding(
            target,
            f"{source.path.name} in {job.scheme}",
            [f"It took {saving.seconds():.1f} s on {target.num_threads} threads; mean error {error:.2g}."],
            [],
        )
        target.metrics["mean_error"] = error = sum(errors.values()) / len(errors)
    return QuantizeResult(job.output_dir, target.sparsity, len(errors), ignored, error, saving.seconds())


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


def write_unquantized(target: Derived, block: Block, ignored: Collection[str]) -> None:
    """Store what stays floating point: the norms and the ignored linears, smoothed."""
    rounded = {f"{name}.weight" for group in block.groups for name in group if name not in ignored}
    for name, parameter in block.layer.named_parameters():
        name = f"{block.prefix}{name}"
        if name not in rounded:
            write_tensor(target, name, parameter)
