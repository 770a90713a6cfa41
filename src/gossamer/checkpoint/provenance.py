"""Where a model comes from: the stages that made it, its licence, and the texts that must go with it.

A directory has them as files: `gossamer.json`, LICENSE, NOTICE, USE_POLICY, and the model card README.md,
whose front matter names the licence. A packed file has all of it as one JSON object (docs/format.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.errors import CheckpointError

if TYPE_CHECKING:
    from gossamer.checkpoint.directory import Checkpoint

TEXTS = ("README.md", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*")
MAX_TEXT_BYTES = 1 << 18  # of one text; the licences of Llama and Gemma take 10 to 20 KB


@dataclass(frozen=True)
class Step:
    """One stage that led to the model, and the sha256 of the checkpoint that it was given."""

    stage: str
    parent: str


@dataclass(frozen=True)
class Provenance:
    """`lineage` is oldest first; `license` is what the card says, `texts` are by the name of their file."""

    lineage: tuple[Step, ...] = ()
    license: str | None = None
    texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def license_line(self) -> str | None:
        """The licence in a line: as the card names it, or how its text begins. None where it is not known."""
        texts = [self.texts[name] for name in sorted(self.texts) if name.startswith("LICEN")]
        return self.license or next(filter(None, map(_first_line, texts)), None)

    def to_json(self) -> dict[str, Any]:
        """What is not empty."""
        return {key: value for key, value in asdict(self).items() if value}

    @classmethod
    def from_json(cls, found: Any) -> "Provenance":
        """The inverse; ValueError where it is something else. Fields that are not known are left out."""
        if not isinstance(found, dict):
            raise ValueError(f"found {type(found).__name__}; expected an object")
        license, texts = found.get("license"), found.get("texts", {})
        if not isinstance(license, str | None):
            raise ValueError(f"license is {license!a:.80}; expected a text")
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise ValueError(f"texts is {texts!a:.80}; expected texts by name")
        return cls(_steps(found.get("lineage", [])), license, texts)


def read_provenance(source: "Checkpoint") -> Provenance:
    """That of a directory; CheckpointError where its `gossamer.json` is damaged."""
    try:
        lineage = _steps((source.manifest or {}).get("lineage", []))
    except ValueError as error:
        file = source.path / "gossamer.json"
        raise CheckpointError(f"{file}: {error}; take the file out, or restore it") from error
    texts = {file.name: text for file in text_files(source.path) if (text := _text(file)) is not None}
    return Provenance(lineage, _license(source.path / "README.md"), texts)


def text_files(directory: Path) -> list[Path]:
    """The files that say under which conditions a model may be used."""
    return sorted(file for pattern in TEXTS for file in directory.glob(pattern) if file.is_file())


def _steps(found: Sequence[Any]) -> tuple[Step, ...]:
    keys = ("stage", "parent")
    if not isinstance(found, list) or not all(
        isinstance(step, dict) and all(isinstance(step.get(key), str) for key in keys) for step in found
    ):
        raise ValueError(f"lineage is {found!a:.80}; expected a stage and a parent for each step")
    return tuple(Step(step["stage"], step["parent"]) for step in found)


def _text(file: Path) -> str | None:
    """None where the file is no text, or too long to be carried along."""
    raw = file.read_bytes()
    if len(raw) > MAX_TEXT_BYTES or b"\0" in raw:
        return None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _license(card: Path) -> str | None:
    """The field of a model card's front matter; None where there is none to be read."""
    if not card.is_file():
        return None
    import yaml
    from huggingface_hub import metadata_load

    try:
        metadata = metadata_load(card) or {}
    except (ValueError, yaml.YAMLError, RecursionError):  # a card is prose: not this stage's to mend
        return None
    names = [metadata.get(key) for key in ("license_name", "license")]
    words = [", ".join(map(str, name)) if isinstance(name, list) else str(name) for name in names if name]
    return " ".join([words[0], *(f"({word})" for word in words[1:])]) if words else None


def _first_line(text: str) -> str:
    return next((line.strip()[:80] for line in text.splitlines() if line.strip()), "")
