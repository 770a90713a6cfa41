"""Recipe files of SparseML and llm-compressor: the modifiers that they name, in order, with their fields.

    sparsity: 0.5                            a variable: every plain value at the top or in a stage is one
    sparsity_stage:                          a stage; what is in none is one of its own
      run_type: oneshot
      obcq_modifiers:                        a group, whose name means nothing
        SparseGPTModifier:                   groups are mappings, or lists of them or of `!SparseGPTModifier`
          sparsity: eval(sparsity)           arithmetic over variables

A recipe card (.md) has the same between its first two lines of `---`. The file is data: what would make
Python objects is refused, and of an `eval` only numbers, variables and their arithmetic are understood.
"""

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gossamer.errors import ConfigError, UnsupportedError

SUFFIXES = (".yaml", ".yml", ".md")
_GROUPS = ("modifiers", "recipe")
_ABOUT_THE_FILE = ("version", "metadata", "__metadata__", "framework", "run_type")
_DEEPEST = 20  # variables that name variables
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


@dataclass(frozen=True)
class Modifier:
    """One step of a recipe; `where` is its file and stage, `one_shot` whether the stage says that it is."""

    where: str
    name: str
    fields: Mapping[str, Any]
    one_shot: bool


class _Loader(yaml.SafeLoader):
    """Plain data alone; a `!Name` is the mapping {Name: fields}, and no key may come twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := [key for index, key in enumerate(keys) if key in keys[:index]]:
            raise yaml.constructor.ConstructorError(None, None, f"found {twice[0]} twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def whole_number(self, node: yaml.ScalarNode) -> Any:
        """`2:4` is a pattern of zeros, and not 124, a number to the base of 60."""
        return node.value if ":" in node.value else self.construct_yaml_int(node)

    def tagged(self, name: str, node: yaml.Node) -> dict[str, Any]:
        if isinstance(node, yaml.MappingNode):
            return {name: self.construct_mapping(node, deep=True)}
        if isinstance(node, yaml.ScalarNode) and not node.value:
            return {name: {}}
        raise yaml.constructor.ConstructorError(
            None, None, f"found !{name} without its fields", node.start_mark
        )


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.whole_number)
_Loader.add_multi_constructor("!", _Loader.tagged)


def read_recipe(path: Path) -> list[Modifier]:
    """The modifiers of a file; ConfigError for one that is no recipe, UnsupportedError for code in it."""
    content = _load(path)
    top, modifiers = _split({key: it for key, it in content.items() if not _is_stage(key)}, str(path))
    found = [_modifier(*pair, top, str(path), content) for pair in modifiers]
    for name, stage in _stages(content, path):
        where = f"{path}, {name}"
        variables, modifiers = _split(stage, where)
        found += [_modifier(*pair, top | variables, where, stage) for pair in modifiers]
    if not found:
        raise ConfigError(
            f"{path}: found no modifier; expected a recipe of SparseML or llm-compressor, such as "
            "`test_stage: {obcq_modifiers: {SparseGPTModifier: {sparsity: 0.5}}}`"
        )
    return found


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; expected a recipe of SparseML or llm-compressor")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        content = yaml.load(_front_matter(text, path) if path.suffix == ".md" else text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path}: not plain YAML ({' '.join(str(error).split())}); expected a recipe of SparseML or "
            "llm-compressor, without Python objects"
        ) from error
    if isinstance(content, list):
        content = {"modifiers": content}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: found {type(content).__name__}; expected stages or modifiers by name")
    return {str(key): value for key, value in content.items()}


def _front_matter(text: str, path: Path) -> str:
    lines = text.splitlines(keepends=True)
    rules = [index for index, line in enumerate(lines) if line.strip() in ("---", "+++")]
    if len(rules) < 2:
        raise ConfigError(f"{path}: found no recipe between two lines of ---, as SparseML's cards have it")
    return "".join(lines[rules[0] + 1 : rules[1]])


def _is_stage(key: str) -> bool:
    return key == "stages" or re.search(r"_stage(_\d+)?$", key) is not None


def _stages(content: Mapping[str, Any], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each stage by name, in the file's order; those under `stages` may be lists, as SparseML writes them."""
    for key, value in content.items():
        if not _is_stage(key):
            continue
        named = value.items() if key == "stages" and isinstance(value, dict) else [(key, value)]
        for name, stage in named:
            for index, part in enumerate(stage if isinstance(stage, list) else [stage]):
                if not isinstance(part, dict):
                    raise ConfigError(f"{path}, {name}: found {part!r:.80}; expected groups of modifiers")
                place = f"{name}[{index}]" if isinstance(stage, list) else str(name)
                yield place, {str(inner): it for inner, it in part.items()}


