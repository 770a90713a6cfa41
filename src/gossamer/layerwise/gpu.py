"""Layers on a GPU: whether it is there, and has the memory.

In bytes, with N tokens of calibration, hidden width D, query width Q, feed-forward width F, vocabulary V, W
weights in the largest layer, and K inputs of its widest linear:

    hidden states  4 D N for each copy of them: the changed model's, its parent's, and what went into a layer
    kept inputs    4 N times Q, or F where 4 F N is at most `KEPT_BYTES`
    layers         4 W for each copy of a layer; where it is trained, 17 W more: gradient, moments, best, mask
    Hessians       64 K^2: those of two sets of rows, in float32, and factoring, in float64
    a piece        of rows on its way through a layer, 4 (4 Q + 4 F + 4 D) a token
    the head       4 D V, to judge by

Runs have held 67 to 96% of their sum, on a device of the tests that counts bytes.
"""

from gossamer.checkpoint.directory import Checkpoint
from gossamer.data.calibration import CalibrationOptions
from gossamer.errors import ConfigError
from gossamer.job.room import size
from gossamer.modules.decoder import KEPT_BYTES, PIECE_TOKENS


def check_gpu(
    source: Checkpoint,
    job: CalibrationOptions,
    epochs: int,
    scheme: str = "none",
    rounded_epochs: int = 0,
) -> None:
    """Raise ConfigError unless the job's GPU is there and has memory for the layers.

    `epochs`: in which layers are trained, pruned or rounded; the others are of `prune`, which rounds as well.
    """
    from gossamer.training.device import check_device
    from gossamer.training.memory import available_bytes

    check_device(job.device, "--device")
    needed = needed_bytes(source, job, epochs, scheme, rounded_epochs)
    available = available_bytes(job.device)
    if available is not None and sum(needed.values()) > available:
        parts = ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in needed.items())
        raise ConfigError(
            f"--device {job.device}: about {size(sum(needed.values()))} of its memory are needed ({parts}), "
            f"{size(available)} are free: lower --num-calibration-samples or --max-seq-length, or leave "
            "--device out"
        )


def needed_bytes(
    source: Checkpoint, job: CalibrationOptions, epochs: int, scheme: str, rounded_epochs: int
) -> dict[str, int]:
    """Bytes of each thing that the head of this module lists; arguments as `check_gpu` has them."""
    rounds, trained = scheme != "none", bool(epochs or rounded_epochs)
    num_states, num_layers = 2 + bool(epochs or rounds) + rounds + bool(rounded_epochs), 2 + rounds
    anatomy = source.architecture
    length = min(job.max_seq_length, anatomy.max_position_embeddings)
    num_tokens, width = job.num_calibration_samples * length, anatomy.hidden_size
    query = anatomy.attention.num_heads * anatomy.attention.head_dim
    inner = max(block.feed_forward.width for block in anatomy.blocks)
    linears = [[(it.rows, it.columns) for it in block.linears.values()] for block in anatomy.blocks]
    weights = max(sum(rows * columns for rows, columns in shapes) for shapes in linears)
    kept = [query] + ([inner] if 4 * inner * num_tokens <= KEPT_BYTES else [])
    return {
        "hidden states": 4 * num_states * width * num_tokens,
        "inputs of a linear": 4 * max(kept) * num_tokens,
        "layers": (4 * num_layers + 17 * trained) * weights,
        "Hessians": 64 * max(columns for shapes in linears for _, columns in shapes) ** 2,
        "a piece of rows": 16 * (query + inner + width) * max(length, min(num_tokens, PIECE_TOKENS)),
        "the head": 0 if anatomy.is_encoder else 4 * width * anatomy.vocab_size,
    }
