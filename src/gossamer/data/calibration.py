"""Calibration text for the stages that look at activations, and the options of these stages."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gossamer.checkpoint.directory import Checkpoint
from gossamer.data.sources import documents, parse_weight
from gossamer.errors import CalibrationError, ConfigError
from gossamer.job.options import ThreadOptions, option
from gossamer.tokens.encoder import Encoder


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions(ThreadOptions):
    """What `Prune` and `Quantize` share."""

    dataset: tuple[str, ...] = option(help="calibration text: SRC[@WEIGHT]...")
    num_calibration_samples: int = option(128, help="rows of calibration text; an eighth is kept to judge by")
    max_seq_length: int = option(2048, help="tokens a row; the model's context where that is shorter")
    block_size: int = option(
        128, help="inputs of a linear that are treated as one block, before its error moves on to the rest"
    )
    dampening_frac: float = option(0.01, help="share of the Hessian's mean diagonal added to its diagonal")
    device: str = option("cpu", help="where layers are computed: cpu, or a GPU such as cuda or cuda:1")
    seed: int = option(0, help="order of several sources' texts, and of the rows where layers are trained")
    save_seconds: float | None = option(
        None,
        help="least time between two checkpoints, which are saved after a layer; 0: after each, inf: never "
        "(default: 10, or 30 times what saving takes)",
    )
    resume: bool = option(False, help="go on with the interrupted run in OUTPUT_DIR.partial")
    offline: bool = option(False, help="never touch the network")


def check_options(job: CalibrationOptions) -> None:
    """Raise ConfigError for a number that means nothing; take the threads that are asked for."""
    for flag, value, least, why in (
        ("--num-calibration-samples", job.num_calibration_samples, 2, ": an eighth of the rows is held out"),
        ("--max-seq-length", job.max_seq_length, 2, ""),
        ("--block-size", job.block_size, 1, ""),
        ("--dampening-frac", job.dampening_frac, 0, ""),
    ):
        if not least <= value < float("inf"):
            raise ConfigError(f"{flag} is {value:g}; expected at least {least}{why}")
    if job.save_seconds is not None and not job.save_seconds >= 0:
        raise ConfigError(f"--save-seconds is {job.save_seconds:g}; expected at least 0")
    if not 0 <= job.seed < 1 << 64:
        raise ConfigError(f"--seed is {job.seed}; expected a number from 0 to {(1 << 64) - 1}")
    if not job.dataset:
        raise ConfigError("--dataset names no calibration text; give at least one SRC")
    if job.threads is not None:
        from gossamer.job.threads import use_threads

        use_threads(job.threads)


def calibration_ids(source: Checkpoint, job: CalibrationOptions) -> Tensor:
    """Token ids [B, T], T at most the model's context; raises CalibrationError where the text is too short.

    Every row begins with BOS, as every sequence does at inference: much attention goes to that one token.
    An encoder's also end as its texts do.
    """
    tokenizer, num_rows = Encoder.open(source.path), job.num_calibration_samples
    length = min(job.max_seq_length, source.architecture.max_position_embeddings)
    needed = num_rows * length
    if source.architecture.is_encoder:
        from gossamer.tokens.texts import marks

        bos_id, *end_ids = marks(tokenizer)
    else:
        bos_id, end_ids = tokenizer.required_bos(), []
    pieces: list[np.ndarray] = []
    num_tokens = 0
    for text in _texts(job):
        ids = [bos_id, *tokenizer.encode(text, bos=False)][: needed - num_tokens]
        pieces.append(np.array(ids, dtype=np.int64))
        num_tokens += len(ids)
        if num_tokens == needed:
            break
    if num_tokens < needed:
        raise CalibrationError(
            f"calibration text {', '.join(job.dataset)} holds {num_tokens} tokens, {needed} are needed "
            f"({num_rows} samples of {length}); give a longer text or lower "
            "--num-calibration-samples or --max-seq-length"
        )
    ids_BT = torch.from_numpy(np.concatenate(pieces).reshape(num_rows, length))
    ids_BT[:, 0] = bos_id
    ids_BT[:, length - len(end_ids) :] = torch.tensor(end_ids, dtype=torch.int64)
    return ids_BT


def _texts(job: CalibrationOptions) -> Iterator[str]:
    """The head of one source, or a mixture of several."""
    if len(job.dataset) == 1:
        return documents(parse_weight(job.dataset[0])[0], offline=job.offline)
    from gossamer.data.mixture import Mixture

    return (piece.text for piece in Mixture(job.dataset, job.seed, repeat=True, offline=job.offline))
