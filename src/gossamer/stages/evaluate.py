"""`evaluate`: perplexity of a text and exact-match accuracy of tasks, through transformers or the engine."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from gossamer import doctests
from gossamer.checkpoint import Checkpoint
from gossamer.data import evaluation_rows
from gossamer.engine import LLM, KvCacheDtype, SamplingParams
from gossamer.errors import ConfigError, UnsupportedError
from gossamer.job import option
from gossamer.report import Event, Progress, Table, quiet
from gossamer.tokens import Tokenizer

NUM_DOCTESTS = 500
SLACK_TOKENS = 8
BATCH_ROWS = 16


@dataclass(frozen=True)
class Evaluate:
    """Measure a model: perplexity of --dataset, exact-match accuracy of --tasks, or both."""

    model: str = option(help="checkpoint directory, or a .goss file (engine only)", positional=True)
    dataset: str = option("", help="text whose perplexity to measure: SRC")
    tasks: tuple[str, ...] = option(
        (), help="doctest, doctest-unseen, or .jsonl files with fields prompt and answer"
    )
    backend: Literal["torch", "engine"] = option("torch", help="transformers, or Gossamer's own engine")
    kv_cache_dtype: Literal["auto", "f32", "bf16", "i8"] = option(
        "auto", help="the engine's type of cached keys and values (auto: f32 for float32 models, else bf16)"
    )
    baseline: str = option("", help="model to compare with; adds recovery")
    limit: int = option(0, help="rows of text and examples a task at most; 0: all (500 doctests)")
    seed: int = option(0, help="choice of the doctests")
    offline: bool = option(False, help="never touch the network")


@dataclass(frozen=True)
class EvaluateResult:
    """Perplexity (None without --dataset) over `num_tokens`; accuracy of each task and kind of example.

    `recovery`: accuracy over the baseline's, and for "perplexity" the baseline's over ours; 1 is all of it.
    """

    model: str
    backend: str
    perplexity: float | None
    num_tokens: int
    accuracy: dict[str, float]
    accuracy_by_kind: dict[str, dict[str, float]]
    num_examples: dict[str, int]
    recovery: dict[str, float]
    seconds: float

    def tables(self) -> list[Table]:
        """One row a figure."""
        rows = [(name, f"{value:.1%}", f"{self.num_examples[name]}") for name, value in self.accuracy.items()]
        if self.perplexity is not None:
            rows.insert(0, ("perplexity", f"{self.perplexity:.4g}", f"{self.num_tokens} tokens"))
        columns = ("", "value", "examples")
        if self.recovery:
            columns = (*columns, "recovery")
            rows = [(*row, f"{self.recovery[row[0]]:.1%}") for row in rows if row[0] in self.recovery]
        return [Table(f"{self.model} ({self.backend}, {self.seconds:.1f} s)", columns, rows)]


@dataclass(frozen=True)
class Example:
    """A prompt and how to judge what follows it."""

    prompt: str
    kind: str
    answer: str
    check: Callable[[str], bool] = field(repr=False)


class Backend(Protocol):
    """What an evaluation needs of a model."""

    tokenizer: Tokenizer

    def log_likelihood(self, ids_BT: NDArray[np.int64]) -> float:
        """Sum over rows of log p(token | those before it in its row), the first token not scored."""
        ...

    def complete(self, prompts: Sequence[str], stop: str, max_tokens: int) -> list[str]:
        """Greedy continuations up to `stop` (not included), the model's end token or `max_tokens`."""
        ...


def evaluate(job: Evaluate, progress: Progress = quiet) -> EvaluateResult:
    """Measure the model, and the baseline for comparison if there is one."""
    start = time.monotonic()
    if not job.dataset and not job.tasks:
        raise ConfigError("nothing to evaluate; give --dataset SRC, --tasks NAME..., or both")
    if job.limit < 0:
        raise ConfigError(f"--limit is {job.limit}; expected a number of examples, or 0 for all")
    tasks = {task: task_examples(task, job) for task in job.tasks}
    if job.backend != "engine" and job.kv_cache_dtype != "auto":
        raise ConfigError("--kv-cache-dtype is the engine's; add --backend engine")
    ours = measure(job.model, job, tasks, progress)
    base = measure(job.baseline, job, tasks, progress) if job.baseline else None
    return EvaluateResult(
        model=job.model,
        backend=job.backend,
        perplexity=ours.perplexity,
        num_tokens=ours.num_tokens,
        accuracy=ours.accuracy,
        accuracy_by_kind=ours.by_kind,
        num_examples={task: len(examples) for task, examples in tasks.items()},
        recovery=recovery(ours, base) if base else {},
        seconds=time.monotonic() - start,
    )


