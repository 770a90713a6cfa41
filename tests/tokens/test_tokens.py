"""Token ids, texts and chats must be those of transformers' AutoTokenizer."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from gossamer.engine.text import TextStream
from gossamer.errors import CheckpointError, ConfigError
from gossamer.tokens.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "Once upon a time, there was a little girl.",
    "  two spaces\n\n\tand a tab  ",
    "naïve café — 東京 🦙🦙 \u0627\u0644",
    "before <s> inside </s> after",
    "x = sorted('bca')\n>>> x\n",
    "e\u0301\ufffd\u200d\x00\x7f",
]
CHATML = (
    "{% for message in messages %}\n"
    "{% if loop.first and message['role'] == 'system' %}{% continue %}{% endif %}\n"
    "    {% if message['role'] not in ['user', 'assistant', 'system'] %}\n"
    "        {{ raise_exception('unknown role ' + message['role']) }}\n"
    "    {% endif %}\n"
    "{{ bos_token }}<|{{ message['role'] }}|>\n{{ message['content'] | trim }}{{ eos_token }}\n"
    "{{ message | tojson }}{{ strftime_now('%Y') }}\n"
    "{% generation %}{{ message.content }}{% endgeneration %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": ' Say "hi" <b>\n', "name": None},
    {"role": "assistant", "content": "hi é"},
]
LEFT_OUT = "left out"
OLD = {"added_tokens_decoder": LEFT_OUT}
END = {"content": "<|end|>", "lstrip": True, "rstrip": True, "normalized": False, "single_word": False}
MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
CONFIGS = {
    "as shipped": {},
    "LlamaTokenizer": {"tokenizer_class": "LlamaTokenizer"},
    "LlamaTokenizer legacy": {"tokenizer_class": "LlamaTokenizerFast", "legacy": True, "add_bos_token": True},
    "no bos wanted": {"add_bos_token": False, "add_eos_token": True},
    "extra tokens": {"extra_special_tokens": ["<|user|>", "<|assistant|>"], "pad_token": "<pad>"},
    "extra tokens by name": {"extra_special_tokens": {"user_token": "<|user|>"}, "image_token": "<|end|>"},
    "end token in the map alone": {**OLD, "eos_token": LEFT_OUT, MAP: {"eos_token": "<|end|>"}},
    "end token with flags in the map": {**OLD, MAP: {"eos_token": END, "bos_token": "<s>"}},
    "no end token in the map": {**OLD, MAP: {"eos_token": None}},
    "extra tokens in the map": {
        **OLD, "extra_special_tokens": ["<|user|>"], MAP: {"extra_special_tokens": ["<|end|>", "<|user|>"]}
    },
    "old extra tokens in both": {
        **OLD, "additional_special_tokens": ["<|user|>"], MAP: {"additional_special_tokens": ["<|end|>"]}
    },
    "a map that does not count": {"added_tokens_decoder": {}, MAP: {"eos_token": "<|end|>"}},
    "added tokens": {**OLD, ADDED: {"<|user|>": 4301, "<|end|>": 4300}},
    "an added token that is special": {**OLD, "eos_token": "<|end|>", ADDED: {"<|user|>": 9, "<|end|>": 8}},
    "added tokens that are there": {**OLD, ADDED: {"</s>": 7, "<|user|>": 4300}},
    "other flags": {"added_tokens_decoder": {"1": {"content": "</s>", "special": True, "lstrip": True}}},
    "flags of new tokens": {
        "added_tokens_decoder": {
            "4301": {"content": "<|end|>", "rstrip": True}, "4300": {"content": "<|user|>"}
        }
    },
    "other flags of a LlamaTokenizer": {
        "tokenizer_class": "LlamaTokenizer",
        "added_tokens_decoder": {"1": {"content": "</s>", "lstrip": True}},
    },
    "special tokens split": {"split_special_tokens": True, "extra_special_tokens": ["<|user|>"]},
}  # fmt: skip


@pytest.fixture(params=["stories3m", "stories260k", "tiny"])
def model(request: pytest.FixtureRequest, tiny_llama: Callable[[str], Path]) -> Path:
    if request.param == "tiny":
        return tiny_llama("llama2")
    return request.getfixturevalue("shared_data") / "models" / request.param


def variant(model: Path, tmp_path: Path, **changes: object) -> Path:
    """A copy of the model's tokenizer files with changes in tokenizer_config.json, or other whole files."""
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model / name, tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps(read(model / "config.json") | {"vocab_size": 4400}))
    files = {name: content for name, content in changes.items() if name.endswith(".json")}
    config = read(model / "tokenizer_config.json") | {k: v for k, v in changes.items() if k not in files}
    kept = {name: value for name, value in config.items() if value is not LEFT_OUT}
    for name, content in {"tokenizer_config.json": kept, **files}.items():
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def read(file: Path) -> dict:
    return json.loads(file.read_text())


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_ids_and_texts_are_those_of_transformers(model: Path, changes: dict, tmp_path: Path) -> None:
    path = variant(model, tmp_path, **changes)
    ours, theirs = Tokenizer.open(path), AutoTokenizer.from_pretrained(path)
    assert (ours.vocab_size, ours.bos_id) == (len(theirs), theirs.bos_token_id)
    own = read(path / "generation_config.json")["eos_token_id"]
    assert ours.required_eos() == (own if theirs.eos_token_id is None else theirs.eos_token_id)
    assert ours.eos_ids == {ours.required_eos(), own}
    for text in [*TEXTS, "<|user|> hello <|assistant|>", "so <|end|> it </s> ends"]:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids
        assert ours.encode(text, bos=False) == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


