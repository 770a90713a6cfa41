"""A written file reads back exactly, opens with the safetensors library, and is whole or not there."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import gossamer
from gossamer.architecture.anatomy import EMBEDDING
from gossamer.architecture.families import read_anatomy
from gossamer.packed import panels, streams
from gossamer.packed.header import vector_sizes
from gossamer.packed.reader import Packed
from gossamer.packed.writer import PackedWriter, smallest_storage
from packed.matrices import VALUES, random_matrix


def test_everything_reads_back(synthetic: Any) -> None:
    packed = Packed.open(synthetic.path)
    assert set(packed.matrices) == set(synthetic.stored)
    for name, w_NK in synthetic.stored.items():
        assert np.array_equal(packed.stored(name), w_NK) and packed.stored(name).dtype == w_NK.dtype
        assert packed.matrices[name].nonzeros == np.count_nonzero(w_NK)
        assert packed.matrices[name].values == synthetic.values[name]
    for name, scale_N in synthetic.scales.items():
        assert np.array_equal(packed.scale(name), scale_N)
        assert np.array_equal(packed.linear(name), synthetic.stored[name] * scale_N[:, None])
        sum_N = packed.array(f"{name}.weight_sum")
        assert np.array_equal(sum_N[: scale_N.size], synthetic.stored[name].sum(axis=1, dtype=np.int32))
        assert not sum_N[scale_N.size :].any()
    for name, w_D in synthetic.norms.items():
        assert np.array_equal(packed.vector(name), w_D)
    for name, multiplier_NG in synthetic.multipliers.items():
        assert np.array_equal(packed.multiplier(name), multiplier_NG)
    packed.check()
    widened = synthetic.stored[EMBEDDING].astype(np.uint32) << 16
    assert np.array_equal(packed.linear(EMBEDDING).view(np.uint32), widened)


@seed(20240509)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    hidden=st.integers(1, 70), inner=st.integers(1, 300), head=st.integers(1, 12),
    vocabulary=st.integers(3, 40), types=st.lists(st.sampled_from(VALUES), min_size=7, max_size=7),
    number=st.integers(0, 2**32), storage=st.sampled_from(["auto", "sparse", "dense"]),
    sparsity=st.sampled_from([0, 0.5, 0.9, 1]),
)  # fmt: skip
def test_any_model_reads_back(
    hidden: int, inner: int, head: int, vocabulary: int, types: list[str], number: int, storage: Any,
    sparsity: float, make_empty: Callable, synthetic: Any, tmp_path: Path,
) -> None:  # fmt: skip
    """All types and storages in matrices of any shape, through a file, bit for bit."""
    config = Packed.open(synthetic.path).config | {
        "hidden_size": hidden, "intermediate_size": inner, "head_dim": 2 * head, "vocab_size": vocabulary,
        "num_hidden_layers": 1, "tie_word_embeddings": True,
    }  # fmt: skip
    made, anatomy = make_empty(tmp_path / "any.goss"), read_anatomy(config)
    with PackedWriter(made.path, config=json.dumps(config)) as writer:
        made.make(EMBEDDING, "bf16", (vocabulary, hidden), 0, number)
        made.write(writer, EMBEDDING)
        for (name, linear), values in zip(anatomy.linears(0).items(), types, strict=True):
            made.make(name, values, (linear.rows, linear.columns), sparsity, number)
            made.write(writer, name, storage)
        for name, size in vector_sizes(anatomy).items():
            writer.vector(name, np.ones(size, np.float32))
    packed = Packed.open(made.path)
    packed.check()
    for name, w_NK in made.stored.items():
        found = packed.stored(name)
        assert found.dtype == w_NK.dtype and found.tobytes() == w_NK.tobytes()
        if name in made.multipliers:
            assert np.array_equal(packed.multiplier(name), made.multipliers[name])
        if name in made.scales:
            assert np.array_equal(packed.linear(name), w_NK * made.scales[name][:, None])
    opened = dict(safetensors.deserialize(made.path.read_bytes()))
    assert {name: tuple(entry["shape"]) for name, entry in opened.items()} == {
        name: stored.shape for name, stored in packed.tensors.items()
    }


def test_what_is_said_about_the_model(synthetic: Any) -> None:
    packed = Packed.open(synthetic.path)
    assert packed.tokenizer_json == b'{"model": {"type": "BPE"}}' and packed.chat_template is None
    assert packed.config["hidden_size"] == packed.architecture.hidden_size == 36
    assert packed.head == "lm_head" and packed.metadata["parent"] == "ab" * 32
    assert packed.generation_config == {} and len(packed.decoder) == 14
    linears = [synthetic.stored[name] for name in packed.decoder]
    zeros = sum(int((w_NK == 0).sum()) for w_NK in linears)
    assert {(matrix.storage, matrix.values) for matrix in packed.matrices.values()} == {
        (storage, values) for storage in ("dense", "sparse") for values in VALUES
    }
    assert packed.sparsity(packed.decoder) == pytest.approx(zeros / sum(w_NK.size for w_NK in linears))


@pytest.mark.parametrize("values", VALUES)
def test_matrices_are_sparse_exactly_where_that_is_smaller(values: str) -> None:
    """The threshold in zeros is what the mask costs: 1/32, 1/16, 1/8 of the weights, and for int4 more."""
    for sparsity in (0, 0.02, 0.05, 0.1, 0.15, 0.3, 0.5):
        w_NK = random_matrix(values, (160, 512), sparsity)
        stream, offsets = streams.encode(values, w_NK)
        smaller = stream.nbytes + offsets.nbytes < panels.to_panels(values, w_NK).nbytes
        assert smallest_storage(values, w_NK) == ("sparse" if smaller else "dense")


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("rows", [1, 17, 101])
def test_padding_makes_no_matrix_without_zeros_sparse(values: str, rows: int) -> None:
    assert smallest_storage(values, random_matrix(values, (rows, 37), 0)) == "dense"


def test_the_bytes_of_a_layer_are_all_that_belong_to_it(synthetic: Any) -> None:
    packed = Packed.open(synthetic.path)
    for name, w_NK in synthetic.written.items():
        matrix = packed.matrices[name]
        num_bytes = sum(array.nbytes for array in streams.encode(matrix.values, w_NK))
        if matrix.storage == "dense":
            num_bytes = panels.to_panels(matrix.values, w_NK).nbytes
        if matrix.values in ("i8", "i4"):
            num_bytes += 2 * 4 * matrix.padded_rows
        if matrix.values == "i4":
            num_bytes += panels.to_multipliers(synthetic.multipliers[name]).nbytes
        assert packed.matrix_bytes(name) == num_bytes


def test_the_embedding_is_never_sparse(tmp_path: Path, make_synthetic: Callable, synthetic: Any) -> None:
    """Not even where all of it is zero."""
    config = Packed.open(synthetic.path).metadata["config"]
    with PackedWriter(tmp_path / "zeros.goss", config=config) as writer:
        for name in synthetic.written:
            if name == EMBEDDING:
                assert writer.floats(name, np.zeros_like(synthetic.written[name])).storage == "dense"
            else:
                synthetic.write(writer, name)
        for name, w_D in synthetic.norms.items():
            writer.vector(name, w_D)
    assert not Packed.open(tmp_path / "zeros.goss").linear(EMBEDDING).any()


def test_a_storage_can_be_asked_for(tmp_path: Path, synthetic: Any) -> None:
    config = Packed.open(synthetic.path).metadata["config"]
    with PackedWriter(tmp_path / "other.goss", config=config) as writer:
        for name in synthetic.written:
            storage = "sparse" if ".layers.0." in name else "dense"
            assert synthetic.write(writer, name, storage).storage == storage
        for name, w_D in synthetic.norms.items():
            writer.vector(name, w_D)
    packed = Packed.open(tmp_path / "other.goss")
    packed.check()
    for name, w_NK in synthetic.stored.items():
        assert np.array_equal(packed.stored(name), w_NK)


def test_the_safetensors_library_reads_every_tensor(synthetic: Any) -> None:
    packed = Packed.open(synthetic.path)
    with safetensors.safe_open(synthetic.path, "np") as file:
        assert file.metadata() == packed.metadata
    found = dict(safetensors.deserialize(synthetic.path.read_bytes()))
    assert found.keys() == packed.tensors.keys()
    for name, stored in packed.tensors.items():
        assert (found[name]["dtype"], tuple(found[name]["shape"])) == (stored.dtype, stored.shape)
        assert found[name]["data"] == packed.array(name).tobytes()


def test_every_tensor_is_aligned_and_nothing_lies_between(synthetic: Any) -> None:
    packed = Packed.open(synthetic.path)
    assert packed.buffer.ctypes.data % 64 == 0
    position = next(iter(packed.tensors.values())).offset
    for stored in packed.tensors.values():
        assert stored.offset == position and position % 64 == 0 and stored.nbytes % 64 == 0
        position += stored.nbytes
    assert position == packed.file_bytes == synthetic.path.stat().st_size


def test_the_same_model_gives_the_same_bytes(
    synthetic: Any, make_synthetic: Callable, tmp_path: Path
) -> None:
    assert make_synthetic(tmp_path / "again.goss").path.read_bytes() == synthetic.path.read_bytes()


def test_a_repeated_matrix_has_bytes_of_its_own(synthetic: Any, tmp_path: Path) -> None:
    packed = Packed.open(synthetic.path)
    with PackedWriter(tmp_path / "repeated.goss", config=packed.metadata["config"]) as writer:
        for name in synthetic.stored:
            first = name.replace("layers.1", "layers.0")
            if first != name:
                writer.repeat(name, first)
            else:
                synthetic.write(writer, name)
        for name, w_D in synthetic.norms.items():
            writer.vector(name, w_D)
    repeated = Packed.open(tmp_path / "repeated.goss")
    repeated.check()
    for name in synthetic.stored:
        first = name.replace("layers.1", "layers.0")
        assert np.array_equal(repeated.stored(name), synthetic.stored[first])
        if first in synthetic.scales:
            assert np.array_equal(repeated.scale(name), synthetic.scales[first])
        if first in synthetic.multipliers:
            assert np.array_equal(repeated.multiplier(name), synthetic.multipliers[first])


def test_tied_head_is_the_embedding(make_synthetic: Callable, tmp_path: Path, synthetic: Any) -> None:
    config = Packed.open(synthetic.path).config | {"tie_word_embeddings": True}
    packed = Packed.open(make_synthetic(tmp_path / "tied.goss", config).path)
    assert packed.head == EMBEDDING and "lm_head" not in packed.matrices


def test_native_views_describe_the_same_file(synthetic: Any) -> None:
    packed = Packed.open(synthetic.path)
    for name, (dtype, shape, offset, nbytes) in packed.native_tensors().items():
        piece = packed.buffer[offset : offset + nbytes]
        assert np.array_equal(piece, packed.array(name).view(np.uint8).reshape(-1))
        assert (dtype, shape) == packed.tensors[name][:2]
    config = packed.native_config()
    assert config["head_dim"] == 10 and config["inverse_frequencies"].shape == (5,)
    assert config["linears"]["lm_head"] == {
        "storage": "dense", "values": "f32", "rows": 101, "columns": 36, "nonzeros": 101 * 36,
    }  # fmt: skip


@pytest.mark.parametrize("values", VALUES)
def test_a_billion_weights_would_take_well_under_two_minutes(values: str) -> None:
    w_NK = random_matrix(values, (1024, 4096), 0.7)
    start = time.process_time()
    streams.encode(values, w_NK)
    assert (time.process_time() - start) * 1e9 / w_NK.size < 120


def test_a_full_disk_leaves_no_file(
    make_synthetic: Callable, tmp_path: Path, small_files: Callable[[int], None]
) -> None:
    small_files(40_000)
    with pytest.raises(OSError, match="cannot write the packed model") as caught:
        make_synthetic(tmp_path / "full.goss")
    assert caught.value.filename == str(tmp_path / "full.goss")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_writer_leaves_the_old_file(
    error: type[BaseException], synthetic: Any, tmp_path: Path
) -> None:
    path = tmp_path / "model.goss"
    path.write_bytes(b"old")
    with (
        pytest.raises(error),
        PackedWriter(path, config=Packed.open(synthetic.path).metadata["config"]) as writer,
    ):
        writer.vector("model.norm.weight", np.ones(36, np.float32))
        assert writer.partial.exists()
        raise error
    assert [file.name for file in tmp_path.iterdir()] == ["model.goss"] and path.read_bytes() == b"old"


def test_an_incomplete_model_is_never_renamed(synthetic: Any, tmp_path: Path) -> None:
    config = Packed.open(synthetic.path).metadata["config"]
    with (
        pytest.raises(Exception, match="cannot hold 2 layers"),
        PackedWriter(tmp_path / "model.goss", config=config) as writer,
    ):
        writer.vector("model.norm.weight", np.ones(36, np.float32))
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_file_by_that_name(synthetic: Any, tmp_path: Path) -> None:
    config = json.dumps(Packed.open(synthetic.path).metadata["config"])
    program = f"""
import sys, time, numpy
from gossamer.packed.writer import PackedWriter
with PackedWriter({str(tmp_path / "model.goss")!r}, config={config}) as writer:
    writer.vector("model.norm.weight", numpy.ones(36, numpy.float32))
    print("writing", flush=True)
    time.sleep(60)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(gossamer.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None and process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [file.name for file in tmp_path.iterdir()] == ["model.goss.partial"]
