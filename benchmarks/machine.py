"""What this machine can read: every reader, and the wide layers of the demo, as rows of docs/results."""

import dataclasses

from results import write_row

from gossamer import _native
from gossamer.tools.readers import PREFETCH_BYTES
from gossamer.tools.synthetic import Recipe, synthetic_image
from gossamer.tools.tour import cpu_tour


def main() -> None:
    image = synthetic_image(Recipe.of("llama-3.2-1b", "f32", 0.0, layers=2, vocabulary=256))
    for threads in (1, 2):
        for ahead in PREFETCH_BYTES:
            rates = sorted(_native.read_bandwidth(threads, ahead, image.buffer, 20))
            row = {"threads": threads, "prefetch_bytes": ahead}
            write_row("machine", row | {"best_gb_per_s": rates[-1] / 1e9, "median_gb_per_s": rates[10] / 1e9})
    del image
    write_row("machine", dataclasses.asdict(cpu_tour()))


if __name__ == "__main__":
    main()
