"""Calibration text for the stages that look at activations."""

from typing import Protocol

import torch
from torch import Tensor

from gossamer.checkpoint.directory import Checkpoint
from gossamer.data.rows import calibration_rows
from gossamer.errors import ConfigError
from gossamer.tokens import Tokenizer


class Calibrated(Protocol):
    """The options that `prune` and `quantize` share."""

    @property
    def dataset(self) -> tuple[str, ...]: ...
    @property
    def num_calibration_samples(self) -> int: ...
    @property
    def max_seq_length(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def dampening_frac(self) -> float: ...
    @property
    def offline(self) -> bool: ...


def check_options(job: Calibrated) -> None:
    """Raise ConfigError for a number that means nothing."""
    for flag, value, least in (
        ("--num-calibration-samples", job.num_calibration_samples, 1),
        ("--max-seq-length", job.max_seq_length, 2),
        ("--block-size", job.block_size, 1),
        ("--dampening-frac", job.dampening_frac, 0),
    ):
        if not least <= value < float("inf"):
            raise ConfigError(f"{flag} is {value:g}; expected at least {least}")
    if not job.dataset:
        raise ConfigError("--dataset names no calibration text; give at least one SRC")


def calibration_ids(source: Checkpoint, job: Calibrated) -> Tensor:
    """Token ids [B, T], T at most the model's context; raises CalibrationError where the text is too short.

    Every row begins with BOS, as every sequence does at inference: much attention goes to that one token.
    """
    tokenizer = Tokenizer.open(source.path)
    length = min(job.max_seq_length, source.architecture.max_position_embeddings)
    ids_BT = torch.from_numpy(
        calibration_rows(job.dataset, tokenizer, job.num_calibration_samples, length, offline=job.offline)
    )
    if tokenizer.bos_id is not None:
        ids_BT[:, 0] = tokenizer.bos_id
    return ids_BT
