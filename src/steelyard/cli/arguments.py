"""The arguments of each command, as dataclasses that tyro turns into flags and help."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

T = TypeVar("T")

Switch = Annotated[bool, FlagCreatePairsOff]
Name = Annotated[str, Positional, arg(metavar="NAME")]
Address = Annotated[str | None, arg(metavar="ADDRESS", help_behavior_hint="(default: none)")]


@dataclasses.dataclass(frozen=True)
class List:
    """Show the 35 systems and how far each is built."""


@dataclasses.dataclass(frozen=True)
class Show:
    """Show what a system is for, its claims, and how long its experiment takes."""

    name: Name
    """A system (see `steelyard list`) or a recipe file of yours."""


@dataclasses.dataclass(frozen=True)
class Resume:
    """Go on with a run or a sweep that was stopped. It ends with the numbers of an unbroken one."""

    folder: Annotated[Path, Positional, arg(metavar="DIR")]
    """The folder of the run or sweep, for example runs/bpo-quick-20260101-120000."""
    workers: Annotated[
        int | None, arg(metavar="N", help_behavior_hint="(default: as when it began)")
    ] = None
    """Seeds at a time."""
    address: Address = None
    """For a sweep: the Ray cluster to use, or auto; by default a Ray of its own on this machine."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Run several experiments over many seeds on Ray, on this machine or on a cluster.

    Each experiment gets a run folder in DIR and its verdicts. A seed whose worker is lost goes on
    from its checkpoint; the same command with the same --out goes on if the sweep itself was
    killed. On a cluster every machine must see DIR at the same path and have steelyard installed.
    Example: steelyard sweep bpo canon --seeds 20 --out runs/night
    """

    names: Annotated[tuple[str, ...], Positional, arg(metavar="NAME ...", help_behavior_hint="")]
    """Systems (see `steelyard list`) or recipe files of yours; settings are those of their form."""
    full: Switch = False
    """Run the papers' settings, not the quick forms."""
    seeds: Annotated[
        int | None, arg(metavar="N", help_behavior_hint="(default: as many as the form has)")
    ] = None
    """Seeds of each: 0, 1, 2, ..."""
    out: Annotated[
        Path | None, arg(metavar="DIR", help_behavior_hint="(default: a new one in runs)")
    ] = None
    """Folder of the sweep; if it holds this sweep already, it goes on."""
    address: Address = None
    """A Ray cluster: its address, or auto for the one this machine belongs to; by default a Ray of
    its own is started on this machine."""
    cpus: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all)")] = None
    """Cores of this machine to use, without --address."""
    retries: Annotated[int, arg(metavar="N")] = 3
    """How often a seed is given to another worker when its worker is lost."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Write one HTML page with all systems and results. It needs no network and is one file.

    Without DIR it shows all runs of yours and, where this folder has them, the results in runs
    and in results.
    """

    folders: Annotated[tuple[Path, ...], Positional, arg(metavar="DIR")] = ()
    """Run folders, folders of those, or result files."""
    results: Annotated[
        Path | None, arg(metavar="DIR", help_behavior_hint="(default: results, if it is here)")
    ] = None
    """Folder of kept results, as the project's results: DIR/NAME/*.json."""
    out: Path = Path("report.html")
    """The file to write."""
    serve: Switch = False
    """Show the page at an address of this machine and keep it current; no file is written."""
    port: Annotated[
        int | None, arg(metavar="PORT", help_behavior_hint="(default: 8765, or a free one)")
    ] = None
    """Port of that address; `--serve PORT` says the same."""


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """Draw what objectives pay attention to."""

    names: Annotated[tuple[str, ...], Positional, arg(metavar="NAME ...", help_behavior_hint="")]
    """Objectives of the library, or functions of yours: file.py:function, module:function."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("anatomy.svg")
    """The figure to write, .svg or .png; overwritten if it exists."""
    over: Annotated[
        Literal["log_ratio", "margin", "probability"] | None,
        arg(help_behavior_hint="(default: that of the names)"),
    ] = None
    """What is along the axis; needed for functions of yours alone."""
    limits: Annotated[
        tuple[float, float] | None,
        arg(metavar="LOW HIGH", help_behavior_hint="(default: 0 2.5, or -10 10, or 0 1)"),
    ] = None
    """Ends of the axis: ratios, nats or probabilities."""
    scale: Literal["auto", "linear", "log"] = "auto"
    """Scale of the pull; log shows its size without its sign."""
    classes: Annotated[int, arg(metavar="V")] = 10
    """Classes of the logits, over probability."""
    title: Annotated[
        str | None, arg(metavar="TEXT", help_behavior_hint="(default: a general one)")
    ] = None
    """Title of the figure."""


@dataclasses.dataclass(frozen=True)
class Copy:
    """Copy a system's experiment to a file of yours, to change and run."""

    name: Name
    """A system with a recipe (see `steelyard list`)."""
    file: Annotated[Path, Positional, arg(metavar="FILE")]
    """The new file, for example mine.py."""
    force: Switch = False
    """Overwrite FILE if it exists."""


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Show what is installed here, what works, and what a missing extra would give."""


def parse(kind: type[T], arguments: Sequence[str], *, description: str | None = None) -> T:
    """Read a command's arguments; shows help or an error and exits as argparse does."""
    prog = f"steelyard {kind.__name__.lower()}"
    return tyro.cli(kind, prog=prog, description=description, args=list(arguments))


def parse_run(
    name: str, config: Any, seeds: int, text: str, arguments: Sequence[str]
) -> tuple[Any, int, Path | None, int | None]:
    """Read the arguments of ``run NAME``: its own, and one flag for each field of ``config``.

    Args:
        name: the recipe, for the help.
        config: the form's configuration; its values are the defaults.
        seeds: the form's number of seeds.
        text: what the help says above the flags.
        arguments: what follows the name.

    Returns:
        ``(config, seeds, out, workers)``.

    Raises:
        ValueError: the configuration has a field that is an option of ``run``.
    """
    options: dict[str, tuple[Any, Any, str, str, str | None]] = {
        "full": (Switch, False, "Run the paper's setting, not the quick form.", "", None),
        "seeds": (int, seeds, "Number of seeds: 0, 1, 2, ...", f"(default: {seeds})", "N"),
        "out": (Path | None, None, "Folder of the results.", "(default: a new one in runs)", "DIR"),
        "workers": (int | None, None, "Seeds at a time.", "(default: one a core)", "N"),
    }
    clash = {field.name for field in dataclasses.fields(config)} & {*options, "debug", "help"}
    if clash:
        raise ValueError(f"Config of {name} may not have a field {min(clash)!r}: an option of run")
    fields: list[tuple[str, Any, Any]] = [
        (name, Annotated[kind, arg(help=said, help_behavior_hint=hint, metavar=metavar)], default)
        for name, (kind, default, said, hint, metavar) in options.items()
    ]
    settings: Any = Annotated[type(config), arg(name="", help=f"Settings of {name}.")]
    fields.append(("config", settings, config))
    kind = dataclasses.make_dataclass("Run", fields, frozen=True)
    prog = f"steelyard run {name}"
    given: Any = tyro.cli(kind, prog=prog, description=text, args=list(arguments))
    return given.config, given.seeds, given.out, given.workers
