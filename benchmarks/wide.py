"""A stack of linears as wide as llama-2-7b's (4096 x 11008), more than 300 MB of them, in memory."""

from dataclasses import dataclass
from typing import Any

from gossamer.measure.synthetic import Image, Recipe, synthetic_image
from gossamer.packed.values import Values

LAYERS = {  # values, sparse: more than 300 MB of 139 M weights each
    ("f32", False): 1,
    ("bf16", False): 2,
    ("i8", False): 3,
    ("i4", False): 5,
    ("f32", True): 2,
    ("bf16", True): 4,
    ("i8", True): 6,
    ("i4", True): 8,
}


@dataclass(frozen=True)
class StackRecipe(Recipe):
    """Layers of llama-2-7b's width whose attention has one small head: 97% of weights are 4096 x 11008."""

    @property
    def config(self) -> dict[str, Any]:
        return super().config | {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 256}


def stack(values: Values, sparsity: float) -> Image:
    layers = LAYERS[values, sparsity > 0]
    return synthetic_image(StackRecipe("llama-2-7b", values, sparsity, layers, vocabulary=256))


def num_weights(image: Image) -> int:
    """Weights of the decoder's matrices."""
    matrices = [entry for name, entry in image.config["linears"].items() if ".layers." in name]
    return sum(entry["rows"] * entry["columns"] for entry in matrices)
