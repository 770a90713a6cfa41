"""The engine end to end: against transformers where it has an answer, else against itself."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from gossamer.checkpoint.directory import Checkpoint
from gossamer.engine import LLM, SamplingParams, Scheduler
from gossamer.errors import ConfigError
from gossamer.packed.from_checkpoint import pack_checkpoint
from gossamer.packed.rounding import round_rows
from gossamer.packed.writer import PackedWriter

VARIANTS = ["llama2", "llama3", "linear", "sharded", "bf16", "fp16"]
PROMPTS = ["Once upon a time", "def f(x):\n    return", "a", "The little dog was", "x = [1, 2", "Lily"]
GREEDY = SamplingParams(max_tokens=60)


@pytest.fixture(scope="module")
def opened(
    tiny_llama: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Callable[[str], LLM]:
    """name -> LLM over a freshly packed tiny variant or shared model."""
    made: dict[str, LLM] = {}

    def make(name: str) -> LLM:
        if name not in made:
            path = tmp_path_factory.mktemp("packed") / f"{name}.goss"
            if name == "int8":
                pack_int8(Checkpoint.open(tiny_llama("llama3")), path)
            else:
                pack_checkpoint(Checkpoint.open(directory(name, tiny_llama, request)), path)
            # Two threads would wait for each other on a busy machine; transformers computes in float32.
            made[name] = LLM(path, 1, kv_cache_dtype="auto" if name == "int8" else "f32")
        return made[name]

    return make


def pack_int8(source: Checkpoint, path: Path) -> None:
    """The checkpoint with 70% of each decoder matrix set to zero and the rest rounded to int8."""
    content = (source.path / "tokenizer.json").read_bytes()
    with PackedWriter(path, config=json.dumps(source.config), tokenizer=content) as writer:
        for name, shape in source.architecture.tensor_shapes.items():
            weight = source.float32(name)
            if len(shape) == 1:
                writer.vector(name, weight)
            elif name.removesuffix(".weight") in source.linears:
                weight[np.abs(weight) < np.quantile(np.abs(weight), 0.7)] = 0
                writer.int8(name.removesuffix(".weight"), *round_rows(weight), storage="sparse")
            else:
                writer.floats(name.removesuffix(".weight"), weight)


def directory(name: str, tiny_llama: Callable[[str], Path], request: pytest.FixtureRequest) -> Path:
    if name in VARIANTS:
        return tiny_llama(name)
    return request.getfixturevalue("shared_data") / "models" / name


@pytest.mark.parametrize("name", [*VARIANTS, "stories3m", "stories260k"])
def test_greedy_tokens_and_logits_are_those_of_transformers(
    name: str,
    opened: Callable[[str], LLM],
    tiny_llama: Callable[[str], Path],
    request: pytest.FixtureRequest,
) -> None:
    path, llm = directory(name, tiny_llama, request), opened(name)
    model: Any = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    ids = inputs.input_ids
    with torch.no_grad():
        expected = model.generate(**inputs, max_new_tokens=200, do_sample=False, pad_token_id=0)[0]
        logits_TV = model(expected[None]).logits[0].numpy()
    new = expected[ids.shape[1] :].tolist()
    [found] = llm.generate("Once upon a time", SamplingParams(max_tokens=200))
    assert found.token_ids == new
    assert found.text == tokenizer.decode(new, skip_special_tokens=True)
    assert found.finish_reason == ("stop" if new[-1] in llm.tokenizer.eos_ids else "length")
    error = np.abs(llm.logits(expected.tolist()) - logits_TV).max() / np.abs(logits_TV).max()
    assert error < 1e-4


@pytest.mark.parametrize("name", ["llama3", "int8", "stories3m"])
def test_a_batch_gives_each_what_it_gets_alone(name: str, opened: Callable[[str], LLM]) -> None:
    llm = opened(name)
    for params in (GREEDY, SamplingParams(max_tokens=60, temperature=0.9, top_p=0.9, seed=5, logprobs=2)):
        together = llm.generate(PROMPTS, params)
        for prompt, generation in zip(PROMPTS, together, strict=True):
            [alone] = llm.generate(prompt, params)
            assert replace(generation, timings=alone.timings) == alone
        pieces = list(llm.stream(PROMPTS[0], params))
        assert "".join(piece.text for piece in pieces) == together[0].text
        assert [token for piece in pieces for token in piece.token_ids] == together[0].token_ids
        assert pieces[-1].finish_reason == together[0].finish_reason


@pytest.mark.parametrize("name", ["llama3", "int8"])
def test_logits_do_not_depend_on_how_a_prompt_is_cut(name: str, opened: Callable[[str], LLM]) -> None:
    llm = opened(name)
    ids = [index % 300 for index in range(2, 400)]
    whole_TV = llm.logits(ids)
    sequence = llm.model.native.new_sequence(len(ids))
    rows = []
    for start, end in ((0, 1), (1, 2), (2, 37), (37, 300), (300, 398)):
        chunk = np.asarray(ids[start:end], dtype=np.int32)
        rows.append(llm.model.native.forward([sequence], [chunk], True))
    np.testing.assert_array_equal(np.concatenate(rows), whole_TV)


def test_more_prompts_than_the_batch_holds_wait_their_turn(opened: Callable[[str], LLM]) -> None:
    path = opened("llama2").model.path
    narrow, wide = LLM(path, 1, max_batch=2), LLM(path, 1, max_batch=32)
    prompts = [prompt * repeat for prompt in PROMPTS for repeat in (1, 3)]
    found = [generation.token_ids for generation in narrow.generate(prompts, GREEDY)]
    assert found == [generation.token_ids for generation in wide.generate(prompts, GREEDY)]


def test_a_batch_larger_than_a_step_of_prompts(opened: Callable[[str], LLM]) -> None:
    """More requests than a step usually has tokens: all are decoded together, and prompts still enter."""
    path, params = opened("llama2").model.path, SamplingParams(max_tokens=2)
    prompts = [[2 + index % 300, 7, 9] for index in range(600)]
    found = [LLM(path, 1, max_batch=size).generate(prompts, params) for size in (600, 16)]
    assert [one.token_ids for one in found[0]] == [one.token_ids for one in found[1]]


@pytest.mark.parametrize("name", ["llama2", "int8"])
def test_threads_do_not_change_a_bit(name: str, opened: Callable[[str], LLM]) -> None:
    one = opened(name)
    three = LLM(one.model.path, 3)
    ids = [index % 300 for index in range(40)]
    np.testing.assert_array_equal(three.logits(ids), one.logits(ids))


def test_a_long_prompt_enters_in_parts_beside_others(opened: Callable[[str], LLM]) -> None:
    llm = opened("llama2")
    long, short = [index % 300 + 2 for index in range(480)], [5, 6, 7]
    results = llm.generate([long, short, long], SamplingParams(max_tokens=20))
    assert results[0].token_ids == results[2].token_ids == llm.generate([long], GREEDY)[0].token_ids[:20]
    assert results[1].token_ids == llm.generate([short], GREEDY)[0].token_ids[:20]


def test_generation_stops_at_the_context_limit(opened: Callable[[str], LLM]) -> None:
    llm = opened("llama2")
    ids = [index % 300 + 2 for index in range(505)]
    for params in (SamplingParams(max_tokens=100), SamplingParams(max_tokens=None)):
        [generation] = llm.generate([ids], params)
        assert (len(generation.token_ids), generation.finish_reason) == (7, "length")
    [full] = llm.generate([ids + ids[:7]], GREEDY)
    assert (full.token_ids, full.text, full.finish_reason) == ([], "", "length")
    with pytest.raises(ConfigError, match=r"513.*512"):
        llm.generate([ids + ids[:8]], GREEDY)


@pytest.mark.parametrize("name", ["llama2", "stories3m"])
def test_stop_strings_cut_the_text_exactly(name: str, opened: Callable[[str], LLM]) -> None:
    llm = opened(name)
    [plain] = llm.generate(PROMPTS[0], GREEDY)
    for start in range(1, len(plain.text) - 8, 13):
        for stop in (plain.text[start : start + 1], plain.text[start : start + 7]):
            params = replace(GREEDY, stop=[stop, "\N{SNOWMAN}"])
            [found] = llm.generate(PROMPTS[0], params)
            assert found.text == plain.text[: plain.text.index(stop)]
            assert found.finish_reason == "stop"
            assert llm.tokenizer.decode(found.token_ids).startswith(found.text + stop)
            if not stop.endswith("\ufffd"):  # what could still become a character is no U+FFFD yet
                assert stop not in llm.tokenizer.decode(found.token_ids[:-1])
            assert "".join(piece.text for piece in llm.stream(PROMPTS[0], params)) == found.text


def test_an_unbroken_stream_gives_out_text_early_and_can_be_left(opened: Callable[[str], LLM]) -> None:
    llm = opened("stories3m")
    stream = llm.stream(PROMPTS[0], SamplingParams(max_tokens=400))
    assert next(stream).text
    other = llm.stream(PROMPTS[3], GREEDY)
    text = next(stream).text + next(other).text
    stream.close()
    assert text
    assert "".join(piece.text for piece in other) in llm.generate(PROMPTS[3], GREEDY)[0].text
    assert llm._scheduler.idle


def test_logprobs_are_the_models_own(opened: Callable[[str], LLM]) -> None:
    llm = opened("stories3m")
    params = SamplingParams(max_tokens=20, temperature=1.5, seed=1, repetition_penalty=1.2, logprobs=3)
    [generation] = llm.generate("Once", params)
    assert generation.logprobs is not None
    ids = llm.tokenizer.encode("Once")
    logits_TV = torch.from_numpy(llm.logits(ids + generation.token_ids)[len(ids) - 1 : -1])
    expected_TV = torch.log_softmax(logits_TV.double(), -1)
    expected = expected_TV.gather(1, torch.tensor(generation.token_ids)[:, None])[:, 0]
    found = generation.logprobs
    assert [of.token_id for of in found] == generation.token_ids
    np.testing.assert_allclose([of.logprob for of in found], expected.numpy(), atol=1e-5)
    top = expected_TV.topk(3)
    assert [[token for token, _ in of.likeliest] for of in found] == top.indices.tolist()
    np.testing.assert_allclose([[log_p for _, log_p in of.likeliest] for of in found], top.values, atol=1e-5)


LONG = "Once upon a time there was a dog\n" * 30  # prompts of more tokens than a step scores


@pytest.mark.parametrize("name", ["llama2", "int8", "stories260k"])
@pytest.mark.parametrize("max_tokens", [0, 1, 12])
def test_an_echoed_prompt_has_the_logprobs_of_its_tokens(
    name: str, max_tokens: int, opened: Callable[[str], LLM]
) -> None:
    llm = opened(name)
    prompts = [*PROMPTS, LONG[: 3 * llm.model.architecture.max_position_embeddings // 4]]
    params = SamplingParams(max_tokens=max_tokens, logprobs=2, echo=True)
    for prompt, found in zip(prompts, llm.generate(prompts, params), strict=True):
        ids = llm.tokenizer.prompt(prompt)
        [alone] = llm.generate(prompt, replace(params, max_tokens=max(1, max_tokens), echo=False))
        assert found.token_ids == (alone.token_ids if max_tokens else [])
        assert found.finish_reason == (alone.finish_reason if max_tokens else "length")
        assert found.text == llm.tokenizer.decode(ids + found.token_ids)
        assert found.logprobs is not None and alone.logprobs is not None
        assert [of.token_id for of in found.logprobs] == ids + found.token_ids
        assert (found.logprobs[0].logprob, found.logprobs[0].likeliest) == (None, ())
        logits_TV = torch.from_numpy(llm.logits(ids)).double()
        expected_TV = logits_TV.log_softmax(-1)
        top_ids = logits_TV.argsort(descending=True, stable=True)[:, :2].tolist()
        for place, of in enumerate(found.logprobs[1 : len(ids)]):
            assert of.logprob == pytest.approx(expected_TV[place, of.token_id].item(), abs=1e-5)
            assert [token for token, _ in of.likeliest] == top_ids[place]
        for of, without in zip(found.logprobs[len(ids) :], alone.logprobs, strict=False):
            assert (of.logprob, of.likeliest) == (without.logprob, without.likeliest)
        offsets = [of.offset for of in found.logprobs]
        assert offsets == sorted(offsets) and offsets[0] == 0 and offsets[-1] <= len(found.text)
        pieces = list(llm.stream(prompt, params))
        assert "".join(piece.text for piece in pieces) == found.text
        assert [of for piece in pieces for of in piece.logprobs or ()] == found.logprobs
        assert [token for piece in pieces for token in piece.token_ids] == found.token_ids


@pytest.mark.parametrize("name", ["llama3", "stories260k"])
def test_the_offsets_of_tokens_are_where_their_texts_stand(name: str, opened: Callable[[str], LLM]) -> None:
    llm = opened(name)
    prompt = "a dog </s> sat: é 🦙 x"
    [found] = llm.generate(prompt, SamplingParams(max_tokens=1, logprobs=0, echo=True))
    assert found.logprobs is not None
    num_checked = 0
    for of in found.logprobs[2:-1]:  # SentencePiece's first word has a space that is not in the text
        text = llm.tokenizer.token_text(of.token_id)
        if not text.startswith("bytes:"):
            assert found.text[of.offset :].startswith(text), (of, found.text)
            num_checked += 1
    assert num_checked > 10
    assert "</s>" in found.text and "é 🦙 x" in found.text


def test_an_echo_without_logprobs_computes_nothing_of_the_prompt(opened: Callable[[str], LLM]) -> None:
    llm = opened("llama3")
    [found] = llm.generate(PROMPTS[0], SamplingParams(max_tokens=0, echo=True))
    assert (found.text, found.token_ids, found.logprobs, found.finish_reason) == (
        PROMPTS[0],
        [],
        None,
        "length",
    )
    [stopped] = llm.generate("a stop", SamplingParams(max_tokens=3, echo=True, stop=["stop"]))
    assert stopped.text.startswith("a stop")  # only what is generated is looked through for stop strings


def test_an_evaluations_prompts_keep_no_answer_waiting(opened: Callable[[str], LLM]) -> None:
    """300 prompts of 200 tokens are being scored; who comes then has a token at every step, but for a few."""
    llm = opened("llama2")
    scheduler = Scheduler(llm.model.native, max_batch=8)
    scored = SamplingParams(max_tokens=1, logprobs=1, echo=True)
    crowd = [llm.model.request([2 + (i + j) % 300 for j in range(200)], scored) for i in range(300)]
    for request in crowd:
        scheduler.add(request)
    for _ in range(5):
        scheduler.step()
    late = [llm.model.request([5, 6, 7 + i], SamplingParams(max_tokens=20)) for i in range(2)]
    for request in late:
        scheduler.add(request)
    steps = 0
    while any(request.finish_reason is None for request in late):
        scheduler.step()
        steps += 1
    assert steps <= 20 + 8
    assert 0 < sum(request.finish_reason is not None for request in crowd) < 100
    while not scheduler.idle:
        scheduler.step()
    assert all(len(request.logprobs) == 201 for request in crowd)


def test_prompts_are_scored_beside_answers_without_end(opened: Callable[[str], LLM]) -> None:
    """As many answers wait as there are places, again and again: prompts to score still get their share."""
    llm = opened("llama2")
    scheduler = Scheduler(llm.model.native, max_batch=4)
    scored = [
        llm.model.request([5, 6, 7], SamplingParams(max_tokens=0, logprobs=1, echo=True)) for _ in range(9)
    ]
    for index in range(40):
        scheduler.add(llm.model.request([5, 6, 8 + index], SamplingParams(max_tokens=30)))
    for request in scored:
        scheduler.add(request)
    for _ in range(100):
        scheduler.step()
    assert all(request.finish_reason == "length" for request in scored)
    assert not scheduler.idle


def test_one_place_goes_to_both_lines_in_turn(opened: Callable[[str], LLM]) -> None:
    """Answers come without end, and one runs at a time: every second one is a prompt to score."""
    llm = opened("llama2")
    scheduler = Scheduler(llm.model.native, max_batch=1)
    scored = SamplingParams(max_tokens=0, logprobs=1, echo=True)
    both = [
        [llm.model.request([5, 6, 7 + i], params) for i in range(3)]
        for params in (scored, SamplingParams(max_tokens=1))
    ]
    for request in (*both[0], *both[1]):
        scheduler.add(request)
    order = []
    while not scheduler.idle:
        order += scheduler.step()
    assert order == [request for pair in zip(both[1], both[0], strict=True) for request in pair]


def test_timings_add_up(opened: Callable[[str], LLM]) -> None:
    llm, start = opened("stories3m"), time.perf_counter()
    [generation] = llm.generate("Once", GREEDY)
    timings = generation.timings
    assert 0 <= timings.queued_s < timings.prefill_s + timings.decode_s <= time.perf_counter() - start
    assert timings.prefill_s > 0 < timings.decode_s


@pytest.mark.parametrize(
    ("prompt", "words"),
    [([], "no tokens"), ([0, 320], "320"), ([-1], "-1"), (7, "list of token ids"), ([None], "None")],
)
def test_prompts_that_cannot_be_are_refused(opened: Callable[[str], LLM], prompt: Any, words: str) -> None:
    llm = opened("llama2")
    with pytest.raises(ConfigError, match=words):
        llm.model.request(prompt, GREEDY)


def test_a_directory_is_packed_once_into_the_cache(
    tiny_llama: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    first = LLM(tiny_llama("llama2"), 1)
    written = first.model.path.stat().st_mtime_ns
    second = LLM(tiny_llama("llama2"), 1)
    assert (second.model.path, second.model.path.stat().st_mtime_ns) == (first.model.path, written)
    assert second.generate("a", GREEDY)[0].token_ids == first.generate("a", GREEDY)[0].token_ids


def test_a_special_token_ends_the_text_by_its_name_or_its_id(opened: Callable[[str], LLM]) -> None:
    llm = opened("llama2")
    for seed in range(300):
        hot = SamplingParams(max_tokens=60, temperature=3.0, seed=seed)
        [plain] = llm.generate(PROMPTS[0], hot)
        if 0 in plain.token_ids[3:-3]:
            break
    else:
        raise AssertionError("the model never said <s>")
    first = plain.token_ids.index(0)
    for changes in ({"stop": ["<s>"]}, {"stop": "<s>"}, {"stop_token_ids": [0]}, {"stop": ["x<s>", "<s>"]}):
        [found] = llm.generate(PROMPTS[0], replace(hot, **changes))
        assert (found.token_ids, found.finish_reason) == (plain.token_ids[: first + 1], "stop")
        assert found.text == llm.tokenizer.decode(plain.token_ids[:first])
    [other] = llm.generate(PROMPTS[0], replace(hot, stop=["\N{SNOWMAN}<s>"]))
    assert other == replace(plain, timings=other.timings)


def test_stop_ids_that_no_token_has_are_refused(opened: Callable[[str], LLM]) -> None:
    with pytest.raises(ConfigError, match="320"):
        opened("llama2").generate("a", SamplingParams(stop_token_ids=[320]))


def test_a_prompt_is_text_in_utf_8_and_has_one_bos(opened: Callable[[str], LLM]) -> None:
    llm = opened("llama2")
    texts = ["a", "<s>a", "a\ud83d", "a\ufffd"]
    found = [generation.token_ids for generation in llm.generate(texts, GREEDY)]
    assert found[0] == found[1] and found[2] == found[3] != found[0]
    assert SamplingParams(stop="\udcff").stop == ("\ufffd",)
