"""The command line: a verb is a dataclass of options and a function; here it gets its flags and its output.

Exit codes: 0 done, 2 bad usage or bad input, 130 Ctrl-C, 1 the environment (disk full, no permission), 141
when whoever read the output has gone, as of programs that the signal of a broken pipe ends.
"""

import dataclasses
import datetime
import difflib
import importlib
import io
import json
import os
import re
import shlex
import sys
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text

from gossamer.allocator import keep_freed_memory
from gossamer.errors import ConfigError, GossamerError, Interrupted
from gossamer.job.processes import is_first, num_processes, refuse_several
from gossamer.job.report import Event, Progress, Result, Table
from gossamer.tools.terminal import Dialogue, converse

LOGGED = ("learning_rate", "grad_norm")  # only in the log files of training; a bar has no room for them
LINE_S = 30.0  # between two lines of progress where stderr is no terminal
BROKEN_PIPE = 141
NUMBER = re.compile(r"[-+~]?[.\d]|inf|nan")


class Output(Console):
    """A console that lets the exception of a broken pipe through, to the one place that knows it."""

    def on_broken_pipe(self) -> None:
        raise


out, err = Output(highlight=False), Output(stderr=True, highlight=False)


@dataclass(frozen=True)
class Verb:
    """Where a verb lives; modules are imported only when their verb is called."""

    module: str
    job: str
    summary: str
    in_several: bool = False  # whether it may run in the several processes that torchrun starts
    function: str = ""  # its name, where it is not the verb's (`import` is a word of Python's own)

    def load(self, name: str) -> tuple[type, Callable[..., Any]]:
        module = importlib.import_module(self.module)
        return getattr(module, self.job), getattr(module, self.function or name)


VERBS = {
    "demo": Verb(
        "gossamer.runs.demo", "Demo", "the tour: a chat model halved and won back, this CPU, a small model"
    ),
    "compress": Verb("gossamer.runs.compress", "Compress", "prune, train, quantize and pack in one go"),
    "import": Verb(
        "gossamer.stages.import_model",
        "Import",
        "a GGUF file becomes a model directory, a recipe a command line",
        function="import_model",
    ),
    "prune": Verb("gossamer.stages.prune", "Prune", "set weights to zero with SparseGPT"),
    "pretrain": Verb("gossamer.stages.pretrain", "Pretrain", "train on text, zeros fixed", in_several=True),
    "finetune": Verb(
        "gossamer.stages.finetune", "Finetune", "train on examples, zeros fixed, distilling", in_several=True
    ),
    "quantize": Verb("gossamer.stages.quantize", "Quantize", "round to INT8 with every zero kept"),
    "evaluate": Verb(
        "gossamer.stages.evaluate", "Evaluate", "perplexity, and tasks of lm-evaluation-harness or of files"
    ),
    "pack": Verb("gossamer.stages.pack", "Pack", "write the .goss file that the engine runs"),
    "run": Verb("gossamer.tools.run", "Run", "complete a prompt, or chat"),
    "embed": Verb("gossamer.tools.embed", "Embed", "the vectors of a file's texts, as .npy"),
    "serve": Verb("gossamer.server", "Serve", "an OpenAI-compatible server"),
    "bench": Verb("gossamer.tools.bench", "Bench", "tokens/s beside bandwidth, measured in one run"),
    "inspect": Verb("gossamer.tools.inspect", "Inspect", "sizes, sparsity and storage, layer by layer"),
    "verify": Verb("gossamer.tools.verify", "Verify", "zeros kept, streams sound, backends agree"),
    "publish": Verb("gossamer.tools.publish", "Publish", "a model card, and the model, to the hub"),
    "doctor": Verb("gossamer.tools.doctor", "Doctor", "why this machine is fast or slow"),
}


