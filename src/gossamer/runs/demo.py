"""`demo`: the tour. A real chat model halved and won back, wide layers on this CPU, a small model made."""

import dataclasses
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from gossamer import plots
from gossamer.checkpoint.directory import Checkpoint
from gossamer.engine import LLM, SamplingParams
from gossamer.errors import ConfigError
from gossamer.job.options import option
from gossamer.job.report import Event, Progress, Result, Table, quiet
from gossamer.measure.tour import CpuTour, cpu_tour
from gossamer.runs import chat_model, recovery
from gossamer.runs.options import check
from gossamer.stages.evaluate import Evaluate, evaluate

HELD_OUT = "python:stdlib:held-out"
NUM_DOCTESTS = 400
PROMPTS = ('>>> sorted("lamp")\n', '>>> "sassy".replace("s", "t")\n', '>>> "python"[::-1]\n')
REPORT = "report.json"


@dataclass(frozen=True)
class Demo(recovery.Recovery):
    """Win a real chat model back from half its weights, measure this CPU, make a small model (12 minutes).

    The data and the measurements are fixed, and so is all that is done to the chat model. The stages of the
    small one take all their options, whose defaults are tuned to it and to these minutes: only with them can
    the figures be compared with those of the README.
    """

    output_dir: str = option("gossamer-demo", help="directory for models, report and picture", short="-o")
    long: bool = option(
        False, help="the chat model for about an hour: more text, more training, and 70% zeros as well"
    )


@dataclass(frozen=True)
class Row:
    """One model of the table; accuracies and recovery are fractions, `num_bytes` its file or weights."""

    name: str
    perplexity: float
    accuracy: float
    unseen_accuracy: float
    recovery: float
    num_bytes: int


@dataclass(frozen=True)
class DemoResult(Result):
    """Everything that the demo shows; also in `report.json`. `samples`: prompt -> model -> text.

    `chat` is None where the chat model is not installed.
    """

    chat: chat_model.ChatModel | None
    cpu: CpuTour
    rows: tuple[Row, ...]
    samples: dict[str, dict[str, str]]
    seconds: float
    report: str
    picture: str
    packed: str

    def tables(self) -> list[Table]:
        chat = self.chat.tables() if self.chat else []
        return [*chat, *self.cpu.tables(), self._models(), self._samples()]

    def _models(self) -> Table:
        columns = ("model", "held-out perplexity", "doctests", "recovery", "two unseen kinds", "bytes")
        rows = [
            (
                row.name,
                f"{row.perplexity:.2f}",
                f"{row.accuracy:.1%}",
                f"{row.recovery:.1%}",
                f"{row.unseen_accuracy:.1%}",
                f"{row.num_bytes:,}",
            )
            for row in self.rows
        ]
        return Table("A small Python Llama, trained by Gossamer", columns, rows)

    def _samples(self) -> Table:
        names = list(next(iter(self.samples.values())))
        rows = [(prompt.strip(), *texts.values()) for prompt, texts in self.samples.items()]
        return Table("The same prompts, three models", ("prompt", *names), rows)

    @property
    def closing(self) -> tuple[str, ...]:
        body = {"model": "model", "prompt": PROMPTS[0], "max_tokens": 16, "temperature": 0, "stop": ["\n"]}
        program = "gossamer" if shutil.which("gossamer") else sys.argv[0]
        if self.chat:
            names = ("talk to it, half its weights gone", "and as it was")
            files = zip(self.chat.to_talk_to, names, strict=True)
            chat = [f"  {program} run {file}  # {name}" for file, name in files]
        else:
            chat = [f"  {chat_model.INSTALL}  # the chat model, for this demo's first act"]
        return (
            f"\n{self.seconds:.0f} s in all. Report: {self.report}   Picture: {self.picture}\n\nTry it:",
            *chat,
            f"  {program} run {self.packed} '>>> sorted(\"bca\")' --max-tokens 16",
            f"  {program} serve {self.packed}",
            f"  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' "
            f"-d '{json.dumps(body)}'",
        )


