"""`publish`: a model and its card go to the Hugging Face hub."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.checkpoint.directory import Checkpoint
from gossamer.checkpoint.hub import NAME
from gossamer.checkpoint.schemes import read_scheme
from gossamer.checkpoint.upload import check_access, check_repository, upload
from gossamer.errors import ConfigError
from gossamer.evaluation.kept import model_hash
from gossamer.job.options import option
from gossamer.job.report import Event, Progress, Result, Table, quiet
from gossamer.tools.card import Sources, model_card
from gossamer.tools.inspect import Inspect, InspectResult, inspect
from gossamer.tools.local_paths import published_texts

CARD = "README.md"


@dataclass(frozen=True)
class Publish:
    """Write a model card, and push it with the model to a repository of the Hugging Face hub."""

    model: str = option(help="a checkpoint directory, or a .goss file", positional=True)
    repository: str = option(help="org/name[@branch]; made where it is not there", positional=True)
    results: tuple[str, ...] = option(
        (), help="files that `evaluate -o` wrote of the model, or with what --json printed"
    )
    speeds: tuple[str, ...] = option((), help="files with what `bench --json` printed of the model")
    base_model: str | None = option(
        None, help="org/name of the model that it was made of (default: where the first stage had it from)"
    )
    card: str = option("", help="the card: this file, which is written first where it is not there")
    private: bool = option(False, help="a new repository is seen by its owners alone")
    dry_run: bool = option(False, help="send nothing: show the card and the files that would be sent")


@dataclass(frozen=True)
class PublishResult(Result):
    """`files`: the bytes of each, by its path in the repository; `url`: of the commit, None of a dry run."""

    repository: str
    files: Mapping[str, int]
    card: str
    url: str | None

    def tables(self) -> list[Table]:
        """The files; below them the card of a dry run, or where to see them."""
        rows = [(file, f"{size:,}") for file, size in self.files.items()]
        return [Table(self.repository, ("file", "bytes"), rows)]

    @property
    def closing(self) -> tuple[str, ...]:
        return (self.card if self.url is None else self.url,)


def publish(job: Publish, progress: Progress = quiet) -> PublishResult:
    """Send a model with its card in one commit.

    Raises ConfigError for files of results that are none and for links out of the model's directory, and what
    `inspect`, `check_access` and `upload` raise.
    """
    repository, _ = check_repository(job.repository)
    path = Path(job.model)
    if not path.exists():
        raise ConfigError(f"{path}: found nothing there; expected a checkpoint directory or a .goss file")
    if not job.dry_run:
        check_access(job.repository)  # before all weights are read for the card
    found = _files(path)
    card = _card(job, repository, progress)
    files: dict[str, Path | bytes] = {CARD: card.encode(), **{file.name: file for file in found}}
    files |= published_texts(path)
    sizes = {name: len(it) if isinstance(it, bytes) else it.stat().st_size for name, it in files.items()}
    url = None
    if not job.dry_run:
        progress(Event("publish", f"{len(files)} files, {sum(sizes.values()):,} bytes, to {job.repository}"))
        message = f"Publish {path.name} with Gossamer"
        url = upload(job.repository, files, private=job.private, message=message)
    return PublishResult(job.repository, sizes, card, url)


def _files(path: Path) -> list[Path]:
    """The file, or those that lie in the directory itself: no hidden ones, and not its older card.

    ConfigError for a link that leads out of the directory: what it leads to was perhaps not meant.
    """
    if path.is_file():
        return [path]
    files = sorted(
        it for it in path.iterdir() if it.is_file() and not it.name.startswith(".") and it.name != CARD
    )
    if out := next((it for it in files if not it.resolve().is_relative_to(path.resolve())), None):
        raise ConfigError(
            f"{out} is a link to {out.resolve()}, outside of what is published; take it away, or put a copy "
            "of the file in its place"
        )
    return files


def _card(job: Publish, repository: str, progress: Progress) -> str:
    """The card as it is in `job.card`, or a new one. The model is read for both: what is none is not sent."""
    found = inspect(Inspect(job.model), progress)
    file = Path(job.card)
    written = _text(file) if job.card and file.exists() else None
    if written is not None and not (job.results or job.speeds or job.base_model):
        return written
    card = _new_card(job, repository, found)
    if written is None and job.card:
        file.write_text(card, encoding="utf-8")
    if written not in (None, card):
        raise ConfigError(
            f"--card {file} is there, is not the card that would be written now, and is sent as it is; take "
            "it away, or --results, --speeds and --base-model, which are for a new one"
        )
    return card


def _text(card: Path) -> str:
    try:
        return card.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--card {card}: expected text in UTF-8 ({error})") from error


def _new_card(job: Publish, repository: str, found: InspectResult) -> str:
    source = None if Path(job.model).is_file() else Checkpoint.open(job.model)
    manifest = (source.manifest if source else None) or {}
    scheme = read_scheme(source.config, job.model) if source else None
    if job.base_model and NAME.fullmatch(job.base_model) is None:
        raise ConfigError(f"--base-model is {job.base_model!r}; expected a model of the hub, org/name")
    sources = Sources(
        base_model=job.base_model or (manifest.get("origin") or {}).get("repository"),
        scheme=scheme.name if scheme else None,
        manifest=manifest,
        results=_results(job),
        speeds=[row for name in job.speeds for row in _rows(name, "bench", "decode_tokens_per_s")],
    )
    return model_card(repository, found, sources)


def _results(job: Publish) -> list[dict[str, Any]]:
    """What `evaluate` measured of the model; ConfigError where it was another."""
    rows = [(name, row) for name in job.results for row in _rows(name, "evaluate", "model_hash")]
    identity = model_hash(job.model) if rows else ""
    for name, row in rows:
        if row["model_hash"] != identity:
            raise ConfigError(
                f"{name}: found results of {row.get('model')}, whose content has the hash "
                f"{row['model_hash']!s:.16}; expected {identity[:16]}, that of {job.model}. "
                "Evaluate this one"
            )
    return [row for _, row in rows]


def _rows(name: str, verb: str, field: str) -> list[dict[str, Any]]:
    """The results in a file of lines of JSON, or the one that is the whole of it.

    ConfigError where there is none of that verb, or another's.
    """
    try:
        found = _json(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: expected what `gossamer {verb} --json` prints ({error})") from error
    rows = [it.get("result", it) if isinstance(it, dict) else it for it in found]
    rows = [row for row in rows if not (isinstance(row, dict) and "event" in row)]
    if not rows or any(not isinstance(row, dict) or field not in row for row in rows):
        raise ConfigError(
            f"{name}: expected what `gossamer {verb} --json` prints; found no result with {field}"
        )
    if wrong := next((row["impossible"] for row in rows if row.get("impossible")), None):
        raise ConfigError(f"{name}: not to be quoted: {wrong[0]} Measure it again.")
    return rows


def _json(text: str) -> list[Any]:
    """One object over many lines, or one a line."""
    try:
        return [json.loads(text)]
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