@dataclass
class Figures:
    """What was measured of one model."""

    perplexity: float | None = None
    num_tokens: int = 0
    accuracy: dict[str, float] = field(default_factory=dict)
    by_kind: dict[str, dict[str, float]] = field(default_factory=dict)


def measure(model: str, job: Evaluate, tasks: dict[str, list[Example]], progress: Progress) -> Figures:
    """Run one model through the text and the tasks."""
    backend, figures = open_backend(model, job.backend, job.kv_cache_dtype), Figures()
    if job.dataset:
        rows_BT = evaluation_rows(job.dataset, backend.tokenizer, offline=job.offline)[: job.limit or None]
        total, figures.num_tokens = 0.0, rows_BT[:, 1:].size
        for first in range(0, len(rows_BT), BATCH_ROWS):
            total += backend.log_likelihood(rows_BT[first : first + BATCH_ROWS])
            progress(Event("evaluate", job.dataset, min(first + BATCH_ROWS, len(rows_BT)), len(rows_BT)))
        figures.perplexity = float(np.exp(-total / figures.num_tokens))
    for task, examples in tasks.items():
        passed = judge(backend, task, examples, progress)
        kinds = sorted({example.kind for example in examples})
        figures.accuracy[task] = float(np.mean(passed))
        figures.by_kind[task] = {
            kind: float(np.mean([ok for ok, e in zip(passed, examples, strict=True) if e.kind == kind]))
            for kind in kinds
        }
    return figures


def judge(backend: Backend, task: str, examples: Sequence[Example], progress: Progress) -> list[bool]:
    """Whether the greedy completion of each example is right; one line where the answer is one line."""
    passed: list[bool] = []
    lengths = [len(backend.tokenizer.encode(example.answer, bos=False)) for example in examples]
    stop = "" if any("\n" in example.answer for example in examples) else "\n"
    for first in range(0, len(examples), BATCH_ROWS):
        batch = slice(first, first + BATCH_ROWS)
        prompts = [example.prompt for example in examples[batch]]
        texts = backend.complete(prompts, stop, max(lengths[batch]) + SLACK_TOKENS)
        passed += [example.check(text) for example, text in zip(examples[batch], texts, strict=True)]
        progress(Event("evaluate", task, len(passed), len(examples), {"accuracy": float(np.mean(passed))}))
    return passed


def recovery(ours: Figures, base: Figures) -> dict[str, float]:
    """Share of the baseline's figures; a task that the baseline fails wholly has none."""
    shares = {task: ours.accuracy[task] / value for task, value in base.accuracy.items() if value > 0}
    if ours.perplexity is not None and base.perplexity is not None:
        shares = {"perplexity": base.perplexity / ours.perplexity} | shares
    return shares


def task_examples(task: str, job: Evaluate) -> list[Example]:
    """The examples of a task by name or file; ConfigError for an unknown one."""
    if task in ("doctest", "doctest-unseen"):
        kinds = doctests.KINDS if task == "doctest" else doctests.UNSEEN_KINDS
        drawn = doctests.generate(kinds, job.limit or NUM_DOCTESTS, job.seed, split="test")
        return [
            Example(doctests.prompt(d), d.kind, d.want, lambda got, d=d: doctests.check(d, got))
            for d in drawn
        ]
    if not task.endswith(".jsonl"):
        raise ConfigError(f"unknown task {task!r}; expected doctest, doctest-unseen or a .jsonl file")
    return read_examples(Path(task))[: job.limit or None]


def read_examples(file: Path) -> list[Example]:
    """Rows of a .jsonl file with text fields `prompt` and `answer`, and perhaps `kind`."""
    if not file.is_file():
        raise ConfigError(f"task {str(file)!r}: no such file")
    lines = file.read_text(encoding="utf-8").splitlines()
    rows = [(f"{file}:{n}", _row(line, f"{file}:{n}")) for n, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ConfigError(f"task {str(file)!r} has no examples")
    return [_example(row, where) for where, row in rows]


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not a line of JSON ({error})") from error
    wanted = ("prompt", "answer")
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in wanted):
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ConfigError(f"{where}: expected text in the fields prompt and answer; found {found}")
    return row


