"""The table of bad inputs: one clear message, the right exit code, and nothing half-written.

Each row: what is given, the command line, what the message must say, the exit code.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gossamer import cli
from gossamer.engine import LLM
from gossamer.errors import ConfigError
from gossamer.stages.pack import Pack, pack

Tiny = Callable[[str], Path]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
CALIBRATE = ["--dataset", "{text}", "--num-calibration-samples", "4", "--max-seq-length", "32"]
PRUNE = ["prune", "{model}", "-o", "{out}", *CALIBRATE]
FINETUNE = ["finetune", "{model}", "-o", "{out}", "--dataset", "{rows}", "--num-train-epochs", "1"]


def rewrite(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def edit_config(model: Path, **changes: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def truncate(file: Path, by: int = 100) -> None:
    os.truncate(file, file.stat().st_size - by)


def flip(file: Path, position: int, mask: int = 0xFF) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= mask
    file.write_bytes(content)


def make_output(model: Path) -> None:
    (model.parent / "out").mkdir()
    (model.parent / "out" / "precious.txt").write_text("keep")


def remove_weights(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def remove_shard(model: Path) -> None:
    (model / "model-00002-of-00004.safetensors").unlink()


def put(value: float) -> Callable[[Path], None]:
    return lambda model: rewrite(model, lambda tensors: tensors[Q_PROJ].__setitem__((3, 4), value))


def remove_tensor(model: Path) -> None:
    rewrite(model, lambda tensors: tensors.__delitem__(Q_PROJ))


def make_sparse(model: Path) -> None:
    def zero(tensors: dict[str, torch.Tensor]) -> None:
        for name, weight in tensors.items():
            if "_proj" in name:
                weight[:, ::2] = 0

    rewrite(model, zero)


def other_tokenizer(model: Path) -> None:
    teacher = Path(shutil.copytree(model, model.parent / "teacher"))
    text = (teacher / "tokenizer.json").read_text()
    (teacher / "tokenizer.json").write_text(text.replace('"Ġ"', '"Ġ̂"'))


def smaller_teacher(model: Path) -> None:
    def drop_last_layer(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.1.")]:
            del tensors[name]

    teacher = Path(shutil.copytree(model, model.parent / "teacher"))
    rewrite(teacher, drop_last_layer)
    edit_config(teacher, num_hidden_layers=1)


def bad_row(model: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a"}]
    (model.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def long_prompt(model: Path) -> None:
    (model.parent / "rows.jsonl").write_text(json.dumps({"prompt": "a b " * 600, "completion": "c"}) + "\n")


def unanswered(model: Path) -> None:
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
    )
    rows = {"messages": [{"role": "user", "content": "a"}]}
    (model.parent / "rows.jsonl").write_text(json.dumps(rows) + "\n")


def packed(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def make(model: Path) -> None:
        make_sparse(model)
        pack(Pack(str(model), str(model.parent / "model.goss")))
        change(model.parent / "model.goss")

    return make


def newer(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"version":"1"', b'"version":"7"', 1))


def nothing(model: Path) -> None:
    pass


Case = tuple[str, str, Callable[[Path], None], list[str], list[str]]
TABLE: list[Case] = [
    ("output exists", "llama2", make_output, PRUNE, ["out exists", "--overwrite"]),
    (
        "not a checkpoint",
        "llama2",
        lambda m: (m / "config.json").unlink(),
        PRUNE,
        ["without config.json", "Hugging Face"],
    ),
    (
        "unknown architecture",
        "llama2",
        lambda m: edit_config(m, architectures=["GPT2LMHeadModel"]),
        PRUNE,
        ["GPT2LMHeadModel", "supported: LlamaForCausalLM"],
    ),
    ("pickle weights", "llama2", remove_weights, PRUNE, ["pytorch_model.bin", "supported: safetensors"]),
    ("truncated", "llama2", lambda m: truncate(m / "model.safetensors"), PRUNE, ["model.safetensors"]),
    ("corrupt header", "llama2", lambda m: flip(m / "model.safetensors", 9), PRUNE, ["model.safetensors"]),
    ("shard missing", "sharded", remove_shard, PRUNE, ["model-00002-of-00004.safetensors", "missing"]),
    (
        "tensor missing",
        "llama2",
        remove_tensor,
        PRUNE,
        [Q_PROJ, "missing"],
    ),
    ("NaN", "llama2", put(float("nan")), PRUNE, ["model.safetensors", Q_PROJ, "NaN"]),
    ("infinite", "llama2", put(float("inf")), PRUNE, ["model.safetensors", Q_PROJ]),
    ("sparsity of 1", "llama2", nothing, [*PRUNE, "--sparsity", "1.0"], ["--sparsity is 1", "below 1"]),
    ("negative sparsity", "llama2", nothing, [*PRUNE, "--sparsity", "-0.1"], ["-0.1", "at least 0"]),
    (
        "a pattern of another sparsity",
        "llama2",
        nothing,
        [*PRUNE, "--sparsity", "0.7", "--pattern", "2:4"],
        ["2:4 fixes the sparsity at 0.5", "--sparsity is 0.7"],
    ),
    (
        "a pattern that widths do not divide by",
        "llama2",
        nothing,
        [*PRUNE, "--pattern", "32:64"],
        ["model.layers.0.self_attn.q_proj has 48 inputs", "--pattern 32:64"],
    ),
    (
        "a profile and a pattern",
        "llama2",
        nothing,
        [*PRUNE, "--pattern", "2:4", "--sparsity-profile", "auto"],
        ["--sparsity-profile auto", "--pattern 2:4", "leave out one"],
    ),
    ("no pattern", "llama2", nothing, [*PRUNE, "--pattern", "2-4"], ["--pattern is 2-4", "N:M"]),
    ("below the parent's", "llama2", make_sparse, [*PRUNE, "--sparsity", "0.3"], ["0.3", "0.5"]),
    (
        "fewer than no epochs of training through the rounding",
        "llama2",
        nothing,
        ["quantize", *PRUNE[1:], "--reconstruct-epochs", "-1"],
        ["--reconstruct-epochs is -1", "expected 0 or more"],
    ),
    (
        "training through the rounding at no rate",
        "llama2",
        nothing,
        ["quantize", *PRUNE[1:], "--reconstruct-epochs", "1", "--reconstruct-learning-rate", "0"],
        ["--reconstruct-learning-rate is 0", "a number above 0"],
    ),
    (
        "smoothing beyond 1",
        "llama2",
        nothing,
        ["quantize", *PRUNE[1:], "--smoothing-strength", "1.5"],
        ["--smoothing-strength is 1.5", "auto or a number from 0 to 1"],
    ),
    (
        "quantizing by one row",
        "llama2",
        nothing,
        ["quantize", *PRUNE[1:], "--num-calibration-samples", "1"],
        ["--num-calibration-samples is 1", "at least 2: an eighth of the rows"],
    ),
    (
        "short calibration",
        "llama2",
        nothing,
        [*PRUNE, "--num-calibration-samples", "4000"],
        ["4000 samples", "128000 are needed"],
    ),
    (
        "teacher of another shape",
        "llama2",
        smaller_teacher,
        [*FINETUNE, "--teacher", "{teacher}"],
        ["1", "2", "layers"],
    ),
    (
        "teacher of another tokenizer",
        "llama2",
        other_tokenizer,
        [*FINETUNE, "--teacher", "{teacher}"],
        ["tokenizer"],
    ),
    (
        "teacher that is not learned from",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--teacher", "dense"],
        ["--teacher dense", "--distill none"],
    ),
    (
        "temperature of zero",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "kl", "--teacher", "dense", "--distill-temperature", "0"],
        ["--distill-temperature is 0", "above 0"],
    ),
    (
        "row without its fields",
        "llama2",
        bad_row,
        [*FINETUNE, "--distill", "none"],
        ["rows.jsonl:2", "completion"],
    ),
    (
        "unknown reporter",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--report-to", "paper"],
        ["--report-to paper", "tensorboard", "wandb"],
    ),
    (
        "reporter without its package",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--report-to", "wandb"],
        ["--report-to wandb", "--report-to none"],
    ),
    (
        "nothing to resume",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--resume"],
        ["--resume", "out.partial", "leave --resume out"],
    ),
    (
        "sparse kernel for a dense model",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--kernel", "sparse"],
        ["--kernel sparse", "found no zeros", "gossamer prune", "--kernel dense"],
    ),
    (
        "fsdp with one process",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--parallel", "fsdp"],
        ["--parallel fsdp", "one process", "torchrun"],
    ),
    (
        "a schedule that is none",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--prune-schedule", "0.0-0.7"],
        ["--prune-schedule is 0.0-0.7", "expected cubic:[START-]END"],
    ),
    (
        "a schedule that falls",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--prune-schedule", "cubic:0.7-0.5"],
        ["from 0.7 to 0.5", "what is zero stays zero"],
    ),
    (
        "a schedule that would raise weights from zero",
        "llama2",
        make_sparse,
        ["pretrain", "{model}", "-o", "{out}", "--dataset", "{text}", "--prune-schedule", "cubic:0.2-0.7"],
        ["begins at 0.2", "would raise weights from zero", "0.5000 sparse", "leave START out"],
    ),
    (
        "a schedule for the sparse kernel",
        "llama2",
        make_sparse,
        [*FINETUNE, "--distill", "none", "--prune-schedule", "cubic:0.7", "--kernel", "sparse"],
        ["--kernel sparse", "--prune-schedule cubic:0.7", "leave --kernel out"],
    ),
    (
        "a rank of none",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--lora", "0"],
        ["--lora 0", "a rank of at least 1"],
    ),
    (
        "a rank that is a whole matrix's",
        "llama3",
        nothing,
        [*FINETUNE, "--distill", "none", "--lora", "24"],
        ["--lora 24", "k_proj is 24 x 48", "a rank below 24"],
    ),
    (
        "adapters for the sparse kernel",
        "llama2",
        make_sparse,
        [*FINETUNE, "--distill", "none", "--lora", "4", "--kernel", "sparse"],
        ["--lora 4", "--kernel sparse", "leave --kernel out"],
    ),
    (
        "adapters of sharded weights",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--lora", "4", "--parallel", "fsdp"],
        ["--lora 4", "--parallel fsdp", "--parallel ddp"],
    ),
    (
        "adapters of weights that are pruned meanwhile",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--lora", "4", "--prune-schedule", "cubic:0.5"],
        ["--lora 4", "--prune-schedule cubic:0.5", "one after the other"],
    ),
    (
        "weight decay that grows",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--weight-decay", "-1"],
        ["--weight-decay -1", "from 0 on"],
    ),
    (
        "weight decay that is no number",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--weight-decay", "nan"],
        ["--weight-decay nan", "from 0 on"],
    ),
    (
        "gradients of less than no norm",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--max-grad-norm", "-1"],
        ["--max-grad-norm -1", "from 0 on"],
    ),
    (
        "a seed that nothing takes",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--seed", "-1"],
        ["--seed is -1", "from 0 to 4294967295"],
    ),
    (
        "no likely tokens",
        "llama2",
        nothing,
        [*FINETUNE, "--teacher", "{model}", "--teacher-cache", "{cache}", "--cache-top-k", "0"],
        ["--cache-top-k is 0", "at least 1"],
    ),
    (
        "no layers",
        "llama2",
        nothing,
        [*FINETUNE, "--teacher", "{model}", "--teacher-cache", "{cache}", "--cache-layers", "0"],
        ["--cache-layers is 0", "at least 1"],
    ),
    (
        "layers of no cache",
        "llama2",
        nothing,
        [*FINETUNE, "--teacher", "{model}", "--cache-layers", "1"],
        ["--cache-layers 1", "--teacher-cache FOLDER"],
    ),
    (
        "a cache that is a file",
        "llama2",
        nothing,
        [*FINETUNE, "--teacher", "{model}", "--teacher-cache", "{text}"],
        ["text.txt, a file", "expected a folder"],
    ),
    (
        "a cache among the files of a model",
        "llama2",
        nothing,
        [*FINETUNE, "--teacher", "{model}", "--teacher-cache", "{model}"],
        ["holds something else (config.json", "new, empty or a teacher's cache"],
    ),
    (
        "a cache where the output goes",
        "llama2",
        nothing,
        [*FINETUNE, "--teacher", "{model}", "--teacher-cache", "{out}"],
        ["the output directory", "give another folder"],
    ),
    (
        "no rows",
        "llama2",
        lambda m: (m.parent / "rows.jsonl").write_text(""),
        [*FINETUNE, "--distill", "none"],
        ["rows.jsonl: found no example to learn from", "it has no rows"],
    ),
    (
        "prompts longer than a row",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--max-length", "3"],
        ["left out 8 rows whose prompt alone takes 3 tokens (--max-length) or more"],
    ),
    (
        "prompts longer than the context",
        "llama2",
        long_prompt,
        [*FINETUNE, "--distill", "none", "--max-length", "4096"],
        ["left out 1 rows whose prompt alone takes 512 tokens (the context of the model) or more"],
    ),
    (
        "a chat in which nobody answers",
        "llama2",
        unanswered,
        [*FINETUNE, "--distill", "none", "--format", "chat"],
        ["left out 1 rows without an answer", "role assistant"],
    ),
    (
        "a chat without a template",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--format", "chat"],
        ["--format chat", "no chat template", "chat_template.jinja"],
    ),
    (
        "no doctests",
        "llama2",
        nothing,
        ["finetune", "{model}", "-o", "{out}", "--dataset", "python:doctests:0", "--distill", "none"],
        ["python:doctests:0", "at least 1"],
    ),
    (
        "fewer than no rows to leave out",
        "llama2",
        nothing,
        ["evaluate", "{model}", "--dataset", "{rows}", "--kind", "cloze", "--skip-bad-rows", "-1"],
        ["--skip-bad-rows -1", "a number of rows"],
    ),
    (
        "examples that are not there",
        "llama2",
        nothing,
        ["evaluate", "{model}", "--dataset", "{goss}", "--kind", "cloze"],
        ["model.goss, for --kind cloze: no such file", ".jsonl, .jsonl.zst or .parquet"],
    ),
    (
        "a field that holds nothing",
        "llama2",
        lambda m: (m.parent / "rows.jsonl").write_text('{"prompt": null, "continuation": "a"}\n'),
        ["evaluate", "{model}", "--dataset", "{rows}", "--kind", "cloze"],
        ["rows.jsonl:1: expected text in the field context or prompt; found null in 'prompt'"],
    ),
    (
        "an answer without a number",
        "llama2",
        lambda m: (m.parent / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n'),
        ["evaluate", "{model}", "--dataset", "{rows}", "--kind", "gsm8k"],
        ["rows.jsonl:1", "expected an answer that is a number", "'#### b'"],
    ),
    (
        "more examples to show than there are",
        "llama2",
        lambda m: (m.parent / "rows.jsonl").write_text('{"prompt": "a", "continuation": "b"}\n' * 2),
        [
            *("evaluate", "{model}", "--dataset", "{rows}", "--kind", "cloze"),
            *("--num-fewshot", "1", "--fewshot-dataset", "{rows}"),
        ],
        ["--num-fewshot is 1", "expected at most 0", "rows.jsonl"],
    ),
    (
        "a chat evaluation without a template",
        "llama2",
        nothing,
        [
            *("evaluate", "{model}", "--dataset", "{rows}", "--kind", "chat", "--baseline", "{model}"),
            *("--judge", "http://127.0.0.1:9/v1", "--judge-model", "j", "-o", "{report}"),
        ],
        ["model: this model has no chat template", "chat_template.jinja"],
    ),
    (".goss truncated", "llama2", packed(truncate), ["run", "{goss}", "hi"], ["model.goss"]),
    (
        ".goss header flipped",
        "llama2",
        packed(lambda f: flip(f, 20)),
        ["run", "{goss}", "hi"],
        ["model.goss"],
    ),
    (".goss of a newer version", "llama2", packed(newer), ["run", "{goss}", "hi"], ["version", "7"]),
    (
        "the engine's options without the engine",
        "llama2",
        nothing,
        ["evaluate", "{model}", "--dataset", "{text}", "--kv-cache-dtype", "f32"],
        ["--kv-cache-dtype", "--backend engine"],
    ),
    (
        "a batch of none",
        "llama2",
        packed(nothing),
        ["serve", "{goss}", "--max-batch", "0"],
        ["max_batch is 0", "at least 1"],
    ),
    (
        "a repository without its organization",
        "llama2",
        nothing,
        ["publish", "{model}", "name"],
        ["'name' is no repository of the hub", "org/name"],
    ),
    (
        "publishing offline",
        "llama2",
        nothing,
        ["publish", "{model}", "org/name"],
        ["HF_HUB_OFFLINE is set", "--dry-run"],
    ),
    ("no .goss", "llama2", nothing, ["run", "{goss}", "hi"], ["model.goss"]),
    (
        "unknown flag",
        "llama2",
        nothing,
        [*PRUNE, "--sparcity", "0.5"],
        ["--sparcity", "did you mean --sparsity"],
    ),
    ("unknown verb", "llama2", nothing, ["prun", "{model}"], ["did you mean prune"]),
]


@pytest.mark.parametrize("given, variant, prepare, arguments, says", TABLE, ids=[case[0] for case in TABLE])
def test_bad_input_is_refused_with_a_message(
    given: str,
    variant: str,
    prepare: Callable[[Path], None],
    arguments: list[str],
    says: list[str],
    tiny_llama: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = workplace(tiny_llama, variant, tmp_path)
    prepare(places["model"])
    before = sorted(tmp_path.rglob("*"))
    code = cli.call([argument.format(**places) for argument in arguments])
    message = capsys.readouterr().err
    assert code == 2, message
    assert all(phrase in message.replace("\n", " ") for phrase in says), message
    assert "Traceback" not in message
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("max_batch", [0, -3, 1.5, "many"])
def test_a_batch_that_is_no_number_of_requests_is_refused(
    max_batch: Any, tiny_llama: Tiny, tmp_path: Path
) -> None:
    places = workplace(tiny_llama, "llama2", tmp_path)
    packed(nothing)(places["model"])
    with pytest.raises(ConfigError, match=f"max_batch is {max_batch!r}"):
        LLM(places["goss"], max_batch=max_batch)


def workplace(tiny_llama: Tiny, variant: str, directory: Path) -> dict[str, Path]:
    """A copy of a tiny model to damage, with a text and examples to calibrate and train on."""
    places = {name: directory / name for name in ("model", "out", "teacher")}
    shutil.copytree(tiny_llama(variant), places["model"])
    places["text"] = directory / "text.txt"
    places["text"].write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    places["rows"] = directory / "rows.jsonl"
    places["rows"].write_text('{"prompt": "a b", "completion": "c"}\n' * 8)
    places |= {"goss": directory / "model.goss", "cache": directory / "cache", "report": directory / "r.json"}
    return places


@pytest.mark.parametrize("seed", range(2000 if os.environ.get("GOSSAMER_TORTURE") else 40))
def test_a_flipped_packed_file_never_crashes(
    seed: int, tiny_llama: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any byte of header, masks, offsets or values: an error of ours, or a file that still runs."""
    places = workplace(tiny_llama, "llama2", tmp_path)
    packed(nothing)(places["model"])
    generator = np.random.default_rng(seed)
    for _ in range(3):
        flip(
            places["goss"],
            int(generator.integers(places["goss"].stat().st_size)),
            int(generator.integers(1, 256)),
        )
    code = cli.call(["run", str(places["goss"]), "hi", "--max-tokens", "2"])
    assert code in (0, 2), capsys.readouterr().err


