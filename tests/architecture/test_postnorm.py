"""The anatomy of an encoder names exactly the tensors that transformers' models have, in their shapes."""

from typing import Any

import pytest
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from gossamer.architecture import postnorm
from gossamer.architecture.config import Config

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 18,
}


@pytest.mark.parametrize(
    ("config", "model", "offset"),
    [(BertConfig(**SIZES), BertModel, 0), (RobertaConfig(**SIZES), RobertaModel, 2)],
)
def test_names_and_shapes_are_those_of_transformers(config: Any, model: Any, offset: int) -> None:
    read = Config(config.to_dict(), "config.json")
    anatomy = postnorm.model(read, config.model_type, prefix="", offset=offset, beside={})
    loaded = model(config, add_pooling_layer=False)
    assert anatomy.tensor_shapes == {name: tuple(it.shape) for name, it in loaded.state_dict().items()}
    assert anatomy.is_encoder and anatomy.max_position_embeddings == 18 - offset
    assert len(anatomy.linear_names()) == 2 * 6
    layer = loaded.encoder.layer[0]
    assert {it.name for it in anatomy.blocks[0].linears.values()} == {
        name for name, module in layer.named_modules() if hasattr(module, "out_features")
    }
