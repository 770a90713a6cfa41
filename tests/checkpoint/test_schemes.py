"""Quantization schemes: what of others' directories is read, and the engine's numbers for group scales."""

import json
from typing import Any

import numpy as np
import pytest
from compressed_tensors.quantization import preset_name_to_scheme

from gossamer.checkpoint.schemes import (
    SCHEMES,
    dequantized,
    group_size,
    read_scheme,
    row_scales_and_multipliers,
)
from gossamer.checkpoint.weights import to_float32
from gossamer.errors import CheckpointError, UnsupportedError


@pytest.mark.parametrize("name", SCHEMES)
def test_schemes_are_the_presets_of_compressed_tensors(name: str) -> None:
    """By the names that llm-compressor and vLLM know them by."""
    preset: Any = preset_name_to_scheme(name, ["Linear"])
    config = SCHEMES[name].config([])
    group = config["config_groups"]["group_0"]
    for part in ("weights", "input_activations"):
        args = json.loads(getattr(preset, part).model_dump_json())
        assert {key: args[key] for key in group[part]} == group[part]
    group["weights"] |= {"observer": "minmax", "zp_dtype": None}
    assert read_scheme({"quantization_config": config}, "config.json") is SCHEMES[name]


@pytest.mark.parametrize("size", [None, 0, 100, 256, -1, "128", 2])
def test_groups_of_other_sizes_are_refused(size: object) -> None:
    config = SCHEMES["W4A8"].config([])
    config["config_groups"]["group_0"]["weights"]["group_size"] = size
    with pytest.raises(UnsupportedError, match="group_size"):
        read_scheme({"quantization_config": config}, "config.json")


@pytest.mark.parametrize(("widths", "size"), [([4096, 11008], 128), ([576, 1536], 64), ([48, 104], 8)])
def test_the_group_is_the_largest_that_divides_every_width(widths: list[int], size: int) -> None:
    assert group_size({str(width): width for width in widths}, "--ignore") == size


@pytest.mark.parametrize(("inputs", "size"), [(48, 8), (256, 128), (576, 64), (200, 8)])
def test_row_scales_and_multipliers_are_found_again_exactly(inputs: int, size: int) -> None:
    random = np.random.default_rng(0)
    unit_N1 = (random.integers(1 << 19, 1 << 20, (50, 1)) / 2.0**26).astype(np.float32)
    multiplier_NG = random.integers(1, 17, (50, -(-inputs // 128)))
    scale_NG = np.repeat((unit_N1 * multiplier_NG).astype(np.float32), 128 // size, axis=1)
    scale_NG = scale_NG[:, : inputs // size]
    row_N, found_NG = row_scales_and_multipliers(scale_NG, inputs, "q_proj")
    assert found_NG.dtype == np.uint8 and found_NG.min() >= 1 and found_NG.max() <= 16
    expected = np.repeat(row_N[:, None].astype(np.float64) * found_NG, 128 // size, axis=1)
    np.testing.assert_array_equal(expected[:, : scale_NG.shape[1]], scale_NG)
    q_NK = random.integers(-7, 8, (50, inputs)).astype(np.int8)
    whole_NK = q_NK * np.repeat(found_NG, 128, axis=1)[:, :inputs].astype(np.int8)
    np.testing.assert_array_equal(whole_NK * row_N[:, None], dequantized(q_NK, scale_NG))


def test_scales_that_the_engine_cannot_hold_are_refused() -> None:
    free = np.array([[1.0, 2.0], [1.0, 1.234]], np.float32)
    with pytest.raises(UnsupportedError, match=r"q_proj.*1 to 16 times"):
        row_scales_and_multipliers(free, 256, "q_proj")
    within = np.array([[1.0, 2.0]], np.float32)  # of 64 inputs each
    with pytest.raises(UnsupportedError, match=r"one for 128 inputs"):
        row_scales_and_multipliers(within, 128, "q_proj")
    with pytest.raises(CheckpointError, match="above 0"):
        row_scales_and_multipliers(np.array([[1.0, 0.0]], np.float32), 256, "q_proj")


def test_float8_is_read_as_torch_reads_it() -> None:
    import torch

    patterns = np.arange(256, dtype=np.uint8)
    patterns = patterns[(patterns & 0x7F) != 0x7F]
    expected = torch.from_numpy(patterns).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(to_float32(patterns, "F8_E4M3"), expected)
