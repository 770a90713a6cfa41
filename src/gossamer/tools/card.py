"""The model card that `publish` writes: YAML that the hub reads, and the same in words for people.

What it says comes from the model itself (sizes, zeros), from `gossamer.json` (recipe, data, seeds, versions),
from the card of the model that it was made of (licence, language), and from what `evaluate` and `bench`
measured.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gossamer.architecture.anatomy import Task
from gossamer.engine.heads import CALLS, OF_VECTORS
from gossamer.evaluation.scores import is_share, primary
from gossamer.tools.inspect import InspectResult, Matrix
from gossamer.tools.local_paths import without_folders

KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
PIPELINES: dict[Task, tuple[str, str]] = {  # the hub's names of tasks
    "generation": ("text-generation", "Text generation"),
    "embedding": ("sentence-similarity", "Sentence similarity"),
    "masked": ("fill-mask", "Fill mask"),
    "sequence": ("text-classification", "Text classification"),
    "tokens": ("token-classification", "Token classification"),
    "spans": ("question-answering", "Question answering"),
}
LEAST_SPARSITY = 0.05  # dense weights have a zero here and there, of INT8 some 1 to 3%
PLACES = ("model", "output_dir", "output")  # options that name files of this computer and no choice
OF_THE_MACHINE = ("threads", "offline", "save_seconds", "report_to")


@dataclass(frozen=True)
class Sources:
    """What a card is made of besides the model.

    `manifest`: `gossamer.json` ({} where there is none); `results`: what `evaluate --json` printed, one
    object a run; `speeds`: the rows of `bench --json`; `base_model`: org/name on the hub; `scheme`: the name
    of the quantization that a directory has.
    """

    base_model: str | None = None
    scheme: str | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    results: Sequence[Mapping[str, Any]] = ()
    speeds: Sequence[Mapping[str, Any]] = ()


def model_card(name: str, found: InspectResult, sources: Sources) -> str:
    """README.md of the repository `name` (org/name) for the model that `inspect` describes."""
    front = yaml.safe_dump(front_matter(name, found, sources), sort_keys=False, allow_unicode=True, width=100)
    parts = [
        f"# {name.split('/')[-1]}\n\n{_summary(found, sources)}\n",
        _use(name, found),
        _table("", ("", ""), _facts(found, sources)),
        _table("## Results", ("task", "metric", "value", "recovery", "examples"), _scores(sources.results)),
        _table(
            "## Speed",
            ("batch", "prompt", "tokens/s", "prompt tokens/s", "GB/s", "on"),
            _speeds(sources.speeds),
        ),
        _recipe(found, sources),
        _table("## Data", ("stage", "source", "share", "tokens", "what it was"), _data(sources.manifest)),
        _versions(sources.manifest),
    ]
    return f"---\n{front}---\n\n" + "\n".join(filter(None, parts))


def front_matter(name: str, found: InspectResult, sources: Sources) -> dict[str, Any]:
    """The fields that the hub reads; those of the licence are kept from the model's own card."""
    kept = {key: value for key, value in _own_card(found).items() if key in KEPT and value}
    texts = sorted(file for file in found.texts if file.startswith("LICEN"))
    if "license" not in kept and texts:
        kept |= {"license": "other", "license_link": texts[0]}
    front = {
        **kept,
        "base_model": sources.base_model,
        "datasets": sorted(
            {re.split("[:@]", of)[1] for of in _names(sources.manifest) if of.startswith("hf:")}
        ),
        "library_name": "gossamer" if _is_packed(found) else "transformers",
        "pipeline_tag": kept.get("pipeline_tag", _pipeline(found)[0]),
        "tags": _tags(found, sources.scheme),
        "model-index": _model_index(name.split("/")[-1], _pipeline(found), sources.results),
    }
    return {key: value for key, value in front.items() if value}


def _tags(found: InspectResult, scheme: str | None) -> list[str]:
    sparse = ["sparse", "pruned"] if found.sparsity > LEAST_SPARSITY else []
    return ["gossamer", *sparse, *([scheme.lower(), "compressed-tensors"] if scheme else _types(found))]


