"""Recipes of SparseML and llm-compressor become command lines that our own parser takes."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foreign.recipes import ALTERNATING, QUANTIZATION, RECIPES, REFUSED
from gossamer import cli
from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import ConfigError, GossamerError
from gossamer.foreign.recipe_commands import DEFAULTS
from gossamer.runs.compress import Compress, plan
from gossamer.stages.import_model import Import, RecipeResult, import_model


def imported(text: str, path: Path) -> RecipeResult:
    path.write_text(text, encoding="utf-8")
    result = import_model(Import(str(path)))
    assert isinstance(result, RecipeResult)
    return result


def parsed(command: str) -> Any:
    """The job that the command line makes."""
    program, verb, *arguments = shlex.split(command)
    assert program == "gossamer"
    return cli.parse(verb, arguments)[0]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_becomes_command_lines_that_are_accepted(name: str, tmp_path: Path) -> None:
    suffix, text, commands = RECIPES[name]
    assert list(imported(text, tmp_path / f"recipe.{suffix}").commands) == commands
    for command in commands:
        assert parsed(command).output_dir.startswith("OUT")


def test_flags_left_out_are_the_defaults_of_the_verbs() -> None:
    for verb, options in DEFAULTS.items():
        job, _ = cli.VERBS[verb].load(verb)
        defaults = {name: field.default for name, field in job.__dataclass_fields__.items()}
        assert options == {name: defaults[name] for name in options}, verb


def test_compress_makes_the_steps_of_the_recipe(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    """Its plan has the verbs of the recipe, which are known one by one where it does not quantize."""
    [whole] = imported(ALTERNATING + QUANTIZATION, tmp_path / "whole.yaml").commands
    one_by_one = imported(ALTERNATING, tmp_path / "steps.yaml").commands
    job = parsed(whole.replace("MODEL", str(tiny_llama("llama3"))))
    assert isinstance(job, Compress)
    steps = plan(job)
    assert [step.stage for step in steps] == [*(c.split()[1] for c in one_by_one), "quantize", "pack"]
    pruned = [step.job.sparsity for step in steps if step.stage == "prune"]
    assert pruned == [parsed(c).sparsity for c in one_by_one if c.split()[1] == "prune"] == [0.5, 0.75]
    assert steps[-2].job.smoothing_strength == 0.6 and steps[-2].job.dampening_frac == 0.01


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "SquareHead",
            [
                ("prune", {"sparsity": 0.6, "method": "sparsegpt", "dampening_frac": 0.01}),
                ("finetune", {"distill": "squarehead"}),
                ("quantize", {"scheme": "W8A8", "dampening_frac": 0.01, "ignore": ()}),
            ],
        ),
        (
            "one damping for both",
            [("prune", {"sparsity": 0.5, "dampening_frac": 0.1}), ("quantize", {"dampening_frac": 0.1})],
        ),
        (
            "OBCQ, rounding inside",
            [("prune", {"sparsity": 0.7, "block_size": 128}), ("quantize", {"smoothing_strength": 0.8})],
        ),
    ],
)
def test_compress_gives_its_stages_what_the_recipe_says(
    name: str, expected: list[tuple[str, dict[str, Any]]], tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    [command] = imported(RECIPES[name][1], tmp_path / "recipe.yaml").commands
    model = str(tiny_llama("llama3"))
    *steps, last = plan(parsed(command.replace("MODEL", model)))
    found = [
        (step.stage, {it: getattr(step.job, it) for it in wanted})
        for step, (_, wanted) in zip(steps, expected, strict=True)
    ]
    assert found == expected and last.stage == "pack"
    assert all(step.job.teacher == model for step in steps if step.stage == "finetune")


def test_the_command_line_runs(
    tiny_llama: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the recipe in a directory to a packed file, by nothing but what was printed."""
    (tmp_path / "recipe.yaml").write_text(
        "sparse_stage: {m_modifiers: {SparseGPTModifier: {sparsity: 0.6}}}\n"
        "quant_stage: {m_modifiers: {GPTQModifier: {scheme: W8A8, ignore: ['re:.*0.mlp.down_proj']}}}\n"
    )
    assert cli.call(["import", str(tmp_path), "--json"]) == 0
    [command] = json.loads(capsys.readouterr().out)["result"]["commands"]
    places = {"MODEL": tiny_llama("llama2"), "OUT": tmp_path / "out", "TEXT": text_file}
    words = [str(places.get(word, word)) for word in shlex.split(command)[1:]]
    assert cli.call([*words, "--num-calibration-samples", "4", "--max-seq-length", "64"]) == 0
    pruned, quantized = (Checkpoint.open(tmp_path / "out" / name) for name in ("1-prune", "2-quantize"))
    assert pruned.sparsity() == pytest.approx(0.6, abs=1e-3)
    assert quantized.config["quantization_config"]["ignore"] == ["lm_head", "model.layers.0.mlp.down_proj"]
    assert (tmp_path / "out" / "model.goss").stat().st_size > 0


def test_what_is_done_otherwise_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPES["rounded to nearest, zeros held"][1])
    before = sorted(tmp_path.rglob("*"))
    assert cli.call(["import", str(file), "--json"]) == 0
    fields = {name: here for name, _, here in json.loads(capsys.readouterr().out)["result"]["fields"]}
    assert "GPTQ" in fields["QuantizationModifier"] and "default strength" in fields["SmoothQuantModifier"]
    assert fields["QuantizationModifier: ignore"] == "is never touched"
    assert cli.call(["import", str(file)]) == 0
    assert RECIPES["rounded to nearest, zeros held"][2][0] in capsys.readouterr().out.splitlines()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", REFUSED)
def test_another_run_is_refused_by_the_field(name: str, tmp_path: Path) -> None:
    text, words = REFUSED[name]
    with pytest.raises(GossamerError) as refusal:
        imported(text, tmp_path / "recipe.yaml")
    assert words in str(refusal.value) and str(tmp_path / "recipe.yaml") in str(refusal.value)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"m_modifiers: {SparseGPTModifier: {sparsity: 0.5}} # caf\xe9")
    with pytest.raises(ConfigError, match=r"latin\.yaml: not plain YAML"):
        import_model(Import(str(tmp_path / "latin.yaml")))
    with pytest.raises(ConfigError, match="no recipe between two lines of -"):
        imported("# A model card\n---\n", tmp_path / "README.md")
    (tmp_path / "recipe.yaml").write_text(ALTERNATING)
    with pytest.raises(ConfigError, match="leave -o out"):
        import_model(Import(str(tmp_path / "recipe.yaml"), str(tmp_path / "out")))


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file; expected a recipe"):
        import_model(Import(str(tmp_path / "recipe.yaml")))


def test_a_model_needs_a_directory_to_write(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give one with -o"):
        import_model(Import(str(tmp_path)))
