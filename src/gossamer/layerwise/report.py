"""What `prune` and `quantize` leave for people in their output: `report.md`, and the picture `errors.png`.

Nothing reads them again, and later stages do not take them along.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gossamer.architecture.anatomy import Anatomy
from gossamer.checkpoint.directory import Derived
from gossamer.job.report import Table
from gossamer.layerwise.quality import in_words
from gossamer.plots import layer_curves

PICTURE = "errors.png"
ERROR = "error of hidden states a token, held-out rows"


def report_pruning(output: Derived, tensors: Mapping[str, Any], num_held: int, seconds: float) -> None:
    """Write the report of `prune`; `tensors` are those of `gossamer.json`, with each linear's sparsity."""
    metrics, anatomy, job = output.metrics, output.parent.architecture, output.job
    shares = by_role(anatomy, {name: tensors[f"{name}.weight"]["sparsity"] for name in output.parent.linears})
    curves = by_training(metrics["errors"], metrics["reconstruction"])
    panels = [(ERROR, curves)]
    if len({round(share, 3) for column in shares.values() for share in column}) > 1:
        panels.append(("zeros of each linear", shares))
    title = f"{output.sparsity:.1%} zeros by {job['method']}"
    layer_curves(output.path / PICTURE, panels, title)
    name, change = in_words(metrics)
    facts = [
        f"{name.capitalize()} of {num_held} rows that nothing was calibrated on: {change}.",
        f"It took {seconds:.1f} s on {output.num_threads} threads.",
    ]
    tables = [
        layer_errors(metrics["errors"], metrics["reconstruction"]),
        _table_by_role("zeros of each linear", shares, "{:.2%}"),
    ]
    if rounded := metrics["rounded_reconstruction"]:
        tables.insert(1, rounded_errors(rounded))
    _write(output, f"{output.parent.path.name}: {title}", facts, tables)


def report_rounding(output: Derived, title: str, facts: Sequence[str], tables: Sequence[Table]) -> None:
    """Write the report of `quantize`: its own facts and tables, then each linear's error."""
    errors = by_role(output.parent.architecture, output.metrics["linear_errors"])
    name = "squared error of a linear's outputs, relative"
    layer_curves(output.path / PICTURE, [(name, errors)], title)
    _write(output, title, facts, [*tables, _table_by_role(name, errors, "{:.2e}")])


def by_role(anatomy: Anatomy, values: Mapping[str, float]) -> dict[str, list[float]]:
    """Role of a linear -> its value in each layer; NaN where there is none."""
    found: dict[str, list[float]] = {}
    for layer, block in enumerate(anatomy.blocks):
        for role, linear in block.linears.items():
            value = values.get(f"{anatomy.prefix(layer)}{linear.name}", float("nan"))
            found.setdefault(role, []).append(value)
    return found


def by_training(
    errors: Sequence[float], reconstruction: Sequence[Sequence[float]], before: str = "as pruned"
) -> dict[str, list[float]]:
    """Each layer's error before, and, where layers were trained, after that."""
    if not reconstruction:
        return {before: list(errors)}
    return {before: [epochs[0] for epochs in reconstruction], "trained": list(errors)}


def rounded_errors(reconstruction: Sequence[Sequence[float]]) -> Table:
    """Each layer's error as it was rounded, and what training through the rounding gained."""
    return layer_errors([min(epochs) for epochs in reconstruction], reconstruction, before="as rounded")


def layer_errors(
    errors: Sequence[float], reconstruction: Sequence[Sequence[float]], before: str = "as pruned"
) -> Table:
    """Each layer's error, and what training it gained."""
    curves = by_training(errors, reconstruction, before)
    rows = [
        (f"{layer}", *(f"{e:.4f}" for e in found))
        for layer, found in enumerate(zip(*curves.values(), strict=True))
    ]
    if not reconstruction:
        return Table(ERROR, ("layer", *curves), rows)
    gained = [
        f"{1 - after / before:.0%}" if before else "" for before, after in zip(*curves.values(), strict=True)
    ]
    return Table(
        ERROR, ("layer", *curves, "gained"), [(*row, gain) for row, gain in zip(rows, gained, strict=True)]
    )


def _table_by_role(title: str, values: Mapping[str, Sequence[float]], form: str) -> Table:
    rows = zip(*values.values(), strict=True)
    cells = [[f"{layer}", *("" if v != v else form.format(v) for v in row)] for layer, row in enumerate(rows)]
    return Table(title, ("layer", *values), cells)


def _write(output: Derived, title: str, facts: Sequence[str], tables: Sequence[Table]) -> None:
    """`report.md`: facts, picture, tables, what needed more dampening, options and text."""
    tables = list(tables)
    if raised := output.metrics["dampening"]:
        rows = [(name, f"{fraction:g}") for name, fraction in raised.items()]
        tables.append(
            Table("Linears that took more dampening than asked for", ("linear", "dampening_frac"), rows)
        )
    tables.append(Table("Options", ("option", "value"), [(k, f"{v}") for k, v in output.job.items()]))
    data = [(f"{source.get('source', '')}", f"{source.get('sha256') or ''}") for source in output.data]
    tables.append(Table("Calibration text", ("source", "sha256"), data))
    parts = [f"# {title}", "\n".join(facts), f"![{title}]({PICTURE})", *map(markdown, tables)]
    (output.path / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def markdown(table: Table) -> str:
    """A heading and a table."""
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([f"## {table.title[:1].upper()}{table.title[1:]}", "", *lines])