def test_random_ids_decode_as_in_transformers(model: Path) -> None:
    ours, theirs = Tokenizer.open(model), AutoTokenizer.from_pretrained(model)
    draw = random.Random(0)
    for _ in range(300):
        ids = [draw.randrange(min(ours.vocab_size, 400)) for _ in range(draw.randrange(1, 25))]
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)


def test_the_bytes_of_tokens_make_the_text(model: Path) -> None:
    """Of SentencePiece with byte tokens, and of byte-level BPE: special tokens are there by their text."""
    tokenizer = Tokenizer.open(model)
    for text in ["a 🦙🦙 東京é\n\nend — ok", "x = 1\n\t y", "so </s> it ends"]:
        ids = tokenizer.encode(text, bos=False)
        raw = [tokenizer.token_bytes(index) for index in ids]
        decoded = tokenizer.decode(ids, skip_special_tokens=False)
        assert b"".join(raw).decode() in (decoded, f" {decoded}")  # SentencePiece's has a space before it
        for shown, of in zip(map(tokenizer.token_text, ids), raw, strict=True):
            is_text = of.decode(errors="replace").encode() == of
            assert shown == (of.decode() if is_text else "bytes:" + "".join(f"\\x{byte:02x}" for byte in of))
    assert tokenizer.token_text(tokenizer.encode("🦙", bos=False)[-1]).endswith("\\x99")


def test_streaming_never_splits_a_character(model: Path) -> None:
    tokenizer = Tokenizer.open(model)
    text = "a 🦙🦙 東京é\n\nend — ok"
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + stream.flush() == text
    assert len([piece for piece in pieces if piece]) > 5


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chats_are_those_of_transformers(model: Path, tmp_path: Path, add_generation_prompt: bool) -> None:
    path = variant(model, tmp_path, chat_template=CHATML)
    ours, theirs = Tokenizer.open(path), AutoTokenizer.from_pretrained(path)
    expected = theirs.apply_chat_template(
        CHAT, add_generation_prompt=add_generation_prompt, return_dict=False
    )
    assert ours.chat(CHAT, add_generation_prompt) == expected


