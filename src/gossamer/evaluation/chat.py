"""Chat: whose answers an outside judge prefers, the model's or its baseline's (arXiv 2306.05685).

The judge sees each pair twice, with positions swapped; where its verdicts differ it is a tie. A win counts
1, a tie 1/2, and the win rate is their mean: 50% for a model as good as its baseline.
"""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.data.tables import BadRows, check_table, table_rows, text_of
from gossamer.errors import ConfigError
from gossamer.evaluation.backends import BATCH_ROWS, Backend
from gossamer.evaluation.harness import without_its_output
from gossamer.evaluation.judge import ASKED, Judge
from gossamer.evaluation.kept import digest
from gossamer.evaluation.scores import Scores
from gossamer.job.report import Event, Progress


@dataclass(frozen=True)
class Speaker:
    """A model that answers; `identity` is the hash of all that its answers depend on beside the prompt."""

    name: str
    identity: str
    opened: Callable[[], Backend]


class Journal:
    """Answers and verdicts as they come, a line of JSON each, so that a run that ends goes on from there.

    A line that is cut off, as by a full disk, is told of and left out. `anew` begins an empty one.
    """

    def __init__(self, path: Path, progress: Progress, *, anew: bool = False) -> None:
        self.path, self._entries = path, dict[str, dict[str, Any]]()
        lines = [] if anew or not path.exists() else path.read_bytes().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                self._entries[entry["key"]] = entry
            except (ValueError, KeyError, TypeError):
                progress(Event("evaluate", f"{path}:{number} is damaged; left out", lasting=True))
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():  # else the first entry makes it: a run that fails before leaves none
            staged = path.with_suffix(".partial")
            staged.write_text("".join(json.dumps(e) + "\n" for e in self._entries.values()), encoding="utf-8")
            staged.rename(path)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._entries[key]

    def add(self, key: str, **content: Any) -> None:
        """Write an entry down at once."""
        self._entries[key] = {"key": key, **content}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._entries[key]) + "\n")


def read_prompts(file: Path, skip_bad_rows: int, progress: Progress) -> list[str]:
    """What a user asks: `prompt`, `instruction` or `question`, and below it `input` where there is one.

    Of the form of self-instruct, the input of the first of `instances`. ConfigError for other rows.
    """
    check_table(file, f"{file}, for --kind chat")
    bad, prompts = BadRows(skip_bad_rows), list[str]()
    for where, row in table_rows(file, bad):
        try:
            prompts.append(_prompt(row, where))
        except ConfigError as error:
            bad.leave_out(error)
    for note in bad.notes():
        progress(Event("evaluate", f"{file}: {note}", lasting=True))
    if not prompts:
        raise ConfigError(f"{file} has no prompts")
    return prompts


def _prompt(row: Mapping[str, Any], where: str) -> str:
    asked = text_of(row, where, "prompt", "instruction", "question").strip()
    instances = row.get("instances")
    first = instances[0] if isinstance(instances, list) and instances else row
    below = first.get("input") if isinstance(first, dict) else None
    return f"{asked}\n\n{below.strip()}" if isinstance(below, str) and below.strip() else asked


def compare(
    prompts: Sequence[str],
    ours: Speaker,
    base: Speaker,
    judge: Judge,
    journal: Journal,
    max_tokens: int,
    progress: Progress,
) -> Scores:
    """Win rate, and shares of wins, ties and losses, of prompts on which the judge came to verdicts.

    Raises OSError where the judge is down: what there is stays in the journal.
    """
    answers = [answer_all(prompts, speaker, journal, max_tokens, progress) for speaker in (ours, base)]
    points, done = list[float | None](), 0
    for number, (prompt, mine, other) in enumerate(zip(prompts, *answers, strict=True)):
        try:
            won = [_verdict(judge, journal, prompt, *pair) for pair in ((mine, other), (other, mine))]
        except OSError as error:
            raise OSError(
                f"the judge at {judge.url} is down ({error}); {done} of {len(prompts)} comparisons and all "
                f"answers are kept in {journal.path}: the same command goes on from there"
            ) from error
        done = number + 1
        points.append(None if "" in won else {("A", "B"): 1.0, ("B", "A"): 0.0}.get((won[0], won[1]), 0.5))
        progress(Event("evaluate", "judged", done, len(prompts)))
    judged = [point for point in points if point is not None]
    if not judged:
        raise ConfigError(
            f"the judge {judge.model!r} came to no verdict; what it said is in {journal.path}. Once that is "
            "mended, the same command asks again for what is taken out, and the answers stay: "
            f"""sed -i '/"verdict": ""/d' {shlex.quote(str(journal.path))}"""
        )
    columns = {
        "win_rate": judged,
        "wins": [float(point == 1) for point in judged],
        "ties": [float(point == 0.5) for point in judged],
        "losses": [float(point == 0) for point in judged],
        "without_verdict": [float(point is None) for point in points],
    }
    errors = {
        name: float(np.std(column, ddof=1) / np.sqrt(len(column)))
        for name, column in columns.items()
        if len(column) > 1
    }
    means = {name: float(np.mean(column)) for name, column in columns.items()}
    return Scores(means, errors, tuple(judged), len(judged))


def answer_all(
    prompts: Sequence[str], speaker: Speaker, journal: Journal, max_tokens: int, progress: Progress
) -> list[str]:
    """Greedy answers in the model's chat template; those that the journal has are not generated again."""
    from lm_eval.api.instance import Instance

    keys = [digest([speaker.identity, max_tokens, prompt]) for prompt in prompts]
    missing = [index for index, key in enumerate(keys) if key not in journal]
    for first in range(0, len(missing), BATCH_ROWS):
        backend, batch = speaker.opened(), missing[first : first + BATCH_ROWS]
        options = {"until": [], "do_sample": False, "max_gen_toks": min(max_tokens, backend.context // 2)}
        requests = []
        for index in batch:
            turn = [{"role": "user", "content": prompts[index]}]
            try:
                text = backend.tokenizer.render_chat(turn, True)
            except ConfigError as error:
                raise ConfigError(f"{speaker.name}: {error}") from error
            requests.append(Instance("generate_until", {}, (text, options), index))
        with without_its_output():
            texts = backend.for_harness().generate_until(requests)
        for index, text in zip(batch, texts, strict=True):
            journal.add(keys[index], model=speaker.name, prompt=prompts[index], answer=text.strip())
        progress(Event("evaluate", f"answers of {speaker.name}", first + len(batch), len(missing)))
    return [journal[key]["answer"] for key in keys]


def _verdict(judge: Judge, journal: Journal, prompt: str, first: str, second: str) -> str:
    """A, B, C or nothing, as the journal has it or the judge says now."""
    key = digest([judge.url, judge.model, ASKED, prompt, first, second])
    if key not in journal:
        preferred, said = judge.prefers(prompt, first, second)
        journal.add(
            key, judge=judge.model, prompt=prompt, first=first, second=second, verdict=preferred, said=said
        )
    return journal[key]["verdict"]
