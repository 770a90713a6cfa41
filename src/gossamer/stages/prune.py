"""`prune`: zeros in the decoder's linear weights, in one shot and without training."""

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch

from gossamer.checkpoint.directory import Checkpoint
from gossamer.compress.hessian import dampened_more
from gossamer.compress.target import token_error
from gossamer.data.calibration import calibration_ids, check_options
from gossamer.data.sources import manifest
from gossamer.errors import ConfigError
from gossamer.job.options import option
from gossamer.job.report import Event, Progress, Result, Table, quiet
from gossamer.layerwise.finite import finite, telling_text
from gossamer.layerwise.options import PruneOptions, check_training
from gossamer.layerwise.pruning import prune_block
from gossamer.layerwise.quality import in_words, quality
from gossamer.layerwise.report import layer_errors, report_pruning, rounded_errors
from gossamer.layerwise.saving import Saving
from gossamer.layerwise.states import at_the_start
from gossamer.modules.decoder import blocks, embed, refuse_quantized, write_block


@dataclass(frozen=True)
class Prune(PruneOptions):
    """Zero the least important weights; the others make up for them (SparseGPT, or ADMM)."""

    model: str = option(help="directory, or org/name[@revision] of the hub", positional=True)
    output_dir: str = option(help="directory to write", short="-o")
    overwrite: bool = option(False, help="replace the output directory")
    scheme: Literal["none", "W8A8", "W4A8", "FP8_DYNAMIC"] = option(
        "none", help="also round each layer as `quantize` does, before the next one sees it"
    )
    rounded_epochs: int = option(
        0, help="passes over the rows in which each layer, once rounded, is trained through the rounding"
    )


@dataclass(frozen=True)
class PruneResult(Result):
    """What rows say that were held out from calibration (`quality`: see layerwise/quality.py).

    `errors`: after each layer, how far the hidden states are from the parent's (see `token_error`);
    `reconstruction`: of each layer that was trained, the same error as pruned, and after each epoch;
    `rounded_reconstruction`: likewise, as rounded; `budget`: each linear's sparsity where they differ;
    """

    output_dir: str
    sparsity: float
    quality: dict[str, float]
    errors: list[float]
    reconstruction: list[list[float]]
    rounded_reconstruction: list[list[float]]
    budget: dict[str, float]
    num_tokens: int
    seconds: float

    def tables(self) -> list[Table]:
        """What was reached, and the errors of all layers."""
        name, change = in_words(self.quality)
        columns = ("zeros", f"held-out {name}", "calibration tokens", "seconds")
        row = (f"{self.sparsity:.2%}", change, f"{self.num_tokens:,}", f"{self.seconds:.1f}")
        tables = [Table(self.output_dir, columns, [row]), layer_errors(self.errors, self.reconstruction)]
        if self.rounded_reconstruction:
            tables.append(rounded_errors(self.rounded_reconstruction))
        if self.budget:
            from gossamer.layerwise.budget import budget_table

            tables.append(budget_table(self.budget))
        return tables


