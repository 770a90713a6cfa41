"""The paper's recipes as programs: whole runs of a tiny model, and what is skipped, printed and refused."""

import json
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer import cli
from gossamer.job.options import record
from gossamer.runs import recipe
from gossamer.runs.compress import deciding

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
ROWS = [
    {"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"}
    for a in range(6)
    for b in range(6)
]
SMALL = [
    "--num-tokens",
    "1024",
    "1024",
    "--num-calibration-samples",
    "8",
    "--max-length",
    "64",
    "--batch-tokens",
    "512",
]


@pytest.fixture
def given(tiny_llama: Callable[[str], Path], text_file: Path, tmp_path: Path) -> list[str]:
    """Model, output directory and texts of a run."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    text = ["--dataset", str(text_file), "--calibration", str(text_file)]
    return [str(tiny_llama("llama2")), "-o", str(tmp_path / "out"), *text, *SMALL]


def run(
    program: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """What the program prints, run in this process as `python recipes/PROGRAM` would."""
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    monkeypatch.syspath_prepend(str(RECIPES))
    runpy.run_path(str(RECIPES / program), run_name="__main__")
    return capsys.readouterr().out


def test_the_whole_run_ends_in_a_report_and_is_skipped_the_second_time(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prune, pretrain, prune, pretrain, teacher, finetune, quantize, pack, evaluate."""
    examples = ["--examples", f"arithmetic={tmp_path}/rows.jsonl,{tmp_path}/rows.jsonl", "--limit", "4"]
    printed = run("llama2_7b_70.py", [*given, *examples], monkeypatch, capsys)
    stages = ["prune", "pretrain", "prune", "pretrain", "finetune", "finetune", "quantize", "pack"]
    assert [line.split()[:2] for line in printed.splitlines() if line.startswith("ran")] == [
        ["ran", stage] for stage in stages
    ]
    assert "# arithmetic: 70% zeros" in printed and "(exact_match, strict-match)" in printed
    printed = run("llama2_7b_70.py", [*given, *examples], monkeypatch, capsys)
    assert [line.split()[0] for line in printed.splitlines()[:8]] == ["stood"] * 8
    assert {file.suffix for file in (tmp_path / "out" / "arithmetic").glob("evaluation.*")} > {".json", ".md"}
    [train] = (tmp_path / "out-examples" / "arithmetic").glob("train-*.jsonl")
    examples = ["--examples", f"arithmetic={train},{train}", "--dry-run"]
    for line in run("llama2_7b_70.py", [*given, *examples], monkeypatch, capsys).splitlines():
        verb, *words = shlex.split(line, comments=True)[3:] or [""]
        if verb and verb not in ("pack", "evaluate"):  # which do not write down by which options
            planned = cli.parse(verb, words)[0]
            made = json.loads((Path(planned.output_dir) / "gossamer.json").read_text(encoding="utf-8"))
            assert deciding(made["job"]) == deciding(record(planned))


