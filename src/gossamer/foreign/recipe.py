"""A recipe of SparseML or llm-compressor as command lines of ours that make the same run.

The same are the zeros (how many, where they may be, how they are chosen), the linears and the scheme of
quantization, and what is trained. Where Gossamer has its own way in what is finer, `Recipe.rows` says so,
field by field. Everything else is an UnsupportedError that names the field and what is supported.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gossamer.checkpoint.schemes import W8A8
from gossamer.errors import UnsupportedError
from gossamer.foreign.recipe_commands import EXAMPLES, MODEL, Step, commands
from gossamer.foreign.recipe_fields import LINEARS, Fields, Row
from gossamer.foreign.recipe_file import Modifier, read_recipe
from gossamer.foreign.recipe_targets import NEEDED, meant

_NO_EFFECT = "has no effect"
_ROWS_OF_TEXT = "rows of text are --num-calibration-samples"
_SMOOTHED = (
    ({"q_proj", "k_proj", "v_proj"}, "input_layernorm"),
    ({"gate_proj", "up_proj"}, "post_attention_layernorm"),
)


@dataclass(frozen=True)
class Recipe:
    """`commands`: one `compress`, or the verbs one by one; `rows`: (field, its value, what becomes of it)."""

    commands: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass
class _Run:
    """What the modifiers so far make of it. The quantization comes last, and is put together until then.

    `trains`: the stage has nothing to do but to train.
    """

    trains: bool = False
    steps: list[Step] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    quantize: Step | None = None
    has_scheme: bool = False
    has_gptq: bool = False

    def quantization(self) -> dict[str, Any]:
        """The options of the quantization, for a modifier to add to."""
        self.quantize = self.quantize or Step("quantize")
        return self.quantize.options

    def training(self, modifier: Modifier) -> Step:
        """The training of the modifier's stage."""
        last = self.steps[-1] if self.steps else None
        if last is None or last.verb not in ("pretrain", "finetune") or last.stage != modifier.where:
            self.steps.append(Step("pretrain", modifier.where))
        return self.steps[-1]


def translate(path: Path) -> Recipe:
    """The command lines for a recipe file; raises what `read_recipe` does, and UnsupportedError."""
    run, modifiers = _Run(), read_recipe(path)
    for stage in dict.fromkeys(modifier.where for modifier in modifiers):
        # In a stage, pruning comes first, then training, then quantization: so is the order of `_HOW`.
        here = sorted((it for it in modifiers if it.where == stage), key=_order)
        if run.quantize is not None and here[0].name not in _LAST:
            raise UnsupportedError(
                f"{stage}: {here[0].name} comes after a stage that quantizes; supported: quantization last"
            )
        run.trains = all(it.name in _TRAINING and not it.one_shot for it in here)
        for modifier in here:
            _HOW[modifier.name](Fields(modifier, run.rows), run)
    if run.quantize is not None:
        run.steps.append(_finished(run.quantize, run, path))
    return Recipe(commands(run.steps), tuple(run.rows))


def _order(modifier: Modifier) -> int:
    if modifier.name not in _HOW:
        raise UnsupportedError(f"{modifier.where}: found {modifier.name}; supported: {', '.join(_HOW)}")
    return list(_HOW).index(modifier.name)


def _sparsegpt(fields: Fields, run: _Run) -> None:
    step = _one_shot(fields, run)
    step.options["method"] = "sparsegpt"
    step.options |= fields.number(["block_size"], "block_size", 128)
    step.options |= fields.number(["dampening_frac", "percdamp"], "dampening_frac", 0.01)
    fields.aside("zeros that are there already are always kept", "preserve_sparsity_mask")
    fields.aside(_NO_EFFECT, "offload_hessians", "target_ids", "layer_prefix")
    name, quantize = fields.take("quantize")
    if quantize:
        fields.tell(name, "...", "all linears are pruned, and then rounded")
        run.quantization()
    for inner, values in quantize.items() if isinstance(quantize, dict) else ():
        modifier = Modifier(fields.where, str(inner), values or {}, one_shot=True)
        if inner not in _LAST:
            raise fields.refusal(name, inner, ", ".join(_LAST))
        _HOW[modifier.name](Fields(modifier, run.rows), run)
    fields.whole_run()
    fields.close()


def _wanda(fields: Fields, run: _Run) -> None:
    _one_shot(fields, run).options["method"] = "wanda"
    fields.whole_run()
    fields.close()


def _one_shot(fields: Fields, run: _Run) -> Step:
    """The step of SparseGPT or Wanda, with what both have beside `_prune`'s."""
    step = _prune(fields, run, ["sparsity"])
    name, profile = fields.take("sparsity_profile")
    if profile is None:
        for alone in ("owl_m", "owl_lmbda"):
            fields.only([alone], (), "beside `sparsity_profile: owl`")
    elif profile != "owl" or "pattern" in step.options:
        raise fields.refusal(name, profile, "owl, and no pattern beside it, which fixes the share of zeros")
    else:
        step.options |= {"sparsity_profile": "owl"} | fields.number(["owl_m"], "owl_m", 5.0)
        step.options |= fields.number(["owl_lmbda"], "owl_lambda", 0.08)
        fields.tell(name, profile, "--sparsity-profile owl")
    fields.aside("layers always see the earlier ones pruned", "sequential_update")
    fields.aside(_NO_EFFECT, "sequential_targets")
    return step


