"""Copies of models with random zeros in their decoders."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def copy_with_zeros(source: Path, output: Path, density: float) -> Path:
    """A copy of the model at `source` of whose decoder weights that share lives, always the same ones."""
    shutil.copytree(source, output)
    tensors = load_file(output / "model.safetensors")
    torch.manual_seed(0)
    for name, weight in tensors.items():
        if "_proj" in name:
            tensors[name] = weight * (torch.rand_like(weight) < density)
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    return output
