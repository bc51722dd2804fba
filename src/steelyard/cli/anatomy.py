"""``steelyard anatomy``: the library's objectives by name, a user's own from a file, and a figure.

A name may carry settings of its objective: ``ppo:epsilon=0.1``, ``f-dpo:jsd,beta=0.3``. What a name
does not know, it says.
"""

import difflib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from steelyard.anatomy import LossFunction, Over

HELP = """\
Draw what objectives pay attention to: how hard each one pulls at an item, and where to.

Over the ratio, at a positive and at a negative advantage:
  steelyard anatomy ppo bpo grpo gbpo
  steelyard anatomy ppo ppo:epsilon=0.1 ppo:epsilon_high=0.28

Over the margin between a chosen and a rejected response:
  steelyard anatomy dpo f-dpo:jsd f-dpo:alpha=0.5

Over the probability of the label:
  steelyard anatomy ce kd pld sinkd
  steelyard anatomy ce ldr:temperature=inf anyloss:f1 --out loss.png

Your own function beside them, from an importable module or a file:
  steelyard anatomy ppo mine.py:my_loss
  steelyard anatomy package.module:my_loss --over log_ratio

It gets (log_ratio, advantages), (chosen_log_ratio, rejected_log_ratio) or (logits, labels), or the
log-ratio, the margin or the logits alone, for one item at a time.

"""

Point = tuple[float, float]
Scale = Literal["auto", "linear", "log"]

OTHERS = ((1, 0.9), (1, 0.7), (1, 0.3)) + ((0, 0.1),) * 4 + ((0, 0.3), (0, 0.6))
"""Label and probability of the items beside the one that ``anyloss`` is drawn for."""

TEACHER = (0.6, 0.2, 0.1)
"""Probabilities of the teacher: the label, the two next classes; the others share the rest."""


class Objective(NamedTuple):
    """What the command knows of a name."""

    over: "Over"
    says: str
    make: Callable[..., "LossFunction"]


def _ppo(*, epsilon: float = 0.2, epsilon_high: float | None = None) -> "LossFunction":
    from steelyard.policy import ppo_loss

    return partial(ppo_loss, epsilon=epsilon, epsilon_high=epsilon_high)


def _grpo(*, epsilon: float = 0.2, epsilon_high: float | None = None) -> "LossFunction":
    from steelyard.policy import grpo_loss

    def loss(log_ratio: "Tensor", advantages: "Tensor") -> "Tensor":
        tokens = log_ratio[:, None]  # an answer of one token
        return grpo_loss(tokens, advantages, epsilon=epsilon, epsilon_high=epsilon_high)

    return loss


def _bpo(
    *, epsilon: float = 0.2, epsilon_high: float | None = None, temperature: float = 1e-3
) -> "LossFunction":
    from steelyard.policy import bpo_loss, bpo_target_ratio

    def loss(log_ratio: "Tensor", advantages: "Tensor") -> "Tensor":
        target = bpo_target_ratio(
            advantages,
            advantages * 0,
            epsilon=epsilon,
            epsilon_high=epsilon_high,
            temperature=temperature,
        )
        return bpo_loss(log_ratio, target, advantages.abs())

    return loss


def _gbpo(
    *, epsilon: float = 0.2, epsilon_high: float | None = None, temperature: float = 1e-4
) -> "LossFunction":
    from steelyard.policy import bpo_target_ratio, gbpo_loss

    def loss(log_ratio: "Tensor", advantages: "Tensor") -> "Tensor":
        target = bpo_target_ratio(
            advantages,
            advantages * 0,
            epsilon=epsilon,
            epsilon_high=epsilon_high,
            temperature=temperature,
        )
        return gbpo_loss(log_ratio[:, None], target, advantages.abs())

    return loss


def _awm(*, clip: float = 1.0) -> "LossFunction":
    from steelyard.diffusion import awm_loss

    def loss(log_ratio: "Tensor", advantages: "Tensor") -> "Tensor":
        return awm_loss(log_ratio, log_ratio.detach() * 0, advantages, clip=clip)

    return loss


def _dpo(*, beta: float = 0.1) -> "LossFunction":
    from steelyard.preference import f_dpo_loss

    return partial(f_dpo_loss, beta=beta)


