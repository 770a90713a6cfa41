"""What a teacher makes of the rows, written down: the numbers, kills, damage, and training by it."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from gossamer.checkpoint.directory import Checkpoint, Derived
from gossamer.errors import CheckpointError, ConfigError
from gossamer.job.options import record
from gossamer.job.report import Event, quiet
from gossamer.stages.pretrain import Pretrain
from gossamer.training import teacher_cache as module
from gossamer.training.attention import choose_attention
from gossamer.training.device import cast_teacher
from gossamer.training.head_loss import TeacherLogits, TopTokens
from gossamer.training.rows import Rows
from gossamer.training.teacher import LiveTeacher, Teacher, tokenizer_hash
from gossamer.training.teacher_cache import (
    CHUNK_ROWS,
    CachedTeacher,
    Wanted,
    spread_layers,
    teacher_for,
    write_down,
)
from gossamer.training.trainer import train
from gossamer.training.whole_model import load_model

TINY = Callable[[str], Path]
NUM_ROWS, LENGTH = 37, 24


@pytest.fixture
def source(tiny_llama: TINY) -> Checkpoint:
    return Checkpoint.open(tiny_llama("llama3"))


@pytest.fixture
def rows() -> Rows:
    """Some hold two documents, and one ends early."""
    ids_ST = np.random.default_rng(0).integers(2, 320, (NUM_ROWS, LENGTH), dtype=np.int32)
    ids_ST[:, 0] = ~1
    ids_ST[::3, 10] = ~1
    lengths_S = np.full(NUM_ROWS, LENGTH)
    lengths_S[5] = 13
    return Rows(ids_ST, lengths_S=lengths_S)


def wanted(source: Checkpoint, rows: Rows, **changes: Any) -> Wanted:
    anatomy = source.architecture
    made = Wanted(
        teacher=source.hash,
        tokenizer=tokenizer_hash(source.path),
        rows=rows.hash(),
        num_rows=len(rows),
        row_length=LENGTH,
        hidden_size=anatomy.hidden_size,
        layers=(1, anatomy.num_layers),
        top_k=8,
        temperature=2.0,
        precision="f32",
    )
    return replace(made, **changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@torch.no_grad()
def test_it_holds_what_the_teacher_gives_for_each_document_alone(
    source: Checkpoint, rows: Rows, tmp_path: Path
) -> None:
    model, want = load_model(source), wanted(source, rows)
    write_down(tmp_path, want, model, rows, "test", quiet)
    cached = CachedTeacher.open(tmp_path, want)
    batch = rows.collate([3, 5])
    cached.read(batch, {"input_ids": batch["input_ids"]})
    kept_BT = all_but_the_last(2)
    states, top = cached.states(), cached.at_the_head(kept_BT, 2.0)
    for row, begin, end in ((0, 0, 10), (0, 10, LENGTH), (1, 0, 13)):
        outputs = model(batch["input_ids"][row : row + 1, begin:end], output_hidden_states=True)
        for layer, state in zip(want.layers, states, strict=True):
            expected = outputs.hidden_states[layer][0].bfloat16()
            torch.testing.assert_close(state[row, begin:end], expected, rtol=0.02, atol=0.02)
        log_p_TV = (outputs.logits[0] / 2.0).log_softmax(-1)
        num = min(end, LENGTH - 1) - begin
        place = row * (LENGTH - 1) + begin
        assert isinstance(top, TopTokens)
        ids_TK, log_p_TK = top.ids_NK[place : place + num], top.log_p_NK[place : place + num]
        torch.testing.assert_close(log_p_TK.float(), log_p_TV.topk(8).values[:num], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(log_p_TV[:num].gather(1, ids_TK), log_p_TK.float(), rtol=2e-3, atol=2e-3)
    assert not states[0][1, 13:].any()
    assert want.token_bytes == 2 * 2 * source.architecture.hidden_size + 6 * 8


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_it_is_read_as_by_a_teacher_beside_a_student(
    source: Checkpoint, rows: Rows, tmp_path: Path, precision: Any
) -> None:
    """Bit for bit: of the run's precision, under autocast, and in the same micro-batches."""
    want = wanted(source, rows, precision=precision)
    write_down(tmp_path, want, load_model(source), rows, "test", quiet)
    cached, model = CachedTeacher.open(tmp_path, want), load_model(source)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    cast_teacher(model, precision)
    for name, buffer in model.named_buffers():
        assert buffer.dtype == torch.float32 and torch.equal(buffer, buffers[name])
    choose_attention(LENGTH, "cpu", precision, model)
    live, some = LiveTeacher(model), list(range(CHUNK_ROWS))
    batch, kept_BT = rows.collate(some), all_but_the_last(CHUNK_ROWS)
    given = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    for teacher in (live, cached):
        teacher.read(batch, given)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        expected = live.states()
    assert expected[0].dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    for layer, state in zip(want.layers, cached.states(), strict=True):
        there = batch["token_mask"]
        assert torch.equal(state[there], expected[layer - 1].bfloat16()[there])
    top: Any = cached.at_the_head(kept_BT, 2.0)
    head = live.at_the_head(kept_BT, 2.0)
    assert isinstance(head, TeacherLogits)
    logits_NV = head.logits(0, int(kept_BT.sum())).float()
    log_p_NK = (logits_NV / 2.0).log_softmax(-1).topk(8).values.half()
    there = batch["token_mask"][:, :-1].flatten()
    torch.testing.assert_close(top.log_p_NK[there], log_p_NK[there], rtol=1e-3, atol=1e-3)


