"""A BERT of transformers as an ONNX graph, for the peers: MODEL OUT.onnx. Needs torch and onnx."""

import sys
from typing import Any

import torch
from transformers import AutoModel

NAMES = ("input_ids", "attention_mask", "token_type_ids")


class Hidden(torch.nn.Module):
    """The last hidden states alone, of inputs by their places."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model: Any = AutoModel.from_pretrained(model, attn_implementation="eager").eval()

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(NAMES, inputs, strict=True)))[0]


def main() -> None:
    model, output = sys.argv[1:]
    ids_BT = torch.ones(2, 16, dtype=torch.int64)
    axes = {name: {0: "texts", 1: "tokens"} for name in (*NAMES, "last_hidden_state")}
    torch.onnx.export(
        Hidden(model),
        (ids_BT, ids_BT, ids_BT * 0),
        output,
        input_names=[*NAMES],
        output_names=["last_hidden_state"],
        dynamic_axes=axes,
        opset_version=17,
        dynamo=False,
    )


if __name__ == "__main__":
    main()
