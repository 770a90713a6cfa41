"""`bench --backend gpu` on torch's CPU in the place of a GPU: figures that fit each other, right sums."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer import cli
from gossamer.architecture.families import read_anatomy
from gossamer.errors import ConfigError, GossamerError
from gossamer.gpu import SparseLinear
from gossamer.gpu.found import has_gpu
from gossamer.measure.gpu_decoder import DENSE, Decoder, Sizes
from gossamer.measure.report import BenchRow, GpuRow, Speeds
from gossamer.measure.rounds import kv_bytes
from gossamer.measure.stopwatch import Stopwatch
from gossamer.measure.synthetic import CONFIGS, Recipe
from gossamer.tools import card
from gossamer.tools.bench import Bench, bench
from gpu.emulated import Emulated, needs_compiler

SIZES = Sizes(hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, vocabulary=50)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A shape of narrow layers."""
    narrow = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(CONFIGS, "tinyllama-1.1b", CONFIGS["tinyllama-1.1b"] | narrow | heads)
    return Bench(shape="tinyllama-1.1b", layers=1, prompt=(5,), new=3, repeats=2, backend="gpu")


@pytest.mark.usefixtures("cpu_as_gpu")
def test_figures_follow_from_times_and_bytes(job: Bench) -> None:
    row: GpuRow = bench(replace(job, batch=(3,), baseline=True)).row
    assert (row.gpu, row.values, row.sparsity, row.layers, row.batch) == ("CPU", "i8", 0.7, 1, 3)
    assert (row.steps.count, row.prompts.count, row.linears.count) == (6, 2, 2)
    assert row.decode_tokens_per_s == pytest.approx(3 / row.step_p50_s)
    assert row.prompt_tokens_per_s == pytest.approx(15 / row.time_to_first_token_s)
    num_weights = 64 * (64 + 64 + 64 + 96 * 3)
    assert row.prompt_tops == pytest.approx(2e-12 * num_weights * row.prompt_tokens_per_s)
    assert row.baseline is not None and row.baseline.count == 2 and row.linears_speedup is not None
    assert row.linears_speedup == pytest.approx(row.baseline.median / row.linears_s)
    llama = Recipe.of("tinyllama-1.1b", "i8", 0.7, 1)
    assert row.kv_bytes == 3 * 2 * 2 * 16 * 2 * 7  # keys, values; heads; width; bytes; positions
    assert row.kv_bytes == 3 * kv_bytes(read_anatomy(llama.config), 7, "bf16")
    assert row.step_bytes - row.kv_bytes - row.linears_bytes == 2 * 64 * 50 + 2 * 64 * 3
    assert row.gb_per_s == pytest.approx(row.bandwidth_share * row.read_gb_per_s)
    [shown] = card._speeds([asdict(row)])
    assert shown[:2] == ("3", "5") and shown[-1] == "CPU, i8"


