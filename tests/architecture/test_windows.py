"""Which layers have a window, as transformers' configurations of Qwen say it."""

from typing import Any

import pytest
from transformers import Qwen2Config, Qwen3Config

from gossamer.architecture.config import Config
from gossamer.architecture.windows import layer_windows
from gossamer.errors import CheckpointError, UnsupportedError

SETTINGS: list[dict[str, Any]] = [
    {},
    {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 2},
    {"use_sliding_window": True, "num_hidden_layers": 30},
    {"use_sliding_window": True, "max_window_layers": 0},
    {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3},
    {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 9},
    {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1},
    {"use_sliding_window": True, "sliding_window": 16, "layer_types": None, "max_window_layers": 1},
    {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2},
    {"use_sliding_window": False, "layer_types": ["full_attention"] * 4},
    {"use_sliding_window": True, "max_window_layers": 1, "layer_types": ["full_attention"] * 4},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("theirs", [Qwen2Config, Qwen3Config])
def test_layers_have_the_windows_of_transformers(
    theirs: type[Qwen2Config | Qwen3Config], settings: dict[str, Any]
) -> None:
    settings = {"num_hidden_layers": 4} | settings
    config = theirs(**settings)
    assert config.layer_types is not None
    expected = [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]
    assert layer_windows(Config(settings, "config.json")) == expected
    saved = Config(config.to_dict(), "config.json")
    assert layer_windows(saved) == expected


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layer_types": ["linear_attention"] * 4}, UnsupportedError, "linear_attention"),
        ({"layer_types": "sliding_attention"}, UnsupportedError, "layer_types"),
        ({"layer_types": [["full_attention"]] * 4}, UnsupportedError, "layer_types"),
        ({"layer_types": ["full_attention"] * 3}, CheckpointError, "3 layer_types of 4 layers"),
        (
            {"layer_types": ["sliding_attention"] * 4, "use_sliding_window": False},
            CheckpointError,
            "without a window",
        ),
        (
            {"layer_types": ["sliding_attention"] * 4, "sliding_window": None},
            CheckpointError,
            "without a window",
        ),
        ({"sliding_window": 0}, CheckpointError, "sliding_window"),
        ({"max_window_layers": -1}, CheckpointError, "max_window_layers"),
        ({"max_window_layers": None}, CheckpointError, "max_window_layers"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, error: type[Exception], message: str) -> None:
    settings = {"num_hidden_layers": 4, "use_sliding_window": True} | change
    with pytest.raises(error, match=message):
        layer_windows(Config(settings, "config.json"))
