"""Directories that people bring and that do not fit: each is told what it is, and what to give instead."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file

from gossamer import cli
from gossamer.checkpoint.directory import Checkpoint

Tiny = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]
Change = Callable[[Path], object]
Q_PROJ = "model.layers.0.self_attn.q_proj"
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea423c2713d436b5ee50593a9640e0\nsize 9\n"
)
TEXT = Path(__file__).read_text(encoding="utf-8")


def edit(file: str, **changes: object) -> Change:
    def change(model: Path) -> None:
        found = json.loads((model / file).read_text()) if (model / file).exists() else {}
        (model / file).write_text(json.dumps(found | changes))

    return change


def config(**changes: object) -> Change:
    return edit("config.json", **changes)


def tensors(change: Callable[[Tensors], Tensors]) -> Change:
    """The weights replaced; what `change` returns counts."""

    def rewrite(model: Path) -> None:
        save_file(
            change(load_file(model / "model.safetensors")), model / "model.safetensors", {"format": "pt"}
        )

    return rewrite


def renamed(prefix: str) -> Change:
    return tensors(lambda found: {prefix + name: tensor for name, tensor in found.items()})


def instead(*parts: str) -> Change:
    """Other tensors in the place of a linear's weight."""

    def change(found: Tensors) -> Tensors:
        rest = {name: tensor for name, tensor in found.items() if name != f"{Q_PROJ}.weight"}
        return rest | {f"{Q_PROJ}.{part}": torch.zeros(4, dtype=torch.int32) for part in parts}

    return tensors(change)


def inner_model(found: Tensors) -> Tensors:
    return {name.removeprefix("model."): tensor for name, tensor in found.items() if name != "lm_head.weight"}


def int8(found: Tensors) -> Tensors:
    return found | {f"{Q_PROJ}.weight": found[f"{Q_PROJ}.weight"].to(torch.int8)}


def written(file: str, content: bytes) -> Change:
    return lambda model: (model / file).write_bytes(content)


def weights_named(name: str, *, config_too: bool = False) -> Change:
    def change(model: Path) -> None:
        (model / "model.safetensors").rename(model / name)
        if config_too:
            (model / "config.json").unlink()

    return change


def in_a_folder(name: str) -> Change:
    def change(model: Path) -> None:
        files = list(model.iterdir())
        (model / name).mkdir(parents=True)
        for file in files:
            file.rename(model / name / file.name)

    return change


def adapter_alone(model: Path) -> None:
    edit("adapter_config.json", base_model_name_or_path="me/base")(model)
    (model / "config.json").unlink()


def index_of(**weight_map: object) -> Change:
    def change(model: Path) -> None:
        (model / "model.safetensors").unlink()
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


MISFITS: dict[str, tuple[Change, list[str]]] = {
    "torch.compile": (renamed("_orig_mod."), ["torch.compile", "model._orig_mod"]),
    "DataParallel": (renamed("module."), ["DataParallel", "model.module"]),
    "an adapter inside": (renamed("base_model.model."), ["PEFT adapter", "merge_and_unload"]),
    "LoRA tensors": (instead("base_layer.weight", "lora_A.b.weight"), ["PEFT adapter", "merge"]),
    "the inner model": (tensors(inner_model), ["without its head", "ForCausalLM"]),
    "GPTQ": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        ["GPTQ (4 bits)", "give the model that was quantized"],
    ),
    "GPTQ without a word": (instead("qweight", "g_idx"), ["GPTQ", "give the model that was quantized"]),
    "AWQ": (config(quantization_config={"quant_method": "awq", "w_bit": 4}), ["AWQ (4 bits)"]),
    "AWQ without a word": (instead("qweight", "qzeros"), ["quantized by GPTQ or AWQ"]),
    "bitsandbytes": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        ["bitsandbytes (8 bits)"],
    ),
    "bitsandbytes without a word": (instead("weight.absmax", "weight.quant_state.nf4"), ["bitsandbytes"]),
    "packed integers": (
        config(quantization_config={"quant_method": "compressed-tensors", "format": "pack-quantized"}),
        ["format = 'pack-quantized'", "supported: compressed-tensors int-quantized W8A8"],
    ),
    "a bitmask": (instead("compressed", "bitmask"), ["stored compressed", "gossamer import"]),
    "int8 without scales": (tensors(int8), ["weight_scale is missing", "the weight is int8"]),
    "an adapter beside": (edit("adapter_config.json"), ["adapter_config.json", "beside the model", "merge"]),
    "an adapter alone": (adapter_alone, ["PEFT adapter for me/base", "merge_and_unload"]),
    "pickles": (weights_named("pytorch_model.bin"), ["pytorch_model.bin", "supported: safetensors"]),
    "Llama's original files": (
        lambda m: (weights_named("consolidated.00.pth", config_too=True)(m), edit("params.json")(m)),
        ["Llama's original files"],
    ),
    "TensorFlow": (weights_named("tf_model.h5"), ["weights of TensorFlow"]),
    "a GGUF inside": (weights_named("model.Q4_0.gguf", config_too=True), ["GGUF", "gossamer import"]),
    "a variant": (weights_named("model.fp16.safetensors"), ["found model.fp16.safetensors; rename"]),
    "no index": (weights_named("model-00001-of-00002.safetensors"), ["restore the index"]),
    "an index of numbers": (index_of(a=5), ["index.json: names 5 as a file"]),
    "an index of elsewhere": (index_of(a="../a.safetensors"), ["outside of its directory"]),
    "a folder of the cache": (in_a_folder("snapshots/abc"), ["hub's cache", "snapshots/abc"]),
    "a folder of runs": (in_a_folder("checkpoint-9"), ["but in", "checkpoint-9"]),
    "a weights pointer": (written("model.safetensors", POINTER), ["model.safetensors", "git lfs pull"]),
    "a config pointer": (written("config.json", POINTER), ["config.json", "git lfs pull"]),
    "a tokenizer pointer": (written("tokenizer.json", POINTER), ["tokenizer.json", "git lfs pull"]),
    "a template pointer": (written("chat_template.jinja", POINTER), ["chat_template.jinja", "git lfs pull"]),
    "a template in Latin-1": (written("chat_template.jinja", b"na\xefve"), ["not UTF-8"]),
    "a config without end": (written("config.json", b"[" * 200_000), ["config.json", "not readable as JSON"]),
    "a token without a row": (
        edit("tokenizer_config.json", pad_token="<pad>"),
        ["'<pad>' has the id 320", "320 rows"],
    ),
    "an end that is no id": (edit("generation_config.json", eos_token_id="x"), ["eos_token_id is 'x'"]),
    "an id of many digits": (
        edit("tokenizer_config.json", added_tokens_decoder={"1" * 5000: {"content": "a"}}),
        ["added_tokens_decoder", "expected ids"],
    ),
    "added tokens without ids": (edit("added_tokens.json", a="b"), ["'a' has the id 'b'"]),
    "half a character": (edit("tokenizer_config.json", eos_token="\ud800"), ["eos_token", "expected a text"]),
}  # fmt: skip


