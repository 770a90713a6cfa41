"""How `bench` measures on a GPU: CUDA graphs of a step, of a prompt, of the linears, each run many times."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from gossamer.architecture.families import read_anatomy
from gossamer.gpu.memory import memory_for
from gossamer.job.report import Event, Progress
from gossamer.measure.gpu_decoder import DENSE, Decoder, Sizes, most_bytes
from gossamer.measure.readers import impossible
from gossamer.measure.report import GpuRow, speeds
from gossamer.measure.rounds import Setting, kv_bytes
from gossamer.measure.stopwatch import Stopwatch
from gossamer.measure.synthetic import Recipe

READ_BYTES, READS = 1 << 30, 5
CPU_READ_BYTES = 1 << 20  # where a program is only seen to run
BASELINE_BYTES = 600e6  # of dense layers, to compare with: more than any cache holds


@dataclass(frozen=True, eq=False)
class GpuSubject:
    """A decoder, and what it is measured against: bytes/s, and seconds of dense linears (or none)."""

    recipe: Recipe
    decoder: Decoder
    read: float
    baseline: Sequence[float]


def most_bytes_on_gpu(recipe: Recipe) -> float:
    """What its decoder takes at most, without keys and values."""
    return most_bytes(_sizes(recipe), recipe.values, recipe.sparsity)


@torch.no_grad()
def measured_on_gpu(
    at: Stopwatch,
    recipes: Sequence[Recipe],
    settings: Sequence[Setting],
    progress: Progress,
    *,
    baseline: bool,
) -> Iterator[GpuRow]:
    """A row for each recipe and setting; MemoryError where the GPU's memory ends."""
    repeats, num_bytes = settings[0].repeats, READ_BYTES if at.on_gpu else CPU_READ_BYTES
    with memory_for("a decoder was measured; give --layers, or fewer in --batch and --prompt"):
        read = max(rate for rates in at.rates(num_bytes, READS, repeats).values() for rate in rates)
        dense = _dense_linears(at, recipes[0], repeats) if baseline else []
        for recipe in recipes:
            yield from _rows(at, recipe, settings, read, dense, progress)


def _rows(
    at: Stopwatch,
    recipe: Recipe,
    settings: Sequence[Setting],
    read: float,
    dense: Sequence[float],
    progress: Progress,
) -> Iterator[GpuRow]:
    """Those of a model, which is in memory meanwhile."""
    progress(Event("bench", f"{recipe.values} {recipe.sparsity:.0%}: making weights"))
    decoder = Decoder(at, _sizes(recipe), recipe.values, recipe.sparsity)
    for setting in settings:
        yield _row(GpuSubject(recipe, decoder, read, dense), setting, progress)


def _row(subject: GpuSubject, setting: Setting, progress: Progress) -> GpuRow:
    recipe, decoder, at = subject.recipe, subject.decoder, subject.decoder.at
    what = f"{recipe.values} {recipe.sparsity:.0%}, batch {setting.batch}, prompt {setting.prompt}"
    progress(Event("bench", what))
    x_BD, x_BTD = decoder.inputs(setting.batch), decoder.inputs(setting.batch, setting.prompt)
    caches = decoder.caches(setting.batch, round(setting.mean_context))
    kv = setting.batch * kv_bytes(read_anatomy(recipe.config), setting.mean_context, "bf16")
    found = speeds(
        batch=setting.batch,
        prompt=setting.prompt,
        step_bytes=decoder.step_bytes + kv,
        linears_bytes=decoder.linears_bytes,
        num_weights=decoder.sizes.num_weights,
        read=subject.read,
        steps=at.times([lambda: decoder.step(x_BD, caches).argmax(-1)], 1, setting.repeats * setting.new),
        prompts=at.times([lambda: decoder.prompt(x_BTD).argmax(-1)], 1, setting.repeats),
        linears=_linears(decoder, setting.repeats),
        baseline=subject.baseline,
    )
    shares = {
        "read while decoding": found["bandwidth_share"],
        "read by the linears": found["linears_bandwidth_share"],
    }
    return GpuRow(
        **found,
        model=recipe.shape,
        values=recipe.values,
        sparsity=recipe.sparsity,
        gpu=at.card,
        layers=recipe.layers,
        new=setting.new,
        repeats=setting.repeats,
        kv_bytes=kv,
        kv_cache_dtype="bf16",
        impossible=impossible(shares),
        notes=(),
    )


def _linears(decoder: Decoder, repeats: int) -> list[float]:
    """Seconds of one token through all of them."""
    inputs = [decoder.at.random(1, columns).bfloat16() for _, columns in decoder.sizes.linears]
    functions = [partial(it, x) for layer in decoder.layers for it, x in zip(layer, inputs, strict=True)]
    return [len(functions) * it for it in decoder.at.times(functions, len(functions), repeats)]


def _dense_linears(at: Stopwatch, recipe: Recipe, repeats: int) -> list[float]:
    """The same of dense bfloat16, of which no more layers are there than no cache holds."""
    whole = _sizes(recipe)
    layers = min(whole.layers, int(-(-BASELINE_BYTES * whole.layers // (2 * whole.num_weights))))
    decoder = Decoder(at, _sizes(recipe, layers=layers), DENSE, 0.0)
    return [whole.layers / layers * it for it in _linears(decoder, repeats)]


def _sizes(recipe: Recipe, layers: int | None = None) -> Sizes:
    config = recipe.config
    return Sizes(
        config["hidden_size"],
        config["intermediate_size"],
        layers or recipe.layers,
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["vocab_size"],
    )
