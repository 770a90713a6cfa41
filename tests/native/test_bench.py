"""`bench` measures a real file; its figures fit each other; synthetic models are sound packed models."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gossamer import _native, cli
from gossamer.architecture.families import read_anatomy
from gossamer.engine import KvCacheDtype, cached_type, native_model
from gossamer.errors import ConfigError
from gossamer.measure.report import BenchResult, BenchRow
from gossamer.measure.rounds import kv_bytes
from gossamer.measure.synthetic import CONFIGS, Recipe, synthetic_file, synthetic_image
from gossamer.packed.reader import Packed
from gossamer.tools.bench import Bench, bench

QUICK = Bench(prompt=(9,), new=8, threads=2, repeats=2)


@pytest.fixture(scope="module")
def row(int8_model: Packed) -> BenchRow:
    """Two rounds of a batch of three."""
    return bench(dataclasses.replace(QUICK, model=str(int8_model.path), batch=(3,))).row


@pytest.fixture
def small_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """tinyllama-1.1b with few words and narrow layers; the cache is the test's own."""
    narrow = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    monkeypatch.setitem(CONFIGS, "tinyllama-1.1b", CONFIGS["tinyllama-1.1b"] | narrow | heads)
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"


def test_speeds_follow_from_times(row: BenchRow) -> None:
    assert row.num_threads == 2 and row.batch == 3 and row.baseline_s is None
    assert row.step_p99_s >= row.step_p50_s > 0
    assert row.decode_tokens_per_s == pytest.approx(3 / row.step_p50_s)
    assert row.prompt_tokens_per_s == pytest.approx(27 / row.time_to_first_token_s)
    assert row.gb_per_s == pytest.approx(row.step_bytes / row.step_p50_s / 1e9)


def test_shares_refer_to_the_limits_of_the_run(row: BenchRow) -> None:
    assert row.bandwidth_share == pytest.approx(row.gb_per_s / row.read_gb_per_s)
    assert row.bandwidth_share == pytest.approx(row.decode_tokens_per_s / row.bound_tokens_per_s)
    assert row.linears_bandwidth_share == pytest.approx(1 / row.linears_s / row.linears_bound_tokens_per_s)
    assert row.prompt_linears_peak_share == pytest.approx(row.prompt_linears_tops / row.int8_peak_tops)
    assert row.prompt_tops / row.prompt_tokens_per_s == pytest.approx(
        row.prompt_linears_tops / (row.prompt_linears_tokens / row.prompt_linears.median)
    )
    assert row.attention_bandwidth_share == pytest.approx(row.attention_gb_per_s / row.read_gb_per_s)
    assert row.read_gb_per_s >= row.reads_gb_per_s.mean


def test_bytes_are_those_of_the_file_and_the_cache(row: BenchRow, int8_model: Packed) -> None:
    """Keys and values of three sequences, at the middle of 8 steps that follow 9 tokens."""
    llama = int8_model.architecture
    assert row.kv_bytes == pytest.approx(3 * kv_bytes(llama, 9 + 4.5, "bf16"), abs=3)
    position = 2 * llama.num_layers * llama.attention.num_kv_heads * llama.attention.head_dim
    assert [kv_bytes(llama, 7, dtype) for dtype in ("f32", "bf16")] == [28 * position, 14 * position]
    mistral = int8_model.config | {"architectures": ["MistralForCausalLM"], "sliding_window": 5}
    assert [kv_bytes(read_anatomy(mistral), context, "f32") for context in (4, 7)] == [
        16 * position,
        20 * position,
    ]
    assert row.linears_bytes == sum(int8_model.matrix_bytes(name) for name in int8_model.decoder)
    assert row.linears_bytes + int8_model.matrix_bytes(int8_model.head) < row.step_bytes - row.kv_bytes
    assert row.step_bytes - row.kv_bytes < row.file_bytes == int8_model.path.stat().st_size


