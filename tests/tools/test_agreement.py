"""`verify` of encoders: the engine's hidden states and its head's scores are transformers'."""

from pathlib import Path

import numpy as np
import pytest

from encoders import round_to_int8, save_encoder
from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import CheckpointError, EngineError
from gossamer.gpu import found as gpu
from gossamer.packed.cache import open_packed
from gossamer.packed.from_checkpoint import Types, pack_checkpoint
from gossamer.packed.reader import Packed
from gossamer.tools import agreement
from gossamer.tools.agreement import backends
from gossamer.tools.verify import Verify, verify

ROBERTA = {"max_position_embeddings": 68, "type_vocab_size": 1, "pad_token_id": 0}
TASKS = [
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
]
HEADS = [task for task in TASKS if task not in ("Model", "ForMaskedLM")]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ["Bert", "Roberta", "ModernBert"])
def test_a_directory_and_its_file_agree_with_torch(family: str, task: str, tmp_path: Path) -> None:
    save_encoder(tmp_path, family + task, **(ROBERTA if family == "Roberta" else {}))
    found = [(it.name, it.detail.partition(" of ")[0]) for it in verify(Verify(str(tmp_path))).checks]
    numbers = ["hidden states", *(["head's scores"] if task in HEADS else [])]
    names = ("backends agree", "transformers agrees")
    assert found[-2 * len(numbers) :] == [(name, what) for name in names for what in numbers]


def test_transformers_draws_no_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_encoder(tmp_path)
    capfd.readouterr()
    verify(Verify(str(tmp_path)))
    assert "Loading" not in "".join(capfd.readouterr())


def test_an_int8_encoder_agrees_with_torch_whose_inputs_are_rounded(tmp_path: Path) -> None:
    save_encoder(tmp_path, "BertForTokenClassification")
    round_to_int8(tmp_path, 0.5)
    packed = open_packed(tmp_path)
    checks = verify(Verify(str(packed.path))).checks
    assert [it.name for it in checks][-2:] == ["backends agree"] * 2


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_sparse_linears_as_on_a_gpu_agree(
    sparsity: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the operator's definition for CPUs; `verify` asks a GPU where there is one."""
    save_encoder(tmp_path, "BertForTokenClassification")
    round_to_int8(tmp_path, sparsity)
    pack_checkpoint(Checkpoint.open(tmp_path), tmp_path / "model.goss", Types(embedding="keep"))
    packed, ids = Packed.open(tmp_path / "model.goss"), [2, 7, 11, 5, 3]
    monkeypatch.setattr(gpu, "why_no_gpu", lambda: "")
    monkeypatch.setattr(gpu, "check_kernels", lambda: None)
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    found = agreement._sparse_numbers(tmp_path, packed, ids)
    for name, expected in agreement._encoder_numbers(packed, ids).items():
        assert np.linalg.norm(found[name] - expected) <= 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["BertModel", "RobertaForQuestionAnswering"])
def test_other_weights_do_not_agree(name: str, tmp_path: Path) -> None:
    config = ROBERTA if name.startswith("Roberta") else {}
    for seed in (0, 1):
        save_encoder(tmp_path / str(seed), name, seed, **config)
    with pytest.raises(EngineError, match="transformers agrees: the engine's hidden states are"):
        [*backends(open_packed(tmp_path / "0"), tmp_path / "1")]


def test_zeros_since_the_parent_are_counted(tmp_path: Path) -> None:
    for name in ("parent", "child"):
        save_encoder(tmp_path / name)
    round_to_int8(tmp_path / "child", 0.5)
    job = Verify(str(tmp_path / "child"), parent=str(tmp_path / "parent"))
    assert "zeros kept" in [it.name for it in verify(job).checks]
    job = Verify(str(tmp_path / "parent"), parent=str(tmp_path / "child"), skip_engine=True)
    with pytest.raises(CheckpointError, match=r"lost \d+ of the zeros of"):
        verify(job)
