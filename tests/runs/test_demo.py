"""The tour, with little data: every step is real, only the recovery is not waited for."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from foreign.gguf_files import bpe, write_model
from gossamer import cli
from gossamer.engine import LLM, OpenModel
from gossamer.errors import ConfigError
from gossamer.packed.from_checkpoint import expands_int8_fast
from gossamer.packed.reader import Packed
from gossamer.runs import chat_model
from gossamer.runs.chat_text import FORMS, SUBJECTS, requests, write_text
from gossamer.runs.demo import Demo, demo
from gossamer.runs.recovery import SHIPPED, Models, Size, plan
from gossamer.stages.finetune import Finetune
from gossamer.stages.import_model import Import, import_model
from gossamer.stages.pack import Pack, pack
from gossamer.stages.pretrain import Pretrain
from gossamer.stages.prune import Prune
from gossamer.stages.quantize import Quantize
from llamas import save_random

LITTLE = Size(num_examples=200, num_replay_pieces=10)
TURN = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


@pytest.fixture
def chat_gguf(tmp_path: Path) -> Path:
    """A GGUF file of a random chat model, small enough to be pruned twice in a test."""
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    source = save_random(config, tmp_path / "source")
    keys: Any = {"tokenizer.chat_template": TURN}
    return write_model(tmp_path / "chat.gguf", source, "llama", bpe("llama-bpe", 319), **keys)


@pytest.mark.timeout(900)
def test_the_tour_measures_prunes_trains_packs_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the chat model, of which it says that it is missing."""
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(chat_model, "PACKAGE", "no_such_package")
    monkeypatch.setattr("gossamer.runs.demo.NUM_DOCTESTS", 60)
    output, said = tmp_path / "demo", []
    job = Demo(str(output), num_tokens=4096, num_calibration_samples=64)
    result = demo(job, said.append, cpu_seconds=1, size=LITTLE)
    assert [event.message for event in said if event.lasting and event.stage == "demo"] == [
        f"without the chat model, which is not installed: {chat_model.INSTALL}"
    ]
    assert result.chat is None
    assert json.loads((output / "report.json").read_text())["rows"][0]["name"] == "dense"
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")
    dense, control, one_shot, recovered, packed = result.rows
    assert dense.accuracy > 0.7
    assert dense.recovery == 1.0
    assert one_shot.accuracy < dense.accuracy
    # INT8 matrices of 70% zeros, or with all zeros stored where the CPU reads them faster so (`packed`'s
    # from_checkpoint): the head and linears are then about half as large as in bfloat16, not a quarter.
    assert packed.num_bytes < (0.4 if expands_int8_fast() else 0.65) * dense.num_bytes
    assert abs(packed.accuracy - recovered.accuracy) < 0.05
    assert control.perplexity > 1
    assert result.cpu.rows[2].speedup > 1
    assert all(len(texts) == 3 for texts in result.samples.values())
    cli.show(result)
    shown = capsys.readouterr().out
    assert "70% recovered" in shown
    assert "curl" in shown
    assert chat_model.INSTALL in shown


LITTLE_CHAT = chat_model.Budget(
    trainings=(chat_model.Training(0.5, 4 * 128, 1e-3),),
    num_written=400,
    num_rows=4,
    num_reconstruction_rows=5,
    num_rounding_rows=2,
    row_length=64,
    trained_row_length=128,
    batch_tokens=256,
    num_rounds=1,
    answer_tokens=4,
)


