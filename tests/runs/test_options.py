"""Options that verbs share: written once, given to each."""

import dataclasses
import typing
from dataclasses import dataclass

import pytest

from gossamer import cli
from gossamer.job.options import option
from gossamer.runs import recovery
from gossamer.runs.options import DECIDED, STAGES, options_for, options_of
from gossamer.training.options import inherited


@dataclass(frozen=True)
class Wash:
    model: str = option(help="what to wash", positional=True)
    rounds: int = option(3, help="how often")
    heat: float = option(40.0, help="degrees")
    soap: tuple[str, ...] = option((), help="kinds of soap", short="-s")


@dataclass(frozen=True)
class Dry:
    model: str = option(help="what to dry", positional=True)
    rounds: int = option(3, help="how often")
    heat: float = option(60.0, help="degrees")


@dataclass(frozen=True)
class Clean(options_of({"wash": Wash, "dry": Dry}, without=("model",), defaults={"rounds": 2})):
    model: str = option(help="what to clean", positional=True)


@pytest.mark.parametrize(
    ("given", "wash", "dry"),
    [
        ({}, {"rounds": 2, "soap": ()}, {"rounds": 2}),
        ({"heat": 50.0}, {"rounds": 2, "heat": 50.0, "soap": ()}, {"rounds": 2, "heat": 50.0}),
        ({"dry_heat": 0.0}, {"rounds": 2, "soap": ()}, {"rounds": 2, "heat": 0.0}),
        (
            {"heat": 50.0, "dry_heat": 70.0, "rounds": 5, "soap": ("a",)},
            {"rounds": 5, "heat": 50.0, "soap": ("a",)},
            {"rounds": 5, "heat": 70.0},
        ),
    ],
)
def test_options_of_several_verbs_reach_each(given: dict, wash: dict, dry: dict) -> None:
    job = Clean("shirt", **given)
    assert options_for(job, "wash", Wash) == {"model": "shirt"} | wash
    assert options_for(job, "dry", Dry) == {"model": "shirt"} | dry


def test_an_option_says_whose_it_is_and_keeps_its_other_names() -> None:
    fields = {field.name: field for field in dataclasses.fields(Clean)}
    assert set(fields) == {"model", "rounds", "heat", "wash_heat", "dry_heat", "soap"}
    assert fields["soap"].metadata == {"help": "wash: kinds of soap", "positional": False, "short": "-s"}
    assert fields["heat"].metadata["help"] == "wash, dry: degrees (default: 40.0, 60.0)"
    assert fields["rounds"].default == 2


def test_an_inherited_option_changes_its_default_alone() -> None:
    @dataclass(frozen=True)
    class Boil(Wash):
        heat: float = inherited(Wash, "heat", 100.0)

    [heat] = [field for field in dataclasses.fields(Boil) if field.name == "heat"]
    assert (heat.default, heat.metadata["help"]) == (100.0, "degrees")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("run", ["compress", "demo"])
def test_a_run_takes_every_flag_of_its_stages(run: str, stage: str) -> None:
    """With any value that the stage takes, and it arrives there."""
    kind = STAGES[stage]
    decided, given = {
        "compress": (DECIDED, ["model", "-o", "out", "--dataset", "text"]),
        "demo": (recovery.DECIDED, []),
    }[run]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name, hint in typing.get_type_hints(kind).items():
        if name in decided or name not in fields:
            continue
        flag = cli.flag_of(fields[name])
        kinds, of_type = typing.get_args(hint), {bool: True, int: 7, float: 0.25, str: "none"}
        value: typing.Any = next((of_type[kind] for kind in (hint, *kinds) if kind in of_type), None)
        if typing.get_origin(hint) is typing.Literal:
            value = kinds[-1]
        elif typing.get_origin(hint) is tuple:
            value = ("x",)
        words = [flag] if hint is bool else [flag, *(value if isinstance(value, tuple) else [str(value)])]
        job, _ = cli.parse(run, [*given, *words])
        assert options_for(job, stage, kind)[name] == value


def test_compress_can_set_a_flag_in_one_stage_alone() -> None:
    words = ["--learning-rate", "0.5", "--finetune-learning-rate", "0.25", "--pretrain-batch-tokens", "64"]
    job, _ = cli.parse("compress", ["model", "-o", "out", "--dataset", "text", *words])
    pretrain, finetune = (options_for(job, name, STAGES[name]) for name in ("pretrain", "finetune"))
    assert (pretrain["learning_rate"], pretrain["batch_tokens"]) == (0.5, 64)
    assert finetune["learning_rate"] == 0.25 and "batch_tokens" not in finetune
