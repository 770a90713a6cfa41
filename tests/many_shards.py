"""A stage in a process of its own, its output in shards of a few layers: what kill tests start."""

from typing import Any

from gossamer.checkpoint import directory
from gossamer.job.report import Progress, quiet
from gossamer.layerwise import saving
from gossamer.stages.prune import Prune, prune
from gossamer.stages.quantize import Quantize, quantize

SHARD_BYTES = 150_000
Job = Prune | Quantize


def run(job: Job, progress: Progress = quiet) -> Any:
    """Run the job's stage."""
    return prune(job, progress) if isinstance(job, Prune) else quantize(job, progress)


def run_alone(job: Job) -> None:
    """The same in a process that does nothing else, and may have its limit changed."""
    directory.SHARD_BYTES = saving.SHARD_BYTES = SHARD_BYTES
    run(job)