def _own_card(found: InspectResult) -> Mapping[str, Any]:
    """The front matter of the README.md that came with the model; nothing where it cannot be read."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    block = REGEX_YAML_BLOCK.search(found.texts.get("README.md", ""))
    try:
        front = yaml.safe_load(block[2]) if block else None
    except (yaml.YAMLError, RecursionError):  # a card is prose: not ours to mend
        front = None
    return front if isinstance(front, dict) else {}


def _pipeline(found: InspectResult) -> tuple[str, str]:
    ranks = found.task == "sequence" and len(found.labels) == 1
    return ("text-ranking", "Text ranking") if ranks else PIPELINES[found.task]


def _model_index(
    name: str, pipeline: tuple[str, str], results: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """One entry for each task of each run; of a metric also its standard error, recovery and examples."""
    entries = []
    for result in results:
        for task, metrics in _metrics(result).items():
            measured = []
            for metric, value in metrics.items():
                args = {
                    "standard_error": result.get("standard_errors", {}).get(task, {}).get(metric),
                    "num_examples": result.get("num_examples", {}).get(task),
                }
                if metric == next(iter(metrics)):
                    args["recovery"] = result.get("recovery", {}).get(task)
                    args["recovery_standard_error"] = result.get("recovery_errors", {}).get(task)
                args = {key: entry for key, entry in args.items() if entry is not None}
                measured.append(
                    {"type": metric, "name": metric, "value": value, **({"args": args} if args else {})}
                )
            task_type = dict(zip(("type", "name"), pipeline, strict=True))
            entries.append({"task": task_type, "dataset": {"type": task, "name": task}, "metrics": measured})
    return [{"name": name, "results": entries}] if entries else []


def _metrics(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Task -> its metrics, the one it is known by first; the perplexity of a text is a task of its own."""
    found = {task: {"accuracy": value} for task, value in result.get("accuracy", {}).items()}
    for task, metrics in result.get("metrics", {}).items():
        first = primary(metrics)
        found[task] = {first: metrics[first], **metrics}
    if result.get("perplexity") is not None:
        found = {"perplexity": {"perplexity": result["perplexity"]}, **found}
    return found


def _summary(found: InspectResult, sources: Sources) -> str:
    architecture = found.architecture
    of = f"`{sources.base_model}`" if sources.base_model else "a dense model"
    zeros = (
        f"{found.sparsity:.1%} of its {found.side}'s linear weights are zero"
        if found.sparsity > LEAST_SPARSITY
        else "dense"
    )
    made = ", ".join(dict.fromkeys(step.stage for step in found.provenance)) or "nothing that is recorded"
    return (
        f"{architecture['model_type']} of {found.num_parameters:,} parameters, made of {of} with Gossamer "
        f"({made}): {zeros}; they are stored as {_stored(found)}, {found.bits_per_weight:.2f} bits a weight."
    )


def _use(name: str, found: InspectResult) -> str:
    """How to try it, as code."""
    file = Path(found.model).name if _is_packed(found) else name
    fetched = [f"hf download {name} {file} --local-dir ."] if _is_packed(found) else []
    if found.task == "generation":
        also = "" if _is_packed(found) else "    # or transformers' AutoModelForCausalLM"
        lines = [*fetched, f'gossamer run {file} "Once upon a time"{also}']
    else:
        embed = [f"gossamer embed {file} TEXTS.txt -o VECTORS.npy"] if found.task in OF_VECTORS else []
        call = f"import gossamer; print(gossamer.Encoder('{file}').{CALLS[found.task]})"
        lines = [*fetched, *embed, f'python -c "{call}"']
    return "".join(f"    {line}\n" for line in lines)


def _facts(found: InspectResult, sources: Sources) -> list[tuple[str, ...]]:
    seeds = [
        f"{step['stage']} {value}"
        for step in _steps(found, sources.manifest)
        for option, value in step.get("job", {}).items()
        if option == "seed" or option.endswith("_seed")
    ]
    facts = [
        ("parameters", f"{found.num_parameters:,}"),
        ("nonzero parameters", f"{found.num_parameters - _num_zeros(found):,}"),
        ("bytes", f"{found.num_bytes:,}"),
        (f"zeros of the {found.side}'s linears", f"{found.sparsity:.2%}"),
        ("stored as", _stored(found)),
        ("scheme", sources.scheme or ""),
        ("context", f"{_context(found):,} tokens"),
        ("licence", found.license or "unknown"),
        ("seeds", ", ".join(seeds)),
    ]
    return [fact for fact in facts if fact[1]]


def _context(found: InspectResult) -> int:
    """Tokens of a text at most."""
    return found.pooling.max_length if found.pooling else found.architecture["max_position_embeddings"]