def _f_dpo(
    divergence: str = "", *, alpha: float | None = None, beta: float = 0.1
) -> "LossFunction":
    from steelyard.divergences import JENSEN_SHANNON_DOUBLE, KL, REVERSE_KL, alpha_divergence
    from steelyard.preference import f_dpo_loss

    named = {"reverse-kl": KL, "forward-kl": REVERSE_KL, "jsd": JENSEN_SHANNON_DOUBLE}
    if (alpha is None) == (not divergence):
        raise ValueError(f"takes either alpha=A or one of {', '.join(named)}")
    if alpha is not None:  # the paper's index: 1 minus ours
        return partial(f_dpo_loss, beta=beta, divergence=alpha_divergence(1 - alpha))
    return partial(f_dpo_loss, beta=beta, divergence=named[_one_of(divergence, named)])


def _ce() -> "LossFunction":
    from torch.nn.functional import cross_entropy

    return cross_entropy


def _kd(*, alpha: float = 0.1, temperature: float = 2.0) -> "LossFunction":
    from steelyard.distillation import kd_loss

    def loss(logits: "Tensor", labels: "Tensor") -> "Tensor":
        return kd_loss(logits, teacher(logits), labels, alpha=alpha, temperature=temperature)

    return loss


def _pld(*, temperature: float = 1.0) -> "LossFunction":
    from steelyard.distillation import pld_loss

    def loss(logits: "Tensor", labels: "Tensor") -> "Tensor":
        return pld_loss(logits, teacher(logits), labels, temperature=temperature)

    return loss


def _sinkd(*, temperature: float = 2.0, epsilon: float = 0.1) -> "LossFunction":
    from steelyard.distillation import sinkhorn_kd_loss

    def loss(logits: "Tensor") -> "Tensor":
        return sinkhorn_kd_loss(logits, teacher(logits), temperature=temperature, epsilon=epsilon)

    return loss


def _ldr(*, temperature: float = 1.0, margin: float = 0.1, top_k: int = 1) -> "LossFunction":
    from steelyard.classification import ldr_loss

    return partial(ldr_loss, temperature=temperature, margin=margin, top_k=top_k)


def _aldr(
    *, initial_temperature: float = 10.0, alpha: float = 2.0, margin: float = 0.1
) -> "LossFunction":
    from steelyard.classification import aldr_loss

    return partial(aldr_loss, initial_temperature=initial_temperature, alpha=alpha, margin=margin)


def _anyloss(
    metric: str = "f1", *, amplification: float = 73.0, threshold: float = 0.5
) -> "LossFunction":
    import torch

    from steelyard import classification

    named = {
        "accuracy": classification.ACCURACY,
        "balanced-accuracy": classification.BALANCED_ACCURACY,
        "f1": classification.f_beta(1.0),
        "f2": classification.f_beta(2.0),
        "geometric-mean": classification.GEOMETRIC_MEAN,
        "jaccard": classification.JACCARD,
        "matthews": classification.MATTHEWS,
        "precision": classification.PRECISION,
    }
    chosen = named[_one_of(metric, named)]

    def loss(logits: "Tensor") -> "Tensor":
        own = logits[:, 0] - logits[:, 1:].logsumexp(1)  # of the label against the rest
        labels, probs = torch.tensor(OTHERS, dtype=own.dtype).unbind(1)
        everyone = classification.anyloss_with_logits(
            torch.cat((own, probs.logit())),
            torch.cat((own.detach() * 0 + 1, labels)),
            chosen,
            amplification=amplification,
            threshold=threshold,
        )
        return everyone * (1 + len(OTHERS))  # a metric is a mean over the items

    return loss


def teacher(logits: "Tensor") -> "Tensor":
    """Return the fixed teacher's logits for as many classes as ``logits`` have."""
    classes = logits.shape[1]
    probs = logits.new_zeros(1, classes)
    known = min(classes, len(TEACHER))
    probs[0, :known] = probs.new_tensor(TEACHER[:known])
    if classes > known:
        probs[0, known:] = (1 - sum(TEACHER)) / (classes - known)
    return probs.div(probs.sum()).log()


