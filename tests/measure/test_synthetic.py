"""Synthetic models are sound packed models of the shape, with the zeros and the size that were asked for."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gossamer.architecture.anatomy import EMBEDDING, HEAD
from gossamer.architecture.families import read_anatomy
from gossamer.measure.synthetic import CONFIGS, Image, Recipe, synthetic_file, synthetic_image
from gossamer.packed.header import Stored, StoredMatrix
from gossamer.packed.reader import Packed
from gossamer.packed.values import Values

BITS: dict[Values, float] = {
    "f32": 10.6,
    "bf16": 5.8,
    "i8": 3.4,
    "i4": 2.33,
}  # at 70% zeros, without what comes beside the stream
DENSE_BITS: dict[Values, float] = {"f32": 32, "bf16": 16, "i8": 8, "i4": 4}
BESIDE = ("weight_scale", "weight_sum", "weight_multiplier")
every_type = pytest.mark.parametrize("values", BITS)
HIDDEN, INNER, VOCABULARY = 2048, 5632, 300


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for all, removed at the end: it grows to half a gigabyte."""
    directory = tmp_path_factory.mktemp("synthetic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSAMER_CACHE", str(directory))
        yield
    shutil.rmtree(directory)


def recipe(values: Values, sparsity: float) -> Recipe:
    return Recipe.of("tinyllama-1.1b", values, sparsity, layers=1, vocabulary=VOCABULARY)


def open_image(image: Image) -> Packed:
    """The image as if it had been read from a file."""
    config = CONFIGS["tinyllama-1.1b"] | {"num_hidden_layers": 1, "vocab_size": VOCABULARY}
    tensors = {name: Stored(*entry) for name, entry in image.tensors.items()}
    matrices = {name: StoredMatrix(**entry) for name, entry in image.config["linears"].items()}
    return Packed(Path("image"), config, read_anatomy(config), {}, tensors, matrices, image.buffer)


def bits_of(packed: Packed, beside: bool) -> float:
    """Bits per weight of the decoder: of scales, sums and multipliers, or of everything else."""
    total = 0
    for name in packed.decoder:
        for tensor in packed.matrices[name].tensors(name):
            total += 8 * packed.tensors[tensor].nbytes * (tensor.endswith(BESIDE) == beside)
    return total / sum(packed.matrices[name].num_weights for name in packed.decoder)


@every_type
@pytest.mark.parametrize("sparsity", [0.0, 0.7])
@pytest.mark.parametrize("form", ["file", "image"])
def test_a_model_is_sound_and_has_its_size(values: Values, sparsity: float, form: str) -> None:
    wanted = recipe(values, sparsity)
    packed = Packed.open(synthetic_file(wanted)) if form == "file" else open_image(synthetic_image(wanted))
    packed.check()
    storage = "sparse" if sparsity else "dense"
    assert {(packed.matrices[n].storage, packed.matrices[n].values) for n in packed.decoder} == {
        (storage, values)
    }
    assert packed.sparsity(packed.decoder) == pytest.approx(sparsity, abs=2e-3)
    expected = BITS[values] if sparsity else DENSE_BITS[values]
    assert bits_of(packed, beside=False) == pytest.approx(expected, rel=5e-3)
    beside = 64 / HIDDEN if values in ("i8", "i4") else 0
    beside += 8 / 128 if values == "i4" else 0
    assert bits_of(packed, beside=True) == pytest.approx(beside, abs=0.01)


@pytest.mark.parametrize(
    ("values", "embedding", "head"),
    [("f32", "f32", "f32"), ("bf16", "bf16", "bf16"), ("i8", "bf16", "i8"), ("i4", "bf16", "i8")],
)
def test_embedding_and_head_are_dense(values: Values, embedding: str, head: str) -> None:
    matrices = Packed.open(synthetic_file(recipe(values, 0.7))).matrices
    assert (matrices[EMBEDDING].storage, matrices[EMBEDDING].values) == ("dense", embedding)
    assert (matrices[HEAD].storage, matrices[HEAD].values) == ("dense", head)
    assert matrices[HEAD].sparsity < 1e-3


def test_a_tied_head_of_integers_is_an_int8_copy() -> None:
    def matrices(values: Values) -> dict[str, StoredMatrix]:
        wanted = Recipe.of("llama-3.2-1b", values, 0.9, layers=1, vocabulary=VOCABULARY)
        return Packed.open(synthetic_file(wanted)).matrices

    assert matrices("i4")[HEAD].values == "i8"
    assert HEAD not in matrices("bf16")


@every_type
def test_outputs_are_about_as_large_as_inputs(values: Values) -> None:
    """So that a model of many layers neither overflows nor dies out."""
    packed = Packed.open(synthetic_file(recipe(values, 0.7)))
    x_K = np.random.default_rng(0).standard_normal(INNER).astype(np.float32)
    y_N = packed.linear("model.layers.0.mlp.down_proj") @ x_K
    assert 0.1 < y_N.std() < 10


def test_recipes_have_files_of_their_own() -> None:
    """Not those of format version 1's first recipes, whose sparse floats were dense, either."""
    names = {recipe(values, sparsity).file_name for values in BITS for sparsity in (0.0, 0.7)}
    assert len(names) == 8 and not any(name.endswith(("-0.7.goss", "-0.goss")) for name in names)
