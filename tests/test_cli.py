"""The command line: flags are the jobs' fields, lists gather, --json prints objects and nothing else."""

import dataclasses
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from gossamer import cli
from gossamer.engine import LLM, SamplingParams
from gossamer.errors import UnsupportedError
from gossamer.job.report import Event, Result
from gossamer.runs.recovery import SHIPPED
from gossamer.server import ServeResult
from gossamer.stages.pack import Pack, pack
from gossamer.stages.pretrain import Pretrain
from gossamer.stages.prune import Prune

REQUIRED = ["model", "-o", "out"]


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.call([name, "--help"])
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    assert ",," not in "".join(shown.replace("│", "").split()), "an empty choice"
    job, _ = cli.VERBS[name].load(name)
    for field in dataclasses.fields(job):
        if not field.metadata["positional"]:
            assert cli.flag_of(field) in shown
        assert field.metadata["help"], f"{name}: {field.name} has no help"


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.call(["--version"]) == 0
    assert capsys.readouterr().out == f"gossamer {metadata.version('gossamer')}\n"
    assert cli.call(["--help"]) == 0
    assert "gossamer --version" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["--dataset", "a", "b@2"],
        ["--dataset", "a", "--seed", "3", "--dataset", "b@2"],
        ["--dataset=a", "--dataset=b@2"],
    ],
)
def test_a_list_flag_takes_several_values_and_repeats(words: list[str]) -> None:
    job, _ = cli.parse("pretrain", [*REQUIRED, *words])
    assert isinstance(job, Pretrain)
    assert job.dataset == ("a", "b@2")


def test_flags_become_the_job() -> None:
    words = ["model", "--output-dir", "out", "--sparsity", "0.7", "--dataset", "a", "--overwrite"]
    job, function = cli.parse("prune", words)
    assert job == Prune("model", "out", sparsity=0.7, dataset=("a",), overwrite=True)
    assert function.__name__ == "prune"


def test_json_prints_objects_only(
    tiny_llama: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.call(["pack", str(tiny_llama("llama2")), "-o", str(tmp_path / "m.goss"), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1]["result"]["num_bytes"] == (tmp_path / "m.goss").stat().st_size
    assert all(set(line) <= {"event", "result"} for line in lines)


def test_a_plain_result_is_shown_by_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    result = ServeResult("http://here:1", "a model")
    cli.show(result)
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("url", "http://here:1", "name", "a model"))
    cli.show_json(result)
    assert json.loads(capsys.readouterr().out) == {"result": {"url": "http://here:1", "name": "a model"}}


def test_figures_carry_their_units() -> None:
    metrics = {"loss": 2.34567, "sparsity": 0.7, "tokens_per_s": 12345.6, "eta_s": 4000.2, "memory_gb": 1.26}
    shown = [cli.figure(name, value) for name, value in metrics.items()]
    assert shown == ["loss 2.346", "70% zeros", "12,346 tokens/s", "ETA 1:06:40", "memory 1.3 GB"]


def test_a_sentence_that_must_last_is_said_on_any_output(capsys: pytest.CaptureFixture[str]) -> None:
    said = Event("pretrain", "checkpoint-6 is damaged", lasting=True)
    for face in (cli.ProgressBars(), cli.ProgressToJson()):
        with face as progress:
            progress(said)
            progress(said)
    captured = capsys.readouterr()
    assert captured.err.count("pretrain: checkpoint-6 is damaged") == 2
    assert captured.out.count("checkpoint-6 is damaged") == 2


def test_an_interrupted_verb_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Pretrain("model", "my out", dataset=("a",))
    words = ["pretrain", "model", "-o", "my out", "--dataset", "a"]
    assert cli.resuming(words, job) == "gossamer pretrain model -o 'my out' --dataset a --resume"
    assert cli.resuming([*words, "--resume"], job).count("--resume") == 1
    assert "--resume" not in cli.resuming(["compress"], Pack("model", "out.goss"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.resuming(words, job).startswith("torchrun --nproc-per-node 2 -m gossamer pretrain")


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("name", sorted(cli.VERBS.keys() - {"pretrain", "finetune"}))
def test_verbs_that_share_no_work_refuse_torchrun(
    name: str,
    rank: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)

    def parsed(name: str, arguments: list[str]) -> tuple[None, Callable[..., Result]]:
        return None, lambda job, progress: (tmp_path / "written").touch() or Result()

    monkeypatch.setattr(cli, "parse", parsed)
    assert cli.call([name]) == 2
    assert f"found 2 processes; `{name}` runs in one: leave torchrun out" in capsys.readouterr().err
    assert not (tmp_path / "written").exists()
    assert cli.call(["pretrain"]) == 0


def test_pack_from_python_refuses_torchrun(
    tiny_llama: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UnsupportedError, match="found 2 processes; `pack` runs in one"):
        pack(Pack(str(tiny_llama("llama2")), str(tmp_path / "m.goss")))
    assert not list(tmp_path.iterdir())


def test_run_completes_and_chats(
    tiny_llama: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Plain text is the engine's own; a chat goes through the template, and a model without one says so."""
    goss = str(tmp_path / "m.goss")
    assert cli.call(["pack", str(tiny_llama("llama2")), "-o", goss]) == 0
    capsys.readouterr()
    assert cli.call(["run", goss, "def f", "--max-tokens", "6"]) == 0
    [expected] = LLM(goss).generate("def f", SamplingParams(max_tokens=6))
    assert capsys.readouterr().out == expected.text + "\n"
    assert cli.call(["run", goss, "hello", "--chat"]) == 2
    assert "template" in capsys.readouterr().err
    assert cli.call(["run", str(SHIPPED), "1 + 2", "--chat", "--max-tokens", "8"]) == 0
    assert capsys.readouterr().out.strip() == "3"