def _magnitude(fields: Fields, run: _Run) -> None:
    name, first = fields.take("init_sparsity")
    step = _prune(fields, run, ["final_sparsity"])
    if first is not None and first != step.options["sparsity"] and not fields.modifier.one_shot:
        raise fields.refusal(
            name, first, "pruning in one step: final_sparsity here too, or `run_type: oneshot` in the stage"
        )
    step.options["method"] = "magnitude"
    fields.only(["apply_globally", "global_sparsity"], (False,), "false: the same sparsity in all layers")
    fields.aside(
        "all zeros come in one step", "start", "end", "start_epoch", "end_epoch", "update",
        "update_frequency", "update_scheduler", "scheduler_args", "inter_func",
    )  # fmt: skip
    fields.aside(_NO_EFFECT, "leave_enabled", "index", "group", "log_types")
    fields.close()


def _prune(fields: Fields, run: _Run, sparsities: Sequence[str]) -> Step:
    """The step of a pruning, with what all methods share."""
    step = Step("prune", fields.modifier.where, fields.number(sparsities, "sparsity"))
    if groups := fields.zeros_in_groups():
        zeros, size = groups
        step.options |= {"pattern": f"{size - zeros}:{size}", "sparsity": zeros / size}
    fields.all_linears("targets", "params")
    fields.no_linear()
    run.steps.append(step)
    return step


def _constant(fields: Fields, run: _Run) -> None:
    fields.all_linears("targets", "params")
    fields.whole_run()
    fields.close()
    if run.trains:
        run.training(fields.modifier)
    run.rows.append((fields.modifier.name, "", "zeros always stay zeros" + ", here in training" * run.trains))


def _distillation(fields: Fields, run: _Run) -> None:
    name, comparison = fields.take("comparison")
    if comparison != "square_head":
        raise fields.refusal(name, comparison or "kl_divergence", "square_head")
    fields.all_linears("targets", also=("model.embed_tokens",))
    for name in ("orig_scale", "distill_scale"):
        fields.only([name], (1,), "1")
    fields.only(["projection"], (), "none")
    fields.aside(_NO_EFFECT, "projection_args", "transforms", "transforms_args", "comparison_args")
    fields.whole_run()
    fields.close()
    step = run.training(fields.modifier)
    step.verb = "finetune"
    step.options["distill"] = "squarehead"
    run.rows.append((fields.modifier.name, comparison, f"finetune on {EXAMPLES}, {MODEL} is the teacher"))


def _epochs(fields: Fields, run: _Run) -> None:
    fields.only(["start_epoch"], (0, -1), "from the beginning on (0)")
    step = run.training(fields.modifier)
    step.verb = "finetune"
    step.options = {"distill": "none"} | step.options | fields.number(["end_epoch"], "num_train_epochs")
    fields.close()


def _rate(fields: Fields, run: _Run) -> None:
    step = run.training(fields.modifier)
    step.options |= fields.number(["init_lr"], "learning_rate") | {"warmup_ratio": 0.0}
    fields.only(["final_lr"], (0,), "0")
    name, schedule = fields.take("lr_func")
    if schedule not in ("linear", "cosine"):
        raise fields.refusal(name, schedule, "linear, cosine")
    step.options["lr_schedule"] = schedule
    fields.tell(name, schedule, f"--lr-schedule {schedule}")
    fields.only(["start_epoch"], (0, -1), "from the beginning on (0)")
    fields.aside("the rate falls until the end of training", "end_epoch")
    fields.aside(_NO_EFFECT, "cycle_epochs", "update_frequency", "log_types", "constant_logging")
    fields.close()


def _smoothquant(fields: Fields, run: _Run) -> None:
    run.quantization().update(fields.number(["smoothing_strength", "alpha"], "smoothing_strength", 0.5))
    name, mappings = fields.take("mappings")
    for mapping in mappings or []:
        if not _is_usual(mapping):
            raise fields.refusal(
                name, mapping, "q, k, v after input_layernorm; gate, up after the other norm"
            )
    if mappings:
        fields.tell(name, "as usual", "inputs of o_proj and down_proj are smoothed too")
    fields.only(["ignore"], ([],), "none")
    fields.aside(_ROWS_OF_TEXT, "num_calibration_steps")
    fields.whole_run()
    fields.close()


def _is_usual(mapping: Any) -> bool:
    """Whether it says of two norms of a block, by names or patterns, which linears they precede."""
    if isinstance(mapping, dict):
        mapping = [mapping.get("balance_layers"), mapping.get("smooth_layer")]
    if not isinstance(mapping, list) or len(mapping) != 2 or not isinstance(mapping[0], list):
        return False
    linears = {str(pattern).rpartition(".")[2].lstrip("*") for pattern in mapping[0]}
    return any(linears == names and str(mapping[1]).endswith(norm) for names, norm in _SMOOTHED)


