"""Named mixtures of training text: `--dataset preset:NAME` stands for its sources, each `SRC@WEIGHT`.

`sparse-llama` is what the paper trained on (arXiv 2405.03594): SlimPajama and the Python part of The Stack.
It does not say their shares; a tenth of Python is ours. `sparse-llama-open` takes their place where one of
those is gated or gone. Its Python is a small sample: without `--repeat` a mixture ends where that is used up,
which is said with its name and its tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from gossamer.data.sources import parse_weight
from gossamer.errors import ConfigError


@dataclass(frozen=True)
class Preset:
    """Sources in proportion to their weights; `instead`: the preset to take where one cannot be had."""

    sources: tuple[str, ...]
    instead: str | None = None


PRESETS = {
    "sparse-llama": Preset(
        ("hf:cerebras/SlimPajama-627B@0.9", "hf:bigcode/the-stack-dedup:data/python@0.1"),
        instead="sparse-llama-open",
    ),
    "sparse-llama-open": Preset(
        ("hf:HuggingFaceFW/fineweb-edu:sample-100BT@0.9", "hf:bigcode/the-stack-smol:data/python@0.1")
    ),
}


def expand(dataset: Sequence[str]) -> tuple[str, ...]:
    """The sources, those of a preset in its place; a weight of the preset is shared out among them."""
    found: list[str] = []
    for source in dataset:
        if not source.startswith("preset:"):
            found.append(source)
            continue
        name, weight = parse_weight(source)
        preset = PRESETS.get(name.removeprefix("preset:"))
        if preset is None:
            known = ", ".join(f"preset:{each}" for each in PRESETS)
            raise ConfigError(f"dataset {source!r}: no such preset; there are {known}")
        parts = [parse_weight(part) for part in preset.sources]
        total = sum(share for _, share in parts)
        found += [f"{part}@{weight * share / total:g}" for part, share in parts]
    return tuple(found)


def instead_of(repo: str) -> str:
    """What an error about a repository of the hub should add: the preset that goes without it, or nothing."""
    for name, preset in PRESETS.items():
        repos = {part.removeprefix("hf:").partition("@")[0].partition(":")[0] for part in preset.sources}
        if preset.instead and repo in repos:
            return f"; or take --dataset preset:{preset.instead} instead of preset:{name}"
    return ""
