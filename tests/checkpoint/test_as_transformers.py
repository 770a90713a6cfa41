"""A directory that says something twice is read as transformers reads it, or is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gossamer.checkpoint.directory import Checkpoint
from gossamer.engine import LLM
from gossamer.errors import CheckpointError, EngineError
from gossamer.stages.pack import Pack, pack
from gossamer.tools.verify import Verify, verify
from gossamer.training.whole_model import load_model

Tiny = Callable[[str], Path]
Change = Callable[[Path], None]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LINEAR = {"rope_type": "linear", "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 500.0}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def config(**changes: object) -> Change:
    def edit(model: Path) -> None:
        found = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(found | changes))

    return edit


def tensors(change: Callable[[dict[str, torch.Tensor]], object], file: str = "model.safetensors") -> Change:
    def edit(model: Path) -> None:
        found = load_file(model / file)
        change(found)
        save_file(found, model / file, {"format": "pt"})

    return edit


def random_matrix() -> torch.Tensor:
    return torch.randn(320, 48, generator=torch.Generator().manual_seed(0))


def small_matrix() -> torch.Tensor:
    return random_matrix().bfloat16()


def a_second_generation(model: Path) -> None:
    """One file that another run wrote, beside the shards and the index of the first."""
    merged = {name: t + 0.01 for file in model.glob("model-*") for name, t in load_file(file).items()}
    save_file(merged, model / "model.safetensors", {"format": "pt"})


def weights_by_another_name(model: Path) -> None:
    shutil.copyfile(model / "model.safetensors", model / "best.safetensors")
    tensors(lambda t: t[HEAD].zero_())(model)
    config(transformers_weights="best.safetensors")(model)


CASES: dict[str, tuple[str, Change]] = {
    "tied, and a head that differs": ("llama3", tensors(lambda t: t.update({HEAD: random_matrix()}))),
    "tied, and an equal head": ("llama3", tensors(lambda t: t.update({HEAD: t[EMBEDDING].clone()}))),
    "tied, and an equal head of another type": (
        "llama3",
        tensors(lambda t: t.update({EMBEDDING: small_matrix(), HEAD: small_matrix().float()})),
    ),
    "tied, and nothing but a head": ("llama3", tensors(lambda t: t.update({HEAD: t.pop(EMBEDDING)}))),
    "two generations of weights": ("sharded", a_second_generation),
    "weights by another name": ("llama2", weights_by_another_name),
    "a tensor in two shards": (
        "sharded",
        tensors(lambda t: t.update({EMBEDDING: random_matrix()}), "model-00004-of-00004.safetensors"),
    ),
    "two ropes": ("llama2", config(rope_scaling=LINEAR, rope_parameters=DEFAULT)),
    "two ropes and a base": (
        "llama2",
        config(rope_scaling=LINEAR, rope_parameters=DEFAULT, rope_theta=777.0),
    ),
    "two bases": ("llama2", config(rope_parameters=DEFAULT, rope_theta=777.0)),
    "two kinds of rope": ("llama2", config(rope_parameters=DEFAULT | {"type": "linear", "factor": 4.0})),
    "ropes that are empty": ("llama2", config(rope_parameters={}, rope_scaling={}, rope_theta=50.0)),
    "announced sparsity": ("llama2", config(sparsity_config={"format": "dense"})),
}  # fmt: skip


def changed(tiny_llama: Tiny, variant: str, change: Change, directory: Path) -> Path:
    model = Path(shutil.copytree(tiny_llama(variant), directory / "model"))
    change(model)
    return model


def copy(source: Path, output: Path) -> Path:
    """A child directory that a stage wrote without changing a weight."""
    with Checkpoint.open(source).derive(output, Pack(str(source), str(output)), stage="copy") as target:
        target.copy_rest()
    return output


@pytest.mark.parametrize(("variant", "change"), CASES.values(), ids=CASES.keys())
def test_logits_are_those_of_transformers(
    variant: str, change: Change, tiny_llama: Tiny, tmp_path: Path
) -> None:
    model = changed(tiny_llama, variant, change, tmp_path)
    ids_BT = torch.randint(0, 320, (1, 40), generator=torch.Generator().manual_seed(1))

    def transformers_reads(directory: Path) -> torch.Tensor:
        with torch.no_grad():
            return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(ids_BT).logits

    expected = transformers_reads(model)
    with torch.no_grad():
        torch.testing.assert_close(load_model(Checkpoint.open(model))(ids_BT).logits, expected)
    child = copy(model, tmp_path / "child")
    torch.testing.assert_close(transformers_reads(child), expected)
    pack(Pack(str(child), str(tmp_path / "child.goss")))
    for path in (model, child, tmp_path / "child.goss"):
        found = torch.from_numpy(LLM(path, kv_cache_dtype="f32").logits(ids_BT[0].tolist()))
        torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-4)


REFUSED: dict[str, tuple[Change, str]] = {
    "two families": (config(model_type="qwen3"), "model_type is 'qwen3', but architectures has a llama"),
    "a truth value in quotes": (config(tie_word_embeddings="false"), "'false'; expected true or false"),
    "weights elsewhere": (config(transformers_weights="../a.safetensors"), "which is no file of this"),
    "no head": (tensors(lambda t: t.pop(HEAD)), "lm_head.weight is missing.*tie_word_embeddings"),
    "fewer layers": (config(num_hidden_layers=1), r"layers\.1\..* not part of a llama of 1 layers"),
}


@pytest.mark.parametrize(("change", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_contradictions_are_refused_by_name(
    change: Change, says: str, tiny_llama: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(Exception, match=says) as caught:
        Checkpoint.open(changed(tiny_llama, "llama2", change, tmp_path))
    assert caught.type.__module__ == "gossamer.errors"


def test_weights_outside_of_the_directory_are_refused(tiny_llama: Tiny, tmp_path: Path) -> None:
    model = changed(tiny_llama, "llama2", config(transformers_weights="../a.safetensors"), tmp_path)
    shutil.copyfile(model / "model.safetensors", tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="outside of its directory"):
        Checkpoint.open(model)


def test_verify_reads_with_transformers_too(
    tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader of ours that misreads in every place alike is found out."""
    from gossamer.architecture.rope import Rope

    model = changed(tiny_llama, "llama2", config(rope_scaling=LINEAR), tmp_path)
    assert [check.name for check in verify(Verify(str(model))).checks][-1] == "transformers agrees"
    monkeypatch.setattr(Rope, "read", lambda config: Rope(10000.0))
    monkeypatch.setattr("gossamer.modules.decoder.CONFIG_MAPPING", _with_default_rope())
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "another cache"))
    with pytest.raises(EngineError, match="transformers agrees: the engine's logits are"):
        verify(Verify(str(model)))


def _with_default_rope() -> dict[str, type]:
    """transformers' configuration as a reader of ours would have it that does not know `rope_scaling`."""
    from transformers import LlamaConfig

    class Misread(LlamaConfig):
        @classmethod
        def from_dict(cls, config_dict: dict, **how: object) -> LlamaConfig:
            return LlamaConfig.from_dict(config_dict | {"rope_scaling": None, "rope_parameters": None}, **how)

    return {"llama": Misread}


def test_every_stage_carries_the_licence_and_the_model_card_on(tiny_llama: Tiny, tmp_path: Path) -> None:
    carried = ("README.md", "LICENSE", "LICENSE.txt", "LICENCE", "NOTICE.md", "USE_POLICY.md")
    model = changed(tiny_llama, "llama2", lambda m: (m / "LICENSES").mkdir(), tmp_path)
    for name in (*carried, "notes.md"):
        (model / name).write_text(f"{name} of the model")
    child = copy(copy(model, tmp_path / "child"), tmp_path / "grandchild")
    assert all((child / name).read_text() == f"{name} of the model" for name in carried)
    assert not (child / "notes.md").exists()
