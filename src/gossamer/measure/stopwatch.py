"""What a time on a GPU is: of launches in CUDA graphs, between two events."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.machine import available_memory_bytes

WARM_RUNS = 3

Function = Callable[[], Any]


class Stopwatch:
    """A device of torch's, and how long it takes; a CPU's clock tells only that a program runs."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.on_gpu = self.device.type == "cuda"
        self.card: str = torch.cuda.get_device_name(self.device) if self.on_gpu else "CPU"

    @property
    def free_bytes(self) -> float | None:
        """Of the device's memory; None where nothing tells."""
        return torch.cuda.mem_get_info(self.device)[0] if self.on_gpu else available_memory_bytes()

    def times(self, functions: Sequence[Function], launches: int, repeats: int) -> list[float]:
        """Seconds of one launch, in each of `repeats` runs of a graph in which the functions take turns."""
        turns = [functions[index % len(functions)] for index in range(launches)]
        if not self.on_gpu:
            return [_clock(turns) / launches for _ in range(repeats)]
        for function in functions:
            function()
        with torch.cuda.device(self.device):
            found = [it / launches for it in _replays(turns, WARM_RUNS + repeats)]
        return found[WARM_RUNS:]

    def rates(self, num_bytes: int, launches: int, repeats: int) -> dict[str, list[float]]:
        """Bytes/s of reading so many bytes, and of copying them, which reads and writes each."""
        big = torch.ones(num_bytes // 8, dtype=torch.int64, device=self.device)
        read, copied = (self.times([it], launches, repeats) for it in (big.sum, big.clone))
        rates = {"read": [big.nbytes / it for it in read]}
        return rates | {"copy": [2 * big.nbytes / it for it in copied]}

    def random(self, *shape: int, seed: int = 0) -> Tensor:
        """float32, normal."""
        random = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=random, device=self.device)

    def weights(self, rows: int, columns: int, zeros: float, seed: int) -> Tensor:
        """float32 [N, K], so many of them zero."""
        w_NK = self.random(rows, columns, seed=seed)
        random = torch.Generator(self.device).manual_seed(seed + 1)
        return w_NK.masked_fill_(torch.rand(w_NK.shape, generator=random, device=self.device) < zeros, 0)


def _replays(functions: Sequence[Function], number: int) -> Iterator[float]:
    """Seconds of each run of a graph of all of them, on torch's current GPU."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            function()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(number):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        yield begin.elapsed_time(end) / 1e3


def _clock(functions: Sequence[Function]) -> float:
    begin = time.perf_counter()
    for function in functions:
        function()
    return time.perf_counter() - begin