def test_rows_that_are_read_together_are_as_if_read_alone(
    source: Checkpoint, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want, model, num_rows = wanted(source, rows), load_model(source), []
    model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: num_rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    for tokens, expected in ((4 * LENGTH, [4] * 8 + [4, 1]), (1, [1] * NUM_ROWS)):
        monkeypatch.setitem(module.MICRO_BATCH_TOKENS, "cpu", tokens)
        write_down(tmp_path / str(tokens), want, model, rows, "test", quiet)
        assert num_rows == expected
        num_rows.clear()
    together, alone = (CachedTeacher.open(tmp_path / str(tokens), want) for tokens in (4 * LENGTH, 1))
    batch = rows.collate(list(range(NUM_ROWS)))
    for teacher in (together, alone):
        teacher.read(batch, {"input_ids": batch["input_ids"]})
    for ours, theirs in zip(together.states(), alone.states(), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert not ours[~batch["token_mask"]].any()
    kept_BT = all_but_the_last(NUM_ROWS)
    ours, theirs = (teacher.at_the_head(kept_BT, 2.0) for teacher in (together, alone))
    assert isinstance(ours, TopTokens) and isinstance(theirs, TopTokens)
    torch.testing.assert_close(ours.log_p_NK, theirs.log_p_NK, rtol=2e-3, atol=2e-3)


def test_a_chunk_adds_a_line_and_rewrites_none(source: Checkpoint, rows: Rows, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []

    def look(_: Event) -> None:
        chunks, record_file = tmp_path / "chunks.jsonl", tmp_path / "teacher.json"
        seen.append((chunks.stat().st_ino, record_file.stat().st_mtime_ns, chunks.read_text()))

    write_down(tmp_path, wanted(source, rows), load_model(source), rows, "test", look)
    assert len({(inode, written) for inode, written, _ in seen}) == 1
    assert [text.count("\n") for _, _, text in seen] == [1, 2, 3]
    assert all(after.startswith(before) for (_, _, before), (_, _, after) in pairwise(seen))


def test_a_kill_loses_no_chunk_and_changes_no_byte(source: Checkpoint, rows: Rows, tmp_path: Path) -> None:
    model, want = load_model(source), wanted(source, rows)
    write_down(tmp_path / "whole", want, model, rows, "test", quiet)
    done: list[float] = []

    def stop(event: Event) -> None:
        done.append(event.done)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_down(tmp_path / "cut", want, model, rows, "test", stop)
    with pytest.raises(CheckpointError, match="1 of 3 chunks are not there yet"):
        CachedTeacher.open(tmp_path / "cut", want)
    with (tmp_path / "cut" / "top-ids.i32").open("ab") as file:
        file.write(b"half of a chunk")
    with (tmp_path / "cut" / "chunks.jsonl").open("ab") as file:
        file.write(b'{"hidden-01.bf16": "half of a line')
    write_down(tmp_path / "cut", want, model, rows, "test", lambda event: done.append(event.done))
    assert done == [1, 2, 3] and contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_kill_before_the_last_chunk_is_on_record_is_made_up_for(
    source: Checkpoint, rows: Rows, tmp_path: Path
) -> None:
    """Though all bytes are there, and though the folder holds others."""
    job = Pretrain(
        "model", "out", dataset=("text",), teacher="t", teacher_cache=str(tmp_path / "c"), distill="both"
    )
    events: list[Event] = []
    teacher_for(job, source, rows, "test", events.append)
    [said] = [event.message for event in events if event.lasting]
    assert "bytes a token: its states after layers 1, 2 of 2 and the 128 likeliest tokens" in said
    record_file, whole = tmp_path / "c" / "teacher.json", contents(tmp_path / "c")
    chunks_file = tmp_path / "c" / "chunks.jsonl"
    chunks_file.write_text("".join(chunks_file.read_text().splitlines(keepends=True)[:-1]))
    (tmp_path / "c" / "other").write_bytes(bytes(10**6))
    teacher_for(job, source, rows, "test", quiet)
    (tmp_path / "c" / "other").unlink()
    assert contents(tmp_path / "c") == whole
    record_file.unlink()
    teacher_for(job, source, rows, "test", quiet)
    assert contents(tmp_path / "c") == whole


def test_what_is_damaged_or_of_something_else_is_refused(
    source: Checkpoint, rows: Rows, tmp_path: Path
) -> None:
    want, folder = wanted(source, rows), tmp_path / "cache"
    write_down(folder, want, load_model(source), rows, "test", quiet)
    for change, words in (
        (
            {"rows": "0123456789ab" + "c" * 52},
            rf"the text, in rows of tokens \(sha256\): found {want.rows[:12]}, expected 0123456789ab\)",
        ),
        ({"teacher": "other"}, r"the teacher's files \(sha256\): found [0-9a-f]{12}, expected other"),
        (
            {"tokenizer": "0123456789ab" + "c" * 52},
            rf"the tokenizer \(sha256\): found {want.tokenizer[:12]}, expected 0123456789ab\)",
        ),
        ({"precision": "bf16"}, r"the teacher's precision \(--precision\): found f32, expected bf16"),
        ({"temperature": 1.0}, "--distill-temperature: found 2.0, expected 1.0"),
        ({"layers": (1,)}, r"layers \(--cache-layers, --distill\): found \[1, 2\], expected \[1\]"),
    ):
        with pytest.raises(ConfigError, match=f"was written of something else .{words}.*another folder"):
            CachedTeacher.open(folder, replace(want, **change))
    for file in sorted(folder.glob("*.*16")):
        copied = shutil.copytree(folder, tmp_path / file.name)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        (copied / file.name).write_bytes(bytes(content))
        with pytest.raises(CheckpointError, match=f"{file.name}: rows from 16 on are not as they were"):
            CachedTeacher.open(copied, want)
    for line in ("[3]\n", "no line\n"):
        copied = shutil.copytree(folder, tmp_path / "lines", dirs_exist_ok=True)
        with (copied / "chunks.jsonl").open("a") as file:
            file.write(line)
        with pytest.raises(CheckpointError, match=r"chunks.jsonl: not the record of a teacher's cache"):
            CachedTeacher.open(copied, want)
    (folder / "teacher.json").write_text(json.dumps({"wanted": 3}))
    with pytest.raises(CheckpointError, match="not the record of a teacher's cache"):
        CachedTeacher.open(folder, want)


def test_of_teacher_tokenizer_and_text_what_differs_is_said(
    source: Checkpoint, rows: Rows, tmp_path: Path
) -> None:
    """As a run finds them; the tokenizer's file is one of the teacher's."""
    job = Pretrain("model", "out", dataset=("text",), teacher="t", teacher_cache=str(tmp_path / "c"))
    teacher_for(job, source, rows, "test", quiet)
    other = {name: Path(shutil.copytree(source.path, tmp_path / name)) for name in ("teacher", "tokenizer")}
    weights = bytearray((other["teacher"] / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other["teacher"] / "model.safetensors").write_bytes(weights)
    with (other["tokenizer"] / "tokenizer.json").open("a") as file:
        file.write("\n")
    text = Rows(rows.marked_ids_ST[::-1].copy())
    for directory, given, words in (
        (other["teacher"], rows, ["the teacher's files"]),
        (other["tokenizer"], rows, ["the teacher's files", "the tokenizer"]),
        (source.path, text, ["the text, in rows of tokens"]),
    ):
        with pytest.raises(ConfigError) as raised:
            teacher_for(job, Checkpoint.open(directory), given, "test", quiet)
        said = re.findall(r"[(;] ?([^;(]*) \(sha256\): found (\w{12}), expected (\w{12})", str(raised.value))
        assert [word for word, _, _ in said] == words
        assert all(found != expected for _, found, expected in said)
    recorded = json.loads((tmp_path / "c" / "teacher.json").read_text())
    del recorded["wanted"]["tokenizer"]  # as in one from before that was written down
    (tmp_path / "c" / "teacher.json").write_text(json.dumps(recorded))
    assert isinstance(teacher_for(job, source, rows, "test", quiet), CachedTeacher)


def test_only_the_first_process_checks_and_it_says_how_far_it_is(
    source: Checkpoint, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Pretrain("model", "out", dataset=("text",), teacher="t", teacher_cache=str(tmp_path / "c"))
    teacher_for(job, source, rows, "test", quiet)
    events: list[Event] = []
    teacher_for(job, source, rows, "test", events.append)
    assert [(event.message, event.done, event.total) for event in events] == [
        ("what the teacher made is checked", done, 3) for done in (1, 2, 3)
    ]
    file = tmp_path / "c" / "hidden-02.bf16"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CheckpointError, match=r"hidden-02\.bf16: rows from 0 on are not as"):
        teacher_for(job, source, rows, "test", quiet)
    monkeypatch.setattr(module, "from_first", lambda complete: None)
    assert isinstance(teacher_for(job, source, rows, "test", quiet), CachedTeacher)


def test_without_room_nothing_is_asked(
    source: Checkpoint, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(
        OSError, match=r"0\.21 MB \(240 bytes a token.*0\.00 MB are free: make room, or lower --cache-la"
    ):
        write_down(tmp_path / "cache", wanted(source, rows), load_model(source), rows, "test", quiet)


def test_training_by_the_cache_is_training_by_the_teacher(
    source: Checkpoint, rows: Rows, tmp_path: Path
) -> None:
    """With every layer and token in it, the losses differ by the rounding of what was written down."""
    target = Derived(source, tmp_path / "out", tmp_path, {}, "test")
    job = Pretrain(
        *("model", "out"),
        dataset=("text",),
        teacher=str(source.path),
        teacher_cache=str(tmp_path / "cache"),
        cache_layers=2,
        cache_top_k=10**6,
        distill="both",
        distill_temperature=2.0,
        batch_tokens=8 * LENGTH,
        learning_rate=1e-3,
        precision="f32",
    )
    target.job.update(record(job))
    student = load_model(source)
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if "_proj" in name:
                weight.mul_(0.7)
    cached = teacher_for(job, source, rows, "test", quiet)
    assert isinstance(cached, CachedTeacher)
    by_cache = train(job, copy.deepcopy(student), rows, target, quiet, cached)
    live = Teacher(LlamaForCausalLM.from_pretrained(source.path), source.hash)
    by_teacher = train(job, student, rows, target, quiet, live)
    assert by_cache.parts.keys() == by_teacher.parts.keys() == {"cross_entropy", "kl", "squarehead"}
    for part, values in by_teacher.parts.items():
        assert by_cache.parts[part] == pytest.approx(values, rel=0.02, abs=1e-3)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((30, 576, 128, None), (8, 15, 22, 30)),
        ((30, 384, 128, None), (6, 12, 18, 24, 30)),
        ((32, 4096, 128, None), (8, 16, 24, 32)),
        ((3, 4096, 128, None), (1, 2, 3)),
        ((6, 192, 128, None), (1, 2, 3, 4, 5, 6)),
        ((30, 576, 128, 3), (10, 20, 30)),
        ((2, 64, 8, 9), (1, 2)),
    ],
)
def test_layers_are_spread_and_the_last_is_among_them(
    shape: tuple[int, int, int, int | None], expected: tuple[int, ...]
) -> None:
    assert spread_layers(*shape) == expected


def all_but_the_last(num_rows: int) -> torch.Tensor:
    """Tokens that another one follows: bool [B, T]."""
    return torch.arange(LENGTH).expand(num_rows, -1) < LENGTH - 1
