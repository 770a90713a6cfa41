"""IFEval (arXiv 2311.07911): prompts whose instructions a program checks, by the harness's own rules.

A prompt is followed where all of its instructions are; `strict` takes what was written, `loose` also without
its first line, its last one, and Markdown's stars. `inst_level` counts instructions, not prompts.
"""

import contextlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gossamer.data.tables import text_of
from gossamer.errors import ConfigError
from gossamer.evaluation.task_yaml import Function

# The rules that split a text into words or sentences as NLTK does, by data that is not in its package.
_BY_NLTK = ("length_constraints:number_sentences", "change_case:capital_word_frequency")
_NLTK_DATA = "tokenizers/punkt_tab/english/"


def rules(*, offline: bool = False) -> Any:
    """The harness's module of IFEval's rules; ModuleNotFoundError where a package that they need is absent.

    NLTK's data are fetched where they are absent, unless `offline`.
    """
    import langdetect
    import nltk

    langdetect.DetectorFactory.seed = 0  # its guesses are drawn
    if not offline and not _has_nltk_data():
        # Where that fails, the rules that need them say so.
        nltk.download("punkt_tab", quiet=True, print_error_to=io.StringIO())
    with _without_download(nltk):
        from lm_eval.tasks.ifeval import utils
    return utils


def judge(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Which instructions of an example what was generated follows, and whether all of them."""
    followed = {**row, "kwargs": json.loads(row["kwargs"])}
    return rules(offline=True).process_results(followed, results)


def share_of_instructions(followed: Sequence[Sequence[bool]]) -> float:
    """Of all instructions of all examples."""
    return rules(offline=True).agg_inst_level_acc(followed)


def _metrics(level: str, aggregation: str) -> list[dict[str, Any]]:
    ways = (f"{level}_{way}_acc" for way in ("strict", "loose"))
    return [{"metric": name, "aggregation": aggregation, "higher_is_better": True} for name in ways]


# In the harness's words, with the settings of its own `ifeval`.
TASK: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "",
    "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": 1280},
    "process_results": Function(f"{__name__}.judge"),
    "metric_list": [
        *_metrics("prompt_level", "mean"),
        *_metrics("inst_level", Function(f"{__name__}.share_of_instructions")),
    ],
}


def read_instructions(row: Mapping[str, Any], where: str, rules: Any) -> dict[str, Any]:
    """A row of `prompt`, `instruction_id_list` and `kwargs`, once each of its instructions can be checked."""
    known = rules.instructions_registry.INSTRUCTION_DICT
    prompt, names, kwargs = text_of(row, where, "prompt"), row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{where}: expected names in the field instruction_id_list; found {names!r}")
    if not isinstance(kwargs, list) or len(kwargs) != len(names):
        raise ConfigError(
            f"{where}: expected {len(names)} objects in the field kwargs, one an instruction; "
            f"found {kwargs!r}"
        )
    for name, given in zip(names, kwargs, strict=True):
        if name not in known:
            raise ConfigError(
                f"{where}: instruction {name!r} is none of IFEval's; expected one of {[*known]}"
            )
        if name in _BY_NLTK:
            _need_nltk_data(name, where)
        _try_out(known[name](name), given, prompt, where)
    # As text: columns of a table have one type, and instructions have settings of their own.
    return {
        "key": where,
        "prompt": prompt,
        "instruction_id_list": names,
        "kwargs": json.dumps(kwargs),
    }


def _try_out(instruction: Any, given: Any, prompt: str, where: str) -> None:
    """Have the rule take its settings, before anything is generated; it would draw those that are absent."""
    try:
        instruction.build_description(**{name: value for name, value in given.items() if value})
        if "prompt" in (instruction.get_instruction_args() or {}):
            instruction.build_description(prompt=prompt)
        lacking = [name for name in instruction.get_instruction_args_keys() if not given.get(name)]
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"{where}: instruction {instruction.id} cannot take {given!r}: {error}") from error
    if lacking:
        raise ConfigError(
            f"{where}: instruction {instruction.id} lacks {', '.join(lacking)} in the field kwargs"
        )


def _need_nltk_data(name: str, where: str) -> None:
    import nltk

    if not _has_nltk_data():
        raise ConfigError(
            f"{where}: instruction {name} needs NLTK's {_NLTK_DATA}, which is not in {nltk.data.path[0]} "
            "nor in the other folders of nltk.data.path; run `python -m nltk.downloader punkt_tab` with a "
            "network, or name the folder that has tokenizers/ in NLTK_DATA"
        )


def _has_nltk_data() -> bool:
    import nltk

    try:
        nltk.data.find(_NLTK_DATA)
    except LookupError:
        return False
    return True


@contextlib.contextmanager
def _without_download(nltk: Any) -> Iterator[None]:
    """The harness's module fetches the data when it is imported, and prints that it has done so."""
    fetch, nltk.download = nltk.download, lambda *_: False
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        nltk.download = fetch