@pytest.mark.usefixtures("cpu_as_gpu")
def test_a_sweep_has_a_row_for_each_setting_and_the_cpus_fields(
    job: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "--shape", "tinyllama-1.1b", "--layers", "1", "-n", "2", "-r", "1", "--backend", "gpu"]
    words += ["--values", "bf16", "i8", "--sparsity", "0", "0.6", "--plot", str(tmp_path / "speed.png")]
    assert cli.call([*words, "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = [it["result"] for it in found if "result" in it]
    assert [(it["values"], it["sparsity"]) for it in rows] == [
        ("bf16", 0.0), ("bf16", 0.6), ("i8", 0.0), ("i8", 0.6),
    ]  # fmt: skip
    shared, on_cpu = ({it.name for it in fields(kind)} for kind in (Speeds, BenchRow))
    assert shared <= on_cpu and {*rows[0]} == shared | {"gpu", "layers"}
    assert rows[0]["linears_bytes"] > rows[1]["linears_bytes"] > rows[3]["linears_bytes"]
    assert (tmp_path / "speed.png").stat().st_size > 1000
    assert cli.call(words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "CPU, 1 rounds, reads" in shown and "bf16 60%" in shown


@needs_compiler
def test_every_product_of_a_decoder_goes_through_the_gpus_kernels(emulated_gpu: Emulated) -> None:
    decoder = Decoder(Stopwatch("cpu"), replace(SIZES, layers=1), "i8", 0.7)
    decoder.step(decoder.inputs(2), decoder.caches(2, 3))
    assert emulated_gpu.launched == ["round_inputs", "sparse_i8_1", "scale_sums"] * 4


@pytest.mark.parametrize("values", ["bf16", "i8", "i4", DENSE])
def test_prompts_and_steps_are_those_of_a_decoder(values: str) -> None:
    """A prompt against attention that is written out, a step behind the cache that it would have left."""
    decoder = Decoder(Stopwatch("cpu"), SIZES, values, 0.7)
    x_BTD = decoder.inputs(2, 6)
    expected, caches = written_out(decoder, x_BTD)
    for found in (decoder.prompt(x_BTD), decoder.step(x_BTD[:, -1], caches)):
        assert found.shape == (2, 50) and (found - expected).abs().max() <= 0.05 * expected.abs().max()


def written_out(decoder: Decoder, x_BTD: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Logits [B, V] of the last tokens, and the keys and values of each layer."""

    def normed(x: Tensor) -> Tensor:
        return (x.float() * (x.float() ** 2).mean(-1, keepdim=True).rsqrt()).bfloat16()

    caches = []
    for qkv, o, gate_up, down in decoder.layers:
        heads_BHTE = qkv(normed(x_BTD)).view(2, 6, 8, 16).transpose(1, 2)
        q, keys, values = heads_BHTE[:, :4], heads_BHTE[:, 4:6], heads_BHTE[:, 6:]
        scores = q.float() @ keys.float().repeat_interleave(2, 1).transpose(2, 3) / 4
        weights = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf).softmax(-1)
        seen = weights @ values.float().repeat_interleave(2, 1)
        x_BTD = x_BTD + o(seen.transpose(1, 2).reshape(2, 6, 64).bfloat16())
        gate, up = gate_up(normed(x_BTD)).split(96, dim=-1)
        x_BTD = x_BTD + down(gate * gate.sigmoid() * up)
        caches.append((keys, values))
    return normed(x_BTD[:, -1]) @ decoder.head.T, caches


def test_linears_are_as_many_and_as_sparse_as_asked() -> None:
    decoder = Decoder(Stopwatch("cpu"), SIZES, "bf16", 0.7)
    found: list[Any] = [it for layer in decoder.layers for it in layer]
    assert [(it.out_features, it.in_features) for it in found] == SIZES.linears * 2
    assert all(isinstance(it, SparseLinear) and not it.is_dense for it in found)
    shares = [1 - it.values.count_nonzero() / (it.out_features * it.in_features) for it in found]
    assert all(0.65 < share < 0.75 for share in shares)
    assert len({it.values[:8].sum().item() for it in found}) == len(found)
    assert decoder.linears_bytes == sum(it.num_bytes for it in found)


@pytest.mark.usefixtures("cpu_as_gpu")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"shape": None, "layers": None, "model": "x.goss"}, "synthetic models; give --shape .llama-2-7b"),
        ({"values": ("f32", "i8")}, "--values f32: supported on a GPU: i8 i4 bf16"),
        ({"pattern": "1x4"}, "--pattern is the engine's"),
        ({"kv_cache_dtype": "i8"}, "--kv-cache-dtype is the engine's"),
        ({"threads": 2}, "--threads is the engine's"),
    ],
    ids=["model", "f32", "pattern", "cache", "threads"],
)
def test_what_only_the_engine_has_is_refused(options: dict[str, Any], says: str, job: Bench) -> None:
    with pytest.raises(GossamerError, match=says):
        bench(replace(job, **options))


@pytest.mark.usefixtures("cpu_as_gpu")
def test_memory_that_does_not_do_is_said_before_and_after(
    job: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Stopwatch, "free_bytes", 20e3)
        with pytest.raises(ConfigError, match="of memory are available: give --layers"):
            bench(job)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Decoder, "caches", full)
    with pytest.raises(MemoryError, match="memory ended while a decoder was measured; give --layers, or few"):
        bench(job)


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_missed(job: Bench) -> None:
    with pytest.raises(ConfigError, match="no GPU was found: CUDA's driver"):
        bench(job)
