"""What this machine can read: every reader, and the wide layers of the demo, as rows of docs/results."""

import dataclasses

from results import write_row

from gossamer import _native
from gossamer.machine import default_threads
from gossamer.measure.readers import Reader, Readers
from gossamer.measure.report import Spread
from gossamer.measure.synthetic import Recipe, synthetic_image
from gossamer.measure.tour import cpu_tour

REPEATS = 20


def main() -> None:
    threads = default_threads()
    image = synthetic_image(Recipe.of("llama-3.2-1b", "f32", 0.0, layers=2, vocabulary=256))
    readers = Readers.of(image.buffer, threads)
    found: dict[Reader, list[float]] = {}
    for _ in range(REPEATS):
        for reader, rate in readers.rates().items():
            found.setdefault(reader, []).append(rate / 1e9)
    for reader, rates in found.items():
        speeds = {"best_gb_per_s": max(rates)} | dataclasses.asdict(Spread.of(rates))
        write_row("machine", dataclasses.asdict(reader) | speeds)
    del image, readers
    for num_threads in sorted({1, threads}):
        peak = 2 * _native.int8_peak(_native.isa(), num_threads, REPEATS) / 1e12
        write_row("machine", {"num_threads": num_threads, "int8_peak_tops": peak})
    write_row("machine", dataclasses.asdict(cpu_tour()))


if __name__ == "__main__":
    main()