@pytest.mark.parametrize("dtype", ["auto", "f32", "i8"])
def test_keys_and_values_are_counted_in_their_type(int8_model: Packed, dtype: KvCacheDtype) -> None:
    """The engine, asked for the bytes of a whole cache, counts the same for a position."""
    job = dataclasses.replace(QUICK, model=str(int8_model.path), kv_cache_dtype=dtype, repeats=1)
    row = bench(job).row
    assert row.kv_cache_dtype == {"auto": "bf16"}.get(dtype, dtype)
    llama = int8_model.architecture
    assert row.kv_bytes == kv_bytes(llama, 13.5, cached_type(int8_model, dtype))
    num_bytes, _ = native_model(int8_model, 1, dtype).time_attention(9, 1)
    assert num_bytes % kv_bytes(llama, 9, cached_type(int8_model, dtype)) == 0


def test_spreads_count_every_sample(row: BenchRow) -> None:
    assert (row.steps.count, row.prompts.count, row.reads_gb_per_s.count) == (16, 2, 2)
    assert row.steps.median == row.step_p50_s and row.steps.p99 == row.step_p99_s
    assert row.prompts.mean == pytest.approx(row.prompts.median)  # of two
    assert row.steps.deviation > 0


def test_a_share_above_all_is_said(monkeypatch: pytest.MonkeyPatch, int8_model: Packed) -> None:
    """Readers that claim a thousandth of the truth: the run must not look sound."""
    monkeypatch.setattr("gossamer.measure.readers.Readers.best", lambda self, repeats=1: 1e5)
    result = bench(dataclasses.replace(QUICK, model=str(int8_model.path)))
    assert result.row.bandwidth_share > 1
    assert any(text.startswith("WRONG: read while decoding") for text in result.closing)


def test_few_weights_are_said_to_be_few(row: BenchRow) -> None:
    assert any("may stay in a cache" in text for text in BenchResult((row,)).closing)


def test_a_sweep_gives_a_row_for_each_combination(small_shape: Path) -> None:
    """And leaves no files of its own behind, but those that were there before."""
    before = synthetic_file(Recipe.of("tinyllama-1.1b", "i8", 0.5, layers=1))
    job = dataclasses.replace(
        QUICK,
        shape="tinyllama-1.1b",
        layers=1,
        values=("i8", "bf16"),
        sparsity=(0.5, 0.9),
        batch=(1, 2),
        prompt=(3, 5),
        new=2,
        repeats=1,
    )
    result = bench(job)
    assert [(r.values, r.sparsity, r.batch, r.prompt) for r in result.rows] == [
        (values, sparsity, batch, prompt)
        for values in ("i8", "bf16")
        for sparsity in (0.5, 0.9)
        for batch in (1, 2)
        for prompt in (3, 5)
    ]
    assert list(small_shape.glob("*.goss")) == [before]
    assert {len(line) for line in result.tables()[0].rows} == {len(result.tables()[0].columns)}
    bench(dataclasses.replace(job, keep=True, batch=(1,), prompt=(3,)))
    assert len(list(small_shape.glob("*.goss"))) == 4


def test_zeros_in_blocks_are_stored_as_blocks(small_shape: Path) -> None:
    job = dataclasses.replace(QUICK, shape="tinyllama-1.1b", layers=1, sparsity=(0.8,), pattern="1x4", new=2)
    row = bench(job).row
    packed = Packed.open(Path(row.file))
    assert {packed.matrices[name].storage for name in packed.decoder} == {"blocks"}
    assert packed.sparsity(packed.decoder) == pytest.approx(0.8, abs=0.01)
    assert row.prompt_tokens_per_s > 0


def test_the_command_prints_an_object_a_row_or_markdown(
    small_shape: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "--shape", "tinyllama-1.1b", "--layers", "1", "-n", "2", "-r", "1", "-b", "1", "2"]
    words += ["-p", "3", "-t", "1", "--baseline"]
    assert cli.call([*words, "--json"]) == 0
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    results = [found["result"] for found in objects if "result" in found]
    assert [found["batch"] for found in results] == [1, 2]
    assert results[0]["linears_speedup"] == pytest.approx(results[0]["baseline_s"] / results[0]["linears_s"])
    assert cli.call(words) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert set(lines[1]) == set("|-: ")