def test_what_a_later_step_refuses_is_said_before_the_first(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = ["--examples", f"code={tmp_path}/code.jsonl,{tmp_path}/code.jsonl"]
    (tmp_path / "code.jsonl").write_text(json.dumps({"instruction": "Greet.", "output": "print('hello')"}))
    for wrong, message in (
        (["--batch-tokens", "0"], "--batch-tokens 0: expected at least"),  # of training; pruning has none
        (code, "--allow-code-execution"),
    ):
        with pytest.raises(SystemExit):
            run("llama2_7b_70.py", [*given, *wrong], monkeypatch, capsys)
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def weights_in(printed: str) -> list[float]:
    """Megabytes of weights of each step that trains."""
    return [float(found) for found in re.findall(r"\(weights ([0-9.]+) MB", printed)]


def test_the_plan_has_commands_memory_time_and_cost(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a model of which only the configuration is there; nothing is written."""
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "config.json").write_text((Path(given[0]) / "config.json").read_text())
    options = [
        "--dry-run",
        "--processes",
        "4",
        "--tokens-per-s",
        "100",
        "--price",
        "2",
        "--num-tokens",
        "360000",
        "720000",
    ]
    given = [str(tmp_path / "only"), *given[1:], *options]
    printed = run(
        "llama2_7b_70.py", [*given, "--examples", "chat=train.jsonl,test.jsonl"], monkeypatch, capsys
    )
    assert "360,000 tokens: 0.2 hours, 2.00 at 2 a GPU-hour" in printed
    assert "pretraining: 0.8 hours, 6.00 at 2 a GPU-hour, at 100 tokens/s a GPU" in printed
    assert printed.count("in micro-batches of 128 tokens") == 4  # a quarter of a step of 8 rows
    config = LlamaConfig.from_pretrained(tmp_path / "only")
    weights = sum(weight.numel() for weight in LlamaForCausalLM(config).parameters())
    cached = run(
        "llama2_7b_70.py",
        [*given, "--examples", "chat=a.jsonl,b.jsonl", "--teacher-cache", "cache"],
        monkeypatch,
        capsys,
    )
    [beside] = [megabytes for megabytes in weights_in(printed) if megabytes not in weights_in(cached)]
    assert beside == pytest.approx(
        (4 * weights / 4 + 2 * weights) / 1e6, abs=0.06
    )  # a share, and the teacher
    assert f"cache/chat: {2 * 2 * config.hidden_size:,} bytes a token of the teacher" in cached
    assert "--teacher-cache cache/chat" in cached
    assert "packing 360,000 tokens: 0.0 hours" in printed and "(measured, two cores, any model)" in printed
    assert (
        printed.count("sparsegpt on two threads") == 2
        and "train.jsonl is not here; each 1,000,000" in printed
    )
    ours = run(
        "llama2_7b_70.py",
        [word for word in given if word not in ("--tokens-per-s", "100")],
        monkeypatch,
        capsys,
    )
    assert "scaled by multiplications from 127,068 measured, SmolLM2-135M" in ours
    crowded = [*given, "--gpu-gb", "0.001"]
    assert run("llama2_7b_70.py", crowded, monkeypatch, capsys).count("in micro-batches of 64 tokens") == 2
    assert (
        "each of 4 GPUs: about" in printed
        and "-m torch.distributed.run --nproc-per-node 4 -m gossamer pretrain" in printed
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("program", ["arithmetic", "chat", "instruction", "coding", "summarization"])
def test_each_task_plans_its_run(
    program: str, given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*given, "--train", "a.jsonl", "--test", "b.jsonl", "--sparsity", "0.5", "--dry-run"]
    judge = ["--judge", "http://127.0.0.1:1/v1", "--judge-model", "j", "--ifeval", "prompts.jsonl"]
    printed = run(f"{program}.py", [*arguments, *judge], monkeypatch, capsys).splitlines()
    lines = [line for line in printed if not line.startswith("#")]
    verbs = [line.split(" gossamer ")[1].split()[0] for line in lines]
    also = {"chat": "--kind chat --judge http", "instruction": "--kind ifeval"}.get(program)
    assert verbs[:7] == ["prune", "pretrain", "finetune", "finetune", "quantize", "pack", "evaluate"]
    assert verbs[7:] == ([] if also is None else ["evaluate"])
    assert also is None or also in lines[7]
    for line in lines[6:]:
        asked = cli.parse("evaluate", shlex.split(line)[4:])[0]
        assert asked.baseline.endswith("/teacher") and asked.model.endswith("/model.goss")
    assert ("--teacher" in lines[3]) == (program != "instruction")
    assert sum(line.startswith("# report: ") for line in printed) == len(verbs) - 6
    assert sum("each of 1 GPUs: about" in line for line in printed) == 3
    assert sum(" of memory" in line or "memory: " in line for line in printed) == len(verbs)
    plain = run(f"{program}.py", arguments, monkeypatch, capsys)
    assert plain.count(" gossamer evaluate ") == 1


def test_instructions_are_checked_by_rules_and_half_of_a_judge_is_refused(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first step."""
    turns = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "told.jsonl").write_text(json.dumps({"prompt": "Say no.", "response": "No."}) + "\n")
    for program, wrong, message in (
        ("chat", ["--judge", "http://127.0.0.1:1/v1"], "it needs --judge-model"),
        ("instruction", ["--ifeval", f"{tmp_path}/none.jsonl"], "none.jsonl: no such file"),
    ):
        rows = tmp_path / ("chat.jsonl" if program == "chat" else "told.jsonl")
        files = ["--train", str(rows), "--test", str(rows)]
        with pytest.raises(SystemExit) as ended:
            run(f"{program}.py", [*given, *files, *wrong], monkeypatch, capsys)
        assert ended.value.code == 2 and message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_model_of_the_hub_is_planned_without_a_network(
    given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Llama-2-7B by the shape that is known; another one is an error with a code."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = [*given[1:], "--dry-run", "--processes", "8"]
    printed = run("llama2_7b_70.py", ["meta-llama/Llama-2-7b-hf", *words], monkeypatch, capsys)
    assert "meta-llama/Llama-2-7b-hf is not on this machine: planned by the shape of llama-2-7b" in printed
    assert printed.count("each of 8 GPUs: about") == 2 and "3.4 GB" in printed
    with pytest.raises(SystemExit) as ended:
        run("llama2_7b_70.py", ["nobody/nothing", *words], monkeypatch, capsys)
    assert ended.value.code == 1


def test_several_machines_are_torchruns_own_words(
    given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*given, "--dry-run", "--processes", "2", "--nnodes", "4"]
    printed = run(
        "llama2_7b_70.py", [*words, "--node-rank", "3", "--rdzv-endpoint", "a:29500"], monkeypatch, capsys
    )
    passed = "--nproc-per-node 2 --nnodes 4 --node-rank 3 --rdzv-endpoint a:29500 -m gossamer pretrain"
    assert printed.count(passed) == 2 and printed.count("each of 8 GPUs") == 2
    assert printed.count("--parallel fsdp") == 2
    for wrong, message in (
        ([], "--nnodes 4 needs --rdzv-endpoint HOST:PORT"),
        (["--node-rank", "4", "--rdzv-endpoint", "a:1"], "a rank from 0 to one less than --nnodes"),
    ):
        with pytest.raises(SystemExit) as ended:
            run("llama2_7b_70.py", [*words, *wrong], monkeypatch, capsys)
        assert ended.value.code == 2 and message in capsys.readouterr().err


def test_another_machine_waits_for_what_the_first_one_prunes(
    given: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And writes no step's output itself but by torchrun; the two look at the same files."""
    text = (given[given.index("--dataset") + 1],)
    sizes = recipe.Sizes(0.5, num_calibration_samples=4, max_length=32)
    [pruning, _] = recipe.pruned(given[0], tmp_path / "out", text, text, sizes)
    second = recipe.Launch(1, 2, 1, "a:1")
    naps: list[float] = []

    def first_prunes(seconds: float) -> None:
        naps.append(seconds)
        list(recipe.run([pruning], tmp_path / "out"))

    monkeypatch.setattr(recipe.time, "sleep", first_prunes)
    assert list(recipe.run([pruning], tmp_path / "out", second)) == ["waited"]
    assert list(recipe.run([pruning], tmp_path / "out", second)) == ["waited"] and len(naps) == 1
    assert list(recipe.run([pruning], tmp_path / "out")) == ["stood"]


def test_examples_that_lack_a_field_name_it(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--train", f"{tmp_path}/rows.jsonl", "--test", f"{tmp_path}/rows.jsonl"]
    with pytest.raises(SystemExit) as ended:
        run("chat.py", [*given, *files], monkeypatch, capsys)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "rows.jsonl:1: found fields ['answer', 'question']; this recipe needs 'messages'" in said
