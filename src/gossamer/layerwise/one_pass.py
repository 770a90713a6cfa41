"""Round a layer right after it was pruned, so that the layers after it make up for both."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

from torch import Tensor

from gossamer.checkpoint.directory import Checkpoint, Derived
from gossamer.checkpoint.schemes import SCHEMES
from gossamer.errors import ConfigError
from gossamer.layerwise.options import PruneOptions
from gossamer.layerwise.rounded import quantization_config, shared_group, write_rounded, write_unquantized
from gossamer.layerwise.rounding import Rounded, RoundingOptions, round_block, smooth
from gossamer.layerwise.states import States
from gossamer.modules.decoder import Block


def check_rounding(source: Checkpoint, scheme: str, num_epochs: int) -> None:
    """Raise ConfigError or UnsupportedError for what cannot be rounded in `prune`."""
    if num_epochs < 0 or scheme == "none":
        raise ConfigError(f"--rounded-epochs is {num_epochs}; expected 0, or more beside a --scheme")
    shared_group(source, scheme, ())


def round_pruned(
    block: Block,
    inputs: Sequence[Tensor],
    states: tuple[States, States],
    output: Derived,
    job: PruneOptions,
    scheme: Literal["W8A8", "W4A8", "FP8_DYNAMIC"],
    num_epochs: int,
) -> None:
    """Smooth, round and store a pruned layer; `states` become those after it.

    `inputs` are the hidden states [rows, T, D] before the layer, of the calibration rows and of those held
    out; they are overwritten. The weights aim at what the layer gave unrounded: what is lacking by the
    layers before it, rounded too, its pruning has made up for. Then `num_epochs` train them through the
    rounding, towards the parent's hidden states.
    """
    source, dampening = output.parent, output.metrics["dampening"]
    options = RoundingOptions(
        dataset=job.dataset,
        scheme=scheme,
        block_size=job.block_size,
        dampening_frac=job.dampening_frac,
        reconstruct_epochs=num_epochs,
        seed=job.seed,
    )
    rows, held = (States(x, x.clone(), of.first_row) for x, of in zip(inputs, states, strict=True))
    smoothed = smooth(block, source, held.ours_BTD, options.smoothing_strength, (), scheme)
    group_size = shared_group(source, scheme, ())
    round_layer: Callable[..., Iterator[Rounded]] = round_block
    if num_epochs:
        from gossamer.layerwise.through_rounding import as_read_by_head, round_and_train

        round_layer = partial(
            round_and_train,
            read_DD=as_read_by_head(source).to(job.device),
            reconstruction=output.metrics["rounded_reconstruction"],
            towards=[each.parent_BTD for each in states],
        )
    for rounded in round_layer(block, smoothed, (rows, held), source, options, (), dampening):
        write_rounded(output, rounded, SCHEMES[scheme], group_size)
    write_unquantized(output, block, ())
    output.config["quantization_config"] = quantization_config(source, scheme, ())
    for after, of in zip((rows, held), states, strict=True):
        of.ours_BTD.copy_(after.ours_BTD)
