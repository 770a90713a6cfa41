"""`run`: complete a prompt, answer it, or talk."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from gossamer.engine import LLM, GenerationOptions, Piece, SamplingParams
from gossamer.errors import ConfigError
from gossamer.job.options import option
from gossamer.job.report import Event, Progress, quiet
from gossamer.tools.conversation import Conversation

MAX_TOKENS = 128  # of a completion, which need not have an end; an answer has one


@dataclass(frozen=True)
class Run(GenerationOptions):
    """Complete PROMPT, or answer it with --chat; text comes as it is made. Without a PROMPT, talk."""

    model: str = option(
        help="a .goss file, or a directory or org/name[@revision] of the hub (packed once into a cache)",
        positional=True,
    )
    prompt: str | None = option(
        None,
        help="the text to go on from (default: what comes on stdin; from a terminal, a chat)",
        positional=True,
    )
    max_tokens: int | None = option(None, help="new tokens at most (128; in chats, what the context holds)")
    temperature: float | None = option(
        None, help="0 takes the likeliest token; above, samples (default: the model's own, else 0)"
    )
    top_k: int | None = option(None, help="sample among this many likeliest tokens (0: all)")
    top_p: float | None = option(None, help="sample among the likeliest tokens of this total probability")
    min_p: float | None = option(
        None, help="sample among tokens of this share of the likeliest's probability"
    )
    repetition_penalty: float | None = option(
        None, help="above 1, tokens that were there before become less likely"
    )
    seed: int | None = option(None, help="makes sampling repeatable")
    stop: tuple[str, ...] = option((), help="strings that end the text; special tokens by their names")
    stop_token_ids: tuple[int, ...] = option((), help="token ids that end the text")
    chat: bool = option(False, help="put the prompt through the model's chat template")
    backend: Literal["engine", "gpu"] = option(
        "engine", help="engine: Gossamer's own; gpu: transformers with sparse linears on a GPU (directories)"
    )


def run(job: Run, progress: Progress = quiet) -> Iterator[Piece] | Conversation:
    """The completion piece by piece, or a conversation where there is a terminal and no prompt."""
    talks = job.prompt is None and sys.stdin is not None and sys.stdin.isatty()
    prompt = None if talks else _given(job)
    llm = _opened(job, progress)
    params = _params(job, llm, talks or job.chat, progress)
    if prompt is None:
        if llm.tokenizer.chat_template is None:
            raise ConfigError(
                "this model has no chat template, so there is no talking to it; give a PROMPT to go on from."
            )
        return Conversation(llm, params, progress)
    return _complete(llm, prompt, params, progress, chat=job.chat)


def _opened(job: Run, progress: Progress) -> LLM:
    """The model behind the backend; ConfigError for options that another has, or a GPU that is not there."""
    if job.backend == "engine":
        return LLM(
            job.model, job.threads, kv_cache_dtype=job.kv_cache_dtype, offline=job.offline, progress=progress
        )
    job.refuse_given("threads", "kv_cache_dtype")
    from gossamer.tools.on_gpu import open_on_gpu

    return open_on_gpu(job.model, offline=job.offline)


def _given(job: Run) -> str:
    """The prompt from the command line or from stdin, whose last line end is not part of it."""
    if job.prompt is not None:
        return job.prompt
    content = b"" if sys.stdin is None else sys.stdin.buffer.read()
    text = content.decode(errors="replace").removesuffix("\n").removesuffix("\r")
    if not text:
        raise ConfigError("no prompt was given, and nothing came on stdin; give a PROMPT.")
    return text


def _params(job: Run, llm: LLM, answers: bool, progress: Progress) -> SamplingParams:
    """What was asked for, over the model's own options; greedy where neither says otherwise."""
    named = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    given = {name: value for name in named if (value := getattr(job, name)) is not None}
    defaults = llm.model.sampling_defaults(job.generation_config, "run", progress)
    length = {"max_tokens": None if answers else MAX_TOKENS}
    return SamplingParams(**{**length, **defaults, **given}, stop=job.stop, stop_token_ids=job.stop_token_ids)


def _complete(
    llm: LLM, prompt: str, params: SamplingParams, progress: Progress, *, chat: bool
) -> Iterator[Piece]:
    """Yield the pieces; say when none has text, and that a chat model was not asked as one."""
    if not chat and llm.tokenizer.chat_template is not None:
        line = "this model has a chat template: --chat puts the prompt through it"
        progress(Event("run", line, lasting=True))
    empty = True
    messages = [{"role": "user", "content": prompt}]
    for piece in llm.stream(llm.tokenizer.chat(messages, typed=True) if chat else prompt, params):
        empty = empty and not piece.text
        yield piece
    if empty:
        progress(Event("run", "the model ended at once, without a text", lasting=True))
