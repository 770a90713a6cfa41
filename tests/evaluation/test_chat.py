"""Chat that an outside judge compares: a real HTTP endpoint that is fair, biased, silent, or goes down."""

import json
import math
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from gossamer.cli import call
from gossamer.errors import ConfigError
from gossamer.evaluation.backends import EngineBackend
from gossamer.evaluation.chat import Journal
from gossamer.job.report import Event
from gossamer.stages.evaluate import Evaluate, evaluate

TinyLlama = Callable[[str], Path]
PROMPTS = ["def ", "x = 1", "class A:", "return", "import numpy", "0"]
SHOWN = re.compile(r"A's answer\]\n(.*)\n\[End of .*B's answer\]\n(.*)\n\[End of", re.DOTALL)


def the_longer(first: str, second: str) -> str:
    """The verdict of a judge who compares lengths."""
    return "C" if len(first) == len(second) else "A" if len(first) > len(second) else "B"


@dataclass
class Endpoint:
    """A judge at `url`, who says what `verdict` returns of two answers, for the next `patience` requests."""

    url: str = ""
    verdict: Callable[[str, str], str] = the_longer
    patience: int = 10_000
    status: int = 503
    location: str = ""
    seen: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr("gossamer.evaluation.judge.WAITS_S", (0.0, 0.0))
    judge = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if judge.location:
                self.send_response(302)
                self.send_header("Location", judge.location)
                self.end_headers()
                return
            if self.path != "/v1/chat/completions" or judge.patience == 0:
                self.send_error(judge.status if judge.patience == 0 else 404)
                return
            judge.patience -= 1
            judge.seen.append(request)
            judge.headers.append(dict(self.headers))
            shown = SHOWN.search(request["messages"][0]["content"])
            assert shown is not None
            verdict = judge.verdict(*shown.groups())
            said = f"At first I thought [[C]]. My verdict: [[{verdict}]]" if verdict else "I cannot tell."
            content = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            judge.headers.append(dict(self.headers))
            self.send_error(404)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        judge.url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield judge
        server.shutdown()


