"""The real chat model, out of its GGUF file: against transformers and llama.cpp, and through every stage."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from foreign.golden_ids import golden
from foreign.texts import texts
from gossamer import cli
from gossamer.checkpoint.directory import Checkpoint
from gossamer.engine import LLM, SamplingParams
from gossamer.stages.pack import Pack, pack
from gossamer.stages.prune import Prune, prune
from gossamer.stages.quantize import Quantize, quantize
from gossamer.tokens.tokenizer import Tokenizer
from gossamer.tools.verify import Verify, verify
from server.conftest import end, start

QUESTIONS = (
    "What is a spider's web made of?",
    "Name three colours.",
    "Add 17 and 25.",
    "Write one line of Python that prints the numbers from 1 to 10.",
    "Why is the sky blue? Answer in one sentence.",
)


@pytest.fixture(scope="module")
def packed(smollm2: Path) -> Path:
    """The dense model as one file of float32 weights."""
    pack(Pack(str(smollm2), str(smollm2.parent / "dense.goss")))
    return smollm2.parent / "dense.goss"


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path) -> Any:
    """transformers' own reading of the file, its weights decoded to float32."""
    name = {"gguf_file": smollm2_gguf.name, "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, **name).eval()


def test_the_ids_of_500_texts_are_those_of_llama_cpp(smollm2: Path) -> None:
    tokenizer, theirs = Tokenizer.open(smollm2), AutoTokenizer.from_pretrained(smollm2)
    assert len(texts()) == 500
    for text, ids in zip(texts(), golden()["smollm2"], strict=True):
        assert tokenizer.encode(text) == ids == theirs.encode(text), text


def test_weights_are_those_that_transformers_reads(smollm2: Path, reference: Any) -> None:
    """Bit for bit, decoded by the same package, and norms and embedding with them."""
    source, state = Checkpoint.open(smollm2), reference.state_dict()
    for name in source.names:
        np.testing.assert_array_equal(source.raw(name), state[name].numpy(), err_msg=name)


def test_chats_are_answered_as_transformers_answers_them(packed: Path, smollm2: Path, reference: Any) -> None:
    """Logits within 1e-4 of the largest, and 200 greedy tokens, or as many as come before the end, the same.

    That every token is the one of the highest logit is what a greedy loop would check, in a single pass.
    """
    llm, theirs = LLM(packed), AutoTokenizer.from_pretrained(smollm2)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [llm.tokenizer.chat(messages) for messages in chats]
    answers = llm.generate(prompts, SamplingParams(max_tokens=200))
    for messages, ids, answer in zip(chats, prompts, answers, strict=True):
        rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert ids == theirs.encode(rendered, add_special_tokens=False)
        with torch.no_grad():
            expected_TV = reference(torch.tensor([[*ids, *answer.token_ids]])).logits[0].numpy()
        found_TV = llm.logits([*ids, *answer.token_ids])
        assert np.abs(found_TV - expected_TV).max() < 1e-4 * np.abs(expected_TV).max()
        greedy = expected_TV[len(ids) - 1 : -1].argmax(1).tolist()
        assert greedy == answer.token_ids
        assert answer.text.strip()


@pytest.mark.timeout(900)  # about two minutes of work for one core, which others may be using too
def test_through_every_stage_to_a_server(
    smollm2: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Half of the weights zero, INT8, one file: it runs, and a client of OpenAI's is answered the same."""
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    few: dict[str, Any] = {"dataset": (str(text_file),), "num_calibration_samples": 4, "max_seq_length": 128}
    pruned, quantized, file = tmp_path / "50", tmp_path / "int8", tmp_path / "model.goss"
    found = prune(Prune(str(smollm2), str(pruned), sparsity=0.5, **few))
    assert found.sparsity == pytest.approx(0.5, abs=1e-3)
    quantize(Quantize(str(pruned), str(quantized), **few))
    pack(Pack(str(quantized), str(file), storage="smallest"))
    verify(Verify(str(quantized), parent=str(pruned)))
    capsys.readouterr()
    question = ["run", str(file), QUESTIONS[0], "--chat", "--max-tokens", "24"]
    assert cli.call(question) == 0
    printed = capsys.readouterr().out.rstrip("\n")
    llm = LLM(file)
    answer = llm.chat([{"role": "user", "content": QUESTIONS[0]}], SamplingParams(max_tokens=24))
    assert answer.text.rstrip() == printed.rstrip()
    running = start(file)
    try:
        served = running.client.chat.completions.create(
            model=running.name,
            messages=[{"role": "user", "content": QUESTIONS[0]}],
            max_tokens=24,
            temperature=0,
        )
    finally:
        end(running)
    assert served.choices[0].message.content == answer.text
