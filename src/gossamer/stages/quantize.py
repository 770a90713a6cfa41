"""`quantize`: INT8 weights and activations in the compressed-tensors format, every zero kept."""

import fnmatch
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.architecture.anatomy import Group
from gossamer.checkpoint.directory import Checkpoint, Derived
from gossamer.checkpoint.fused import stored_names
from gossamer.checkpoint.schemes import SCHEMES
from gossamer.compress.gptq import gptq, hessian, reconstruction_error
from gossamer.compress.hessian import inverse_factor
from gossamer.compress.int8 import fake_quantize_tokens, row_scales
from gossamer.compress.smooth import divide_norm, share_over_query_heads, smoothing_scales, value_rows
from gossamer.data.calibration import CalibrationOptions, calibration_ids, check_options
from gossamer.data.sources import manifest
from gossamer.decoder import TORCH_DTYPE, Block, blocks, embed, refuse_quantized, write_tensor
from gossamer.errors import ConfigError
from gossamer.job.options import option
from gossamer.job.report import Event, Progress, Result, Table, quiet


@dataclass(frozen=True)
class Quantize(CalibrationOptions):
    """Round the decoder's linears to INT8 (SmoothQuant, then GPTQ under the mask)."""

    model: str = option(help="checkpoint directory", positional=True)
    output_dir: str = option(help="directory to write", short="-o")
    scheme: Literal["W8A8"] = option("W8A8", help="INT8 weights per row, INT8 activations per token")
    smoothing_strength: float = option(
        0.8, help="how much of the activations' outliers moves into the weights"
    )
    ignore: tuple[str, ...] = option(
        (), help="linears to leave as they are, such as '*.layers.0.mlp.down_proj'"
    )
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
    start, source = time.monotonic(), Checkpoint.open(job.model)
    check_options(job)
    refuse_quantized(source)
    ignored = matching(source.linears, job.ignore)
    stored = stored_names(source.architecture, ignored)
    if not 0 <= job.smoothing_strength <= 1:
        raise ConfigError(
            f"--smoothing-strength is {job.smoothing_strength:g}; expected a number from 0 to 1"
        )
    errors: list[float] = []
    with source.derive(job.output_dir, job, stage="quantize", overwrite=job.overwrite) as target:
        target.data = [manifest(name) for name in job.dataset]
        hidden_BTD = embed(source, calibration_ids(source, job))
        for block in blocks(source):
            smooth(block, source, hidden_BTD, job.smoothing_strength, ignored)
            for group, inputs in block.walk(hidden_BTD):
                rounded = {name: linear for name, linear in group.items() if name not in ignored}
                errors += quantize_group(target, rounded, hessian(inputs), job) if rounded else []
                progress(
                    Event("quantize", next(iter(group)), len(errors), len(source.linears) - len(ignored))
                )
            write_unquantized(target, block, ignored)
        target.copy_rest()
        target.config["quantization_config"] = SCHEMES[job.scheme].config(stored)
        target.num_threads = torch.get_num_threads()
        target.metrics["mean_error"] = sum(errors) / len(errors)
    error, seconds = sum(errors) / len(errors), time.monotonic() - start
    return QuantizeResult(job.output_dir, target.sparsity, len(errors), ignored, error, seconds)


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


def smooth(
    block: Block, source: Checkpoint, hidden_BTD: Tensor, strength: float, ignored: Collection[str]
) -> None:
    """Fold smoothing factors into what produces each group's input, in place; the float output stays."""
    amax = [largest(x.abs().amax((0, 1)) for x in inputs) for _, inputs in block.walk(hidden_BTD.clone())]
    for group, linears, x_amax_K in zip(block.anatomy.groups, block.groups, amax, strict=True):
        read = [linear.weight.data.abs().amax(0) for name, linear in linears.items() if name not in ignored]
        if not read:
            continue
        w_amax_K = largest(read)
        if group.fold == "value rows":
            x_amax_K, w_amax_K = (share_over_query_heads(m, *kv_heads(block)) for m in (x_amax_K, w_amax_K))
        scale_K = fold(block, group, smoothing_scales(x_amax_K, w_amax_K, strength), source)
        for linear in linears.values():
            linear.weight.data *= scale_K


def fold(block: Block, group: Group, scale_K: Tensor, source: Checkpoint) -> Tensor:
    """Divide what produces a group's input by [K] factors; returns those that its stored type stands for."""
    producer = block.layer.get_submodule(group.producer)
    weight = producer.weight
    assert isinstance(weight, nn.Parameter)
    if group.fold == "norm":
        dtype = TORCH_DTYPE[source.dtype(f"{block.prefix}{group.producer}.weight")]
        weight.data, scale_K = divide_norm(weight.data, scale_K, dtype)
        return scale_K
    scale_N = value_rows(scale_K, *kv_heads(block)) if group.fold == "value rows" else scale_K
    weight.data /= scale_N[:, None]
    if isinstance(bias := producer.bias, nn.Parameter):
        bias.data /= scale_N
    return scale_K


def kv_heads(block: Block) -> tuple[int, int]:
    """How many key/value heads, and their width."""
    return block.anatomy.attention.num_kv_heads, block.anatomy.attention.head_dim


def largest(amax: Iterable[Tensor]) -> Tensor:
    """Elementwise maximum of vectors [K]."""
    return torch.stack(list(amax)).amax(0)


def quantize_group(
    target: Derived, group: Mapping[str, nn.Linear], H_KK: Tensor, job: Quantize
) -> list[float]:
    """Round the linears that share an input, in place and to disk; returns the relative error of each."""
    errors, factor = [], inverse_factor(H_KK, job.dampening_frac, name=", ".join(group))
    for name, linear in group.items():
        w_NK = linear.weight.detach()
        scale_N1 = row_scales(w_NK, TORCH_DTYPE[target.parent.dtype(f"{name}.weight")])
        q_NK = gptq(w_NK, scale_N1, factor, block_size=job.block_size)
        target.write(f"{name}.weight", q_NK.numpy(), SCHEMES[job.scheme].dtype)
        target.write(f"{name}.weight_scale", scale_N1.numpy(), "F32")
        linear.weight.data = q_NK * scale_N1
        linear.register_forward_pre_hook(lambda _, inputs: fake_quantize_tokens(inputs[0]))
        errors.append(reconstruction_error(w_NK, linear.weight.data, H_KK))
    return errors


def write_unquantized(target: Derived, block: Block, ignored: Collection[str]) -> None:
    """Store what stays floating point: the norms and the ignored linears, smoothed."""
    rounded = {f"{name}.weight" for group in block.groups for name in group if name not in ignored}
    for name, parameter in block.layer.named_parameters():
        name = f"{block.prefix}{name}"
        if name not in rounded:
            write_tensor(target, name, parameter)
