"""A recipe: one readable module with a configuration, claims and a ``run`` that knows its field.

The lab takes everything it needs from the module's names:

- ``Config``: a frozen dataclass of numbers, strings, booleans and tuples of them;
- ``QUICK`` and ``FULL``: a :class:`Form` each, minutes on a laptop and the published setting;
- ``CLAIMS``: the claims that a run judges;
- ``run(config, lab)``: called once for each seed, returns flat metrics;
- ``CURVES`` (optional): names of the logged metrics that are drawn over steps;
- ``UNITS`` (optional): what the axes of those curves say, by metric and for ``"step"``;
- ``figures(result)`` (optional): further figures, by name.

The first line of the module's docstring is its title.
"""

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import json
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from steelyard._checks import check_choice, check_range
from steelyard.lab.claims import Claim

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from steelyard.lab.training import Lab

_REQUIRED = ("Config", "QUICK", "FULL", "CLAIMS", "run")


@dataclass(frozen=True)
class Form:
    """One size of a recipe.

    Args:
        config: the recipe's ``Config``.
        seeds: how many seeds are run by default; at least 1.
        minutes: a rough estimate of the time on two cores, said before starting.
        threads: most threads of a seed; ``None`` = its share of the cores. Models of a few
            thousand parameters are slower with two threads than with one.

    Raises:
        ValueError: ``seeds`` or ``threads`` below 1, or a negative ``minutes``.
    """

    config: Any
    seeds: int
    minutes: float
    threads: int | None = None

    def __post_init__(self) -> None:
        check_range("seeds", self.seeds, at_least=1)
        check_range("minutes", self.minutes, at_least=0)
        if self.threads is not None:
            check_range("threads", self.threads, at_least=1)


@dataclass(frozen=True)
class Recipe:
    """A loaded recipe; made by :func:`load_recipe`.

    Attributes:
        name: short name, for titles and folders.
        reference: what :func:`load_recipe` finds it by: the name, or the file's absolute path.
        path: the file it was read from.
        doc: the module's docstring.
        quick: the default form.
        full: the form whose results are published.
        claims: what a run judges.
        run: ``run(config, lab)``, once for each seed.
        config_type: the frozen dataclass ``Config``.
        curves: logged metrics that are drawn over steps.
        units: what the axes say, by metric and for ``"step"``.
        figures: further figures from a result, or ``None``.
    """

    name: str
    reference: str
    path: Path
    doc: str
    quick: Form
    full: Form
    claims: tuple[Claim, ...]
    run: "Callable[[Any, Lab], dict[str, float]]"
    config_type: type[Any]
    curves: tuple[str, ...]
    units: dict[str, str]
    figures: "Callable[[dict[str, Any]], dict[str, Figure]] | None"

    @property
    def title(self) -> str:
        """First line of the docstring."""
        return self.doc.strip().split("\n", 1)[0]

    def form(self, name: str) -> Form:
        """Return the form called ``"quick"`` or ``"full"``."""
        check_choice("form", name, ("quick", "full"))
        return self.full if name == "full" else self.quick

    def digest(self) -> str:
        """SHA-256 of the source file and of its private parts, ``_NAME_*.py`` beside it."""
        parts = sorted(self.path.parent.glob(f"_{self.path.stem}_*.py"))
        return hashlib.sha256(b"".join(p.read_bytes() for p in (self.path, *parts))).hexdigest()

    def config_from(self, values: Mapping[str, Any]) -> Any:
        """Rebuild a ``Config`` from what :func:`config_to` made of it.

        Raises:
            ValueError: a field is unknown or missing.
        """
        names = [field.name for field in dataclasses.fields(self.config_type)]
        if unknown := [name for name in values if name not in names]:
            raise ValueError(f"config of {self.name} has unknown fields: {', '.join(unknown)}")
        if missing := [name for name in names if name not in values]:
            raise ValueError(f"config of {self.name} lacks fields: {', '.join(missing)}")
        return self.config_type(**{name: _tuples(value) for name, value in values.items()})

    def config_to(self, config: Any) -> dict[str, Any]:
        """Turn a ``Config`` into JSON values.

        Raises:
            TypeError: not this recipe's ``Config``.
            ValueError: a field does not come back from JSON as it was.
        """
        if not isinstance(config, self.config_type):
            raise TypeError(
                f"config must be a {self.name} Config or a dict, got {type(config).__name__}"
            )
        values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        for name, value in values.items():
            if not _survives_json(value):
                raise ValueError(
                    f"config field {name} must be made of numbers, strings, booleans, None and "
                    f"tuples, got {value!r}"
                )
        stored: dict[str, Any] = json.loads(json.dumps(values))
        return stored


def prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    """Put metrics under a name: ``prefix/key`` for each key.

    Example:
        >>> prefixed("sort/rl", {"accuracy": 0.9})
        {'sort/rl/accuracy': 0.9}
    """
    return {f"{prefix}/{key}": value for key, value in values.items()}


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Load a recipe by name (``"bpo"``) or from a user's file (``"mine.py"``).

    Args:
        name_or_path: a module of ``steelyard.recipes`` (dashes count as underscores), or the path
            of a Python file. The file's folder is added to the end of the module search path.

    Returns:
        The recipe, checked for everything that the lab needs.

    Raises:
        ValueError: no such recipe (the nearest name is suggested) or file, or a required name is
            missing or of the wrong kind.
        ImportError: the recipe needs a package that is not installed.
    """
    text = str(name_or_path)
    if text.endswith(".py"):
        path = Path(text).expanduser().resolve()
        return _recipe(_import_file(path), path.stem.replace("_", "-"), str(path))
    name = text.replace("_", "-")
    known = _module_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`steelyard list` shows them"
        raise ValueError(f"no recipe named {text!r}; {hint}")
    module = importlib.import_module(f"steelyard.recipes.{name.replace('-', '_')}")
    return _recipe(module, name, name)


def _module_names() -> list[str]:
    import steelyard.recipes

    modules = pkgutil.iter_modules(steelyard.recipes.__path__)
    return [m.name.replace("_", "-") for m in modules if not m.name.startswith("_")]


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"no recipe file at {path}")
    source = hashlib.sha256(bytes(path) + path.read_bytes()).hexdigest()
    name = f"steelyard_recipe_{path.stem}_{source[:12]}"
    if name in sys.modules:  # its Config must stay one class
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _recipe(module: ModuleType, name: str, reference: str) -> Recipe:
    where = f"recipe {reference}"
    if missing := [need for need in _REQUIRED if not hasattr(module, need)]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    config_type: Any = module.Config
    parameters = getattr(config_type, "__dataclass_params__", None)
    if not (isinstance(config_type, type) and parameters is not None and parameters.frozen):
        raise ValueError(f"{where}: Config must be a frozen dataclass")
    for label in ("QUICK", "FULL"):
        form = getattr(module, label)
        if not (isinstance(form, Form) and isinstance(form.config, config_type)):
            raise ValueError(f"{where}: {label} must be Form(Config(...), seeds=..., minutes=...)")
    claims = tuple(module.CLAIMS)
    if wrong := [claim for claim in claims if not isinstance(claim, Claim)]:
        raise ValueError(f"{where}: CLAIMS must hold Claim objects, got {wrong[0]!r}")
    if not callable(module.run):
        raise ValueError(f"{where}: run must be a function run(config, lab)")
    return Recipe(
        name=name,
        reference=reference,
        path=Path(str(module.__file__)),
        doc=(module.__doc__ or name).strip(),
        quick=module.QUICK,
        full=module.FULL,
        claims=claims,
        run=module.run,
        config_type=config_type,
        curves=tuple(getattr(module, "CURVES", ())),
        units=dict(getattr(module, "UNITS", {})),
        figures=getattr(module, "figures", None),
    )


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _survives_json(value: Any) -> bool:
    try:
        back = _tuples(json.loads(json.dumps(value)))
    except (TypeError, ValueError):
        return False
    return bool(back == value) and type(back) is type(value)
