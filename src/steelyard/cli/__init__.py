"""The command line, ``steelyard COMMAND``: see ``HELP`` for its commands.

Each command imports what it needs when it runs, so that ``list`` and ``--help`` answer at once.
"""

import difflib
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import steelyard
from steelyard.recipes import catalog

if TYPE_CHECKING:
    from steelyard.cli.arguments import Report
    from steelyard.lab.recipe import Form, Recipe

HELP = """\
usage: steelyard COMMAND ...

Learning objectives as programs: train a published method against its baseline and see whether
its claim holds on this machine.

  list               the 35 systems and how far each is built
  show NAME          what a system is for, its claims, how long its experiment takes
  run NAME           run the experiment and judge its claims (NAME may be a file of yours)
  sweep NAME ...     run many seeds of several experiments on Ray, here or on a cluster
  resume DIR         go on with a run or a sweep that was stopped
  report [DIR ...]   one page with all results, readable offline; --serve keeps it current
  anatomy NAME ...   draw what objectives pay attention to: ppo, dpo, your own
  copy NAME FILE     get an experiment as one file to change, then: steelyard run FILE
  doctor             what is installed here and what works

Each command explains itself, for example: steelyard run bpo --help
--version shows the version, --debug the full traceback of an error.
"""

RUN_HELP = """\
usage: steelyard run NAME [--full] [--seeds N] [--out DIR] [--workers N] [flags of the recipe]

Run an experiment and judge its claims. NAME is a system (see: steelyard list) or a recipe file of
yours (see: steelyard copy --help). Each recipe explains its own flags:

  steelyard run bpo --help
  steelyard run bpo --seeds 5
  steelyard run bpo --full --out results/mine
"""

