"""The dense model that a sparse one learns from: what training asks of it, and one that is in memory."""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import ConfigError
from gossamer.training.head_loss import HeadTeacher, TeacherLogits
from gossamer.training.heads import head_of
from gossamer.training.text_rows import states_at

# The files that tokenizers are in, the surest first, and those that belong to them.
_TOKENIZERS = {
    "tokenizer.json": (),
    "tokenizer.model": ("added_tokens.json",),
    "vocab.json": ("merges.txt", "added_tokens.json"),
}


class TeacherStates(Protocol):
    """What a teacher makes of the micro-batch that the student computes with."""

    @property
    def layers(self) -> Sequence[int]:
        """Those whose hidden states there are, counted from 1; the last one's are what the head reads."""
        ...

    def prepare(self, student: PreTrainedModel, device: torch.device) -> None:
        """Before the first step; raises ConfigError where the two do not go together."""
        ...

    def read(self, batch: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        """Take the next micro-batch, and what the student's decoder is given of it."""
        ...

    def states(self) -> Sequence[Tensor]:
        """The hidden states [B, T, D] after each of `layers`."""
        ...

    def at_the_head(self, kept_BT: Tensor, temperature: float, means_of: Tensor | None = None) -> HeadTeacher:
        """What its head makes of the kept tokens [B, T]."""
        ...

    def forget(self) -> None:
        """The micro-batch is done with."""
        ...


class LiveTeacher:
    """A teacher that reads along; it computes in its own dtype, once for each micro-batch.

    On the student's device, or on `elsewhere`: what is learned of it goes to the student's.
    """

    def __init__(self, model: PreTrainedModel, elsewhere: str | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self._own = self._students = None if elsewhere is None else torch.device(elsewhere)
        self.layers = range(1, model.config.get_text_config().num_hidden_layers + 1)
        self._inputs: Mapping[str, Any] = {}
        self._states: tuple[Tensor, ...] | None = None

    def prepare(self, student: PreTrainedModel, device: torch.device) -> None:
        """Raises ConfigError unless each layer of the student has a counterpart of the same width."""
        for field in ("num_hidden_layers", "hidden_size"):
            theirs, ours = (getattr(m.config.get_text_config(), field) for m in (self.model, student))
            if theirs != ours:
                raise ConfigError(
                    f"SquareHead: the teacher has {field} {theirs}, the trainer's model has {ours}; they "
                    "must be equal: the teacher is the dense model that the student was pruned from"
                )
        self._students = device
        nn.Module.to(self.model, self._own or device)

    def read(self, batch: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        self._inputs, self._states = inputs, None

    def states(self) -> tuple[Tensor, ...]:
        return tuple(_on(self._students, state) for state in self._computed())

    def at_the_head(self, kept_BT: Tensor, temperature: float, means_of: Tensor | None = None) -> HeadTeacher:
        hidden_ND = states_at(self._computed()[-1], _on(self._own, kept_BT), _on(self._own, means_of))
        head = head_of(self.model)

        @torch.no_grad()
        def logits(begin: int, end: int) -> Tensor:
            with self._autocast():
                return _on(self._students, head(hidden_ND[begin:end]))

        return TeacherLogits(logits, temperature)

    def forget(self) -> None:
        self._inputs, self._states = {}, None

    @torch.no_grad()
    def _computed(self) -> tuple[Tensor, ...]:
        """The hidden states where the teacher is."""
        if self._states is None:
            inputs = {name: _on(self._own, value) for name, value in self._inputs.items()}
            decoder = self.model.base_model
            with self._autocast():
                outputs = decoder(**inputs, output_hidden_states=True, use_cache=False)
            self._states = tuple(outputs.hidden_states)[1:]
        return self._states

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        """What the student's device has of it, where the teacher is on another."""
        if self._own is None or self._students is None or self._own.type == self._students.type:
            return contextlib.nullcontext()
        there = self._students.type
        return torch.autocast(
            self._own.type, torch.get_autocast_dtype(there), enabled=torch.is_autocast_enabled(there)
        )


def _on(device: torch.device | None, value: Any) -> Any:
    """A tensor, or those of a dictionary, on a device, if one is given; anything else is as it is."""
    if isinstance(value, dict):
        return {key: _on(device, it) for key, it in value.items()}
    return value.to(device) if isinstance(value, Tensor) and device is not None else value


@dataclass(frozen=True)
class Teacher:
    """A dense model to learn from. `hash`: the sha256 of the directory that it was loaded from."""

    model: PreTrainedModel
    hash: str


def open_teacher(path: str | Path, student: Checkpoint, *, offline: bool = False) -> Checkpoint:
    """The directory at `path`; raises ConfigError unless its shape and its tokenizer are the student's."""
    teacher = Checkpoint.open(path, offline=offline)
    for field in ("num_layers", "hidden_size", "vocab_size"):
        theirs, ours = getattr(teacher.architecture, field), getattr(student.architecture, field)
        if theirs != ours:
            raise ConfigError(
                f"--teacher {path} has {field} {theirs}, the model {student.path} has {ours}; they must "
                "be equal: the teacher is the dense model that the student was pruned from"
            )
    _check_tokenizer(teacher, student)
    return teacher


def _check_tokenizer(teacher: Checkpoint, student: Checkpoint) -> None:
    """Raise ConfigError unless a file that both have says that ids mean the same to both.

    Where neither has such a file, a teacher is known to read the student's ids only if it is the student.
    """
    theirs, ours = (_tokenizer_digests(checkpoint.path) for checkpoint in (teacher, student))
    shared = next((name for name in ours if name in theirs), None)
    if shared is not None and theirs[shared] != ours[shared]:
        raise ConfigError(
            f"--teacher {teacher.path} has another tokenizer ({shared} sha256 {theirs[shared][:12]}) than "
            f"the model {student.path} ({ours[shared][:12]}); expected the same file in both"
        )
    if shared is None and (theirs or ours or teacher.hash != student.hash):
        raise ConfigError(
            f"--teacher {teacher.path} may have another tokenizer than the model {student.path}: found "
            f"{' and '.join(theirs) or 'none'} there, {' and '.join(ours) or 'none'} here; expected "
            "tokenizer.json in both (transformers' AutoTokenizer saves one)"
        )


def _tokenizer_digests(path: Path) -> dict[str, str]:
    """What there is of `_TOKENIZERS` in a directory, the surest first, with its sha256."""
    digests = {}
    for name, beside in _TOKENIZERS.items():
        if (path / name).is_file():
            files = [file for file in (path / name, *(path / other for other in beside)) if file.is_file()]
            digests[name] = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return digests


def tokenizer_hash(path: Path) -> str:
    """The sha256 of the surest of a directory's tokenizers; "none" where there is none."""
    return next(iter(_tokenizer_digests(path).values()), "none")
