"""How a trainer calls the functions it is given: by the names of their parameters.

A function says what it needs by naming it, so that ``group_relative_advantages(rewards, groups)``
fits as it is, and what is costly (entropies, columns of the data) is only made if asked for.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from steelyard._checks import check_shape


def parameters_of(function: Callable[..., Any], argument: str) -> tuple[set[str], set[str], bool]:
    """Names that a function takes, those it cannot do without, and whether it takes any other.

    What a ``functools.partial`` has fixed is not among them.

    Args:
        function: the function to look at.
        argument: what the user passed it as, for the errors.

    Raises:
        TypeError: not callable, or a parameter can only be passed by its position.
    """
    if not callable(function):
        raise TypeError(f"{argument} must be a function, got {type(function).__name__}")
    fixed = function.keywords if isinstance(function, functools.partial) else {}
    taken, required, open_ended = set(), set(), False
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise TypeError(
                f"{argument} is called by keywords, but takes {name!r} by position only"
            )
        if parameter.kind is parameter.VAR_KEYWORD:
            open_ended = True
        elif parameter.kind is not parameter.VAR_POSITIONAL and name not in fixed:
            taken.add(name)
            if parameter.default is parameter.empty:
                required.add(name)
    return taken, required, open_ended


def check_takes(function: Callable[..., Any], argument: str, *names: str) -> None:
    """Require parameters without which a function makes no sense.

    Args:
        function: the function to be called.
        argument: what the user passed it as, for the errors.
        *names: of the parameters.

    Raises:
        TypeError: one of them is missing.
    """
    taken, _, open_ended = parameters_of(function, argument)
    missing = [] if open_ended else [name for name in names if name not in taken]
    if missing:
        raise TypeError(f"{argument} must take {missing[0]!r}, got the parameters {sorted(taken)}")


def names_wanted(function: Callable[..., Any], argument: str, offered: Collection[str]) -> set[str]:
    """Return which of the offered values a function wants.

    Args:
        function: the function to be called.
        argument: what the user passed it as, for the errors.
        offered: names that the trainer can pass.

    Raises:
        TypeError: it needs a value that is not offered.
    """
    taken, required, open_ended = parameters_of(function, argument)
    unknown = sorted(required - set(offered))
    if unknown:
        raise TypeError(
            f"{argument} needs {', '.join(map(repr, unknown))}, but can only be given "
            f"{', '.join(sorted(offered))}; fix other parameters with functools.partial"
        )
    return set(offered) if open_ended else taken & set(offered)


def as_signals(result: Any, number: int) -> dict[str, Tensor]:
    """Bring what ``advantages`` returned into one form: a tensor ``[N]`` for each name.

    Args:
        result: ``[N]``, or a named tuple or mapping of ``[N]`` with an entry ``advantages``.
        number: ``N``.

    Raises:
        TypeError: neither of these.
        ValueError: a wrong shape, no ``advantages``, or NaN or infinity in one of them.
    """
    if isinstance(result, Tensor):
        signals = {"advantages": result}
    elif isinstance(result, tuple) and hasattr(result, "_asdict"):
        signals = result._asdict()
    elif isinstance(result, Mapping):
        signals = dict(result)
    else:
        raise TypeError(
            "advantages= must return a tensor [N] or a named tuple of them, got "
            f"{type(result).__name__}"
        )
    if "advantages" not in signals:
        raise ValueError(
            f"advantages= must return a field 'advantages', got the fields {sorted(signals)}"
        )
    for name, values in signals.items():
        check_shape(f"{name!r} returned by advantages=", values, (number,))
        if not bool(torch.isfinite(values).all()):
            where = int((~torch.isfinite(values)).nonzero()[0, 0])
            raise ValueError(
                f"{name!r} returned by advantages= must be finite, got {float(values[where])} "
                f"for completion {where}"
            )
    return signals
