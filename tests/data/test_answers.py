"""Which tokens of a chat are learned: the answers, whatever the template does around them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from gossamer.data.supervised import supervised_examples
from gossamer.data.tables import BadRows
from gossamer.errors import ConfigError
from gossamer.tokens.tokenizer import Tokenizer

Tiny = Callable[[str], Path]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMED = CHATML.replace("m.content", "(m.content | trim)")
# Qwen3's way: reasoning is shown in the last turn alone, and the last turn always has a place for it.
REASONING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.last %}{{ '<think>\n' + (parts[0].split('<think>')[-1].strip() if parts | length > 1 else '')"
    " + '\n</think>\n\n' }}{% endif %}{{ parts[-1].lstrip('\n') + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
END_OF_LAST = (
    "{% for m in messages %}{{ m.role + ':\n' + m.content }}{% if loop.last and m.role == 'assistant' %}"
    "{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
ENDS_WITH_A_SPACE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    + ("{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}")
)
REFUSES_A_LAST_QUESTION = (
    "{% if messages[-1].role != 'assistant' %}{{ raise_exception('an answer comes last') }}{% endif %}"
    + CHATML
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
CHAT = [("user", "hi"), ("assistant", "first"), ("user", "and?"), ("assistant", "second one")]
THOUGHTFUL = [
    CHAT[0],
    ("assistant", "<think>hm</think>\n\nfirst"),
    CHAT[2],
    ("assistant", "<think>so</think>x"),
]
NEWLINES = [("user", "hi\n"), ("assistant", "\n\nfirst\n"), ("user", "\n"), ("assistant", "\n")]
CASES: dict[str, tuple[str, list[tuple[str, str]], str]] = {
    "usual": (CHATML, CHAT, "first<|im_end|>\nsecond one<|im_end|>\n"),
    "answers that begin with a newline": (CHATML, NEWLINES, "\n\nfirst\n<|im_end|>\n\n<|im_end|>\n"),
    "answers that are trimmed": (TRIMMED, NEWLINES, "first<|im_end|>\n<|im_end|>\n"),
    "earlier reasoning is dropped": (
        REASONING, THOUGHTFUL, "first<|im_end|><think>\nso\n</think>\n\nx<|im_end|>\n"
    ),
    "the last turn has a place for reasoning": (
        REASONING, CHAT, "first<|im_end|><think>\n\n</think>\n\nsecond one<|im_end|>\n"
    ),
    "only the last turn ends": (END_OF_LAST, CHAT, "firstsecond one</s>"),
    "a space before the end": (ENDS_WITH_A_SPACE, CHAT, " first </s> second one </s>"),
    "a chat must end in an answer": (
        REFUSES_A_LAST_QUESTION, CHAT, "first<|im_end|>\nsecond one<|im_end|>\n"
    ),
    "an answer comes first": (CHATML, CHAT[1:], "first<|im_end|>\nsecond one<|im_end|>\n"),
    "marked by the template": (MARKED, CHAT, "first<|im_end|>second one<|im_end|>"),
    "an empty answer": (CHATML, [CHAT[0], ("assistant", "")], "<|im_end|>\n"),
    "emoji": (CHATML, [("user", "🦙é"), ("assistant", "é🦙 東京")], "é🦙 東京<|im_end|>\n"),
}  # fmt: skip


def tokenizer_with(tiny_llama: Tiny, template: str) -> Tokenizer:
    content = (tiny_llama("llama2") / "tokenizer.json").read_bytes()
    config = {"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    ends = {"eos_token_id": [1, 321]}
    return Tokenizer(content, config, chat_template=template, generation_config=ends)


def row(turns: list[tuple[str, str]], **weights: Any) -> dict[str, Any]:
    """A row of messages; `w1=0` gives the second one the weight 0."""
    messages: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in turns]
    for key, weight in weights.items():
        messages[int(key[1:])]["weight"] = weight
    return {"messages": messages}


def learned(tokenizer: Tokenizer, path: Path, *rows: dict[str, Any], bad: BadRows | None = None) -> list[str]:
    """The text that is learned of each row."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = []
    for ids, labels in supervised_examples(str(path), "chat", tokenizer, 512, bad):
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
        found.append(tokenizer.decode([it for it in labels if it != -100], skip_special_tokens=False))
    return found


@pytest.mark.parametrize(("template", "turns", "expected"), CASES.values(), ids=CASES.keys())
def test_answers_are_learned_and_nothing_else(
    template: str, turns: list[tuple[str, str]], expected: str, tiny_llama: Tiny, tmp_path: Path
) -> None:
    tokenizer = tokenizer_with(tiny_llama, template)
    assert learned(tokenizer, tmp_path / "a.jsonl", row(turns)) == [expected]


