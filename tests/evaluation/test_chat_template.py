"""Prompts in the chat template: the same ids and log likelihoods through the engine and transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance

from gossamer.evaluation.backends import EngineBackend, TorchBackend
from gossamer.stages.evaluate import Evaluate, evaluate

TinyLlama = Callable[[str], Path]
TURNS = (
    "{% for turn in messages %}[{{ turn.role }}] {{ turn.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
TEMPLATES = {"writes BOS": "{{ bos_token }}" + TURNS, "writes none": TURNS}
CHATS = [
    [{"role": "user", "content": "x = 1?"}],
    [
        {"role": "system", "content": "def f("},
        {"role": "user", "content": "Say é.  "},
        {"role": "assistant", "content": "class A:"},
        {"role": "user", "content": "return"},
    ],
]


@pytest.fixture(params=[(variant, name) for variant in ("llama2", "llama3") for name in TEMPLATES], ids=str)
def model(
    request: pytest.FixtureRequest,
    tiny_llama: TinyLlama,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    variant, template = request.param
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    path = shutil.copytree(tiny_llama(variant), tmp_path / "model")
    (path / "chat_template.jinja").write_text(TEMPLATES[template])
    return path


def test_both_backends_see_the_same_tokens(model: Path) -> None:
    """One BOS at the beginning of each prompt, whether the template writes it or the tokenizer adds it."""
    engine = EngineBackend(str(model), 1)
    ours, theirs, bos = engine.for_harness(), TorchBackend(str(model)).for_harness(), engine.tokenizer.bos_id
    prompts = [ours.apply_chat_template(chat) for chat in CHATS]
    assert prompts == [theirs.apply_chat_template(chat) for chat in CHATS]
    assert prompts[0].endswith("[user] x = 1?\n[assistant]\n")
    for prompt in prompts:
        ids = ours.tok_encode(prompt)
        assert ids == theirs.tok_encode(prompt)
        assert ids[0] == bos and ids.count(bos) == 1
        assert theirs.tok_batch_encode([prompt])[0].tolist() == [ids]
        assert ours._encode_pair(prompt, "self") == theirs._encode_pair(prompt, "self")
    pairs = [(prompt, answer) for prompt in prompts for answer in ("self", "import numpy as np", "0")]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    found, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests)
    np.testing.assert_allclose([t for t, _ in found], [t for t, _ in expected], atol=1e-3, rtol=0)
    until = {"until": ["\n"], "do_sample": False, "max_gen_toks": 12}
    asked: list[Any] = [
        Instance("generate_until", {}, (prompt, until), n) for n, prompt in enumerate(prompts)
    ]
    assert ours.generate_until(asked) == theirs.generate_until(asked)


def test_a_templated_task_has_the_same_scores_on_both(model: Path, tmp_path: Path) -> None:
    """With examples shown as earlier turns; and others than without the template."""
    rows = [{"context": word, "continuation": "self"} for word in ("def", "x =", "class A", "return")]
    file = tmp_path / "cloze.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {
        (backend, chat): evaluate(
            Evaluate(
                str(model), dataset=str(file), kind="cloze", backend=backend, apply_chat_template=chat,
                num_fewshot=1, fewshot_dataset=str(file),
            )
        ).metrics["cloze.jsonl"]["perplexity"]
        for backend in ("torch", "engine")
        for chat in (True, False)
    }  # fmt: skip
    assert found["engine", True] == pytest.approx(found["torch", True], rel=1e-4)
    assert found["engine", True] != pytest.approx(found["engine", False], rel=1e-3)
