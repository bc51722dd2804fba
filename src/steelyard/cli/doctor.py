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
    yield _threads()
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
    yield _try("self-test", _self_test)


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


def _threads() -> Finding:
    """More threads than cores wait for each other; the usual cause is a setting for a machine."""
    import torch

    from steelyard.lab.setup import cores

    threads, settings = torch.get_num_threads(), []
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        if name in os.environ:
            settings.append(f"{name}={os.environ[name]}")
    text = f"{threads} of torch on {cores()} cores; {', '.join(settings) or 'nothing set'}"
    if threads <= cores():
        return "threads", OK, text
    return "threads", BROKEN, f"{text}; to fix it: export OMP_NUM_THREADS={cores()}"


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


def _self_test() -> str:
    """Compute what is known beforehand: losses, a gradient, a fused head, a stored checkpoint."""
    import tempfile
    import time

    import torch

    from steelyard.divergences import KL, f_divergence
    from steelyard.fused import linear_logprobs
    from steelyard.lab.storage import TrialStore
    from steelyard.preference import f_dpo_loss

    began = time.monotonic()
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 8, 16, generator=generator, dtype=torch.float64).log_softmax(-1)
    _agree("the KL divergence", f_divergence(p, q, KL), (p.exp() * (p - q)).sum(-1))
    margin = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    f_dpo_loss(margin, zero, beta=0.1).backward()  # type: ignore[no-untyped-call]
    _agree("DPO's gradient", margin.grad, torch.tensor([-0.05], dtype=torch.float64))
    hidden = torch.randn(4, 8, generator=generator)
    head, tokens = torch.randn(16, 8, generator=generator), torch.arange(4)
    plain = (hidden @ head.T).log_softmax(-1)[torch.arange(4), tokens]
    _agree("the fused head", linear_logprobs(hidden, head, tokens).logprobs, plain)
    with tempfile.TemporaryDirectory() as folder:
        store = TrialStore(Path(folder), print)
        store.open(0)
        store.save(1, {"x": p}, 0.0)
        store.close()
        found = store.restore()
    if found is None or not torch.equal(found.state["x"], p):
        raise RuntimeError("a stored checkpoint did not come back as it was")
    return f"losses, gradient, fused head and checkpoint agree ({time.monotonic() - began:.1f} s)"


def _agree(what: str, got: object, expected: object) -> None:
    import torch

    try:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    except AssertionError as error:
        reason = " ".join(str(error).split())
        raise RuntimeError(f"{what} is wrong on this installation: {reason}") from None


def _writable(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".steelyard-{os.getpid()}"
    probe.touch()
    probe.unlink()
    return f"{folder} can be written"
