"""This CPU in half a minute: wide decoder layers in float32 and INT8, and with 70% zeros in INT8 and INT4."""

import time
from dataclasses import dataclass
from statistics import median

from gossamer import _native
from gossamer.job.report import Event, Progress, Table, quiet
from gossamer.machine import cpu_model, default_threads
from gossamer.measure.readers import Readers, impossible
from gossamer.measure.synthetic import Image, Recipe, Values, synthetic_image

LAYERS = 16  # of Llama 3.2 1B: a token passes this many layers
# Label, type of the values, share of zeros, and how many layers are held in memory: enough for each format to
# take more than 300 MB, which no cache holds. The time of `LAYERS` layers is computed from theirs.
FORMATS: tuple[tuple[str, Values, float, int], ...] = (
    ("dense float32", "f32", 0.0, 2),
    ("dense INT8", "i8", 0.0, 6),
    ("70% zeros, INT8", "i8", 0.7, 13),
    ("70% zeros, INT4", "i4", 0.7, 18),
)


@dataclass(frozen=True)
class LayerSpeed:
    """One format: how fast tokens pass 16 layers, and how fast their bytes are read meanwhile."""

    format: str
    measured_mb: float
    bits_per_weight: float
    tokens_per_s: float
    speedup: float
    gb_per_s: float
    bandwidth_share: float


@dataclass(frozen=True)
class CpuTour:
    """What this machine can do; `read_gb_per_s` is the best of all readers in the run."""

    cpu: str
    isa: str
    num_threads: int
    read_gb_per_s: float
    rows: tuple[LayerSpeed, ...]
    seconds: float

    def tables(self) -> list[Table]:
        columns = ("16 wide layers as", "bits/weight", "tokens/s", "speed", "GB/s", "of read bandwidth")
        rows = [
            (
                row.format,
                f"{row.bits_per_weight:.1f}",
                f"{row.tokens_per_s:.1f}",
                f"{row.speedup:.1f}x",
                f"{row.gb_per_s:.1f}",
                f"{row.bandwidth_share:.0%}",
            )
            for row in self.rows
        ]
        title = f"{self.cpu}: {self.num_threads} threads, {self.isa}, reads {self.read_gb_per_s:.1f} GB/s"
        shares = {row.format: row.bandwidth_share for row in self.rows}
        wrong = [Table("", ("",), [(text,)]) for text in impossible(shares)]
        return [Table(title, columns, rows), *wrong]

    def speeds(self) -> list[tuple[str, float, float]]:
        """(format, tokens/s, share of the read bandwidth) for a picture."""
        return [(row.format, row.tokens_per_s, row.bandwidth_share) for row in self.rows]


def cpu_tour(progress: Progress = quiet, seconds: float = 30) -> CpuTour:
    """Measure all formats and the read bandwidth in turns until `seconds` are over, at least three times."""
    start, num_threads = time.monotonic(), default_threads()
    images, models = [], []
    for index, (label, values, sparsity, layers) in enumerate(FORMATS):
        progress(Event("your CPU", f"making {label} layers", index, len(FORMATS)))
        image = synthetic_image(Recipe.of("llama-3.2-1b", values, sparsity, layers, vocabulary=256))
        images.append(image)
        models.append(_native.Model(image.buffer, image.tensors, image.config, num_threads))
    times: list[list[float]] = [[] for _ in FORMATS]
    readers, best = Readers.of(images[0].buffer, num_threads), 0.0
    while (spent := time.monotonic() - start) < 0.8 * seconds or len(times[0]) < 3:
        progress(Event("your CPU", "measuring", spent, seconds))
        for model, found in zip(models, times, strict=True):
            found += model.time_linears(2)
        best = max(best, readers.best())
    rows = _rows(images, times, best)
    return CpuTour(cpu_model(), _native.isa(), num_threads, best / 1e9, rows, time.monotonic() - start)


def _rows(images: list[Image], times: list[list[float]], best: float) -> tuple[LayerSpeed, ...]:
    rows: list[LayerSpeed] = []
    for (label, _, _, layers), image, found in zip(FORMATS, images, times, strict=True):
        middle = median(found)
        rate, tokens_per_s = image.num_bytes / middle, layers / (LAYERS * middle)
        matrices = [entry for name, entry in image.config["linears"].items() if ".layers." in name]
        num_weights = sum(entry["rows"] * entry["columns"] for entry in matrices)
        rows.append(
            LayerSpeed(
                format=label,
                measured_mb=image.num_bytes / 1e6,
                bits_per_weight=8 * image.num_bytes / num_weights,
                tokens_per_s=tokens_per_s,
                speedup=tokens_per_s / rows[0].tokens_per_s if rows else 1.0,
                gb_per_s=rate / 1e9,
                bandwidth_share=rate / best,
            )
        )
    return tuple(rows)
