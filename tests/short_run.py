"""A model with random zeros and a text, and the short run of training on them that tests interrupt."""

import hashlib
from pathlib import Path

from gossamer.stages.finetune import Finetune
from gossamer.stages.pretrain import Pretrain
from pruned import copy_with_zeros

NUM_STEPS = 12


def model_and_text(place: Path, model: Path, density: float, text: Path) -> Path:
    """`place`, which now holds a copy of the model of that density, and of the text."""
    copy_with_zeros(model, place / "model", density)
    (place / "text.txt").write_text(text.read_text(encoding="utf-8"), encoding="utf-8")
    return place


def short_run(place: Path, output: Path, **changes: object) -> Pretrain:
    """A job of `NUM_STEPS` steps, with a checkpoint after every second one."""
    settings: dict[str, object] = {
        "dataset": (str(place / "text.txt"),),
        "num_tokens": NUM_STEPS * 256,
        "max_length": 32,
        "batch_tokens": 256,
        "learning_rate": 3e-3,
        "precision": "f32",
        "save_steps": 2,
    }
    return Pretrain(str(place / "model"), str(output), **(settings | changes))  # pyright: ignore


def weights(job: Pretrain | Finetune) -> str:
    """sha256 of the file that the job wrote."""
    return hashlib.sha256((Path(job.output_dir) / "model.safetensors").read_bytes()).hexdigest()