def main() -> None:
    """Entry point of `gossamer`: parse, run the verb, exit with its code.

    What an output's encoding cannot write becomes "?", and undecodable input U+FFFD. `... | head` ends us
    without a word.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = call_and_flush(sys.argv[1:])
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):  # which Python flushes once more when it ends
            if stream is not None:
                os.dup2(nowhere, stream.fileno())
        code = BROKEN_PIPE
    sys.exit(code)


def call_and_flush(arguments: list[str]) -> int | str | None:
    """`call`, with all of its output written."""
    try:
        code = call(arguments)
    except SystemExit as error:  # after --help
        code = error.code
    if sys.stdout is not None:
        sys.stdout.flush()
    return code


def call(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    as_json, arguments = "--json" in arguments, [word for word in arguments if word != "--json"]
    if not arguments or arguments[0] in ("-h", "--help"):
        return usage()
    if arguments == ["--version"]:
        print("gossamer", version("gossamer"))
        return 0
    name, *rest = arguments
    try:
        job, function = parse(name, rest)
        if not VERBS[name].in_several:
            refuse_several(name)
        if VERBS[name].module.startswith(("gossamer.stages", "gossamer.runs")):
            keep_freed_memory()
        with ProgressToJson() if as_json else ProgressBars() as progress:
            result = function(job, progress)
            if isinstance(result, Iterator):
                return stream(result, as_json)
            if isinstance(result, Dialogue):
                return talk(result, as_json)
        if is_first():
            show_json(result) if as_json else show(result)
    except GossamerError as error:
        return fail(str(error), 2)
    except Interrupted as error:
        return fail(f"{error}; to go on: {resuming(arguments, job)}", 130) if is_first() else 130
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except BrokenPipeError:
        raise
    except (OSError, MemoryError) as error:
        return fail(f"the environment failed: {error or 'out of memory'}", 1)
    except RuntimeError as error:
        from gossamer.machine import ran_out_of_memory

        if not ran_out_of_memory(error):
            raise
        return fail(f"the environment failed: out of memory ({error})", 1)
    except ModuleNotFoundError as error:
        return fail(f"`{name}` needs {error.name}: pip install 'gossamer[compress]'", 1)
    return 0


def resuming(arguments: list[str], job: Any) -> str:
    """The command line that goes on with the interrupted one (`compress` finds it by itself)."""
    can_resume = "resume" in {field.name for field in dataclasses.fields(job)}
    flags = ["--resume"] if can_resume and "--resume" not in arguments else []
    torchrun = ["torchrun", "--nproc-per-node", str(num_processes()), "-m"] if num_processes() > 1 else []
    return shlex.join([*torchrun, "gossamer", *arguments, *flags])


def usage() -> int:
    """Print the verbs, one line each."""
    table = RichTable.grid(padding=(0, 2))
    for name, verb in VERBS.items():
        table.add_row(Text(f"  {name}", style="bold"), verb.summary)
    out.print(
        "usage: gossamer VERB ... (gossamer VERB --help shows its flags; --json prints objects)\n"
        "       gossamer --version\n"
    )
    out.print(table)
    return 0


def parse(name: str, arguments: list[str]) -> tuple[Any, Callable[..., Any]]:
    """The verb's job, filled from the arguments, and its function; raises ConfigError for unknown words."""
    if name not in VERBS:
        raise ConfigError(f"unknown verb {name!r}{nearest(name, VERBS)}; `gossamer --help` lists the verbs")
    job_type, function = VERBS[name].load(name)
    fields = help_order(job_type)
    flags = flag_names(fields)
    for argument in arguments:
        if argument.startswith("--") and argument.split("=")[0] not in flags:
            raise ConfigError(f"unknown flag {argument.split('=')[0]}{nearest(argument, flags)}")
    parsed = tyro.cli(
        flagged(job_type, fields),
        prog=f"gossamer {name}",
        description=f"{VERBS[name].summary} (--json prints one object a line)",
        args=gather(arguments, {flag for flag, field in flags.items() if field and is_list(job_type, field)}),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return job_type(**vars(parsed)), function


def help_order(job_type: type) -> dict[str, dataclasses.Field[Any]]:
    """name -> field: what must be given, what the verb has of its own, then what it shares with others."""
    shared = {name for parent in job_type.__mro__[1:] for name in getattr(parent, "__annotations__", {})}
    fields = dataclasses.fields(job_type)
    ordered = sorted(fields, key=lambda f: (f.default is not dataclasses.MISSING, f.name in shared))
    return {field.name: field for field in ordered}


def flag_names(fields: dict[str, dataclasses.Field[Any]]) -> dict[str, str]:
    """Every accepted flag -> the field it fills ("" for --help)."""
    flags = {"--help": ""} | {flag_of(field): name for name, field in fields.items()}
    return flags | {
        field.metadata["short"]: name for name, field in fields.items() if field.metadata.get("short")
    }


def flag_of(field: dataclasses.Field[Any]) -> str:
    """The long flag of a field, such as `--output-dir`."""
    return "--" + (field.metadata.get("flag") or field.name.replace("_", "-"))


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """ "; did you mean X?" for the closest known word, or nothing."""
    close = difflib.get_close_matches(word.split("=")[0], list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def is_list(job_type: type, field: str) -> bool:
    return typing.get_origin(typing.get_type_hints(job_type)[field]) is tuple


def gather(arguments: list[str], list_flags: set[str]) -> list[str]:
    """Put the values of a repeated list flag behind its first occurrence (tyro keeps only the last one)."""
    plain: list[str] = []
    values: dict[str, list[str]] = {}
    current: list[str] = plain
    for argument in arguments:
        flag, _, value = argument.partition("=")
        if flag in list_flags:
            current = values.setdefault(flag, [])
            current += [value] if value else []
        else:
            current = plain if argument.startswith("-") else current
            current.append(argument)
    return plain + [word for flag, words in values.items() for word in (flag, *words)]


def flagged(job_type: type, fields: dict[str, dataclasses.Field[Any]]) -> type:
    """The job's dataclass with tyro's annotations made from each field's `option` metadata."""
    hints = typing.get_type_hints(job_type)
    specification = []
    for name, field in fields.items():
        short, positional = field.metadata.get("short"), field.metadata.get("positional")
        face = tyro.conf.arg(
            help=field.metadata.get("help"),
            name=field.metadata.get("flag"),
            aliases=[short] if short else None,
            metavar=name.upper() if positional else None,
            help_behavior_hint="" if field.default in (None, ()) else None,  # the help itself says what then
        )
        annotated = Annotated[(hints[name], face, *([tyro.conf.Positional] if positional else []))]
        specification.append((name, annotated, dataclasses.field(default=field.default)))
    return dataclasses.make_dataclass(job_type.__name__, specification, frozen=True, kw_only=True)


def fail(message: str, code: int) -> int:
    err.print(Text.assemble(("gossamer: ", "bold red"), message), soft_wrap=True)
    return code


class ProgressBars:
    """Draws one bar per stage on stderr; a line every half minute and at its end where that is no terminal.

    A stage that a run has twice begins its bar and its time anew.
    Used as a context manager. In a narrow terminal the last figures give way.
    """

    def __init__(self) -> None:
        whole, rest = Column(no_wrap=True), Column(no_wrap=True, overflow="ellipsis", ratio=1)
        self.bars = Bars(
            TextColumn("{task.description}", table_column=whole),
            BarColumn(bar_width=12),
            MofNCompleteColumn(table_column=whole),
            TimeElapsedColumn(table_column=whole),
            TextColumn("{task.fields[figures]}", table_column=rest),
            console=err,
            expand=True,
        )
        self.tasks: dict[str, TaskID] = {}
        self.last_line = time.monotonic()

    def __enter__(self) -> Progress:
        return self.event

    def __exit__(self, *error: object) -> None:
        if self.tasks:
            self.bars.stop()

    def event(self, event: Event) -> None:
        if event.lasting:
            err.print(f"{event.stage}: {event.message}", soft_wrap=True, markup=False)
            return
        figures = "  ".join(
            figure(name, value) for name, value in event.metrics.items() if name not in LOGGED
        )
        if not err.is_terminal:
            ended = event.total and event.done >= event.total
            if ended or time.monotonic() - self.last_line > LINE_S:
                self.last_line = time.monotonic()
                count = "" if ended or not event.total else f" {event.done:,.0f} of {event.total:,.0f}"
                line = f"{event.stage}: {event.message}{count}  {figures}"
                err.print(line.rstrip(), soft_wrap=True, markup=False)
            return
        if not self.tasks:
            self.bars.start()
        if event.stage not in self.tasks:
            self.tasks[event.stage] = self.bars.add_task(event.stage, total=None, figures="")
        task = self.tasks[event.stage]
        if event.done < self.bars.tasks[task].completed:  # the stage has begun again
            self.bars.reset(task)
        self.bars.update(
            task,
            completed=event.done,
            total=event.total or None,
            figures=figures or event.message,
            description=event.stage,
        )


class ProgressToJson:
    """Prints each event as one JSON object a line, at most ten a second and the last of every stage."""

    def __enter__(self) -> Progress:
        self.last = 0.0
        return self.event

    def __exit__(self, *error: object) -> None:
        pass

    def event(self, event: Event) -> None:
        if event.lasting or event.done >= event.total or time.monotonic() - self.last > 0.1:
            self.last = time.monotonic()
            print_json({"event": dataclasses.asdict(event)})


def stream(pieces: Iterator[Any], as_json: bool) -> int:
    """Print text as it comes (`run`)."""
    for piece in pieces:
        if as_json:
            print_json(dataclasses.asdict(piece))
        else:
            print(piece.text, end="", flush=True)
    if not as_json:
        print()
    return 0


def talk(dialogue: Dialogue, as_json: bool) -> int:
    """A chat in the terminal (`run`)."""
    if as_json:
        raise ConfigError("--json prints the pieces of one text; give a PROMPT")
    converse(dialogue, lambda line: err.print(Text(line, style="dim"), soft_wrap=True))
    return 0


def show_json(result: Result) -> None:
    """Print the result's objects, one a line."""
    for row in result.objects():
        print_json({"result": dataclasses.asdict(row)})


def print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, default=str, ensure_ascii=False), flush=True)


