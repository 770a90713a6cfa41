"""`bench`: tokens per second, and the gigabytes per second they take as a share of what memory can give."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Literal

from gossamer import plots
from gossamer.architecture.families import read_anatomy
from gossamer.engine import EngineOptions, KvCacheDtype, cached_type, native_model
from gossamer.errors import ConfigError, UnsupportedError
from gossamer.gpu.found import gpu_device
from gossamer.job.options import option
from gossamer.job.report import Progress, quiet
from gossamer.machine import available_memory_bytes, cache_directory, default_threads
from gossamer.measure.readers import Readers
from gossamer.measure.report import BenchResult, Speeds
from gossamer.measure.rounds import Baseline, Setting, Subject, measure
from gossamer.measure.synthetic import CONFIGS, Recipe, Shape, synthetic_file
from gossamer.packed.cache import open_packed
from gossamer.packed.reader import Packed
from gossamer.packed.values import NUMBER_TYPES

BASELINE_BYTES = 600e6  # of dense float32 layers, to compare with: more than any cache holds
PLOT_SPARSITIES = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9)
OF_SHAPES = ("layers", "sparsity", "pattern", "values", "baseline", "plot", "keep")
TOGETHER = {"unstructured": 1, "1x4": 4}  # weights of a row that are zero or not as one
GPU_VALUES = ("i8", "i4", "bf16")
MEMORY_SHARE = 0.8  # of what is available that a model may take


@dataclass(frozen=True)
class Bench(EngineOptions):
    """Measure MODEL, or synthetic models of a real shape: decoding, prompts, and memory, in turns.

    A synthetic model is written to the cache and kept there. Of several, measured one at a time, each that
    was not there before is removed afterwards unless `keep`.
    """

    model: str | None = option(
        None, help="a .goss file, a checkpoint directory, or org/name[@revision] of the hub", positional=True
    )
    shape: Literal["llama-2-7b", "llama-3.2-1b", "tinyllama-1.1b"] | None = option(
        None,
        help="a synthetic model of this shape instead, kept in the cache (GOSSAMER_CACHE, else "
        "~/.cache/gossamer; 0.5 to 5 GB)",
    )
    layers: int | None = option(None, help="decoder layers of the synthetic model (default: all)")
    sparsity: tuple[float, ...] = option(
        (),
        help="fractions of zeros in its decoder linears, a row each (0.7; with --plot 0 0.5 0.6 0.7 0.8 0.9)",
    )
    pattern: Literal["unstructured", "1x4"] = option(
        "unstructured", help="of its zeros; 1x4: four neighbours of a row at once, which prompts of i8 skip"
    )
    values: tuple[Literal["f32", "bf16", "i8", "i4"], ...] = option(
        (), help="its value types, a row each (i8); i8 and i4 store the head in int8"
    )
    prompt: tuple[int, ...] = option((64,), help="tokens in the prompt (the context), a row each", short="-p")
    new: int = option(32, help="tokens to decode", short="-n")
    batch: tuple[int, ...] = option((1,), help="sequences at once, a row each", short="-b")
    repeats: int = option(5, help="rounds; medians are reported", short="-r")
    baseline: bool = option(
        False,
        help="also time dense decoder linears of the same shape, float32 or on a GPU bfloat16 (0.6 GB more)",
    )
    backend: Literal["engine", "gpu"] = option(
        "engine", help="engine: Gossamer's own; gpu: sparse linears on a GPU, of --shape in i8, i4 and bf16"
    )
    plot: str | None = option(None, help="draw speed against sparsity, with its bound, as this PNG file")
    keep: bool = option(
        False,
        help="keep what a sweep writes; else each synthetic model that was not in the cache before is "
        "removed after it is measured",
    )


def bench(job: Bench, progress: Progress = quiet) -> BenchResult:
    """Measure every setting, and draw the picture."""
    rows = tuple(measured(job, progress))
    if job.plot is None:
        return BenchResult(rows)
    result, first = BenchResult(rows, str(Path(job.plot).resolve())), rows[0]
    title = f"{job.shape} on {first.where}, batch {first.batch}"
    plots.speed_by_sparsity(Path(job.plot), result.curves(), title)
    return result


def measured(job: Bench, progress: Progress = quiet) -> Iterator[Speeds]:
    """Each setting in rounds; models one after another, prompts and batches on the open one."""
    check(job)
    settings = [Setting(*it, job.new, job.repeats) for it in product(job.batch, job.prompt)]
    if job.backend == "gpu":
        yield from on_gpu(job, settings, progress)
        return
    threads = default_threads() if job.threads is None else job.threads
    dense = baseline(job, threads, progress)
    for subject in subjects(job, threads, dense, progress):
        for setting in settings:
            yield measure(subject, setting, progress)


def on_gpu(job: Bench, settings: Sequence[Setting], progress: Progress) -> Iterator[Speeds]:
    """The same on a GPU; ConfigError where there is none, or for what only the engine has."""
    job.refuse_given("threads", "kv_cache_dtype", "pattern", "keep")
    if job.shape is None:
        raise ConfigError(
            f"--backend gpu measures synthetic models; give --shape ({', '.join(CONFIGS)}) instead of MODEL"
        )
    if others := sorted(set(job.values) - set(GPU_VALUES)):
        raise UnsupportedError(
            f"--values {' '.join(others)}: supported on a GPU: {' '.join(GPU_VALUES)}; the engine has all"
        )
    device = gpu_device()
    from gossamer.measure.gpu_rounds import measured_on_gpu, most_bytes_on_gpu
    from gossamer.measure.stopwatch import Stopwatch

    at = Stopwatch(device)
    made = recipes(job, at.free_bytes, most_bytes_on_gpu)
    yield from measured_on_gpu(at, made, settings, progress, baseline=job.baseline)


def check(job: Bench) -> None:
    """ConfigError unless exactly one of a model and a shape is given, with sensible numbers."""
    if (job.model is None) == (job.shape is None):
        raise ConfigError(f"give either MODEL or --shape ({', '.join(CONFIGS)}), not both and not neither")
    for name in ("prompt", "new", "batch", "repeats", "layers", "threads"):
        found = getattr(job, name)
        for number in found if isinstance(found, tuple) else (found,):
            if number is not None and number < 1:
                raise ConfigError(f"--{name} is {number}; expected at least 1")
    for name in ("prompt", "batch"):
        if not getattr(job, name):
            raise ConfigError(f"--{name} has no value; expected one or more")
    for sparsity in job.sparsity:
        if not 0 <= sparsity < 1:
            raise ConfigError(f"--sparsity is {sparsity}; expected at least 0 and below 1")
    if job.shape is None:
        for field in fields(Bench):
            if field.name in OF_SHAPES and getattr(job, field.name) != field.default:
                raise ConfigError(f"--{field.name} needs --shape: it describes synthetic models")
    if job.plot is not None:
        check_plot(job, Path(job.plot))


def check_plot(job: Bench, path: Path) -> None:
    """Before minutes of measuring: whether a picture can be drawn, and what it would show."""
    if len(job.batch) > 1 or len(job.prompt) > 1:
        raise ConfigError("--plot draws one batch and one prompt; give a single --batch and --prompt")
    if path.suffix != ".png" or not path.resolve().parent.is_dir():
        raise ConfigError(f"--plot is {path}; expected a .png file in a directory that exists")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'gossamer[compress]'")


def subjects(job: Bench, threads: int, dense: Baseline | None, progress: Progress) -> Iterator[Subject]:
    """Each model, open; a synthetic one is written when its turn comes."""
    if job.model is not None:
        packed = open_packed(job.model, progress, offline=job.offline)
        values = "+".join(sorted({packed.matrices[name].values for name in packed.decoder}))
        yield subject_of(packed, values, packed.sparsity(packed.decoder), threads, job.kv_cache_dtype, dense)
        return
    made = recipes(job, available_memory_bytes(), file_bytes)
    for recipe in made:
        path = cache_directory() / recipe.file_name
        drop = len(made) > 1 and not job.keep and not path.exists()
        try:
            packed = Packed.open(synthetic_file(recipe, progress))
            notes = () if drop else (f"{path} ({packed.file_bytes / 1e9:.1f} GB) stays in the cache.",)
            kind = (recipe.values, recipe.sparsity)
            yield subject_of(packed, *kind, threads, job.kv_cache_dtype, dense, notes)
        finally:
            if drop:
                path.unlink(missing_ok=True)


def subject_of(
    packed: Packed,
    values: str,
    sparsity: float,
    threads: int,
    kv_cache_dtype: KvCacheDtype,
    dense: Baseline | None,
    notes: tuple[str, ...] = (),
) -> Subject:
    kv, model = cached_type(packed, kv_cache_dtype), native_model(packed, threads, kv_cache_dtype)
    readers = Readers.of(packed.buffer, threads)
    return Subject(packed, values, sparsity, kv, model, readers, dense, notes)


def recipes(job: Bench, available: float | None, most_bytes: Callable[[Recipe], float]) -> list[Recipe]:
    """The synthetic models of the sweep; ConfigError for one that does not fit in the memory available."""
    assert job.shape is not None
    sparsities = job.sparsity or (PLOT_SPARSITIES if job.plot else (0.7,))
    made = [
        replace(Recipe.of(job.shape, values, sparsity, job.layers), together=TOGETHER[job.pattern])
        for values in dict.fromkeys(job.values or ("i8",))
        for sparsity in dict.fromkeys(sparsities)
    ]
    for recipe in made:
        if available is not None and (needed := most_bytes(recipe)) > MEMORY_SHARE * available:
            raise ConfigError(
                f"{recipe.shape} with {recipe.layers} layers of {recipe.values}, {recipe.sparsity:.0%} "
                f"zeros, takes {needed / 1e9:.0f} GB; {available / 1e9:.0f} GB of memory are available: give "
                "--layers"
            )
    return made


def file_bytes(recipe: Recipe) -> float:
    """At most how large the recipe's file is: embedding and head dense, int4 pairs a quarter more."""
    config, bits = CONFIGS[recipe.shape], NUMBER_TYPES[recipe.values].bits
    stored = min(bits, 1 + 1.25 * bits * (1 - recipe.sparsity)) + 0.2
    vocabulary = 2 * max(bits, 16) * recipe.vocabulary * config["hidden_size"]
    return (stored * recipe.layers * layer_weights(recipe.shape) + vocabulary) / 8


def layer_weights(shape: Shape) -> int:
    """Weights in the linears of one decoder layer."""
    linears = read_anatomy(CONFIGS[shape] | {"num_hidden_layers": 1, "vocab_size": 1}).linears(0)
    return sum(linear.rows * linear.columns for linear in linears.values())


def baseline(job: Bench, threads: int, progress: Progress) -> Baseline | None:
    """Dense float32 layers of the same shape, as many as no cache holds, and the factor to all layers."""
    if not job.baseline:
        return None
    assert job.shape is not None
    layers = job.layers or CONFIGS[job.shape]["num_hidden_layers"]
    measured = min(layers, int(-(-BASELINE_BYTES // (4 * layer_weights(job.shape)))))
    path = synthetic_file(Recipe.of(job.shape, "f32", 0.0, measured, vocabulary=256), progress)
    return Baseline(native_model(Packed.open(path), threads), layers / measured)
