"""The tour, with little data: every step is real, only the recovery is not waited for."""

import json
from pathlib import Path
from typing import Any

import pytest

from gossamer import cli
from gossamer.errors import ConfigError
from gossamer.packed.from_checkpoint import expands_int8_fast
from gossamer.runs.demo import Demo, demo
from gossamer.runs.recovery import SHIPPED, Models, Size, plan
from gossamer.stages.finetune import Finetune
from gossamer.stages.pack import Pack
from gossamer.stages.pretrain import Pretrain
from gossamer.stages.prune import Prune
from gossamer.stages.quantize import Quantize

LITTLE = Size(num_examples=200, num_replay_pieces=10)


@pytest.mark.timeout(900)
def test_the_tour_measures_prunes_trains_packs_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    output = tmp_path / "demo"
    result = demo(Demo(str(output), num_tokens=4096, num_calibration_samples=64), cpu_seconds=1, size=LITTLE)
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


def test_a_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep")
    with pytest.raises(ConfigError, match="holds no demo"):
        demo(Demo(str(tmp_path)))


DATA = ("python:doctests@3", "python:stdlib@1")
CALIBRATED: Any = {
    "dataset": DATA,
    "num_calibration_samples": 256,
    "max_seq_length": 128,
    "overwrite": True,
}
TRAINED: Any = {
    "max_length": 128,
    "batch_tokens": 2048,
    "learning_rate": 5e-4,
    "kernel": "dense",
    "seed": 3,
    "overwrite": True,
}
TEXT: Any = TRAINED | {"dataset": DATA, "num_tokens": 300_000}
EXAMPLES: Any = TRAINED | {"num_train_epochs": 1}


def test_the_stages_of_a_default_demo_are_those_that_its_figures_were_measured_with() -> None:
    """Written out: a default that changes here, or in a stage, changes what the README says of the demo."""
    jobs = plan(Demo(seed=3), Models.under(Path("out"), SHIPPED), Path("out"))
    dense = str(SHIPPED)
    assert jobs.one_shot == Prune(dense, "out/one-shot-70", sparsity=0.7, **CALIBRATED)
    assert jobs.prune_50 == Prune(dense, "out/pruned-50", sparsity=0.5, **CALIBRATED)
    assert jobs.pretrain_50 == Pretrain("out/pruned-50", "out/pretrained-50", **TEXT)
    assert jobs.prune_70 == Prune("out/pretrained-50", "out/pruned-70", sparsity=0.7, **CALIBRATED)
    assert jobs.finetune == Finetune(
        "out/pruned-70",
        "out/recovered-70",
        dataset=("python:doctests:14000:3", "out/recovered-70.jsonl"),
        teacher=dense,
        distill="squarehead",
        **EXAMPLES,
    )
    assert jobs.quantize == Quantize("out/recovered-70", "out/quantized-70", **CALIBRATED)
    assert jobs.pack == Pack("out/quantized-70", "out/model.goss", overwrite=True)
    assert jobs.control_pretrain == Pretrain(dense, "out/control-pretrained", **TEXT)
    assert jobs.control_finetune == Finetune(
        "out/control-pretrained",
        "out/control",
        dataset=("python:doctests:14000:3", "out/control.jsonl"),
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
