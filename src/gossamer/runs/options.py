"""Options of a run of several verbs, made from theirs; each verb's, out of the run's; and their checks."""

import dataclasses
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from gossamer.checkpoint.directory import Checkpoint
from gossamer.job.options import option
from gossamer.stages import finetune, pack, pretrain, prune, quantize

STAGES: dict[str, type] = {
    "prune": prune.Prune,
    "pretrain": pretrain.Pretrain,
    "finetune": finetune.Finetune,
    "quantize": quantize.Quantize,
    "pack": pack.Pack,
}
# What there is to choose of a teacher, which runs have for fine-tuning alone.
TAUGHT = (
    *("distill_temperature", "cross_entropy_weight"),
    *("teacher_cache", "cache_layers", "cache_top_k", "teacher_device"),
)
# What every run decides: where a stage reads and writes, who teaches whom, that `prune` prunes and `quantize`
# rounds, and what is done again. It runs in one process, so `parallel` has nothing to choose.
DECIDED = (
    *("model", "output_dir", "output_file", "dataset", "teacher", "resume", "overwrite", "parallel"),
    *("prune_scheme", "rounded_epochs", "prune_schedule", "pretrain_pattern", "finetune_pattern"),
    *(f"pretrain_{name}" for name in ("distill", *TAUGHT)),
)

CHECKS: dict[type, Callable[[Any, Checkpoint], Any]] = {
    prune.Prune: prune.check,
    pretrain.Pretrain: pretrain.check,
    finetune.Finetune: finetune.check,
    quantize.Quantize: quantize.check,
}


def options_of(
    verbs: Mapping[str, type], *, without: Collection[str] = (), defaults: Mapping[str, Any] | None = None
) -> Any:
    """A frozen dataclass with the options of several verbs (name -> dataclass of options), given by name.

    An option keeps its name and sets it in every verb that has it. One on whose default the verbs differ is
    None, which leaves each verb its own, and is also there for each verb alone, as VERB_OPTION. `without`
    names options that the caller decides by itself (VERB_OPTION: for that verb); `defaults` are those that
    it changes.
    """
    owners: dict[str, dict[str, dataclasses.Field[Any]]] = {}
    for verb, kind in verbs.items():
        for field in dataclasses.fields(kind):
            if field.name not in without and f"{verb}_{field.name}" not in without:
                owners.setdefault(field.name, {})[verb] = field
    hints = {name: hint for kind in verbs.values() for name, hint in typing.get_type_hints(kind).items()}
    made: list[tuple[str, Any, Any]] = []
    for name, fields in owners.items():
        made += _shared(name, hints[name], fields, (defaults or {}).get(name, dataclasses.MISSING))
    return dataclasses.make_dataclass("Options", made, frozen=True, kw_only=True)


def _shared(
    name: str, hint: Any, fields: Mapping[str, dataclasses.Field[Any]], changed: Any
) -> list[tuple[str, Any, Any]]:
    """(name, type, field) of an option of several verbs, and where their defaults differ of each verb's."""
    metadata = dict(next(iter(fields.values())).metadata)
    metadata["help"] = f"{', '.join(fields)}: {metadata['help']}"
    values = {verb: field.default for verb, field in fields.items()}
    if changed is not dataclasses.MISSING or len(set(values.values())) == 1:
        default = next(iter(values.values())) if changed is dataclasses.MISSING else changed
        return [(name, hint, option(default, **metadata))]
    metadata["help"] += f" (default: {', '.join(map(str, values.values()))})"
    alone = f"--{name.replace('_', '-')} for it alone"
    return [
        (name, hint | None, option(None, **metadata)),
        *((f"{verb}_{name}", hint | None, option(None, help=f"{verb}: {alone}")) for verb in fields),
    ]


def options_for(job: object, verb: str, kind: type, *, without: Collection[str] = ()) -> dict[str, Any]:
    """What a job made from `options_of` says of the options of one of its verbs, for `kind(**options)`.

    VERB_OPTION counts before OPTION; what the job does not have, or has as None, is left to the verb, and so
    is OPTION where `without`, as `options_of` was given it, has VERB_OPTION.
    """
    given = {name: value for name, value in vars(job).items() if value is not None}
    names = [field.name for field in dataclasses.fields(kind) if f"{verb}_{field.name}" not in without]
    return {
        name: given.get(f"{verb}_{name}", given.get(name))
        for name in names
        if f"{verb}_{name}" in given or name in given
    }


def check(jobs: Iterable[Any], dense: Checkpoint) -> None:
    """Raise what a verb would refuse of a job's options or of such a model, before the first one begins."""
    for job in jobs:
        if type(job) in CHECKS:
            CHECKS[type(job)](job, dense)