def test_a_token_across_a_boundary_is_learned(tiny_llama: Tiny, tmp_path: Path) -> None:
    """Where prompt and answer meet within a token, as where both have a newline, it stands for both."""
    tokenizer = tokenizer_with(tiny_llama, "{% for m in messages %}{{ m.content }}{% endfor %}")
    joined = next(text for text in ("    ", "  ", "\n\n") if len(tokenizer.encode(text, bos=False)) == 1)
    turns = [("user", "a" + joined[0]), ("assistant", joined[1:] + "b")]
    assert learned(tokenizer, tmp_path / "a.jsonl", row(turns)) == [joined + "b"]


def test_marked_parts_are_those_of_transformers(tiny_llama: Tiny, tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tiny_llama, MARKED)
    theirs = AutoTokenizer.from_pretrained(tiny_llama("llama2"))
    theirs.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    messages = row([*CHAT, *NEWLINES])["messages"]
    expected = theirs.apply_chat_template(
        messages, chat_template=MARKED, return_assistant_tokens_mask=True, return_dict=True
    )
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    ((ids, labels),) = supervised_examples(f"{tmp_path}/a.jsonl", "chat", tokenizer, 512)
    assert ids == expected["input_ids"]
    assert [label != -100 for label in labels] == [mask == 1 for mask in expected["assistant_masks"]]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_an_answer_without_weight_is_not_learned(template: str, tiny_llama: Tiny, tmp_path: Path) -> None:
    tokenizer, bad = tokenizer_with(tiny_llama, template), BadRows()
    rows = [row(CHAT, w1=0), row(CHAT, w1=1, w3=0), row(CHAT, w1=0, w3=0), row(CHAT, w0=0, w1=None)]
    found = learned(tokenizer, tmp_path / "a.jsonl", *rows, bad=bad)
    assert [text.strip() for text in found[:2]] == ["second one<|im_end|>", "first<|im_end|>"]
    assert len(found) == 3 and bad.num_without_answer == 1
    with pytest.raises(ConfigError, match=r"a\.jsonl:1: message 2 has the weight 0\.5; expected 0 or 1"):
        learned(tokenizer, tmp_path / "a.jsonl", row(CHAT, w1=0.5))


def test_bad_rows_are_counted_and_named(tiny_llama: Tiny, tmp_path: Path) -> None:
    tokenizer, bad = tokenizer_with(tiny_llama, CHATML), BadRows(3)
    rows = [row(CHAT), {"text": "no chat"}, row([("user", "hi"), ("assistant", "yes")], w1=7)]
    path = tmp_path / "a.jsonl"
    assert len(learned(tokenizer, path, *rows, bad=bad)) == 1
    assert [text.split(": ")[0] for text in bad.found] == [f"{path}:2", f"{path}:3"]
    path.write_text(path.read_text() + "{oops\n" + json.dumps(row(CHAT)) + "\n")
    found = list(supervised_examples(str(path), "chat", tokenizer, 512, bad := BadRows(3)))
    assert len(found) == 2 and bad.found[2].startswith(f"{path}:4: not a line of JSON")
    with pytest.raises(
        ConfigError, match=r"a\.jsonl:4: not a line.*after 2 left out, the first: .*--skip-bad-rows N"
    ):
        list(supervised_examples(str(path), "chat", tokenizer, 512, BadRows(2)))


def test_a_model_without_a_template_is_no_bad_row(tiny_llama: Tiny, tmp_path: Path) -> None:
    content = (tiny_llama("llama2") / "tokenizer.json").read_bytes()
    with pytest.raises(ConfigError, match="no chat template"):
        learned(Tokenizer(content, {"eos_token": "</s>"}), tmp_path / "a.jsonl", row(CHAT), bad=BadRows(9))


def test_answers_end_with_the_tokenizers_end_token(tiny_llama: Tiny, tmp_path: Path) -> None:
    """Of several ends not the lowest, and only once where a tokenizer ends every text itself."""
    document = json.loads((tiny_llama("llama2") / "tokenizer.json").read_text())
    document["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    document["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [1], "tokens": ["</s>"]}
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "2 + 2 =", "completion": " 4"}))
    for content in ((tiny_llama("llama2") / "tokenizer.json").read_bytes(), json.dumps(document).encode()):
        config = {"bos_token": "<s>", "eos_token": "<|end|>"}
        tokenizer = Tokenizer(content, config, generation_config={"eos_token_id": [0, 1, 320]})
        ((ids, labels),) = supervised_examples(f"{tmp_path}/a.jsonl", "prompt-completion", tokenizer, 512)
        assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>2 + 2 = 4<|end|>"
        assert ids[-1] == labels[-1] == 320
