"""Round a layer right after it was pruned, so that the layers after it make up for both."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from gossamer.checkpoint.directory import Derived
from gossamer.checkpoint.schemes import SCHEMES
from gossamer.decoder import Block
from gossamer.layerwise.options import PruneOptions
from gossamer.layerwise.rounded import quantization_config, shared_group, write_rounded, write_unquantized
from gossamer.layerwise.rounding import RoundingOptions, round_block, smooth
from gossamer.layerwise.states import States


def round_pruned(
    block: Block,
    inputs: Sequence[Tensor],
    states: tuple[States, States],
    output: Derived,
    job: PruneOptions,
    scheme: Literal["W8A8", "W4A8", "FP8_DYNAMIC"],
) -> None:
    """Smooth, round and store a pruned layer; `states` become those after it.

    `inputs` are the hidden states [rows, T, D] before the layer, of the calibration rows and of those held
    out; they are overwritten. The weights aim at what the layer gave unrounded: what is lacking by the
    layers before it, rounded too, its pruning has made up for.
    """
    source, dampening = output.parent, output.metrics["dampening"]
    options = RoundingOptions(
        dataset=job.dataset, scheme=scheme, block_size=job.block_size, dampening_frac=job.dampening_frac
    )
    rows, held = (States(x, x.clone(), of.first_row) for x, of in zip(inputs, states, strict=True))
    smoothed = smooth(block, source, held.ours_BTD, options.smoothing_strength, (), scheme)
    group_size = shared_group(source, scheme, ())
    for rounded in round_block(block, smoothed, (rows, held), source, options, (), dampening):
        write_rounded(output, rounded, SCHEMES[scheme], group_size)
    write_unquantized(output, block, ())
    output.config["quantization_config"] = quantization_config(source, scheme, ())
    for after, of in zip((rows, held), states, strict=True):
        of.ours_BTD.copy_(after.ours_BTD)
