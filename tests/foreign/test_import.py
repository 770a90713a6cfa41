"""`import` of tiny models: the directory that a GGUF file was made of comes back; the rest is refused."""

import itertools
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import metadata_load
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from foreign.gguf_files import bpe, write_model
from gossamer import cli
from gossamer.architecture import families
from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import CheckpointError, GossamerError, UnsupportedError
from gossamer.foreign import gguf_file
from gossamer.stages import import_model as stage
from gossamer.stages.import_model import Import, import_model
from gossamer.tokens.tokenizer import Tokenizer
from gossamer.tools.inspect import Inspect, inspect
from gossamer.tools.verify import Verify, verify
from llamas import LINEAR_ROPE, LLAMA3_ROPE, save_random

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 104,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 4,
    "rms_norm_eps": 1e-5,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 16.0,
    "original_max_position_embeddings": 128,
}
CONFIGS: dict[str, tuple[str, PretrainedConfig, dict[str, Any]]] = {
    "llama": ("llama", LlamaConfig(**SIZES), {}),
    "tied llama3 rope": (
        "llama",
        LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE),
        {},
    ),
    "linear rope": (
        "llama",
        LlamaConfig(**SIZES, rope_parameters=LINEAR_ROPE),
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
    ),
    "yarn rope": (
        "llama",
        LlamaConfig(**SIZES, rope_parameters=YARN_ROPE),
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 128,
            "llama.rope.scaling.yarn_beta_fast": 16.0,
        },
    ),
    "mistral": ("llama", MistralConfig(**SIZES, sliding_window=None), {}),
    "mistral's window": (
        "llama",
        MistralConfig(**SIZES, sliding_window=32),
        {"llama.attention.sliding_window": 32},
    ),
    "qwen2": ("qwen2", Qwen2Config(**SIZES, tie_word_embeddings=True), {}),
    "qwen3": ("qwen3", Qwen3Config(**SIZES), {}),
}
VOCABULARY = bpe("llama-bpe", 319)
K_QUANTS = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}  # where scales lie


