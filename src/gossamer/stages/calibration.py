"""Calibration text for the stages that look at activations."""

from typing import Protocol

import torch
from torch import Tensor

from gossamer.checkpoint import Checkpoint
from gossamer.data import calibration_rows
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
    def offline(self) -> bool: ...


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
