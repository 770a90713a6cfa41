"""What rows that nothing was calibrated on say of a changed model: perplexity, or an encoder's similarity."""

from typing import Any

import torch
from torch import Tensor, nn

from gossamer.checkpoint.directory import Checkpoint
from gossamer.layerwise.states import States
from gossamer.modules.decoder import empty_model, model_config, tensor

HEAD_TOKENS = 256  # a row of logits is as long as the vocabulary


def quality(source: Checkpoint, held_out: States, ids_BT: Tensor) -> dict[str, float]:
    """Of the hidden states after the last layer: `parent_perplexity` and `perplexity`.

    An encoder foretells nothing; of it `similarity`, the mean cosine between what becomes of a row in both
    models: its vector as `Pooling` makes it, or where the head is another one, each of its tokens.
    """
    if source.architecture.is_encoder:
        from gossamer.modules.encoder import similarity

        return {"similarity": similarity(source, held_out.ours_BTD, held_out.parent_BTD)}
    pair = (held_out.parent_BTD, held_out.ours_BTD)
    before, after = (_perplexity(source, hidden_BTD, ids_BT) for hidden_BTD in pair)
    return {"parent_perplexity": before, "perplexity": after}


def in_words(measured: dict[str, Any]) -> tuple[str, str]:
    """What `quality` measured, and how it came out, for people."""
    if "similarity" in measured:
        return "similarity", f"{measured['similarity']:.4f}"
    return "perplexity", f"{measured['parent_perplexity']:.2f} -> {measured['perplexity']:.2f}"


@torch.no_grad()
def _perplexity(source: Checkpoint, hidden_BTD: Tensor, ids_BT: Tensor) -> float:
    """How well hidden states after the last layer foretell each row's tokens, the first one left out."""
    anatomy, total = source.architecture, 0.0
    assert anatomy.final_norm is not None
    model = empty_model(model_config(anatomy, source.config))
    norm = model.get_submodule(anatomy.final_norm.name).float().to_empty(device=hidden_BTD.device)
    norm.weight.copy_(tensor(source, f"{anatomy.final_norm.name}.weight"))
    w_VD = tensor(source, f"{anatomy.logits}.weight").to(hidden_BTD.device).float()
    h_ND, next_N = hidden_BTD[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten().to(hidden_BTD.device)
    for part_ND, ids_N in zip(h_ND.split(HEAD_TOKENS), next_N.split(HEAD_TOKENS), strict=True):
        total += nn.functional.cross_entropy(norm(part_ND) @ w_VD.T, ids_N, reduction="sum").item()
    return torch.tensor(total / len(next_N), dtype=torch.double).exp().item()
