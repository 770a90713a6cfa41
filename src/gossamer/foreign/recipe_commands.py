"""The steps of a recipe as command lines: one `compress` where that makes the same run, or a verb a step.

What a recipe does not say is in capitals: MODEL, OUT, TEXT to calibrate on, TRAINING_TEXT, EXAMPLES.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

MODEL, OUTPUT, TEXT, TRAINING_TEXT, EXAMPLES = "MODEL", "OUT", "TEXT", "TRAINING_TEXT", "EXAMPLES"
# What the verbs do without a word. Steps have all of these that their verb has, so that they can be compared.
DEFAULTS = {
    "prune": {
        "method": "admm",
        "pattern": "unstructured",
        "sparsity_profile": "uniform",
        "owl_m": 5.0,
        "owl_lambda": 0.08,
        "block_size": 128,
        "dampening_frac": 0.01,
    },
    "pretrain": {"lr_schedule": "linear"},
    "finetune": {"lr_schedule": "linear", "distill": "squarehead"},
    "quantize": {"block_size": 128, "dampening_frac": 0.01},
}
_DATA = {"prune": TEXT, "pretrain": TRAINING_TEXT, "finetune": EXAMPLES, "quantize": TEXT}
_APART = ("learning_rate", "warmup_ratio")  # `compress` has these for each kind of training


@dataclass
class Step:
    """One verb of a run, with the options that the recipe decides; `stage` is the recipe's."""

    verb: Literal["prune", "pretrain", "finetune", "quantize"]
    stage: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def all_options(self) -> dict[str, Any]:
        return DEFAULTS[self.verb] | self.options


def commands(steps: Sequence[Step]) -> tuple[str, ...]:
    """The command lines, in their order; each verb reads what the one before it wrote."""
    options = _of_compress(steps)
    if options is not None:
        return (_line("compress", MODEL, OUTPUT, options),)
    lines, model = [], MODEL
    for number, step in enumerate(steps, 1):
        output = f"{OUTPUT}/{number}-{step.verb}" if len(steps) > 1 else OUTPUT
        options = {"dataset": _DATA[step.verb]}
        if step.verb == "finetune" and step.all_options["distill"] == "squarehead":
            options["teacher"] = MODEL
        lines.append(_line(step.verb, model, output, step.options | options))
        model = output
    return tuple(lines)


def _of_compress(steps: Sequence[Step]) -> dict[str, Any] | None:
    """The options with which `compress` makes these steps of a dense model, or None if it makes others."""
    sparsities = [step.options["sparsity"] for step in steps if step.verb == "prune"]
    verbs = {step.verb for step in steps}
    if not sparsities or "quantize" not in verbs:
        return None
    trained, last = "pretrain" in verbs, sparsities[-1]
    two_steps = trained and last > 0.5 and not any("pattern" in step.options for step in steps)
    made: list[tuple[str, float | None]] = []
    for sparsity in (0.5, last) if two_steps else (last,):
        made += [("prune", sparsity), ("pretrain", None)] if trained else [("prune", sparsity)]
    made += [("finetune", None), ("quantize", None)] if "finetune" in verbs else [("quantize", None)]
    if [(step.verb, step.options.get("sparsity")) for step in steps] != made:
        return None
    options = {"sparsity": last, "dataset": TEXT}
    options |= {f"{verb}_dataset": _DATA[verb] for verb in ("pretrain", "finetune") if verb in verbs}
    for step in steps:
        for name, value in step.all_options.items():
            name = f"{step.verb}_{name}" if name in _APART else name
            if name != "sparsity" and options.setdefault(name, value) != value:
                return None
    return options


def _line(verb: str, model: str, output: str, options: Mapping[str, Any]) -> str:
    """A command line without the options that have their defaults."""
    words = ["gossamer", verb, model, "-o", output]
    usual = {name: value for defaults in DEFAULTS.values() for name, value in defaults.items()}
    for name, value in options.items():
        if name not in usual or usual[name] != value:
            words += [
                f"--{name.replace('_', '-')}",
                *map(str, value if isinstance(value, tuple) else [value]),
            ]
    return shlex.join(words)