def _example(row: dict[str, Any], where: str) -> Example:
    answer = row["answer"].strip()
    if not row["prompt"] or not answer:
        raise ConfigError(f"{where}: prompt or answer is empty")
    return Example(row["prompt"], str(row.get("kind", "")), answer, lambda got: got.strip() == answer)


def open_backend(model: str, backend: str, kv_cache_dtype: KvCacheDtype = "auto") -> Backend:
    """Open a model for evaluation; UnsupportedError for a packed file on the torch backend."""
    if backend == "engine":
        return EngineBackend(model, kv_cache_dtype)
    if Path(model).is_file():
        raise UnsupportedError(
            f"{model} is a file; the torch backend reads directories (try --backend engine)"
        )
    return TorchBackend(model)


class EngineBackend:
    """Gossamer's own engine; a directory is packed once into its cache."""

    def __init__(self, model: str, kv_cache_dtype: KvCacheDtype = "auto") -> None:
        self._llm = LLM(model, max_batch=BATCH_ROWS, kv_cache_dtype=kv_cache_dtype)
        self.tokenizer = self._llm.tokenizer

    def log_likelihood(self, ids_BT: NDArray[np.int64]) -> float:
        total = 0.0
        for ids_T in ids_BT:
            logits_TV = self._llm.logits(ids_T[:-1]).astype(np.float64)
            logits_TV -= logits_TV.max(axis=1, keepdims=True)
            chosen_T = np.take_along_axis(logits_TV, ids_T[1:, None], axis=1)[:, 0]
            total += float((chosen_T - np.log(np.exp(logits_TV).sum(axis=1))).sum())
        return total

    def complete(self, prompts: Sequence[str], stop: str, max_tokens: int) -> list[str]:
        params = SamplingParams(max_tokens=max_tokens, stop=[stop] if stop else [])
        return [generation.text for generation in self._llm.generate(prompts, params)]


class TorchBackend:
    """transformers' model in float32, quantized directories (compressed-tensors) included."""

    def __init__(self, model: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        source = Checkpoint.open(model)  # names what is wrong with a directory better than transformers does
        self.tokenizer = Tokenizer.open(source.path)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            source.path, dtype=torch.float32, local_files_only=True
        )

    def log_likelihood(self, ids_BT: NDArray[np.int64]) -> float:
        import torch

        ids = torch.from_numpy(np.ascontiguousarray(ids_BT))
        with torch.no_grad():
            logits_NV = self._model(ids[:, :-1]).logits.flatten(0, 1)
        return -torch.nn.functional.cross_entropy(logits_NV, ids[:, 1:].flatten(), reduction="sum").item()

    def complete(self, prompts: Sequence[str], stop: str, max_tokens: int) -> list[str]:
        """Left-padded batch, greedy; the texts are cut after decoding, so they equal the engine's."""
        import torch

        rows = [self.tokenizer.encode(prompt) for prompt in prompts]
        width = max(map(len, rows))
        ids_BT = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        chosen_BT = self._decode(ids_BT, mask_BT, stop, max_tokens)
        return [self._text(row, stop) for row in chosen_BT.tolist()]

    def _decode(self, ids_BT: Any, mask_BT: Any, stop: str, max_tokens: int) -> Any:
        """Ids [B, steps] chosen greedily; ends early once every row holds an end token or `stop`."""
        import torch

        cache, chosen, fed = None, torch.empty(len(ids_BT), 0, dtype=torch.long), ids_BT
        with torch.no_grad():
            for _ in range(max_tokens):
                positions = (mask_BT.cumsum(1) - 1).clamp_min(0)[:, -fed.shape[1] :]
                output = self._model(
                    fed, attention_mask=mask_BT, position_ids=positions, past_key_values=cache, use_cache=True
                )
                cache, fed = output.past_key_values, output.logits[:, -1:].argmax(-1)
                chosen = torch.cat([chosen, fed], dim=1)
                mask_BT = torch.cat([mask_BT, torch.ones_like(fed)], dim=1)
                if all(self._ended(row, stop) for row in chosen.tolist()):
                    break
        return chosen

    def _ended(self, ids: list[int], stop: str) -> bool:
        ended = not self.tokenizer.eos_ids.isdisjoint(ids)
        return ended or (bool(stop) and stop in self.tokenizer.decode(ids))

    def _text(self, ids: list[int], stop: str) -> str:
        end = next((i for i, token in enumerate(ids) if token in self.tokenizer.eos_ids), len(ids))
        text = self.tokenizer.decode(ids[:end])
        return text.split(stop)[0] if stop else text