def prune(job: Prune, progress: Progress = quiet) -> PruneResult:
    """Prune layer by layer, two copies of the model in step: the one being pruned and the parent.

    Groups and layers see the earlier ones pruned, and aim at the outputs that they have in the parent. The
    last eighth of the rows is held out from calibration, and what the result says is measured there.
    """
    start, source = time.monotonic(), Checkpoint.open(job.model, offline=job.offline)
    check(job, source)
    num_held = max(1, job.num_calibration_samples // 8)
    shares: dict[str, float] = {}
    with (
        source.derive(
            job.output_dir, job, stage="prune", overwrite=job.overwrite, resume=job.resume
        ) as output,
        telling_text(source, job),
    ):
        output.data = [manifest(name, offline=job.offline) for name in job.dataset]
        ids_BT, num_rows = calibration_ids(source, job), job.num_calibration_samples - num_held
        if job.sparsity_profile != "uniform":
            from gossamer.layerwise.budget import measured_shares

            shares = measured_shares(source, ids_BT[:num_rows], job, progress)
        rows, held = at_the_start(embed(source, ids_BT).to(job.device), num_rows)
        output.metrics |= {"errors": [], "reconstruction": [], "rounded_reconstruction": [], "dampening": {}}
        saving = Saving(output, job, ids_BT, rows.tensors("rows") | held.tensors("held_out"), start)
        first = saving.begin(progress)
        errors, dampening = output.metrics["errors"], output.metrics["dampening"]
        reconstruction, rounded = (output.metrics[f"{of}reconstruction"] for of in ("", "rounded_"))
        for block, parent in zip(*(blocks(source, first, job.device) for _ in range(2)), strict=True):
            inputs = [s.ours_BTD.clone() for s in (rows, held)] if job.epochs or job.scheme != "none" else []
            pruned = prune_block(block, parent, rows, held, job, shares, dampening)
            for done, name in enumerate(pruned, 1):
                if name in dampening:
                    progress(Event("prune", dampened_more(name, dampening[name]), lasting=True))
                metrics = {"error": errors[-1]} if errors else {}
                num_linears = len(block.anatomy.linears)
                progress(Event("prune", name, block.index * num_linears + done, len(source.linears), metrics))
            if job.epochs:
                from gossamer.layerwise.reconstruction import reconstruct_block

                reconstruction.append(reconstruct_block(block, inputs, rows, held, job, progress))
            if job.scheme == "none":
                write_block(output, block)
            else:
                from gossamer.layerwise.one_pass import round_pruned

                round_pruned(block, inputs, (rows, held), output, job, job.scheme, job.rounded_epochs)
            errors.append(token_error(held.ours_BTD, held.parent_BTD).item())
            if not math.isfinite(errors[-1]):
                for hidden_BTD in (held.ours_BTD, held.parent_BTD):
                    list(finite([hidden_BTD], [f"what follows layer {block.index}"], held.first_row))
            saving.after(block.index + 1)
        output.copy_rest()
        measured = quality(source, held, ids_BT[-num_held:])
        output.num_threads = torch.get_num_threads()
        output.report = lambda tensors: report_pruning(output, tensors, num_held, saving.seconds())
        output.metrics |= {**measured, "budget": shares}
    figures = (output.sparsity, measured, errors, reconstruction, rounded, shares, ids_BT.numel())
    return PruneResult(job.output_dir, *figures, saving.seconds())


def check(job: Prune, source: Checkpoint) -> None:
    """Raise ConfigError or UnsupportedError for a job that cannot be done."""
    check_options(job)
    refuse_quantized(source)
    if job.pattern == "unstructured":
        check_sparsity(source, job.sparsity)
    if job.pattern != "unstructured" or job.sparsity_profile != "uniform":
        from gossamer.layerwise.budget import check_budget

        check_budget(source, job)
    check_training(job.epochs, job.reconstruct_learning_rate)
    if job.device != "cpu":
        from gossamer.layerwise.gpu import check_gpu

        check_gpu(source, job, job.epochs, job.scheme, job.rounded_epochs)
    if job.scheme != "none" or job.rounded_epochs:
        from gossamer.layerwise.one_pass import check_rounding

        check_rounding(source, job.scheme, job.rounded_epochs)


def check_sparsity(source: Checkpoint, sparsity: float) -> None:
    """Raise ConfigError unless `sparsity` is in [0, 1) and not below the model's own."""
    if not 0 <= sparsity < 1:
        raise ConfigError(f"--sparsity is {sparsity:g}; expected a fraction of zeros, at least 0 and below 1")
    if (found := source.sparsity()) > sparsity + 5e-4:
        raise ConfigError(
            f"--sparsity is {sparsity:g}, but {source.path} is {found:.4f} sparse already and its zeros "
            "are kept; give a higher total, or a denser model"
        )