def _split(content: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """Variables, and (name, fields) of modifiers."""
    variables: dict[str, Any] = {}
    modifiers: list[tuple[str, Any]] = []
    for key, value in content.items():
        if key in _GROUPS or key.endswith("_modifiers"):
            modifiers += _group(value, f"{where}: {key}")
        elif key.endswith("Modifier"):
            modifiers.append((key, value))
        elif key == "args" and isinstance(value, dict | None):
            variables |= {str(name): it for name, it in (value or {}).items()}
        elif isinstance(value, dict) and key not in _ABOUT_THE_FILE:
            raise ConfigError(
                f"{where}: found {key} with fields of its own; names of stages end in _stage, of groups in "
                "_modifiers, of modifiers in Modifier"
            )
        elif key not in _ABOUT_THE_FILE:
            variables[key] = value
    return variables, modifiers


def _group(group: Any, where: str) -> list[tuple[str, Any]]:
    """The modifiers of a mapping, or of a list of mappings of one each."""
    found: list[tuple[str, Any]] = []
    for part in group if isinstance(group, list) else [group or {}]:
        if not isinstance(part, dict):
            raise ConfigError(f"{where}: found {part!r:.80}; expected modifiers by name, with their fields")
        found += [(str(name), fields) for name, fields in part.items()]
    return found


def _modifier(
    name: str, fields: Any, variables: Mapping[str, Any], where: str, stage: Mapping[str, Any]
) -> Modifier:
    if not isinstance(fields, dict | None):
        raise ConfigError(f"{where}: {name} is {fields!r:.80}; expected its fields by name")
    values = {
        str(key): _value(value, variables, f"{where}: {name}.{key}") for key, value in (fields or {}).items()
    }
    return Modifier(where, name, values, stage.get("run_type") == "oneshot")


def _value(value: Any, variables: Mapping[str, Any], where: str, depth: int = 0) -> Any:
    """A value of the file, with each `eval(...)` in it worked out."""
    if depth > _DEEPEST:
        raise ConfigError(f"{where}: nested too deeply, or its variables name each other in a circle")
    if isinstance(value, dict):
        return {key: _value(it, variables, where, depth + 1) for key, it in value.items()}
    if isinstance(value, list):
        return [_value(it, variables, where, depth + 1) for it in value]
    if not isinstance(value, str) or "eval(" not in value:
        return value
    whole = re.fullmatch(r"\s*eval\((.*)\)\s*", value, re.DOTALL)
    if whole is None:
        raise UnsupportedError(f"{where} is {value!r}; supported: eval(...) as the whole of a value")
    try:
        tree = ast.parse(whole[1].strip(), mode="eval")
        return _calculated(tree.body, variables, where, depth)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{where} is {value!r:.80}, which cannot be worked out ({error})") from error


def _calculated(node: ast.expr, variables: Mapping[str, Any], where: str, depth: int) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in variables:
            raise ConfigError(
                f"{where}: found no variable {node.id}; write its value into the file, as `{node.id}: VALUE`"
            )
        return _value(variables[node.id], variables, where, depth + 1)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        operand = float(_calculated(node.operand, variables, where, depth))
        return -operand if isinstance(node.op, ast.USub) else operand
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = (float(_calculated(it, variables, where, depth)) for it in (node.left, node.right))
        return _OPERATORS[type(node.op)](left, right)
    raise UnsupportedError(
        f"{where}: found eval({ast.unparse(node)[:80]}); supported in it: numbers, variables, + - * / // %"
    )
