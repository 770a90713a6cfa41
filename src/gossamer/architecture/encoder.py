"""What encoders of all families have: heads for tasks, and what is done to embedded tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

from gossamer.architecture.anatomy import Norm, Task
from gossamer.architecture.config import Config
from gossamer.errors import CheckpointError

TASKS: dict[str, Task] = {
    "Model": "embedding",
    "ForMaskedLM": "masked",
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "tokens",
    "ForQuestionAnswering": "spans",
}
ENDINGS = tuple(TASKS)  # of the names of classes


@dataclass(frozen=True)
class Added:
    """What is added to embedded tokens: rows of `positions` from `offset` on, and of `types`; then a `norm`.

    `positions` and `types` are names of tables with so many rows; one without a name is not there.
    """

    norm: Norm
    positions: str = ""
    num_positions: int = 0
    offset: int = 0
    types: str = ""
    num_types: int = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensors and their shapes."""
        tables = {self.positions: self.num_positions, self.types: self.num_types}
        vectors = {name: (size,) for name, size in self.norm.vectors().items()}
        return {f"{name}.weight": (rows, self.norm.width) for name, rows in tables.items() if name} | vectors


def ending(config: Config) -> str:
    """Which of `ENDINGS` the model's class has; `Model` where the configuration names no class."""
    (name,) = config.get("architectures") or ["Model"]
    return next(it for it in ENDINGS if name.endswith(it))


def labels(config: Config) -> list[str]:
    """Names of the classes of a head, by their numbers; transformers' two where there are none."""
    found = config.get("id2label")
    if not found:
        return [f"LABEL_{index}" for index in range(config.size("num_labels", 2))]
    numbers = [str(index) for index in range(len(found))]
    if not isinstance(found, Mapping) or {*found} != {*numbers}:
        raise CheckpointError(
            f"{config.source}: id2label is {found!r:.80}; expected a name for each number from 0 on"
        )
    return [str(found[number]) for number in numbers]


def plain_head(config: Config, ending: str, of_spans: str = "qa_outputs") -> dict[str, tuple[int, ...]]:
    """The matrix and bias that make scores of labels, or of a span's two ends; nothing for other tasks."""
    name = {
        "ForSequenceClassification": "classifier", "ForTokenClassification": "classifier",
        "ForQuestionAnswering": of_spans,
    }.get(ending)  # fmt: skip
    num_labels = 2 if ending == "ForQuestionAnswering" else len(labels(config))
    shapes = {f"{name}.weight": (num_labels, config.size("hidden_size")), f"{name}.bias": (num_labels,)}
    return shapes if name else {}