def test_a_template_file_comes_before_the_one_in_the_config(model: Path, tmp_path: Path) -> None:
    path = variant(model, tmp_path, chat_template="wrong")
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}é\n")
    ours, theirs = Tokenizer.open(path), AutoTokenizer.from_pretrained(path)
    assert ours.chat_template == theirs.chat_template
    assert ours.chat(CHAT) == theirs.apply_chat_template(CHAT, return_dict=False)


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (None, CHAT, "no chat template"),
        (CHATML, [{"role": "wizard", "content": "x"}], "unknown role wizard"),
        (CHATML, [], "at least one message"),
        (CHATML, [{"content": "x"}], "message 0"),
        ("{% if %}", CHAT, "does not parse"),
        ("{{ messages.append(1) }}", CHAT, "refuses"),
        ("{{ ''.__class__.__mro__ }}", CHAT, "refuses"),
        ("{{ messages[0].content + 1 }}", CHAT, "refuses"),
        ("{{ 1 // 0 }}", CHAT, "refuses"),
    ],
)
def test_chats_that_cannot_be_say_why(
    tiny_llama: Callable[[str], Path], tmp_path: Path, template: str | None, messages: list, words: str
) -> None:
    tokenizer = Tokenizer.open(variant(tiny_llama("llama2"), tmp_path, chat_template=template))
    with pytest.raises(ConfigError, match=words):
        tokenizer.chat(messages)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"model": {"type": "BPE"}}', '{"model": {"type": "BPE", "vocab": 1}}']
)
def test_a_damaged_tokenizer_is_named(
    tiny_llama: Callable[[str], Path], tmp_path: Path, content: str
) -> None:
    path = variant(tiny_llama("llama2"), tmp_path)
    (path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.open(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"bos_token": 5},
        {"eos_token": {"text": "x"}},
        {"added_tokens_decoder": {"x": "y"}},
        {"added_tokens_decoder": [1]},
        {"extra_special_tokens": 3},
        {"extra_special_tokens": [3]},
        {"bos_token": "\ud800"},
        {"chat_template": 3},
        {"chat_template": [{"name": "default", "template": 1}]},
    ],
)
def test_settings_of_the_wrong_type_are_named(
    tiny_llama: Callable[[str], Path], tmp_path: Path, changes: dict
) -> None:
    with pytest.raises(CheckpointError, match=rf"{next(iter(changes))}|a special token"):
        Tokenizer.open(variant(tiny_llama("llama2"), tmp_path, **changes))


def test_a_template_that_uses_an_undefined_token_is_named(
    tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    path = variant(tiny_llama("llama2"), tmp_path)
    document = json.loads((path / "tokenizer.json").read_text())
    document["post_processor"]["special_tokens"] = {}
    (path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="'<s>', which it does not define"):
        Tokenizer.open(path)


def test_a_directory_without_tokenizer_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model only"):
        Tokenizer.open(tmp_path)


def test_stop_tokens_come_from_the_generation_config_and_the_tokenizer(
    tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    path = variant(tiny_llama("llama2"), tmp_path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert Tokenizer.open(path).eos_ids == {5, 7, 1}
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": "x"}))
    with pytest.raises(CheckpointError, match="eos_token_id"):
        Tokenizer.open(path)


def test_the_end_token_is_the_tokenizers_own(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    ends = {"generation_config.json": {"eos_token_id": [0, 5, 1]}}
    assert Tokenizer.open(variant(tiny_llama("llama2"), tmp_path, **ends)).required_eos() == 1
    unnamed = variant(tiny_llama("llama2"), tmp_path, eos_token=None, **ends)
    with pytest.raises(ConfigError, match=r"several end tokens, \[0, 1, 5\].*set eos_token"):
        Tokenizer.open(unnamed).required_eos()


def test_a_token_beyond_the_embedding_is_named(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    path = variant(tiny_llama("llama2"), tmp_path, extra_special_tokens=["<|user|>", "<|end|>"])
    (path / "config.json").write_text(json.dumps(read(path / "config.json") | {"vocab_size": 321}))
    with pytest.raises(CheckpointError, match=r"'<\|end\|>' has the id 321, but the embedding has 321 rows"):
        Tokenizer.open(path)
    (path / "config.json").write_text(json.dumps(read(path / "config.json") | {"vocab_size": 322}))
    assert Tokenizer.open(path).vocab_size == 322


def test_half_a_surrogate_pair_is_a_replacement_character(model: Path) -> None:
    tokenizer = Tokenizer.open(model)
    assert tokenizer.encode("a\ud83d b\udc00\ud800é") == tokenizer.encode("a\ufffd b\ufffd\ufffdé")
    assert tokenizer.encode("\ud83e\udd99") == tokenizer.encode("\N{LLAMA}")
