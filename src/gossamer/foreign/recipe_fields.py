"""The fields of one modifier of a recipe, read strictly: each is taken once, and what is left is refused."""

import re
from collections.abc import Sequence
from typing import Any

from gossamer.errors import ConfigError, UnsupportedError
from gossamer.foreign.recipe_file import Modifier
from gossamer.foreign.recipe_targets import NEEDED, meant, shell_pattern

Row = tuple[str, str, str]  # a field, its value, what becomes of it
WHOLE = ("block_size", "num_train_epochs")  # options that are whole numbers
LINEARS = "all linears of the decoder, as Linear, __ALL__ or 're:model.layers.\\d+$'"


class Fields:
    """What one modifier says; `rows` is where it is noted what becomes of each field.

    Fields that are null say nothing. Where methods take several names, these are one field's in older and
    newer files. A value that has no match here is an UnsupportedError.
    """

    def __init__(self, modifier: Modifier, rows: list[Row]) -> None:
        self.modifier, self.rows = modifier, rows
        self.where = f"{modifier.where}: {modifier.name}"
        self._left = {name: value for name, value in modifier.fields.items() if value is not None}

    def take(self, *names: str) -> tuple[str, Any]:
        """The name that the field has, and its value; (the first name, None) where it is not given."""
        found = [(name, self._left.pop(name)) for name in names if name in self._left]
        if len(found) > 1:
            raise ConfigError(f"{self.where}: {found[0][0]} and {found[1][0]} say the same; keep one of them")
        return found[0] if found else (names[0], None)

    def gives(self, *names: str) -> bool:
        return any(name in self._left for name in names)

    def tell(self, name: str, value: Any, becomes: str) -> None:
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        self.rows.append((f"{self.modifier.name}: {name}", shown, becomes))

    def refusal(self, name: str, value: Any, supported: str) -> UnsupportedError:
        return UnsupportedError(f"{self.where}.{name} is {value!r:.120}; supported: {supported}")

    def only(self, names: Sequence[str], values: Sequence[Any], supported: str) -> None:
        """Refuse the field unless it has one of these values."""
        name, value = self.take(*names)
        if value is not None and value not in values:
            raise self.refusal(name, value, supported)

    def number(self, names: Sequence[str], option: str, default: float | None = None) -> dict[str, Any]:
        """The option that a number becomes; ConfigError where it is not given and has no `default`."""
        name, value = self.take(*names)
        if value is None and default is None:
            raise ConfigError(f"{self.where} has no {name}; expected a number")
        if value is None:
            return {option: default}
        try:
            number = float(value) if isinstance(value, int | float | str) else None
        except ValueError:
            number = None
        if number is None or isinstance(value, bool) or (option in WHOLE and number % 1):
            raise self.refusal(name, value, "one whole number" if option in WHOLE else "one number")
        if option in WHOLE:
            number = int(number)
        self.tell(name, value, f"--{option.replace('_', '-')} {number}")
        return {option: number}

    def zeros_in_groups(self) -> tuple[int, int] | None:
        """N and M of a pattern in which N of each M weights become zero; None where zeros may be anywhere."""
        name, structure = self.take("mask_structure", "mask_type")
        if self.gives("prunen", "prunem"):
            if structure not in (None, "0:0", "unstructured"):
                raise ConfigError(f"{self.where}: {name} and prunen say the same; keep one of them")
            name, structure = "prunen, prunem", f"{self.take('prunen')[1]}:{self.take('prunem')[1]}"
        if structure in (None, "0:0", "unstructured"):
            return None
        found = re.fullmatch(r"(\d{1,6}):(\d{1,6})", str(structure))
        if not found or not 0 < int(found[1]) < int(found[2]):
            raise self.refusal(name, structure, "'0:0': zeros anywhere, or 'N:M': N zeros in each M weights")
        zeros, size = int(found[1]), int(found[2])
        self.tell(name, structure, f"--pattern {size - zeros}:{size}, which fixes the sparsity")
        return zeros, size

    def aside(self, becomes: str, *names: str) -> None:
        """Fields that leave the result as it is, or whose part in it Gossamer decides by itself."""
        for name in names:
            _, value = self.take(name)
            if value not in (None, [], {}):
                self.tell(name, value, becomes)

    def whole_run(self) -> None:
        """Refuse a modifier that works for a part of a training only."""
        self.only(("start", "start_epoch"), (0, -1), "from the beginning on (0)")
        self.only(("end", "end_epoch"), (-1,), "to the end (-1, or left out)")
        self.aside("has no effect", "update", "index", "group", "log_types", "leave_enabled")

    def patterns(self, name: str, value: Any) -> list[str]:
        patterns = value if isinstance(value, list) else [value]
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise self.refusal(name, value, "names of modules or classes, or 're:' and a regular expression")
        return patterns

    def all_linears(self, *names: str, also: Sequence[str] = ()) -> None:
        """Refuse targets that are not all linears of the decoder; those of `also` have no part in this."""
        name, value = self.take(*names)
        patterns = [pattern for pattern in self.patterns(name, value or "Linear") if pattern not in also]
        if not meant(patterns, self.where) >= NEEDED:
            raise self.refusal(name, value, LINEARS)

    def no_linear(self) -> None:
        """Refuse to leave out linears of the decoder; others are never touched."""
        name, value = self.take("ignore")
        for pattern in self.patterns(name, value or []):
            if meant([pattern], self.where):
                raise self.refusal(name, pattern, "lm_head and what else is no linear of the decoder")
        if value:
            self.tell(name, value, "is never touched")

    def ignored(self) -> tuple[str, ...]:
        """Shell patterns of the decoder's linears that are left out."""
        name, value = self.take("ignore")
        found: list[str] = []
        for pattern in self.patterns(name, value or []):
            if not meant([pattern], self.where):
                self.tell(name, pattern, "is never touched")
                continue
            glob = shell_pattern(pattern, self.where)
            if glob is None:
                raise self.refusal(
                    name, pattern, "names, and regular expressions of letters, dots, .* and \\d+"
                )
            self.tell(name, pattern, f"--ignore {glob}")
            found.append(glob)
        return tuple(found)

    def close(self) -> None:
        """Refuse what is left."""
        for name, value in self._left.items():
            raise UnsupportedError(
                f"{self.where}.{name} is {value!r:.120}; this field is not understood here; take it out of "
                "the recipe if the run does not need it"
            )