OBJECTIVES: Mapping[str, Objective] = {
    "ppo": Objective("log_ratio", "the clipped ratio", _ppo),
    "bpo": Objective("log_ratio", "the ratio fitted to its bounded optimum", _bpo),
    "grpo": Objective("log_ratio", "PPO for one token of an answer", _grpo),
    "gbpo": Objective("log_ratio", "BPO for one token of an answer", _gbpo),
    "awm": Objective("log_ratio", "advantage-weighted matching of a flow", _awm),
    "dpo": Objective("margin", "logistic loss of the implicit rewards", _dpo),
    "f-dpo": Objective("margin", "the same on another leash: reverse-kl, forward-kl, jsd", _f_dpo),
    "ce": Objective("probability", "cross-entropy", _ce),
    "kd": Objective("probability", "cross-entropy and KL to a fixed teacher", _kd),
    "pld": Objective("probability", "Plackett-Luce ranking by that teacher", _pld),
    "sinkd": Objective("probability", "Sinkhorn distance to that teacher, a batch of one", _sinkd),
    "ldr": Objective("probability", "the worst weighted average of the label gaps", _ldr),
    "aldr": Objective("probability", "the same with a temperature for each item", _aldr),
    "anyloss": Objective(
        "probability", "a metric of the confusion matrix: f1, accuracy, matthews, ...", _anyloss
    ),
}


def describe() -> str:
    """Return the help: examples, then every name with its settings and their defaults."""
    lines = [HELP, "Names, and the settings they take after a colon:\n"]
    for name, objective in OBJECTIVES.items():
        parameters = inspect.signature(objective.make).parameters.values()
        settings = ", ".join(
            f"{p.name}={'...' if p.default is None else p.default}"
            for p in parameters
            if p.kind is p.KEYWORD_ONLY
        )
        lines.append(f"  {name:<9}{objective.says}{f' ({settings})' if settings else ''}\n")
    return "".join(lines)


def draw(
    names: Sequence[str],
    *,
    over: "Over | None",
    out: Path,
    limits: Point | None,
    scale: Scale,
    classes: int,
    title: str | None,
) -> list[tuple[str, str, str]]:
    """Write the figure of the named objectives to ``out``.

    Returns:
        For each objective and panel what the curve does, in words.

    Raises:
        ValueError: an unknown name or setting, objectives of several families, a file that is
            neither SVG nor PNG, or what :func:`steelyard.anatomy.weight_curves` refuses.
    """
    if out.suffix not in (".svg", ".png"):
        raise ValueError(f"--out must end in .svg or .png, got {str(out)!r}")
    if twice := [name for index, name in enumerate(names) if name in names[:index]]:
        raise ValueError(f"{twice[0]} is named twice")
    objectives = {name: _objective(name) for name in names}
    over = _family(names, over)

    import matplotlib as mpl

    from steelyard.anatomy import draw_curves, weight_curves
    from steelyard.lab.plots import STYLE

    try:
        curves = weight_curves(objectives, over, limits=limits, classes=classes)
    except TypeError as error:
        if error.__cause__ is None:  # a bug, not a mistake that anatomy names
            raise
        raise ValueError(str(error)) from error
    figure = draw_curves(curves, scale=scale, title=title)
    with mpl.rc_context(STYLE):
        options: dict[str, Any] = (
            {"metadata": {"Date": None}}
            if out.suffix == ".svg"
            else {"dpi": 150, "metadata": {"Software": None}}
        )
        figure.savefig(out, **options)
    return [
        (name, panel, in_words(curves.x.tolist(), lines[name].tolist(), _VERBS[panel]))
        for name in names
        for panel, lines in curves.panels.items()
    ]


def _family(names: Sequence[str], over: "Over | None") -> "Over":
    """Return what all names are drawn over, or say which of them do not fit together."""
    by_name = {name: OBJECTIVES[_head(name)].over for name in names if _head(name) in OBJECTIVES}
    if over is not None:
        by_name = {"--over": over, **by_name}
    if not by_name:
        raise ValueError(
            f"say what {names[0]} is drawn over: --over log_ratio, margin or probability"
        )
    (first, family), *rest = by_name.items()
    for name, other in rest:
        if other != family:
            says = f"--over is {over}" if first == "--over" else f"{first} is drawn over {family}"
            raise ValueError(f"{says}, but {name} over {other}: draw them in two figures")
    return family


