"""A checkpoint between two layers: hidden states, what was written of the output, and the figures so far.

In `checkpoint-N`, N being the number of finished layers (see `gossamer.checkpoint.resumable`):

    states.safetensors     hidden states of all rows, in float32
    pending.safetensors    finished tensors that are not in one of the output's shards yet
    checkpoint.json        names of these and of those in shards, the metrics so far, and the seconds

Shards lie in OUT.partial itself and are as they will be in the output, so that each tensor of a large model
is stored at most twice. One checkpoint is kept; a run resumes only with as many threads as it began with,
because sums of other parts round differently.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gossamer import _native
from gossamer.checkpoint.directory import ShardWriter, library_versions
from gossamer.checkpoint.resumable import Checkpoints, RunIdentity, sync
from gossamer.checkpoint.weights import read_header, write_safetensors
from gossamer.errors import CheckpointError
from gossamer.layerwise.saving import Saving

STATES, PENDING = "states.safetensors", "pending.safetensors"
WITHOUT_EFFECT = ("model", "output_dir", "dataset", "save_seconds", "offline", "threads")  # paths, and how


def save(saving: Saving, num_layers: int) -> None:
    """Write `checkpoint-N` and delete the one before; OSError where the disk fails, which changes nothing."""
    checkpoints, shards = _checkpoints(saving), saving.output.shards
    checkpoints.discard_staged()
    folder = checkpoints.staged(num_layers)
    folder.mkdir(parents=True)
    try:
        states = {name: (state.cpu().numpy(), "F32") for name, state in saving.states.items()}
        write_safetensors(folder / STATES, states)
        write_safetensors(folder / PENDING, shards.pending)
        for index in range(len(shards.shards)):
            sync(shards.file(index))
        found = {
            "written": sorted(saving.output.written),
            "shards": shards.shards,
            "total_bytes": shards.total_bytes,
            "pending": list(shards.pending),
            "metrics": saving.output.metrics,
            "seconds": saving.seconds(),
        }
        checkpoints.publish(num_layers, found)
    finally:
        checkpoints.discard_staged()


def load(saving: Saving) -> tuple[int, float, list[str]]:
    """Take up the newest checkpoint: fills the states and what `output` knows.

    Returns the number of finished layers, the seconds that they took, and notes for the user. Raises what
    `Checkpoints.newest_sound` does.
    """
    checkpoints, output = _checkpoints(saving), saving.output
    num_layers, notes = checkpoints.newest_sound()
    found, folder = checkpoints.recorded(num_layers), checkpoints.path(num_layers)
    stored = read_header(folder / STATES)
    for name, state in saving.states.items():
        for row_TD, stored_TD in zip(state, stored[name].array(), strict=True):
            row_TD.copy_(torch.from_numpy(stored_TD.copy()))
    pending = read_header(folder / PENDING)
    for index in range(len(found["shards"])):
        _give_back_its_name(output.shards, index)
    output.written = set(found["written"])
    output.shards.shards, output.shards.total_bytes = found["shards"], found["total_bytes"]
    output.shards.pending = {
        name: (pending[name].array().copy(), pending[name].dtype) for name in found["pending"]
    }
    output.metrics |= found["metrics"] | ({"notes": notes} if notes else {})
    return num_layers, found["seconds"], notes


def _give_back_its_name(shards: ShardWriter, index: int) -> None:
    """Rename a shard whose run was interrupted when it had given it its last name already."""
    if (file := shards.file(index)).exists():
        return
    last: Sequence[Path] = list(file.parent.glob(f"{file.stem}-of-*.safetensors"))
    if not last and not index:
        last = list(file.parent.glob("model.safetensors"))
    if not last:
        raise CheckpointError(f"{file} is missing, which the interrupted run wrote; --overwrite starts anew")
    last[0].rename(file)


def _checkpoints(saving: Saving) -> Checkpoints:
    output = saving.output
    options = {name: value for name, value in output.job.items() if name not in WITHOUT_EFFECT}
    must_match: dict[str, Any] = {
        "stage": output.stage,
        **options,
        "num_threads": torch.get_num_threads(),
        "model": output.parent.hash,
        "data": hashlib.sha256(saving.ids_BT.numpy().tobytes()).hexdigest(),
    }
    may_differ = {
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "native_instructions": _native.isa(),
        **library_versions(),
    }
    return Checkpoints(output.path, RunIdentity(must_match, may_differ), num_kept=1)