def directory(name: str, path: Path) -> Path:
    """A random model of this configuration; skips where its family, or a part of it, is not supported yet."""
    _, config, _ = CONFIGS[name]
    fields = config.to_dict() | {
        "architectures": [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    }
    try:
        families.read_anatomy(fields)
    except UnsupportedError as error:
        pytest.skip(str(error))
    return save_random(config, path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of a random Llama."""
    folder = tmp_path_factory.mktemp("llama")
    return write_model(folder / "model.gguf", directory("llama", folder / "source"), "llama", VOCABULARY)


def test_the_licence_that_a_file_names_goes_along(tmp_path: Path) -> None:
    """As a model card, which travels with a directory, and as the one line that `inspect` shows."""
    source = directory("llama", tmp_path / "source")
    about = {"general.license": "apache-2.0", "general.name": "Tiny: a model", "general.organization": "Org"}
    link = {"general.license.link": "https://example.org/#terms"}
    for name, more, license in (("plain", {}, None), ("named", about | link, "apache-2.0")):
        file = write_model(tmp_path / f"{name}.gguf", source, "llama", VOCABULARY, **more)
        import_model(Import(str(file), str(tmp_path / name)))
        assert inspect(Inspect(str(tmp_path / name))).license == license
    assert not (tmp_path / "plain" / "README.md").exists()
    card = (tmp_path / "named" / "README.md").read_text()
    assert metadata_load(tmp_path / "named" / "README.md") == {
        "license": "apache-2.0",
        "license_link": "https://example.org/#terms",
    }
    assert card.endswith("# Tiny: a model\n\nA model by Org, imported from named.gguf.\n")


def logits(path: Path) -> torch.Tensor:
    ids = torch.arange(200).reshape(2, 100)
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_weights_give_the_same_bits(name: str, tmp_path: Path) -> None:
    source, (architecture, _, more) = directory(name, tmp_path / "source"), CONFIGS[name]
    file = write_model(tmp_path / "model.gguf", source, architecture, VOCABULARY, **more)
    import_model(Import(str(file), str(tmp_path / "out")))
    parent, child = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    assert parent.names == child.names
    for tensor in parent.names:
        np.testing.assert_array_equal(parent.raw(tensor), child.raw(tensor), err_msg=tensor)
    assert torch.equal(logits(source), logits(tmp_path / "out"))
    verify(Verify(str(tmp_path / "out"), parent=str(source)))


def test_what_the_directory_says(llama: Path, tmp_path: Path) -> None:
    """Sizes, an epsilon without float32's digits, the ids of special tokens, where it came from."""
    import_model(Import(str(llama), str(tmp_path / "out")))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, [4, 2])
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [4, 2]
    child = Checkpoint.open(tmp_path / "out")
    assert child.manifest
    assert [step["stage"] for step in child.manifest["lineage"]] == ["import"]
    tokenizer = Tokenizer.open(tmp_path / "out")
    assert tokenizer.special_tokens["eos_token"] == "<|im_end|>"
    assert tokenizer.eos_ids == {2, 4}
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("Hello 1234 <|im_start|>x<web> y", " \n\n naïve", "ก็ 😀"):
        assert tokenizer.encode(text) == theirs.encode(text)
        assert tokenizer.decode(tokenizer.encode(text, bos=False), skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", *K_QUANTS])
def test_every_type_is_decoded_as_gguf_decodes_it(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    config = LlamaConfig(**SIZES | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64})
    source = save_random(config, tmp_path / "source")
    if kind in K_QUANTS:
        monkeypatch.setattr(gguf, "quantize", random_blocks)
    file = write_model(tmp_path / "model.gguf", source, "llama", VOCABULARY, gguf.GGMLQuantizationType[kind])
    import_model(Import(str(file), str(tmp_path / "out")))
    child = Checkpoint.open(tmp_path / "out")
    for tensor in gguf.GGUFReader(file).tensors:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name == "blk.1.attn_q.weight":  # the two numbers that rope turns, half a head apart again
            expected = np.concatenate(
                [expected[head : head + 64][i::2] for head in range(0, 256, 64) for i in (0, 1)]
            )
            np.testing.assert_array_equal(child.raw("model.layers.1.self_attn.q_proj.weight"), expected)
        if tensor.name == "blk.0.ffn_down.weight":
            np.testing.assert_array_equal(child.raw("model.layers.0.mlp.down_proj.weight"), expected)
        if tensor.name == "token_embd.weight":
            np.testing.assert_array_equal(child.raw("model.embed_tokens.weight"), expected)


def random_blocks(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Blocks of random bits with scales of about 0.01, of a type that `gguf` cannot quantize to."""
    if kind == gguf.GGMLQuantizationType.F32:
        return values
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    found = rng.integers(0, 256, (values.size // block, block_bytes), dtype=np.uint8)
    for offset in K_QUANTS[kind.name]:
        scales = rng.normal(0, 0.01, len(found)).astype(np.float16)
        found[:, offset : offset + 2] = scales[:, None].view(np.uint8)
    return found.reshape(len(values), -1)


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_smaller_types_are_rounded_to_nearest(
    dtype: Any, kind: torch.dtype, llama: Path, tmp_path: Path
) -> None:
    import_model(Import(str(llama), str(tmp_path / "f32")))
    import_model(Import(str(llama), str(tmp_path / "out"), dtype=dtype))
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "f32").state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert all(torch.equal(found[name], weight.to(kind)) for name, weight in exact.items())


def test_shards_are_read_by_transformers(llama: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import_model(Import(str(llama), str(tmp_path / "one")))
    monkeypatch.setattr(stage, "SHARD_BYTES", 100_000)
    import_model(Import(str(llama), str(tmp_path / "many")))
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert torch.equal(logits(tmp_path / "one"), logits(tmp_path / "many"))
    assert Checkpoint.open(tmp_path / "one").names == Checkpoint.open(tmp_path / "many").names


WITHOUT_BYTES = {"model": "llama", "scores": [0.0] * 320}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"general.architecture": "gemma3"}, "gemma3.*supported: llama, qwen2, qwen3"),
    "experts": ({"llama.expert_count": 8}, "expert_count = 8"),
    "an unknown setting": ({"llama.logit_scale": 0.5}, "logit_scale = 0.5"),
    "a part of a model": ({"split.count": 3}, "one of 3 parts"),
    "part of a head turned": ({"llama.rope.dimension_count": 6}, "rope.dimension_count is 6"),
    "longrope": ({"llama.rope.scaling.type": "longrope"}, "longrope"),
    "layers of different sizes": ({"llama.attention.head_count_kv": [2, 4]}, "head_count_kv"),
    "an unknown split": ({"tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre = 'tekken'.*smollm"),
    "another tokenizer": ({"tokenizer.ggml.model": "bert"}, "'bert'.*gpt2"),
    "no bytes": ({f"tokenizer.ggml.{key}": value for key, value in WITHOUT_BYTES.items()}, "no piece <0x00>"),
    "no heads": ({"llama.attention.head_count": 0}, "head_count is 0"),
    "a number as text": ({"llama.block_count": "two"}, "block_count is 'two'"),
    "more layers than tensors": ({"llama.block_count": 3}, "blk.2.attn_q.weight is missing"),
    "another width": ({"llama.feed_forward_length": 96}, "shape"),
    "an end beyond the vocabulary": ({"tokenizer.ggml.eos_token_id": 320}, "eos_token_id is 320"),
    "merges of nothing": ({"tokenizer.ggml.merges": ["qq zz"]}, "merges"),
    "types of other tokens": ({"tokenizer.ggml.token_type": [1, 1]}, "token_type has 2"),
    "a token twice": ({"tokenizer.ggml.tokens": ["a"] * 320}, "token twice"),
    "more tokens than rows": ({"tokenizer.ggml.tokens": [str(i) for i in range(321)],
                               "tokenizer.ggml.token_type": [1] * 321,
                               "tokenizer.ggml.merges": []}, "321 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused(name: str, llama: Path, tmp_path: Path, capsys: Any) -> None:
    changes, words = REFUSED[name]
    file = write_model(tmp_path / "model.gguf", llama.parent / "source", "llama", VOCABULARY, **changes)
    with pytest.raises(GossamerError, match=words):
        import_model(Import(str(file), str(tmp_path / "out")))
    assert cli.call(["import", str(file), "-o", str(tmp_path / "out")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_file_that_is_cut_off_is_refused_wherever_it_ends(llama: Path, tmp_path: Path) -> None:
    content = llama.read_bytes()
    for length in [*range(64), *range(64, len(content), len(content) // 60), len(content) - 1]:
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            import_model(Import(str(tmp_path / "cut.gguf"), str(tmp_path / "out")))
    assert [path.name for path in tmp_path.iterdir()] == ["cut.gguf"]


def test_flipped_bits_never_end_in_anything_but_an_error_of_ours(llama: Path, tmp_path: Path) -> None:
    """Half of the flips hit the first 3,000 bytes, where the model's sizes and the counts of arrays are."""
    content, rng = llama.read_bytes(), np.random.default_rng(3)
    for attempt in range(80):
        broken = bytearray(content)
        limit = 3000 if attempt % 2 else len(content)
        for position in rng.integers(0, limit, 3):
            broken[position] ^= 1 << int(rng.integers(8))
        (tmp_path / "broken.gguf").write_bytes(broken)
        job = Import(str(tmp_path / "broken.gguf"), str(tmp_path / "out"), overwrite=True)
        try:
            import_model(job)
        except GossamerError:
            assert not (tmp_path / "out.partial").exists()


def test_counts_beyond_the_file_are_refused_at_once(llama: Path, tmp_path: Path) -> None:
    """2^60 values of an array, tensors or pairs: an error, not a loop or an allocation of that size."""
    content = llama.read_bytes()
    tokens = content.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
    merges = content.index(b"tokenizer.ggml.merges") + len("tokenizer.ggml.merges") + 8
    types = content.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8
    for position in (8, 16, tokens, merges, types):
        broken = content[:position] + (1 << 60).to_bytes(8, "little") + content[position + 8 :]
        (tmp_path / "broken.gguf").write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"broken\.gguf"):
            import_model(Import(str(tmp_path / "broken.gguf"), str(tmp_path / "out")))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_refused(value: float, llama: Path, tmp_path: Path) -> None:
    file = gguf_file.GgufFile.open(llama)
    content = bytearray(llama.read_bytes())
    offset = file.tensors["blk.1.attn_k.weight"].offset + 40
    content[offset : offset + 4] = np.float32(value).tobytes()
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"blk\.1\.attn_k\.weight holds NaN"):
        import_model(Import(str(tmp_path / "model.gguf"), str(tmp_path / "out")))
    content[offset : offset + 4] = np.float32(1e6).tobytes()
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"attn_k\.weight has values beyond F16"):
        import_model(Import(str(tmp_path / "model.gguf"), str(tmp_path / "out"), dtype="f16"))
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    "words",
    [
        ["inspect"],
        ["verify"],
        ["run", "hello"],
        ["serve"],
        ["bench"],
        ["pack", "-o", "out"],
        ["prune", "-o", "out"],
    ],
)
def test_other_verbs_name_the_import(words: list[str], llama: Path, capsys: Any) -> None:
    verb, *rest = words
    more = ["--dataset", "python:stdlib"] if verb == "prune" else []
    assert cli.call([verb, str(llama), *rest, *more]) == 2
    shown = " ".join(itertools.chain(*(text.split() for text in capsys.readouterr())))
    assert f"gossamer import {llama} -o DIR" in shown