def test_the_act_of_the_chat_model(chat_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    output = tmp_path / "out"
    found = chat_model.chat_model(chat_gguf, output, 0, budget=LITTLE_CHAT)
    dense, one_shot, recovered = found.rows
    assert dense.num_bytes > one_shot.num_bytes
    assert [row.num_bytes for row in found.rows] == [Path(file).stat().st_size for file in found.packed]
    assert all(row.perplexity > 1 and 0 <= row.accuracy <= 1 and row.tokens_per_s > 0 for row in found.rows)
    opened = [Packed.open(Path(file)) for file in found.packed]
    assert [packed.sparsity(packed.decoder) for packed in opened] == pytest.approx([0, 0.5, 0.5], abs=0.02)
    assert recovered.perplexity != one_shot.perplexity
    assert sorted(path.name for path in output.iterdir()) == [
        "dense",
        "dense.goss",
        "one-shot-50.goss",
        "recovered-50.goss",
        "text.jsonl",
    ]
    assert (found.num_calibration_tokens, found.num_reconstruction_tokens) == (256, 320)
    assert found.num_trained_tokens == (512,)
    assert found.num_written_tokens >= 400
    figures, answers = found.tables()
    names = ["dense, bfloat16", "50% one-shot, INT8", "50% recovered, INT8"]
    assert [row[0] for row in figures.rows] == names
    assert [row[0] for row in answers.rows] == list(chat_model.ASKED)
    assert found.to_talk_to == (str(output / "recovered-50.goss"), str(output / "dense.goss"))
    text = (output / "text.jsonl").read_text()
    again = chat_model.chat_model(chat_gguf, output, 0, budget=LITTLE_CHAT)  # the same seed, the same models
    assert [replace(row, tokens_per_s=0) for row in again.rows] == [
        replace(row, tokens_per_s=0) for row in found.rows
    ]
    assert (output / "text.jsonl").read_text() == text


def test_the_long_act_has_both_sparsities(
    chat_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    assert [training.sparsity for training in chat_model.LONG.trainings] == [0.5, 0.7]
    trainings = tuple(replace(each, num_tokens=256) for each in chat_model.LONG.trainings)
    budget = replace(LITTLE_CHAT, trainings=trainings)
    found = chat_model.chat_model(chat_gguf, tmp_path / "out", 0, budget=budget)
    opened = [Packed.open(Path(file)) for file in found.packed]
    shares = [packed.sparsity(packed.decoder) for packed in opened]
    assert shares == pytest.approx([0, 0.5, 0.5, 0.7, 0.7], abs=0.02)
    assert [row.name.split(",")[0] for row in found.rows] == [
        "dense",
        "50% one-shot",
        "50% recovered",
        "70% one-shot",
        "70% recovered",
    ]


def test_a_recovered_model_expects_what_the_dense_one_does(
    chat_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By reconstruction, and more so by training after it."""
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    ids = np.random.default_rng(0).integers(3, 320, 200).tolist()

    def logits(file: str) -> torch.Tensor:
        return torch.from_numpy(LLM(file).logits(ids)).log_softmax(-1)

    def divergences(training: chat_model.Training) -> list[float]:
        budget = replace(LITTLE_CHAT, trainings=(training,), num_reconstruction_rows=8)
        found = chat_model.chat_model(chat_gguf, tmp_path / "out", 0, budget=budget)
        dense, *pruned = map(logits, found.packed)
        return [float((dense.exp() * (dense - other)).sum(-1).mean()) for other in pruned]

    one_shot, rebuilt = divergences(chat_model.Training(0.5))
    _, trained = divergences(chat_model.Training(0.5, 4096, 1e-3))
    assert trained < rebuilt < one_shot


def test_what_the_dense_model_writes_are_chats_to_different_requests(chat_gguf: Path, tmp_path: Path) -> None:
    import_model(Import(str(chat_gguf), str(tmp_path / "dense")))
    model = OpenModel.open(pack(Pack(str(tmp_path / "dense"), str(tmp_path / "x.goss"))).output_file)
    file, said = tmp_path / "text.jsonl", []
    written = write_text(model, file, 3000, 48, 7, said.append)
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    bos = model.tokenizer.special_tokens["bos_token"]
    expected = list(islice(requests(), len(texts)))
    for text, request in zip(texts, expected, strict=True):
        assert text.startswith(f"<|im_start|>{request}<|im_end|>")
        assert not text.startswith(bos)
    num_tokens = [len(model.tokenizer.encode(text, bos=False)) for text in texts]
    assert 3000 <= written < 3000 + max(num_tokens) + 48
    assert (said[-1].done, said[-1].total) == (3000, 3000)


def test_every_form_meets_every_subject() -> None:
    number = len(FORMS) * len(SUBJECTS)
    made = list(islice(requests(), number + 1))
    assert len(set(made)) == number and made[-1] == made[0]
    assert not set(made) & set(chat_model.ASKED)


def test_a_long_demo_takes_the_long_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budgets = []

    class Enough(Exception):
        pass

    def act(output: Path, seed: int, progress: Any, budget: chat_model.Budget) -> None:
        budgets.append(budget)
        raise Enough

    monkeypatch.setattr("gossamer.runs.demo.act_of_the_chat_model", act)
    for words in ([], ["--long"]):
        job, _ = cli.parse("demo", ["-o", str(tmp_path / "demo"), *words])
        with pytest.raises(Enough):
            demo(job)
    assert budgets == [chat_model.WHOLE, chat_model.LONG]


def test_the_questions_have_one_right_answer_each() -> None:
    rows = [json.loads(line) for line in chat_model.CHOICES.read_text().splitlines()]
    assert len(rows) == len({row["prompt"] for row in rows}) == 80
    places = [row["answer"] for row in rows]
    assert all(places.count(place) >= 20 for place in range(3))  # no place is right much more often


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"learning_rate": -1.0}, "--learning-rate -1"),
        ({"ignore": ("nothing*",)}, "matches none"),
        ({"distill": "none", "cross_entropy_weight": 0.5}, None),
    ],
)
def test_what_the_last_act_refuses_is_said_before_the_first(
    wrong: dict[str, Any], message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is of a teacher is left out where there is none, as beside the control."""

    def act(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gossamer.runs.demo.act_of_the_chat_model", act)
    with pytest.raises(ConfigError if message else KeyboardInterrupt, match=message):
        demo(Demo(output_dir=str(tmp_path / "out"), **wrong))
    assert (tmp_path / "out").exists() == (message is None)


def test_a_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep")
    with pytest.raises(ConfigError, match="holds no demo"):
        demo(Demo(str(tmp_path)))


DATA = ("python:doctests@3", "python:stdlib@1")
CALIBRATED: Any = {
    "dataset": DATA,
    "num_calibration_samples": 128,
    "max_seq_length": 128,
    "overwrite": True,
}
BY_SPARSEGPT: Any = {"method": "sparsegpt", "seed": 3, **CALIBRATED}
TRAINED: Any = {
    "max_length": 128,
    "batch_tokens": 2048,
    "learning_rate": 5e-4,
    "kernel": "dense",
    "seed": 3,
    "overwrite": True,
}
TEXT: Any = TRAINED | {"dataset": DATA, "num_tokens": 150_000}
EXAMPLES: Any = TRAINED | {"num_train_epochs": 1}


def test_the_stages_of_a_default_demo_are_those_that_its_figures_were_measured_with() -> None:
    """Written out: a default that changes here, or in a stage, changes what the README says of the demo."""
    jobs = plan(Demo(seed=3), Models.under(Path("out"), SHIPPED), Path("out"))
    dense = str(SHIPPED)
    assert jobs.one_shot == Prune(dense, "out/one-shot-70", sparsity=0.7, **BY_SPARSEGPT)
    assert jobs.prune_50 == Prune(dense, "out/pruned-50", sparsity=0.5, **BY_SPARSEGPT)
    assert jobs.pretrain_50 == Pretrain("out/pruned-50", "out/pretrained-50", **TEXT)
    assert jobs.prune_70 == Prune("out/pretrained-50", "out/pruned-70", sparsity=0.7, **BY_SPARSEGPT)
    assert jobs.finetune == Finetune(
        "out/pruned-70",
        "out/recovered-70",
        dataset=("python:doctests:7000:3", "out/recovered-70.jsonl"),
        teacher=dense,
        distill="squarehead",
        **EXAMPLES,
    )
    assert jobs.quantize == Quantize("out/recovered-70", "out/quantized-70", seed=3, **CALIBRATED)
    assert jobs.pack == Pack("out/quantized-70", "out/model.goss", overwrite=True)
    assert jobs.control_pretrain == Pretrain(dense, "out/control-pretrained", **TEXT)
    assert jobs.control_finetune == Finetune(
        "out/control-pretrained",
        "out/control",
        dataset=("python:doctests:7000:3", "out/control.jsonl"),
        distill="none",
        **EXAMPLES,
    )


def test_the_demo_passes_on_the_flags_of_its_stages() -> None:
    words = ["--smoothing-strength", "0.5", "--head", "keep", "--learning-rate", "0.25", "--distill", "none"]
    job, _ = cli.parse("demo", [*words, "--finetune-weight-decay", "0.125", "--method", "magnitude"])
    jobs = plan(job, Models.under(Path("out"), SHIPPED), Path("out"))
    assert (jobs.quantize.smoothing_strength, jobs.pack.head) == (0.5, "keep")
    assert jobs.one_shot.method == jobs.prune_70.method == "magnitude"
    assert jobs.pretrain_50.learning_rate == jobs.control_finetune.learning_rate == 0.25
    assert (jobs.finetune.teacher, jobs.finetune.distill) == (None, "none")
    assert (jobs.pretrain_50.weight_decay, jobs.finetune.weight_decay) == (0.1, 0.125)


def test_the_control_of_a_demo_is_taught_nothing() -> None:
    words = [
        "--teacher-cache",
        "cache",
        "--cache-layers",
        "2",
        "--distill",
        "both",
        "--distill-temperature",
        "2",
    ]
    jobs = plan(cli.parse("demo", words)[0], Models.under(Path("out"), SHIPPED), Path("out"))
    assert (jobs.finetune.teacher_cache, jobs.finetune.cache_layers) == ("cache", 2)
    assert (jobs.finetune.distill, jobs.finetune.distill_temperature) == ("both", 2.0)
    assert jobs.pretrain_50.teacher_cache is None and jobs.pretrain_50.distill_temperature == 1.0
    control = jobs.control_finetune
    assert (control.teacher_cache, control.cache_layers, control.distill_temperature) == (None, None, 1.0)
    assert (control.teacher, control.distill) == (None, "none")