def start(arguments: list[str], limit_bytes: int | None = None) -> subprocess.Popen[str]:
    """The command line in a process of its own, where every file may grow to `limit_bytes`."""

    def limit() -> None:
        if limit_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    return subprocess.Popen(
        [sys.executable, "-m", "gossamer", *arguments], stderr=subprocess.PIPE, text=True, preexec_fn=limit
    )


@pytest.mark.parametrize("verb", ["prune", "pack"])
def test_a_disk_that_takes_no_more_leaves_nothing(verb: str, tiny_llama: Tiny, tmp_path: Path) -> None:
    places = workplace(tiny_llama, "llama2", tmp_path)
    before = sorted(tmp_path.rglob("*"))
    arguments = PRUNE if verb == "prune" else ["pack", "{model}", "-o", "{goss}"]
    process = start([argument.format(**places) for argument in arguments], limit_bytes=50_000)
    message = process.communicate(timeout=120)[1]
    assert process.returncode == 1, message
    assert "Traceback" not in message
    assert sorted(tmp_path.rglob("*")) == before


def test_ctrl_c_exits_130_and_leaves_nothing(tiny_llama: Tiny, tmp_path: Path) -> None:
    places = workplace(tiny_llama, "llama2", tmp_path)
    before = sorted(tmp_path.rglob("*"))
    training = ["--num-tokens", "5000000", "--max-length", "64", "--batch-tokens", "256"]
    output = ["-o", str(places["out"]), "--dataset", "python:stdlib"]
    process = start(["pretrain", str(places["model"]), *output, *training])
    deadline = time.monotonic() + 120
    while not (tmp_path / "out.partial").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)  # rows are packed for many seconds yet: after a step, the run would be kept to be resumed
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 130, message
    assert "Traceback" not in message
    assert sorted(tmp_path.rglob("*")) == before
