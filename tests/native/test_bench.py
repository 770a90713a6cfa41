"""`bench` measures a real file; synthetic models are sound packed models."""

import numpy as np
import pytest

from gossamer import _native
from gossamer.errors import ConfigError, UnsupportedError
from gossamer.packed import Packed
from gossamer.tools.bench import Bench, bench
from gossamer.tools.synthetic import Recipe, synthetic_file, synthetic_image


def test_figures_of_a_run_agree_with_each_other(int8_model: Packed) -> None:
    found = bench(Bench(model=str(int8_model.path), prompt=9, new=8, batch=3, threads=2, repeats=2))
    assert found.num_threads == 2 and found.batch == 3 and found.baseline_s is None
    assert found.step_p99_s >= found.step_p50_s > 0
    assert found.decode_tokens_per_s == pytest.approx(3 / found.step_p50_s)
    assert found.prompt_tokens_per_s == pytest.approx(27 / found.time_to_first_token_s)
    assert found.gb_per_s == pytest.approx(found.step_bytes / found.step_p50_s / 1e9)
    assert found.bandwidth_share == pytest.approx(found.gb_per_s / found.read_gb_per_s)
    assert "tokens/s" in found.tables()[0].markdown()


@pytest.mark.parametrize(
    "job",
    [
        Bench(),
        Bench(model="x.goss", shape="llama-2-7b"),
        Bench(shape="llama-2-7b", layers=0),
        Bench(shape="llama-2-7b", sparsity=1.0),
    ],
    ids=["neither", "both", "no layers", "all zeros"],
)
def test_senseless_jobs_are_refused(job: Bench) -> None:
    with pytest.raises(ConfigError):
        bench(job)


def test_int4_is_not_supported_yet() -> None:
    with pytest.raises(UnsupportedError, match="int4"):
        bench(Bench(shape="llama-2-7b", values="i4"))


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