def test_a_plot_is_drawn_over_all_sparsities(small_shape: Path, tmp_path: Path) -> None:
    job = Bench(shape="tinyllama-1.1b", layers=1, prompt=(2,), new=2, repeats=1, plot=str(tmp_path / "s.png"))
    result = bench(job)
    [curve] = result.curves()
    assert curve.sparsities == [0, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert curve.bounds == sorted(curve.bounds)  # fewer bytes, higher
    assert curve.speeds == [row.decode_tokens_per_s for row in result.rows]
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def senseless() -> dict[str, tuple[Bench, str]]:
    """A job and a word of the message that refuses it."""
    shape = Bench(shape="llama-2-7b")
    changed = dataclasses.replace
    return {
        "neither": (Bench(), "MODEL or --shape"),
        "both": (changed(shape, model="x.goss"), "not both"),
        "no layers": (changed(shape, layers=0), "layers is 0"),
        "no tokens": (changed(shape, prompt=(4, 0)), "prompt is 0"),
        "no batch": (changed(shape, batch=()), "batch has no value"),
        "all zeros": (changed(shape, sparsity=(0.5, 1.0)), "sparsity is 1.0"),
        "two batches in a plot": (changed(shape, batch=(1, 2), plot="x.png"), "one batch"),
        "a plot of another kind": (changed(shape, plot="x.pdf"), "x.pdf"),
        "a plot nowhere": (changed(shape, plot="/nowhere/x.png"), "directory that exists"),
        "a sparsity of a file": (Bench(model="x.goss", sparsity=(0.5,)), "sparsity needs --shape"),
        "a pattern of a file": (Bench(model="x.goss", pattern="1x4"), "pattern needs --shape"),
        "a baseline of a file": (Bench(model="x.goss", baseline=True), "baseline needs --shape"),
    }


@pytest.mark.parametrize("name", senseless())
def test_senseless_jobs_are_refused(name: str) -> None:
    job, message = senseless()[name]
    with pytest.raises(ConfigError, match=message):
        bench(job)


def test_a_model_larger_than_memory_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    monkeypatch.setattr("gossamer.tools.bench.available_memory_bytes", lambda: 20e9)
    with pytest.raises(ConfigError, match="27 GB; 20 GB of memory are available: give --layers"):
        bench(Bench(shape="llama-2-7b", values=("f32",), sparsity=(0.0,)))
    assert not list(tmp_path.iterdir())


def test_a_result_of_several_rows_has_no_single_one(row: BenchRow) -> None:
    with pytest.raises(ValueError, match="unpack"):
        _ = BenchResult((row, row)).row


def test_a_synthetic_image_is_a_model_of_the_shape_that_runs() -> None:
    """One layer in memory: the engine checks it as it checks a file; 70% zeros take 3.4 bits a weight."""
    image = synthetic_image(Recipe.of("tinyllama-1.1b", "i8", 0.7, layers=1, vocabulary=256))
    model = _native.Model(image.buffer, image.tensors, image.config, 1)
    logits = model.forward([model.new_sequence(4)], [np.array([5, 6], np.int32)])
    assert logits.shape == (1, 256) and np.isfinite(logits).all() and logits.std() > 0
    num_weights = 2048 * (2048 * 2 + 256 * 2 + 5632 * 3)
    assert 8 * image.num_bytes / num_weights == pytest.approx(3.4, abs=0.05)


def test_a_synthetic_file_is_written_once(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    recipe = Recipe.of("tinyllama-1.1b", "bf16", 0.0, layers=2, vocabulary=256)
    path = synthetic_file(recipe)
    written, packed = path.stat().st_mtime_ns, Packed.open(path)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    first, second = (packed.array(name) for name in names)
    np.testing.assert_array_equal(first, second)
    assert (
        packed.tensors["model.layers.0.mlp.up_proj.weight"]
        != packed.tensors["model.layers.1.mlp.up_proj.weight"]
    )
    assert synthetic_file(recipe).stat().st_mtime_ns == written