@pytest.mark.parametrize(("change", "says"), MISFITS.values(), ids=MISFITS.keys())
def test_what_does_not_fit_is_told_what_it_is(
    change: Change, says: list[str], tiny_llama: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(copytree(tiny_llama("llama2"), tmp_path / "model"))
    change(model)
    assert cli.call(["pack", str(model), "-o", str(tmp_path / "model.goss")]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert all(phrase in message for phrase in says), message
    assert not (tmp_path / "model.goss").exists()


@pytest.mark.parametrize("suffix", ["goss", "safetensors", "txt"])
def test_a_file_is_no_directory(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / f"a.{suffix}").write_text("text")
    assert cli.call(["pack", str(tmp_path / f"a.{suffix}"), "-o", str(tmp_path / "b.goss")]) == 2
    expected = {"goss": "packed from", "safetensors": "directory that it lies in", "txt": "but a file"}
    assert expected[suffix] in capsys.readouterr().err.replace("\n", " ")


FIT: dict[str, Change] = {
    "no quantization": config(quantization_config=None),
    "announced sparsity": config(
        quantization_config={"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}}
    ),
    "old buffers": tensors(lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}),
    "a licence that is not there": lambda m: (m / "LICENSE").symlink_to("/nowhere/LICENSE"),
    "half a character in the config": config(_name_or_path="\ud800"),
    "odd lists of tokens": lambda m: (
        edit("tokenizer_config.json", extra_special_tokens=None)(m),
        edit("special_tokens_map.json", extra_special_tokens=["</s>"])(m),
    ),
}


@pytest.mark.parametrize("change", FIT.values(), ids=FIT.keys())
def test_what_only_looks_odd_goes_through(change: Change, tiny_llama: Tiny, tmp_path: Path) -> None:
    model = Path(copytree(tiny_llama("llama2"), tmp_path / "model"))
    change(model)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    calibrate = [
        "--dataset",
        f"{tmp_path}/text.txt",
        "--num-calibration-samples",
        "2",
        "--max-seq-length",
        "32",
    ]
    pruned = tmp_path / "pruned"
    assert cli.call(["prune", str(model), "-o", str(pruned), "--method", "magnitude", *calibrate]) == 0
    assert cli.call(["pack", str(pruned), "-o", str(tmp_path / "model.goss")]) == 0
    assert cli.call(["run", str(tmp_path / "model.goss"), "hi", "--max-tokens", "2"]) == 0
    assert not {"sparsity_config", "quantization_config"} & Checkpoint.open(pruned).config.keys()


def test_a_damaged_record_shows_before_the_work(
    tiny_llama: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(copytree(tiny_llama("llama2"), tmp_path / "model"))
    edit("gossamer.json", lineage=5)(model)
    for command in (
        ["prune", str(model), "-o", str(tmp_path / "out"), "--dataset", "a.txt"],
        ["inspect", str(model)],
    ):
        assert cli.call(command) == 2
        assert "gossamer.json: lineage is 5" in capsys.readouterr().err.replace("\n", " ")