def _gptq(fields: Fields, run: _Run) -> None:
    run.has_gptq = True
    options = run.quantization()
    options |= fields.number(["block_size"], "block_size", 128)
    options |= fields.number(["dampening_frac", "percdamp"], "dampening_frac", 0.01)
    fields.only(["quantize"], (True,), "true")
    fields.aside("layers always see the earlier ones rounded", "sequential_update")
    fields.aside("has no effect where rows have one scale", "actorder")
    fields.aside(_NO_EFFECT, "sequential_targets", "offload_hessians")
    _quantization(fields, run)


def _quantization(fields: Fields, run: _Run) -> None:
    """The scheme, and the linears that it is for."""
    run.has_scheme |= fields.gives("scheme", "config_groups")
    _check_scheme(fields)
    _check_groups(fields)
    fields.all_linears("targets")
    fields.only(["kv_cache_scheme"], (), "none: keys and values are stored as the engine is told to")
    options = run.quantization()
    if ignored := fields.ignored():
        options["ignore"] = tuple(dict.fromkeys(options.get("ignore", ()) + ignored))
    fields.aside(_ROWS_OF_TEXT, "num_calibration_steps")
    fields.aside(
        _NO_EFFECT, "disable_quantization_observer_epoch", "post_oneshot_calibration", "observer",
        "weight_observer", "input_observer", "output_observer", "bypass_divisibility_checks",
    )  # fmt: skip
    fields.whole_run()
    fields.close()


def _check_scheme(fields: Fields) -> None:
    """Refuse a `scheme` that is not ours: its name, {name: targets}, or a group as in `config_groups`."""
    name, scheme = fields.take("scheme")
    if scheme is None:
        return
    if isinstance(scheme, dict) and scheme.keys() & {"weights", "input_activations"}:
        _check_group(fields, name, {"group_0": scheme})
        return
    for key, targets in scheme.items() if isinstance(scheme, dict) else ((scheme, None),):
        if str(key).upper() not in (W8A8.name, "INT8"):
            raise fields.refusal(name, key, f"W8A8 ({W8A8.summary})")
        _check_targets(fields, name, targets)
        fields.tell(name, key, "--scheme W8A8 (the default)")


def _check_groups(fields: Fields) -> None:
    name, groups = fields.take("config_groups")
    if groups is not None:
        _check_group(fields, name, groups)


def _check_group(fields: Fields, name: str, groups: Any) -> None:
    """Refuse groups of linears of which one is quantized otherwise, or that leave some out."""
    whole = {"quant_method": "compressed-tensors", "format": W8A8.format, "config_groups": groups}
    if difference := W8A8.difference(whole):
        raise fields.refusal(name, difference, f"W8A8 ({W8A8.summary})")
    targets = [fields.patterns(name, group.get("targets") or "Linear") for group in groups.values()]
    _check_targets(fields, name, [pattern for patterns in targets for pattern in patterns])
    fields.tell(name, ", ".join(map(str, groups)), "--scheme W8A8 (the default)")


def _check_targets(fields: Fields, name: str, targets: Any) -> None:
    patterns = fields.patterns(name, targets or "Linear")
    if not meant(patterns, fields.where) >= NEEDED:
        raise fields.refusal(name, targets, LINEARS)


def _finished(step: Step, run: _Run, path: Path) -> Step:
    """The quantization, with a word on what the recipe left open."""
    if not run.has_scheme:
        raise UnsupportedError(
            f"{path}: found a quantization without scheme or config_groups: SparseML's own, by tensor and "
            f"asymmetric; supported: `scheme: W8A8` in a GPTQModifier ({W8A8.summary})"
        )
    if not run.has_gptq:
        run.rows.append(("QuantizationModifier", "to nearest", "GPTQ rounds, which makes up for errors"))
    if "smoothing_strength" not in step.options:
        run.rows.append(
            ("SmoothQuantModifier", "none", "inputs are smoothed, at Gossamer's default strength")
        )
    return step


_HOW: dict[str, Callable[[Fields, _Run], None]] = {
    "SparseGPTModifier": _sparsegpt,
    "WandaPruningModifier": _wanda,
    "MagnitudePruningModifier": _magnitude,
    "GMPruningModifier": _magnitude,
    "ConstantPruningModifier": _constant,
    "OutputDistillationModifier": _distillation,
    "EpochRangeModifier": _epochs,
    "LearningRateFunctionModifier": _rate,
    "SmoothQuantModifier": _smoothquant,
    "GPTQModifier": _gptq,
    "QuantizationModifier": _quantization,
}
_TRAINING = (
    "ConstantPruningModifier", "OutputDistillationModifier", "EpochRangeModifier",
    "LearningRateFunctionModifier",
)  # fmt: skip
_LAST = ("SmoothQuantModifier", "GPTQModifier", "QuantizationModifier")
