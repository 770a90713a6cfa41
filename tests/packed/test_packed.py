"""A written file reads back exactly, opens with the safetensors library, and is whole or not there."""

import json
import os
import resource
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

import gossamer
from gossamer import panels, streams
from gossamer.packed import EMBEDDING, Packed, PackedWriter
from packed.matrices import VALUES, random_matrix


def test_everything_reads_back(synthetic: Any) -> None:
    packed = Packed.open(synthetic.path)
    assert set(packed.layers) == set(synthetic.stored)
    for name, w_NK in synthetic.stored.items():
        assert np.array_equal(packed.stored(name), w_NK) and packed.stored(name).dtype == w_NK.dtype
        assert packed.layers[name].nonzeros == np.count_nonzero(w_NK)
    for name, scale_N in synthetic.scales.items():
        assert np.array_equal(packed.scale(name), scale_N)
        assert np.array_equal(packed.linear(name), synthetic.stored[name] * scale_N[:, None])
        sum_N = packed.array(f"{name}.weight_sum")
        assert np.array_equal(sum_N[: scale_N.size], synthetic.stored[name].sum(axis=1, dtype=np.int32))
        assert not sum_N[scale_N.size :].any()
    for name, w_D in synthetic.norms.items():
        assert np.array_equal(packed.norm(name), w_D)
    widened = synthetic.stored[EMBEDDING].astype(np.uint32) << 16
    assert np.array_equal(packed.linear(EMBEDDING).view(np.uint32), widened)


def test_what_is_said_about_the_model(synthetic: Any) -> None:
    packed = Packed.open(synthetic.path)
    assert packed.tokenizer_json == b'{"model": {"type": "BPE"}}' and packed.chat_template is None
    assert packed.config["hidden_size"] == packed.architecture.hidden_size == 36
    assert packed.head == "lm_head" and packed.metadata["parent"] == "ab" * 32
    assert packed.generation_config == {} and len(packed.decoder) == 14
    linears = [synthetic.stored[name] for name in packed.decoder]
    zeros = sum(int((w_NK == 0).sum()) for w_NK in linears)
    assert packed.sparsity(packed.decoder) == pytest.approx(zeros / sum(w_NK.size for w_NK in linears))


def test_int8_is_sparse_exactly_where_that_is_smaller(synthetic: Any) -> None:
    packed = Packed.open(synthetic.path)
    for name in packed.decoder:
        layer = packed.layers[name]
        stream, offsets = streams.encode("i8", synthetic.stored[name])
        dense = panels.to_panels("i8", synthetic.stored[name])
        smaller = stream.nbytes + offsets.nbytes < dense.nbytes
        assert layer.storage == ("sparse" if smaller else "dense")
        scales = 2 * 4 * layer.padded_rows
        assert packed.layer_bytes(name) == scales + (
            stream.nbytes + offsets.nbytes if smaller else dense.nbytes
        )
    assert {packed.layers[name].storage for name in packed.decoder} == {"sparse", "dense"}


def test_the_safetensors_library_opens_it(synthetic: Any) -> None:
    packed = Packed.open(synthetic.path)
    with safetensors.safe_open(synthetic.path, "np") as file:
        assert file.metadata() == packed.metadata
        assert set(file.keys()) == set(packed.tensors)
        for name, stored in packed.tensors.items():
            if stored.dtype != "BF16":  # NumPy has no bfloat16
                assert np.array_equal(file.get_tensor(name), packed.array(name))


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
        for name, w_NK in synthetic.stored.items():
            first = name.replace("layers.1", "layers.0")
            if first != name:
                writer.repeat(name, first)
            elif name in synthetic.scales:
                writer.int8(name, w_NK, synthetic.scales[name])
            else:
                writer.dense(name, w_NK)
        for name, w_D in synthetic.norms.items():
            writer.norm(name, w_D)
    repeated = Packed.open(tmp_path / "repeated.goss")
    repeated.check()
    for name in synthetic.scales:
        first = name.replace("layers.1", "layers.0")
        assert np.array_equal(repeated.stored(name), synthetic.stored[first])
        assert np.array_equal(repeated.scale(name), synthetic.scales[first])


def test_tied_head_is_the_embedding(make_synthetic: Callable, tmp_path: Path, synthetic: Any) -> None:
    config = Packed.open(synthetic.path).config | {"tie_word_embeddings": True}
    packed = Packed.open(make_synthetic(tmp_path / "tied.goss", config).path)
    assert packed.head == EMBEDDING and "lm_head" not in packed.layers


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


def test_a_full_disk_leaves_no_file(make_synthetic: Callable, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(
        resource.RLIMIT_FSIZE
    )  # CPython ignores SIGXFSZ, so writing fails with EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        with pytest.raises(OSError, match="cannot write the packed model") as caught:
            make_synthetic(tmp_path / "full.goss")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
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
        writer.norm("model.norm.weight", np.ones(36, np.float32))
        assert writer.partial.exists()
        raise error
    assert [file.name for file in tmp_path.iterdir()] == ["model.goss"] and path.read_bytes() == b"old"


def test_an_incomplete_model_is_never_renamed(synthetic: Any, tmp_path: Path) -> None:
    config = Packed.open(synthetic.path).metadata["config"]
    with (
        pytest.raises(Exception, match="cannot hold 2 layers"),
        PackedWriter(tmp_path / "model.goss", config=config) as writer,
    ):
        writer.norm("model.norm.weight", np.ones(36, np.float32))
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_file_by_that_name(synthetic: Any, tmp_path: Path) -> None:
    config = json.dumps(Packed.open(synthetic.path).metadata["config"])
    program = f"""
import sys, time, numpy
from gossamer.packed import PackedWriter
with PackedWriter({str(tmp_path / "model.goss")!r}, config={config}) as writer:
    writer.norm("model.norm.weight", numpy.ones(36, numpy.float32))
    print("writing", flush=True)
    time.sleep(60)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(gossamer.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None and process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [file.name for file in tmp_path.iterdir()] == ["model.goss.partial"]