def demo(
    job: Demo,
    progress: Progress = quiet,
    *,
    cpu_seconds: float = 30,
    budget: chat_model.Budget | None = None,
    size: recovery.Size = recovery.WHOLE,
) -> DemoResult:
    """Run the tour; `output_dir` may be a former demo's, which is replaced.

    The chat model's `budget` is the job's, where none is given.
    """
    budget = budget or (chat_model.LONG if job.long else chat_model.WHOLE)
    start, output = time.monotonic(), Path(job.output_dir)
    if output.exists() and any(output.iterdir()) and not (output / REPORT).exists():
        raise ConfigError(f"{output} exists and holds no demo; give another --output-dir")
    jobs = recovery.plan(job, recovery.Models.under(output, recovery.SHIPPED), output, size)
    check(vars(jobs).values(), Checkpoint.open(recovery.SHIPPED))  # before the acts that come first
    output.mkdir(parents=True, exist_ok=True)
    (output / REPORT).write_text("{}\n", encoding="utf-8")  # an interrupted demo may be run again
    chat = act_of_the_chat_model(output / "chat", job.seed, progress, budget)
    cpu = cpu_tour(progress, cpu_seconds)
    models = recovery.recover(job, recovery.SHIPPED, output / "models", progress, size)
    rows = measure(models, job.seed, progress)
    result = DemoResult(
        chat=chat,
        cpu=cpu,
        rows=rows,
        samples=side_by_side(models),
        seconds=time.monotonic() - start,
        report=str(output / REPORT),
        picture=str(output / "demo.png"),
        packed=str(models.packed),
    )
    (output / REPORT).write_text(json.dumps(dataclasses.asdict(result), indent=2) + "\n", encoding="utf-8")
    plots.demo(
        output / "demo.png",
        [(row.name, 100 * row.accuracy) for row in chat.rows] if chat else [],
        cpu.speeds(),
        [(row.name, 100 * row.accuracy) for row in rows],
        cpu.cpu,
    )
    return result


def act_of_the_chat_model(
    output: Path, seed: int, progress: Progress, budget: chat_model.Budget
) -> chat_model.ChatModel | None:
    """The act, or None where the model is not installed, which the user is told."""
    gguf = chat_model.find_gguf()
    if gguf is None:
        message = f"without the chat model, which is not installed: {chat_model.INSTALL}"
        progress(Event("demo", message, lasting=True))
        return None
    return chat_model.chat_model(gguf, output, seed, progress, budget)


def measure(models: recovery.Models, seed: int, progress: Progress) -> tuple[Row, ...]:
    """Every model through the engine on the same held-out text and the same unseen instances."""
    named = {
        "dense": models.dense,
        "dense, same extra tokens": models.control,
        "70% one-shot": models.one_shot,
        "70% recovered": models.recovered,
        "70% recovered, INT8, packed": models.packed,
    }
    rows: list[Row] = []
    for name, path in named.items():
        progress(Event("evaluate", name, len(rows), len(named)))
        job = Evaluate(
            str(path),
            dataset=HELD_OUT,
            tasks=("doctest", "doctest-unseen"),
            backend="engine",
            limit=NUM_DOCTESTS,
            seed=seed,
            no_cache=True,
        )
        figures = evaluate(job)
        assert figures.perplexity is not None
        accuracy = figures.accuracy["doctest"]
        recovery_share = accuracy / rows[0].accuracy if rows else 1.0
        unseen = figures.accuracy["doctest-unseen"]
        rows.append(Row(name, figures.perplexity, accuracy, unseen, recovery_share, num_bytes(path)))
    progress(Event("evaluate", "", len(named), len(named)))
    return tuple(rows)


def num_bytes(path: Path) -> int:
    """Size of a packed file, or of a directory's weights."""
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def side_by_side(models: recovery.Models) -> dict[str, dict[str, str]]:
    """Greedy answers of the dense, the one-shot and the recovered model to the same prompts."""
    paths = {"dense": models.dense, "70% one-shot": models.one_shot, "70% recovered": models.recovered}
    engines = {name: LLM(path) for name, path in paths.items()}
    params = SamplingParams(max_tokens=24, stop=["\n"])
    return {
        prompt: {name: engine.generate(prompt, params)[0].text for name, engine in engines.items()}
        for prompt in PROMPTS
    }