def show(result: Result) -> None:
    """Draw the result's tables, or its plain fields, then say what it suggests to do next."""
    for table in result.tables() or [plain_fields(result)]:
        if table.to_paste:
            out.print(f"{table.title}\n\n{markdown(table)}", soft_wrap=True, markup=False)
        else:
            out.print(drawn(table))
    for line in result.closing:
        out.print(line, soft_wrap=True, markup=False)


def drawn(table: Table) -> RichTable:
    """The table with lines: columns of numbers to the right, of words to the left."""
    drawing = RichTable(title=table.title or None, title_justify="left", show_header=any(table.columns))
    for index, column in enumerate(table.columns):
        cells = [row[index] for row in table.rows if row[index]]
        numbers = index > 0 and all(NUMBER.match(cell) for cell in cells)
        drawing.add_column(column, justify="right" if numbers else "left")
    for row in table.rows:
        drawing.add_row(*(Text(cell) for cell in row))
    return drawing


def markdown(table: Table) -> str:
    """The table as GitHub shows it, numbers aligned right, and readable as plain text."""
    lines = [table.columns, *table.rows]
    widths = [max(3, *(len(line[index]) for line in lines)) for index in range(len(table.columns))]
    rule = [f"{'-' * (width - 1)}{':' if index else '-'}" for index, width in enumerate(widths)]
    return "".join(f"| {' | '.join(justified(line, widths))} |\n" for line in (lines[0], rule, *lines[1:]))


def justified(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Words of one line, the first to the left and the others to the right."""
    pairs = list(zip(line, widths, strict=True))
    return [pairs[0][0].ljust(pairs[0][1]), *(cell.rjust(width) for cell, width in pairs[1:])]


def number(value: Any) -> str:
    """A figure as a person reads it."""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def plain_fields(result: Result) -> Table:
    """The texts and numbers of a result that has no tables of its own, a line each."""
    fields = vars(result).items()
    rows = [
        (name.replace("_", " "), number(value))
        for name, value in fields
        if isinstance(value, str | int | float)
    ]
    return Table("", ("", ""), rows)


def figure(name: str, value: Any) -> str:
    """A metric as a bar shows it; its name says the unit."""
    if name == "sparsity":
        return f"{value:.0%} zeros"
    if name == "eta_s":
        return f"ETA {datetime.timedelta(seconds=round(value))}"
    if name == "tokens_per_s":
        return f"{number(value)} tokens/s"
    if name.endswith("_gb"):
        return f"{name.removesuffix('_gb')} {value:.1f} GB"
    return f"{name} {number(value)}"
