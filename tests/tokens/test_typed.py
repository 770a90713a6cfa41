"""What people type: control tokens in a chat stay text, BOS is there once, and everything is UTF-8."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from alphabets import byte_level, sentencepiece
from gossamer.tokens.encoder import valid_text
from gossamer.tokens.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content | trim }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
CONTROL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|im_end|>x"]
WORDS = ["hello ", " ", "\n", "a<b", "|im_", "end|>", "<|im_end", "<", "é🦙", "ab", "système", "▁", "12"]


def unigram() -> Tokenizer:
    """SentencePiece's other algorithm, which has the control tokens among its pieces."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", *CONTROL], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(["".join(WORDS) + " user assistant system"] * 9, trainer)
    return Tokenizer(made.to_str().encode())


def with_control(tokenizer: Tokenizer, **flags: bool) -> Tokenizer:
    made = tokenizers.Tokenizer.from_str(tokenizer._tokenizer.to_str())
    made.add_special_tokens([tokenizers.AddedToken(text, special=True, **flags) for text in CONTROL])
    return Tokenizer(made.to_str().encode(), {"bos_token": "<s>"}, chat_template=CHATML)


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "sentencepiece": lambda: with_control(sentencepiece("abcdehlorstxuimn<>_\n")),
    "bytes": lambda: with_control(byte_level("")),
    "unigram": lambda: with_control(unigram()),
    "greedy spaces": lambda: with_control(byte_level(""), lstrip=True, rstrip=True),
}


@pytest.fixture(params=MAKERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return MAKERS[request.param]()


def chat(*texts: str) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text} for role, text in zip(["system", "user"] * 9, texts, strict=False)
    ]


def test_a_chat_without_control_tokens_has_the_ids_that_it_always_had(tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    for _ in range(100):
        messages = chat(
            *(
                "".join(draw.choices([w for w in WORDS if w != "end|>"], k=draw.randint(0, 6)))
                for _ in range(3)
            )
        )
        assert tokenizer.chat(messages, typed=True) == tokenizer.chat(messages)


def test_control_tokens_that_a_user_types_are_text(tokenizer: Tokenizer) -> None:
    """As many control tokens as the template writes, and the text as it was typed."""
    draw, control = random.Random(1), set(tokenizer.special_ids.values())
    num_own = len([i for i in tokenizer.chat(chat("a", "b"), typed=True) if i in control])
    for _ in range(200):
        texts = ["".join(draw.choices(WORDS + CONTROL, k=draw.randint(1, 7))) for _ in range(2)]
        ids = tokenizer.chat(chat(*texts), typed=True)
        assert (
            len([i for i in ids if i in control and tokenizer._tokenizer.id_to_token(i) != "<unk>"])
            == num_own
        )
        shown = tokenizer.decode(ids, skip_special_tokens=False)
        if tokenizer.vocab_size > 250:  # it can write any text
            assert all(text.replace("▁", " ").strip() in shown.replace("▁", " ") for text in texts)


def test_the_space_before_a_text_is_not_added_to_its_parts() -> None:
    tokenizer = MAKERS["sentencepiece"]()
    ids = tokenizer.chat(chat("ab</s>cd"), typed=True)
    names = [tokenizer._tokenizer.id_to_token(index) or "" for index in ids]
    assert "".join(names).startswith("<|im_start|>s<0x79>stem\nab<<0x2F>s>cd<|im_end|>")
    assert "▁" not in "".join(names)


def test_a_role_is_no_way_in_either(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user<|im_end|>", "content": "a"}]
    end = tokenizer.special_ids["<|im_end|>"]
    assert tokenizer.chat(messages, typed=True).count(end) == 1 < tokenizer.chat(messages).count(end)


def test_a_prompt_has_one_bos() -> None:
    made = tokenizers.Tokenizer.from_str(sentencepiece("ab")._tokenizer.to_str())
    document = json.loads(made.to_str())
    piece = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": piece,
        "pair": [*piece, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    tokenizer = Tokenizer(json.dumps(document).encode(), {"bos_token": "<s>"})
    plain = tokenizer.encode("ab")
    assert plain[0] == tokenizer.bos_id == 1
    assert tokenizer.prompt("ab") == plain
    assert tokenizer.prompt("<s>ab") == tokenizer.encode("<s>ab", bos=False)
    assert tokenizer.prompt("<s>ab").count(1) == 1
    assert tokenizer.prompt("<s><s>ab").count(1) == 2
    assert tokenizer.prompt("a</s>").count(2) == 1  # in plain completions they are what they are
    assert sentencepiece("ab").prompt("<s>a").count(1) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain é🦙", "plain é🦙"),
        ("\ud83d", "\ufffd"),
        ("a\ude00b", "a\ufffdb"),
        ("\ud83e\udd99", "🦙"),
        ("\ud83d\ud83e\udd99\udcff\udcfe", "\ufffd🦙\ufffd\ufffd"),
    ],
)
def test_what_utf_8_cannot_write_is_replaced(text: str, expected: str, tokenizer: Tokenizer) -> None:
    assert valid_text(text) == expected
    assert tokenizer.prompt(text) == tokenizer.encode(expected)
    parts = [{"role": "user", "content": text, "more": [{"deep": text}]}]
    assert tokenizer.chat(parts, typed=True) == tokenizer.chat(
        [{"role": "user", "content": expected}], typed=True
    )


def test_the_real_tokenizer_of_a_chat_model(shared_data: Path) -> None:
    tokenizer = with_control(Tokenizer.open(shared_data / "models" / "stories3m"))
    ids = tokenizer.chat(chat("Hi</s>there <s>", "a<|im_end|>"), typed=True)
    shown = tokenizer.decode(ids, skip_special_tokens=False)
    assert "Hi</s>there <s><|im_end|>" in shown and "a<|im_end|><|im_end|>" in shown
