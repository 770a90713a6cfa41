"""The tour, with little data: every step is real, only the recovery is not waited for."""

import json
from pathlib import Path

import pytest

from gossamer import cli
from gossamer.errors import ConfigError
from gossamer.runs.demo import Demo, demo
from gossamer.runs.recovery import Size

LITTLE = Size(num_tokens=4096, num_examples=200, num_replay_pieces=10, num_calibration_samples=64)


def test_the_tour_measures_prunes_trains_packs_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    output = tmp_path / "demo"
    result = demo(Demo(str(output)), cpu_seconds=1, size=LITTLE)
    assert json.loads((output / "report.json").read_text())["rows"][0]["name"] == "dense"
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")
    dense, control, one_shot, recovered, packed = result.rows
    assert dense.accuracy > 0.7
    assert dense.recovery == 1.0
    assert one_shot.accuracy < dense.accuracy
    assert packed.num_bytes < 0.4 * dense.num_bytes
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