def _scores(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A row a metric: value and recovery with their standard errors, where these are known."""
    rows = []
    for result in results:
        for task, metrics in _metrics(result).items():
            errors = result.get("standard_errors", {}).get(task, {})
            recovery, of_recovery = (result.get(key, {}).get(task) for key in ("recovery", "recovery_errors"))
            examples = result.get("num_examples", {}).get(task)
            if task == "perplexity":
                examples = f"{result.get('num_tokens'):,} tokens, {result.get('row_length')} a row"
            for metric, value in metrics.items():
                first = metric == next(iter(metrics))
                shown = _with_error(value, errors.get(metric), share=is_share(metric))
                recovered = _with_error(recovery, of_recovery) if first and recovery is not None else ""
                rows.append((task, metric, shown, recovered, str(examples or "")))
    return rows


def _with_error(value: float, error: float | None, *, share: bool = True) -> str:
    shown = (f"{value:.1%}" if share else f"{value:.4g}") if isinstance(value, int | float) else str(value)
    return shown if error is None else f"{shown} ± {f'{error:.1%}' if share else f'{error:.2g}'}"


def _speeds(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            str(row["batch"]),
            str(row["prompt"]),
            f"{row['decode_tokens_per_s']:.4g}",
            f"{row['prompt_tokens_per_s']:.4g}",
            f"{row['gb_per_s']:.3g}",
            f"{_device(row)}, {row['values']}",
        )
        for row in rows
    ]


def _device(row: Mapping[str, Any]) -> str:
    """What a row of `bench` was measured on."""
    return row["gpu"] if "gpu" in row else f"{row['cpu']}, {row['num_threads']} threads, {row['isa']}"


def _recipe(found: InspectResult, sources: Sources) -> str:
    """The stages with all of their options, oldest first, in YAML."""
    steps = []
    for step in _steps(found, sources.manifest):
        job = step.get("job", {})
        options = {
            name: without_folders(value, name)
            for name, value in job.items()
            if name not in (*PLACES, *OF_THE_MACHINE) and value not in (None, "", [], ())
        }
        steps.append({"stage": step["stage"], **({"options": options} if options else {})})
    if not steps:
        return ""
    shown = yaml.safe_dump(steps, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None)
    return f"## Recipe\n\n```yaml\n{shown}```\n"


def _names(manifest: Mapping[str, Any]) -> list[str]:
    """Every source of text that a stage has read."""
    return [
        of["source"] for step in manifest.get("lineage", ()) for of in step.get("data", ()) if "source" in of
    ]


def _data(manifest: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for step in manifest.get("lineage", ()):
        for of in step.get("data", ()):
            known = [f"{of[key]:,} {word}" for key, word in _COUNTS.items() if isinstance(of.get(key), int)]
            known += [
                f"{key} `{of[key][:16]}`" for key in ("sha256", "revision") if isinstance(of.get(key), str)
            ]
            tokens = f"{of['num_tokens']:,}" if isinstance(of.get("num_tokens"), int) else ""
            source = str(without_folders(of.get("source", "")))
            rows.append((step["stage"], source, str(of.get("weight", "")), tokens, ", ".join(known)))
    return rows


_COUNTS = {"num_documents": "documents", "num_files": "files", "bytes": "bytes"}


def _versions(manifest: Mapping[str, Any]) -> str:
    versions = manifest.get("versions", {})
    return f"Made with {', '.join(f'{name} {it}' for name, it in versions.items())}.\n" if versions else ""


def _steps(found: InspectResult, manifest: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Of a directory what its manifest says of each stage; a packed file knows their names only."""
    return manifest.get("lineage") or [{"stage": step.stage} for step in found.provenance]


def _of_layers(found: InspectResult) -> list[Matrix]:
    return [matrix for matrix in found.matrices if matrix.is_in_a_layer]


def _num_zeros(found: InspectResult) -> int:
    return sum(matrix.num_weights - matrix.nonzeros for matrix in _of_layers(found))


def _types(found: InspectResult) -> list[str]:
    return sorted({matrix.values for matrix in _of_layers(found)})


def _stored(found: InspectResult) -> str:
    return " and ".join(sorted({f"{matrix.storage} {matrix.values}" for matrix in _of_layers(found)}))


def _is_packed(found: InspectResult) -> bool:
    return found.parts is not None


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown under its title; nothing without rows."""
    if not rows:
        return ""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [" | ".join(row) for row in (columns, ["---"] * len(columns), *cells)]
    return (f"{title}\n\n" if title else "") + "".join(f"| {line} |\n" for line in lines)