@pytest.fixture
def job(tiny_llama: TinyLlama, tmp_path: Path, endpoint: Endpoint) -> Evaluate:
    """Two models whose answers differ."""
    models = [shutil.copytree(tiny_llama("llama3"), tmp_path / name) for name in ("dense", "other")]
    for model in models:
        (model / "chat_template.jinja").write_text("{{ messages[0].content }} ->")
    tensors = load_file(models[1] / "model.safetensors")
    tensors = {name: array[::-1].copy() if "k_proj" in name else array for name, array in tensors.items()}
    save_file(tensors, models[1] / "model.safetensors", {"format": "pt"})
    file = tmp_path / "prompts.jsonl"
    rows = [
        {"instruction": prompt, "instances": [{"input": "y" if n % 2 else ""}]}
        for n, prompt in enumerate(PROMPTS)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Evaluate(
        str(models[1]),
        baseline=str(models[0]),
        dataset=str(file),
        kind="chat",
        judge=endpoint.url,
        judge_model="fair",
        output=str(tmp_path / "chat.json"),
        max_tokens=12,
        backend="engine",
    )


def answers(model: str) -> list[str]:
    """What the engine writes, asked directly."""
    asked = [f"{prompt}\n\ny" if n % 2 else prompt.strip() for n, prompt in enumerate(PROMPTS)]
    return [
        text.strip() for text in EngineBackend(model).complete([f"{prompt} ->" for prompt in asked], "", 12)
    ]


def test_the_win_rate_is_of_what_the_judge_says_of_both_orders(job: Evaluate, endpoint: Endpoint) -> None:
    result = evaluate(job)
    mine, other = answers(job.model), answers(job.baseline)
    points = [{"A": 1.0, "B": 0.0, "C": 0.5}[the_longer(*pair)] for pair in zip(mine, other, strict=True)]
    assert len(set(points)) > 1, "the answers are too alike to test anything"
    mean, metrics = sum(points) / 6, result.metrics["prompts.jsonl"]
    assert metrics["win_rate"] == pytest.approx(mean)
    for name, point in (("wins", 1.0), ("ties", 0.5), ("losses", 0.0)):
        assert metrics[name] == pytest.approx(points.count(point) / 6)
    spread = math.sqrt(sum((point - mean) ** 2 for point in points) / 5 / 6)
    assert result.standard_errors["prompts.jsonl"]["win_rate"] == pytest.approx(spread)
    assert len(endpoint.seen) == 12
    shown = [SHOWN.search(request["messages"][0]["content"]) for request in endpoint.seen]
    assert [match.groups() for match in shown if match] == [
        pair for a, b in zip(mine, other, strict=True) for pair in ((a, b), (b, a))
    ]
    assert {(request["model"], request["temperature"]) for request in endpoint.seen} == {("fair", 0)}
    written = json.loads(Path(job.output).read_text())
    assert written["metrics"]["prompts.jsonl"] == metrics
    assert "(win_rate)" in result.tables()[0].rows[0][1]


@pytest.mark.parametrize("always", ["A", "B", "C"])
def test_a_judge_who_goes_by_position_finds_ties(always: str, job: Evaluate, endpoint: Endpoint) -> None:
    endpoint.verdict = lambda first, second: always
    metrics = evaluate(job).metrics["prompts.jsonl"]
    assert (metrics["win_rate"], metrics["ties"]) == (0.5, 1.0)


@pytest.mark.parametrize("torn", [False, True])
def test_a_judge_that_goes_down_leaves_what_the_same_command_goes_on_from(
    torn: bool, job: Evaluate, endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last line of the journal may be torn, as by a full disk: it is told of and asked for again."""
    whole = evaluate(replace(job, output=str(tmp_path / "whole.json")))
    endpoint.seen.clear()
    endpoint.patience = 5
    flags = ["--baseline", job.baseline, "--dataset", job.dataset, "--kind", "chat", "--judge", job.judge]
    flags += ["--judge-model", "fair", "-o", job.output, "--max-tokens", "12", "--backend", "engine"]
    assert call(["evaluate", job.model, *flags]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"the judge at {endpoint.url}/chat/completions is down (503" in said
    assert "2 of 6 comparisons and all answers are kept in" in said and "the same command goes on" in said
    assert not Path(job.output).exists() and len(endpoint.seen) == 5
    journal = Path(job.output).with_suffix(".chat.jsonl")
    assert len(journal.read_text().splitlines()) == 12 + 5
    if torn:
        journal.write_bytes(journal.read_bytes()[:-20] + b"\xff")
    endpoint.patience = 10_000
    assert call(["evaluate", job.model, *flags]) == 0
    assert len(endpoint.seen) == 12 + torn
    assert ("chat.jsonl:17 is damaged; left out" in " ".join(capsys.readouterr().err.split())) == torn
    found = json.loads(Path(job.output).read_text())
    assert found["metrics"] == whole.metrics and found["standard_errors"] == whole.standard_errors


def test_answers_are_generated_once_and_anew_where_the_model_has_changed(
    job: Evaluate, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(job)
    asked = len(endpoint.seen)
    evaluate(replace(job, overwrite=True))
    assert len(endpoint.seen) == asked
    (Path(job.model) / "chat_template.jinja").write_text("{{ messages[0].content }} =>")
    evaluate(replace(job, overwrite=True))
    assert len(endpoint.seen) > asked
    journal = [
        json.loads(line) for line in Path(job.output).with_suffix(".chat.jsonl").read_text().splitlines()
    ]
    generated = [entry["model"] for entry in journal if "answer" in entry]
    assert generated.count(job.model) == 12 and generated.count(job.baseline) == 6
    evaluate(replace(job, overwrite=True, no_cache=True))
    assert len(Path(job.output).with_suffix(".chat.jsonl").read_text().splitlines()) == 12 + 12


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_asked_anew_goes_on_too(overwrite: bool, job: Evaluate, endpoint: Endpoint) -> None:
    if overwrite:
        evaluate(job)
    endpoint.seen.clear()
    job = replace(job, no_cache=True, overwrite=overwrite)
    endpoint.patience = 5
    with pytest.raises(OSError, match="the same command goes on from there"):
        evaluate(job)
    assert len(endpoint.seen) == 5
    endpoint.patience = 10_000
    evaluate(job)
    assert len(endpoint.seen) == 12


def test_prompts_without_a_verdict_are_counted_apart(job: Evaluate, endpoint: Endpoint) -> None:
    longest = max(answers(job.model), key=len)
    endpoint.verdict = lambda first, second: "" if longest in (first, second) else "A"
    silent = evaluate(job)
    num = sum(longest in pair for pair in zip(answers(job.model), answers(job.baseline), strict=True))
    assert silent.metrics["prompts.jsonl"]["without_verdict"] == pytest.approx(1.0 - (6 - num) / 6)


def test_what_a_judge_says_in_vain_is_taken_out_alone(
    job: Evaluate, endpoint: Endpoint, tmp_path: Path
) -> None:
    """By the very command that the message gives; answers and what other judges said are kept."""
    whole = evaluate(replace(job, judge_model="another", output=str(tmp_path / "the other's.json")))
    (tmp_path / "the other's.json").unlink()
    job = replace(job, output=str(tmp_path / "the other's.json"))
    endpoint.verdict = lambda first, second: ""
    with pytest.raises(ConfigError, match=r"the judge 'fair' came to no verdict.*the answers stay") as raised:
        evaluate(job)
    journal = (tmp_path / "the other's.chat.jsonl").read_text().splitlines()
    assert len(journal) == 12 + 12 + 12
    subprocess.run(str(raised.value).rpartition("stay: ")[2], shell=True, check=True)
    assert (tmp_path / "the other's.chat.jsonl").read_text().splitlines() == journal[:24]
    endpoint.verdict = the_longer
    endpoint.seen.clear()
    assert evaluate(job).metrics == whole.metrics and len(endpoint.seen) == 12


def test_a_prompt_that_the_judge_refuses_has_no_verdict(job: Evaluate, endpoint: Endpoint) -> None:
    endpoint.patience, endpoint.status = 10, 413
    assert evaluate(job).metrics["prompts.jsonl"]["without_verdict"] == pytest.approx(1 / 6)
    asked = len(endpoint.seen)
    endpoint.patience = 10_000
    evaluate(replace(job, overwrite=True))
    assert len(endpoint.seen) == asked == 10
    journal = Path(job.output).with_suffix(".chat.jsonl")
    assert json.loads(journal.read_text().splitlines()[-1])["said"].startswith("refused: 413")


def test_a_key_goes_to_no_other_host(
    job: Evaluate, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    endpoint.location = endpoint.url.replace("127.0.0.1", "localhost")
    with pytest.raises(ConfigError, match=r"redirects to http://localhost.*give --judge the URL"):
        evaluate(job)
    assert endpoint.headers == []


def test_a_key_is_sent_where_there_is_one(
    job: Evaluate, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    evaluate(replace(job, limit=1))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    evaluate(replace(job, limit=2, overwrite=True))
    sent = [headers.get("Authorization") for headers in endpoint.headers]
    assert sent == [None, None, "Bearer secret", "Bearer secret"]


def test_a_judge_that_refuses_is_the_users_to_mend(job: Evaluate, endpoint: Endpoint) -> None:
    endpoint.patience, endpoint.status = 0, 401
    with pytest.raises(
        ConfigError, match=r"the judge at http://127.*/chat/completions refuses the request: 401"
    ):
        evaluate(job)
    with pytest.raises(OSError, match=r"is down \(.*Connection refused.*0 of 6 comparisons"):
        evaluate(replace(job, judge="http://127.0.0.1:9/v1"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge": ""}, "--kind chat has a judge .* it needs --judge$"),
        ({"baseline": "", "output": "", "judge_model": ""}, "needs --baseline, --judge-model, --output$"),
        ({"judge": "localhost:8000"}, "--judge is 'localhost:8000'; expected the URL"),
        ({"max_tokens": 0}, "--max-tokens is 0"),
        ({"kind": "cloze"}, "--judge and --judge-model are for --kind chat"),
        ({"dataset": "nowhere.jsonl"}, r"nowhere\.jsonl, for --kind chat: no such file; expected"),
    ],
)
def test_what_a_judge_needs_is_asked_for(options: dict[str, Any], message: str, job: Evaluate) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(replace(job, **options))


def test_rows_without_a_prompt_are_named(job: Evaluate, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": " "}\n')
    with pytest.raises(ConfigError, match=r"rows\.jsonl:2: expected text in the field prompt, instruction"):
        evaluate(replace(job, dataset=str(file)))
    result = evaluate(replace(job, dataset=str(file), skip_bad_rows=1))
    assert result.num_examples == {"rows.jsonl": 1}


@pytest.mark.parametrize("backend", ["torch", "engine"])
def test_the_harness_says_nothing(
    backend: Any, job: Evaluate, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    evaluate(replace(job, backend=backend, limit=2))
    assert "generate_until requests" not in capfd.readouterr().err
    assert [record for record in caplog.records if record.name.startswith("lm_eval")] == []


def test_a_journal_keeps_what_was_added(tmp_path: Path) -> None:
    events: list[Event] = []
    journal = Journal(tmp_path / "a.jsonl", events.append)
    journal.add("k", answer="line\nbreak \u2028")
    again = Journal(tmp_path / "a.jsonl", events.append)
    assert again["k"]["answer"] == "line\nbreak \u2028" and "j" not in again and events == []
