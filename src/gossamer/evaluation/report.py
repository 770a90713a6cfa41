"""What `evaluate` says of a model: its figures with their errors, as a table, as JSON and as a picture."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer import plots
from gossamer.evaluation.scores import is_share, primary
from gossamer.job.options import record
from gossamer.job.report import Result, Table
from gossamer.layerwise.report import markdown


@dataclass(frozen=True)
class EvaluateResult(Result):
    """Perplexity (None without --dataset) over `num_tokens`; accuracy of each task and kind of example.

    `backend`: the one that was used. `row_length`: tokens of a row of the text. `recovery`: accuracy over the
    baseline's, and for "perplexity" the baseline's over ours; 1 is all of it. `metrics` of each task and
    their `standard_errors`, where the text's are named "perplexity"; the first of `acc_norm`, `acc`, ... is a
    task's accuracy. `recovery_errors`: the standard error of the recovery, paired by example or row
    (scores.py).
    `baseline`: its perplexity or accuracy, by the same names. `model_hash`: sha256 of what decides the
    model's answers. `from_cache`: the figures that an earlier run measured, kept in the folder `cache`.
    """

    model: str
    backend: str
    perplexity: float | None
    num_tokens: int
    row_length: int
    accuracy: dict[str, float]
    accuracy_by_kind: dict[str, dict[str, float]]
    num_examples: dict[str, int]
    recovery: dict[str, float]
    metrics: dict[str, dict[str, float]]
    standard_errors: dict[str, dict[str, float]]
    recovery_errors: dict[str, float]
    baseline: dict[str, float]
    model_hash: str
    from_cache: tuple[str, ...]
    cache: str
    seconds: float

    @property
    def closing(self) -> Sequence[str]:
        """Which figures are of an earlier run."""
        if not self.from_cache:
            return ()
        return (f"From {self.cache} (--no-cache measures anew): {', '.join(self.from_cache)}",)

    def tables(self) -> list[Table]:
        """One row a figure, those of a task below each other; recovery is of its first."""
        columns = ("", "value", "examples", "recovery")
        if not self.recovery:
            columns = columns[:-1]
        rows = [row[: len(columns)] for row in self._rows()]
        return [Table(f"{self.model} ({self.backend}, {self.seconds:.1f} s)", columns, rows)]

    def _rows(self) -> Iterator[tuple[str, str, str, str]]:
        if self.perplexity is not None:
            tokens = f"{self.num_tokens} tokens, {self.row_length} a row"
            error = self.standard_errors.get("perplexity", {}).get("perplexity")
            value = f"{self.perplexity:.4g}" + ("" if error is None else f" +- {error:.2g}")
            yield "perplexity", value, tokens, self._recovery("perplexity")
        for task, metrics in self.metrics.items():
            first = primary(metrics)
            yield task, self._value(task, first), f"{self.num_examples[task]}", self._recovery(task)
            for metric in metrics:
                if metric != first:
                    yield "", self._value(task, metric), "", ""

    def _value(self, task: str, metric: str) -> str:
        """A metric with its standard error where there is one; perplexities are no percentages."""
        form = ".1%" if is_share(metric) else ".4g"
        error = self.standard_errors[task].get(metric)
        return (
            f"{self.metrics[task][metric]:{form}}"
            + (f" +- {error:{form}}" if error is not None else "")
            + f" ({metric.replace(',', ', ')})"
        )

    def _recovery(self, name: str) -> str:
        if name not in self.recovery:
            return ""
        error = self.recovery_errors.get(name)
        return f"{self.recovery[name]:.1%}" + ("" if error is None else f" +- {error:.1%}")

    def write(self, output: Path, job: object) -> None:
        """`output`, a JSON file with the run's options; beside it the table (.md) and a picture (.png)."""
        content: dict[str, Any] = {"options": record(job), **dataclasses.asdict(self)}
        output.parent.mkdir(parents=True, exist_ok=True)
        plots.scores(output.with_suffix(".png"), self._panels(), f"{self.model} ({self.backend})")
        parts = [
            *map(markdown, self.tables()),
            f"![scores]({output.with_suffix('.png').name})",
            *self.closing,
        ]
        output.with_suffix(".md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def _panels(self) -> list[tuple[str, list[plots.Score]]]:
        """Shares in percent, then perplexities, where there are any."""
        shares, others = list[plots.Score](), list[plots.Score]()
        if self.perplexity is not None:
            error = self.standard_errors.get("perplexity", {}).get("perplexity")
            others.append(plots.Score("perplexity", self.perplexity, error, self.baseline.get("perplexity")))
        for task, accuracy in self.accuracy.items():
            metric = primary(self.metrics[task])
            share, unit = (shares, 100) if is_share(metric) else (others, 1)
            error, base = self.standard_errors.get(task, {}).get(metric), self.baseline.get(task)
            note = f"recovers {self._recovery(task)}" if task in self.recovery else ""
            share.append(
                plots.Score(
                    task,
                    accuracy * unit,
                    None if error is None else error * unit,
                    None if base is None else base * unit,
                    note,
                )
            )
        named = (("right, %", shares), ("perplexity", others))
        return [(title, scores) for title, scores in named if scores]
