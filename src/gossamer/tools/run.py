"""`run`: complete a prompt, or talk."""

from collections.abc import Iterator
from dataclasses import dataclass

from gossamer.engine import LLM, EngineOptions, Piece, SamplingParams
from gossamer.job.options import option
from gossamer.job.report import Progress, quiet


@dataclass(frozen=True)
class Run(EngineOptions):
    """Complete PROMPT, or answer it with --chat; text comes as it is made."""

    model: str = option(
        help="a .goss file, or a directory or org/name[@revision] of the hub (packed once into a cache)",
        positional=True,
    )
    prompt: str = option(help="the text to go on from", positional=True)
    max_tokens: int = option(128, help="new tokens at most")
    temperature: float = option(0.0, help="0 takes the likeliest token; above, samples")
    top_k: int = option(0, help="sample among this many likeliest tokens (0: all)")
    top_p: float = option(1.0, help="sample among the likeliest tokens of this total probability")
    seed: int | None = option(None, help="makes sampling repeatable")
    stop: tuple[str, ...] = option((), help="strings that end the text")
    chat: bool = option(False, help="put the prompt through the model's chat template")


def run(job: Run, progress: Progress = quiet) -> Iterator[Piece]:
    """Yield the completion piece by piece."""
    llm = LLM(
        job.model, job.threads, kv_cache_dtype=job.kv_cache_dtype, offline=job.offline, progress=progress
    )
    params = SamplingParams(
        max_tokens=job.max_tokens,
        temperature=job.temperature,
        top_k=job.top_k,
        top_p=job.top_p,
        seed=job.seed,
        stop=list(job.stop),
    )
    prompt = llm.tokenizer.chat([{"role": "user", "content": job.prompt}]) if job.chat else job.prompt
    yield from llm.stream(prompt, params)