_MISTAKES = (ValueError, FileExistsError, FileNotFoundError)
VERDICT_STYLES = {"HOLDS": "bold green", "FAILS": "bold red", "UNDECIDED": "yellow"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done. 1: something failed on the way. 2: the command was wrong. 130: stopped by Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, for example `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        # A mistake of the user, the machine or the lab gets one line; any other is a bug of ours
        # or of the user's recipe, whose traceback helps.
        known = (ValueError, OSError, ImportError)
        code = getattr(error, "exit_code", None)
        if code is None and not isinstance(error, known):
            raise
        if debug:
            traceback.print_exc()
        print(_plain(error), file=sys.stderr)
        return code or (2 if isinstance(error, _MISTAKES) else 1)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if arguments[0] == "--version":
        print(f"steelyard {steelyard.__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no command is called {command!r}{hint} (see: steelyard --help)")
    return COMMANDS[command](rest)


def _list(arguments: list[str]) -> int:
    if arguments:  # --help, or a mistake: only then is the parser worth its import
        from steelyard.cli.arguments import List, parse

        parse(List, arguments)
    from rich.console import Console
    from rich.table import Table

    # Cut long titles at the terminal's edge, but nothing for a reader such as grep.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    by_status: dict[str, list[catalog.System]] = {name: [] for name in catalog.STATUSES}
    for system in catalog.SYSTEMS:
        others = (name for name, of in catalog.OTHER_RECIPES.items() if of == system.name)
        for each in (system, *map(catalog.find, others)):
            by_status[catalog.status(each)].append(each)
    for name, systems in by_status.items():
        if not systems:
            continue
        table = Table(title=f"{name} ({len(systems)})", title_justify="left", box=None)
        table.add_column("name", style="bold", min_width=23)
        table.add_column("package", min_width=15)
        table.add_column("paper", no_wrap=True, overflow="ellipsis")
        for system in systems:
            table.add_row(system.name, system.package, system.title)
        console.print(table)
        console.print()
    console.print("More about one: steelyard show NAME")
    return 0


def _show(arguments: list[str]) -> int:
    from rich.console import Console

    from steelyard.cli.arguments import Show, parse

    console = Console(highlight=False, markup=False)
    name = parse(Show, arguments).name
    if _is_file(name):
        _show_recipe(_load(name), name)
        return 0
    system = catalog.find(name)
    state = catalog.status(system)
    console.print(f"{system.name}: {state}", style="bold")
    console.print(system.purpose)
    console.print()
    names = ", ".join(system.names)
    _print_rows(
        ("Paper", f"{system.title}, https://arxiv.org/abs/{system.arxiv}"),
        ("Package", f"steelyard.{system.package}: {names}"),
    )
    if state == "recipe ready":
        console.print()
        _show_recipe(_load(name), name)
    return 0


def _show_recipe(recipe: "Recipe", name: str) -> None:
    print(f"{recipe.doc.strip()}\n")
    _print_rows(
        *(("Claim", f"{claim.statement} ({claim.source})") for claim in recipe.claims),
        *(
            (label, f"steelyard run {shlex.quote(name)}{flag}: {_form_text(form)}")
            for label, form, flag in (("Quick", recipe.quick, ""), ("Full", recipe.full, " --full"))
        ),
    )


def _print_rows(*rows: tuple[str, str]) -> None:
    """Print labels with texts that wrap beside, not below, them."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for label, text in rows:
        grid.add_row(Text(label, style="bold"), Text(text))
    Console(highlight=False).print(grid)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(RUN_HELP, end="")
        return 0 if arguments else 2
    name, *flags = arguments
    if name.startswith("-"):
        raise ValueError(f"the NAME comes first: steelyard run NAME {shlex.join(arguments)}")
    recipe = _load(name)
    from steelyard.cli.arguments import parse_run

    form_name = "full" if "--full" in flags else "quick"
    form = recipe.form(form_name)
    config, seeds, out, workers = parse_run(
        name, form.config, form.seeds, _run_text(recipe, name), flags
    )
    from rich.console import Console

    from steelyard.lab.runner import start_run

    console = Console(highlight=False, markup=False)
    console.print(recipe.title, style="bold")
    console.print("Stop it with Ctrl-C whenever you like; it goes on where it was.")
    folder = start_run(
        name,
        form=form_name,
        config=recipe.config_to(config),
        seeds=seeds,
        out=out,
        workers=workers,
        console=console,
    )
    return _summary(folder)


def _resume(arguments: list[str]) -> int:
    from rich.console import Console

    from steelyard.cli.arguments import Resume, parse
    from steelyard.lab.runner import resume_run

    given = parse(Resume, arguments)
    console = Console(highlight=False, markup=False)
    if (given.folder / "sweep.json").is_file():
        from steelyard.lab.sweep import resume_sweep

        folder = resume_sweep(
            given.folder, address=given.address, cpus=given.workers, console=console
        )
        return _sweep_summary(folder)
    if given.address is not None:
        raise ValueError("--address is for sweeps, and DIR holds none")
    return _summary(resume_run(given.folder, workers=given.workers, console=console))


def _sweep(arguments: list[str]) -> int:
    from rich.console import Console

    from steelyard.cli.arguments import Sweep, parse

    given = parse(Sweep, arguments)
    if not given.names:
        raise ValueError("name at least one experiment (see: steelyard sweep --help)")
    for name in given.names:
        _load(name)
    from steelyard.lab.sweep import start_sweep

    folder = start_sweep(
        given.names,
        form="full" if given.full else "quick",
        seeds=given.seeds,
        out=given.out,
        address=given.address,
        cpus=given.cpus,
        retries=given.retries,
        console=Console(highlight=False, markup=False),
    )
    return _sweep_summary(folder)


def _sweep_summary(folder: Path) -> int:
    from rich.console import Console

    from steelyard.lab.sweep import run_folders

    console = Console(highlight=False, markup=False)
    for run in run_folders(folder):
        console.print(f"\n{run.name}", style="bold")
        _summary(run)
    console.print(f"\nAll on one page: steelyard report {shlex.quote(str(folder))}")
    return 0


def _report(arguments: list[str]) -> int:
    from steelyard.cli.arguments import Report, parse
    from steelyard.lab.report import find_results, find_unfinished, render_results

    if "--serve" in arguments[:-1]:  # --serve 8000 is --serve --port 8000
        after = arguments.index("--serve") + 1
        if arguments[after].isdecimal():
            arguments = [*arguments[:after], "--port", *arguments[after:]]
    given = parse(Report, arguments)
    if given.serve:
        from steelyard.lab._report_server import serve

        serve(lambda: _places(given), given.port, print)
        return 0
    if given.port is not None:
        raise ValueError("--port goes with --serve")
    places = _places(given)
    files, unfinished = find_results(places), find_unfinished(places)
    shown = render_results(files, given.out, unfinished=unfinished)
    older = f" ({len(files) - len(shown)} older left out)" if len(files) > len(shown) else ""
    more = f" and {_count(len(unfinished), 'unfinished run')}" if unfinished else ""
    print(f"{_count(len(shown), 'result')}{older}{more} on {given.out}")
    return 0


def _places(given: "Report") -> list[Path]:
    """Where results are: what was given, or all known runs and what this folder keeps."""
    if given.folders:
        return [*given.folders, *([given.results] if given.results else [])]
    results = given.results or Path("results")
    kept = [Path("runs")] if Path("runs").is_dir() else []
    return [*_known_runs(), *kept, *([results] if given.results or results.is_dir() else [])]


def _known_runs() -> list[Path]:
    """Folders of the runs in the index that are still there; the report goes on without it."""
    from steelyard.lab.index import IndexUnavailableError, list_runs

    try:
        folders = [run["folder"] for run in list_runs()]
    except IndexUnavailableError as error:
        print(f"Warning: {error}", file=sys.stderr)
        return []
    return [folder for folder in folders if (folder / "config.json").is_file()]


def _anatomy(arguments: list[str]) -> int:
    from steelyard.cli.anatomy import describe, draw
    from steelyard.cli.arguments import Anatomy, parse

    given = parse(Anatomy, arguments, description=describe())
    if not given.names:
        raise ValueError("name at least one objective (see: steelyard anatomy --help)")
    rows = draw(
        given.names,
        over=given.over,
        out=given.out,
        limits=given.limits,
        scale=given.scale,
        classes=given.classes,
        title=given.title,
    )
    for name, panel, words in rows:
        print(f"{name}, {panel}: {words}")
    print(f"Figure: {given.out}")
    return 0


def _copy(arguments: list[str]) -> int:
    from steelyard.cli.arguments import Copy, parse

    given = parse(Copy, arguments)
    system = _ready(given.name)
    source = Path(catalog.__file__).with_name(f"{system.module}.py").read_bytes()
    try:
        with given.file.open("wb" if given.force else "xb") as file:
            file.write(source)
    except FileExistsError:
        reason = f"{given.file} exists and was left as it is; overwrite it with --force"
        raise FileExistsError(reason) from None
    print(f"{given.file} is yours to change. Run it with: steelyard run {given.file}")
    return 0


def _doctor(arguments: list[str]) -> int:
    from steelyard.cli.arguments import Doctor, parse

    parse(Doctor, arguments)
    from steelyard.cli.doctor import examine

    return examine()


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "list": _list,
    "show": _show,
    "run": _run,
    "sweep": _sweep,
    "resume": _resume,
    "report": _report,
    "anatomy": _anatomy,
    "copy": _copy,
    "doctor": _doctor,
}


def _is_file(name: str) -> bool:
    return name.endswith(".py") or os.sep in name


def _ready(name: str) -> catalog.System:
    """Return the system called ``name`` if it has a recipe; else say how far it is."""
    system = catalog.find(name)
    state = catalog.status(system)
    if state == "planned":
        raise ValueError(f"{name} is not built yet (see: steelyard list)")
    if state != "recipe ready":
        raise ValueError(
            f"the experiment of {name} is not built yet; its method can be used: "
            f"from steelyard.{system.package} import {', '.join(system.names)}"
        )
    return system


def _load(name: str) -> "Recipe":
    if not _is_file(name):
        _ready(name)
    elif not Path(name).is_file():
        raise FileNotFoundError(f"there is no file {name}")
    from steelyard.lab.recipe import load_recipe

    return load_recipe(name)


def _run_text(recipe: "Recipe", name: str) -> str:
    return (
        f"{recipe.title}\n\n"
        f"Quick form: {_form_text(recipe.quick)}. Full form (--full): {_form_text(recipe.full)}. "
        f"The defaults below are those of the form you ask for.\n\n"
        f"Example: steelyard run {shlex.quote(name)} --seeds 5 --out runs/five"
    )


def _summary(folder: Path) -> int:
    """Print the verdicts of a finished run and where everything is."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from steelyard.lab._format import effect, number

    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    table = Table(title="Verdicts", title_justify="left")
    for heading in ("verdict", "claim", "effect [95 % interval]", "needed", "seeds"):
        table.add_column(heading)
    judged = [row for row in result["claims"] if row["verdict"] != "NOT RUN"]
    for row in judged:
        statement = row["statement"] + (f" ({row['note']})" if row["note"] else "")
        table.add_row(
            Text(row["verdict"], style=VERDICT_STYLES.get(row["verdict"], "dim")),
            Text(statement),
            effect(row),
            f"{'>' if _strict(row) else '>='} {number(row['margin'])}",
            str(row["seeds"]),
        )
    console = Console(highlight=False)
    console.print(table)
    console.print("An effect is a difference per seed, positive = as claimed.", style="dim")
    if left := len(result["claims"]) - len(judged):
        console.print(f"{_count(left, 'claim')} on parts that were not run.", style="dim")
    console.print(Text(f"Figures: {folder / 'figures'}"))
    console.print(Text(f"Report:  {folder / 'report.html'}"))
    return 0


def _strict(row: dict[str, Any]) -> bool:
    return isinstance(row["baseline"], str) and row["margin"] == 0


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _form_text(form: "Form") -> str:
    from steelyard.lab.progress import duration

    return f"{_count(form.seeds, 'seed')}, about {duration(60 * form.minutes)} on 2 cores"


def _plain(error: BaseException) -> str:
    """Say what went wrong without Python's error numbers and type names."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename is not None else ""
        return f"steelyard: {error.strerror}{where}"
    return f"steelyard: {error}" if str(error) else f"steelyard: {type(error).__name__}"
