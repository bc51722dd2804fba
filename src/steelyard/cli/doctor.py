"""``steelyard doctor``: what is installed here, what works, and what is missing."""

import importlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import steelyard
from steelyard._extras import EXTRAS, install_line

OK, MISSING, BROKEN = "ok", "missing", "broken"

Finding = tuple[str, str, str]  # topic, state, what was found


def examine() -> int:
    """Print every finding; return 1 if something that should work is broken, else 0."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {OK: "green", MISSING: "yellow", BROKEN: "bold red"}
    table = Table.grid(padding=(0, 2))
    states = []
    for topic, state, text in findings():
        table.add_row(Text(topic, style="bold"), Text(state, style=styles[state]), Text(text))
        states.append(state)
    Console(highlight=False).print(table)
    return int(BROKEN in states)


def findings() -> Iterator[Finding]:
    """Examine the machine, the packages and the places that are written to."""
    yield "steelyard", OK, f"{steelyard.__version__} on Python {platform.python_version()}"
    yield _torch()
    yield "machine", OK, _machine()
    for extra, content in EXTRAS.items():
        if missing := content.missing():
            gives = f"without {', '.join(missing)} there is no {content.gives}"
            yield f"extra {extra}", MISSING, f"{gives}; to get it: {install_line(extra)}"
        else:
            yield f"extra {extra}", OK, ", ".join(map(_with_version, content.modules))
            if extra == "rl":
                yield _try("MuJoCo", _step_mujoco)
    yield _try("data folder", _write_data)
    yield _try("run index", _read_index)
    yield _try("this folder", _write_here)


def _torch() -> Finding:
    import torch

    build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = f"{devices} GPU{'' if devices == 1 else 's'}" if devices else "no GPU in use"
    return "torch", OK, f"{torch.__version__}, {build}, {found}, {torch.get_num_threads()} threads"


def _machine() -> str:
    from steelyard.lab.setup import cores

    text = f"{platform.system()} {platform.machine()}, {cores()} cores"
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        text += f", {memory / 2**30:.1f} GiB memory"
    return text


def _try(topic: str, check: Callable[[], str]) -> Finding:
    try:
        return topic, OK, check()
    except Exception as error:  # whatever it is, the doctor goes on and names it
        return topic, BROKEN, " ".join(f"{type(error).__name__}: {error}".split())


@cache
def _distributions() -> Mapping[str, list[str]]:
    """Return the packages behind each module; reads every installed file list, so only once."""
    return importlib.metadata.packages_distributions()


def _with_version(module: str) -> str:
    names = _distributions().get(module)
    return f"{module} {importlib.metadata.version(names[0])}" if names else module


def _step_mujoco() -> str:
    gymnasium = importlib.import_module("gymnasium")
    environment = gymnasium.make("InvertedPendulum-v5")
    environment.reset(seed=0)
    environment.step(environment.action_space.sample())
    environment.close()
    return "InvertedPendulum-v5 steps"


def _write_data() -> str:
    from steelyard.lab.index import index_path

    return _writable(index_path().parent)


def _read_index() -> str:
    from steelyard.lab.index import list_runs

    return f"{len(list_runs())} runs recorded"


def _write_here() -> str:
    return _writable(Path.cwd())


def _writable(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".steelyard-{os.getpid()}"
    probe.touch()
    probe.unlink()
    return f"{folder} can be written"