def _head(name: str) -> str:
    return name.partition(":")[0]


def _objective(name: str) -> "LossFunction":
    head, _, settings = name.partition(":")
    if head not in OBJECTIVES:
        return _own(name)
    make = OBJECTIVES[head].make
    known = inspect.signature(make).parameters
    positional = [key for key, p in known.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    given: dict[str, Any] = {}
    for part in settings.split(",") if settings else ():
        key, equals, value = part.partition("=")
        if not equals and positional:
            given[positional[0]] = part
        elif not equals or key not in known or key in positional:
            keys = [f"{key}=..." for key in known if key not in positional]
            kinds = [f"a {key}" for key in positional] + keys
            raise ValueError(
                f"{name}: {head} takes {', '.join(kinds) or 'no setting'}, got {part!r}"
            )
        else:
            given[key] = _number(name, part, value)
    try:
        return make(**given)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _number(name: str, part: str, value: str) -> float:
    try:
        return int(value) if value.lstrip("-").isdigit() else float(value)
    except ValueError:
        raise ValueError(f"{name}: {part!r} is no number") from None


def _one_of(name: str, names: Mapping[str, Any]) -> str:
    if name not in names:
        raise ValueError(f"knows {', '.join(names)}; not {name!r}")
    return name


def _own(name: str) -> "LossFunction":
    """Load a user's function from ``module:function`` or ``file.py:function``."""
    place, _, attribute = name.rpartition(":")
    if not place:
        near = difflib.get_close_matches(_head(name), OBJECTIVES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        own = "a function of yours is file.py:function or module:function"
        raise ValueError(f"no objective is called {name!r}{hint} ({own}; see: --help)")
    module = _from_file(Path(place)) if place.endswith(".py") else _from_module(name, place)
    function = getattr(module, attribute, None)
    if not callable(function):
        near = difflib.get_close_matches(attribute, vars(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{place} has no function {attribute!r}{hint}")
    loss: LossFunction = function
    return loss


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"steelyard_anatomy_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up by name
    sys.path.append(str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module


def _from_module(name: str, place: str) -> Any:
    sys.path.insert(0, str(Path.cwd()))  # first, as with python -m
    importlib.invalidate_caches()
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not (place == error.name or place.startswith(f"{error.name}.")):
            raise  # the module is there; what it imports is not
        near = difflib.get_close_matches(_head(name), OBJECTIVES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no objective and no module is called {place!r}{hint}") from None


_VERBS = {
    "advantage +1": ("raises it", "lowers it", "does not look"),
    "advantage -1": ("raises it", "lowers it", "does not look"),
    "chosen response": ("raises it", "lowers it", "does not look"),
    "rejected response": ("raises it", "lowers it", "does not look"),
    "weight": ("looks", "", "does not look"),
    "direction": ("toward the label", "away from it", "nowhere"),
}

_ZERO = 1e-12


def in_words(x: list[float], y: list[float], verbs: tuple[str, str, str]) -> str:
    """Say where a curve is positive, negative and 0, and where it is largest.

    Example:
        >>> in_words([1.05, 1.15, 1.25, 1.35], [1.05, 1.15, 0.0, 0.0], ("up", "down", "still"))
        'up to 1.2: up, beyond: still; at most 1.15, at 1.15'
    """
    signs = [0 if abs(value) <= _ZERO else int(math.copysign(1, value)) for value in y]
    verb = {1: verbs[0], -1: verbs[1], 0: verbs[2]}
    borders = [i for i in range(1, len(signs)) if signs[i] != signs[i - 1]]
    parts = [f"up to {(x[i - 1] + x[i]) / 2:.3g}: {verb[signs[i - 1]]}" for i in borders]
    parts.append(f"{'beyond' if borders else 'everywhere'}: {verb[signs[-1]]}")
    peak = max(range(len(y)), key=lambda i: abs(y[i]))
    largest = f"; at most {abs(y[peak]):.3g}, at {x[peak]:.3g}" if signs[peak] else ""
    return ", ".join(parts) + largest
