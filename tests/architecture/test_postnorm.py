"""The anatomy of an encoder names exactly the tensors that transformers' models have, in their shapes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForPreTraining, BertModel

from encoders import SIZES, save_encoder
from gossamer.architecture.config import Config
from gossamer.architecture.encoder import TASKS, labels
from gossamer.architecture.families import read_anatomy
from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import CheckpointError, UnsupportedError


@pytest.mark.parametrize("ending", TASKS)
@pytest.mark.parametrize(("family", "offset"), [("Bert", 0), ("Roberta", 2), ("XLMRoberta", 2)])
def test_names_and_shapes_are_those_of_transformers(
    tmp_path: Path, family: str, offset: int, ending: str
) -> None:
    config = {"num_labels": 5} if ending in ("ForSequenceClassification", "ForTokenClassification") else {}
    model = save_encoder(tmp_path, family + ending, **config)
    source = Checkpoint.open(tmp_path)
    anatomy = source.architecture
    assert source.names and set(source.names) == set(load_file(tmp_path / "model.safetensors"))
    assert {name: source.entries[name].shape for name in source.names} == {
        name: tuple(it.shape) for name, it in model.state_dict().items() if name in source.names
    }
    assert anatomy.is_encoder and anatomy.max_position_embeddings == 66 - offset
    assert (anatomy.task, anatomy.model_type) == (TASKS[ending], model.config.model_type)
    layer = model.base_model.encoder.layer[0]
    assert {it.name for it in anatomy.blocks[0].linears.values()} == {
        name for name, module in layer.named_modules() if hasattr(module, "out_features")
    }


def test_pooler_may_be_missing_and_positions_ids_are_ignored(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: it for name, it in load_file(file).items() if not name.startswith("pooler")}
    save_file(tensors | {"embeddings.position_ids": torch.arange(66)[None]}, file)
    assert set(Checkpoint.open(tmp_path).names) == set(tensors)


def test_names_of_the_first_berts_are_read(tmp_path: Path) -> None:
    """bert-base-uncased itself has gamma and beta, more heads, and one of them twice."""
    save_encoder(tmp_path, "BertForMaskedLM")
    whole = {**BertForPreTraining(BertModel.config_class(**SIZES)).state_dict()}
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {}
    for name, value in whole.items():
        first, dot, last = name.rpartition("LayerNorm")
        tensors[first + old[dot + last] if dot else name] = value.clone().contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    source = Checkpoint.open(tmp_path)
    name = "bert.encoder.layer.1.output.LayerNorm.weight"
    np.testing.assert_array_equal(source.float32(name), whole[name])
    assert not any("pooler" in name or "decoder" in name for name in source.names)


def test_labels_are_those_of_the_configuration() -> None:
    assert labels(Config({"id2label": {"0": "no", "1": "yes", "2": "who knows"}}, "it"))[2] == "who knows"
    assert labels(Config({}, "it")) == ["LABEL_0", "LABEL_1"]
    with pytest.raises(CheckpointError, match="expected a name for each number"):
        labels(Config({"id2label": {"0": "no", "2": "yes"}}, "it"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu_new"}, "found hidden_act = 'gelu_new'; supported: 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "found position_embedding_type = 'relative_key'"),
        ({"is_decoder": True}, "found is_decoder = True"),
        ({"architectures": ["BertForNextSentencePrediction"]}, "found architecture BertForNextSentence"),
        ({"architectures": ["LlamaModel"]}, "found architecture LlamaModel; supported"),
    ],
)
def test_other_encoders_are_refused(change: dict[str, object], words: str) -> None:
    config = {"architectures": ["BertModel"], "model_type": "bert", "layer_norm_eps": 1e-12, **SIZES}
    assert read_anatomy(config).is_encoder
    with pytest.raises(UnsupportedError, match=words):
        read_anatomy(config | change)
