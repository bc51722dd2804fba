"""What a call with a spoiled argument may answer.

The rules, in full:

1. An error is a ``ValueError`` or ``TypeError`` whose message has the name of the spoiled argument
   as a word; unless its type is spoiled, the name of another argument, which it then disagrees
   with, will do.
2. NaN in an argument gives an error, or NaN somewhere in the result.
3. Finite arguments give finite results. Three allowances: a number of 1e4 or more may overflow to
   infinity (exp(1e4) does); beyond 1e150 or within 1e-150, where a square or its inverse overflows
   float64, any loud answer will do, infinity or NaN (lower precisions, a spoiled dtype, count with
   their own range); and the functions listed in ``_fuzz_known.DOMAIN`` answer outside the domain
   of their mathematics as ``torch.log`` does, with infinity or NaN.
4. Infinite arguments may give anything that is no wrong kind of error.
5. No call takes longer than ``SECONDS``.
"""

import dataclasses
import math
import re
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from _fuzz_mutations import Mutation

SECONDS = 10.0
SQUARE_OVERFLOWS = 1e150


class Hang(BaseException):
    """A call took too long; not an ``Exception``, so that no handler within the call hides it."""


@dataclass(frozen=True)
class Verdict:
    """``status`` is ``"accepted"``, ``"refused"`` or ``"bad"``; a bad one has a reason."""

    status: str
    reason: str = ""


@contextmanager
def watchdog() -> Iterator[None]:
    """Raise ``Hang`` in the block once ``SECONDS`` are over."""
    seconds = SECONDS

    def bark(signum: int, frame: FrameType | None) -> None:
        raise Hang(f"longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, bark)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(
    call: Callable[..., Any],
    arguments: Mapping[str, Any],
    spoiled: Mapping[str, Mutation],
    *,
    not_finite: frozenset[str] = frozenset(),
    domain: bool = False,
) -> Verdict:
    """Make the call and judge its answer.

    ``not_finite`` are results that the valid call has so; ``domain`` says that the function answers
    outside its domain with infinity or NaN.
    """
    try:
        with watchdog(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            result = call(**arguments)
            numbers = dict(floats_of(result))
            if any(mutation.label == "requires_grad" for mutation in spoiled.values()):
                numbers |= _gradients(result, arguments, spoiled)
    except Hang as hang:
        return Verdict("bad", f"hang: {hang}")
    except (ValueError, TypeError) as error:
        if names(error, spoiled, arguments):
            return Verdict("refused")
        return Verdict("bad", f"unnamed {_described(error)}")
    except Exception as error:
        return Verdict("bad", _described(error))
    verdict = _of_result(numbers, arguments, spoiled, not_finite)
    loud = verdict.reason.startswith(("NaN out", "infinity out"))
    return Verdict("accepted") if domain and loud else verdict


def names(error: Exception, spoiled: Mapping[str, Mutation], arguments: Mapping[str, Any]) -> bool:
    """Whether the message names what was spoiled, or what a spoiled shape disagrees with."""
    loose = any(mutation.kind != "type" for mutation in spoiled.values())
    wanted = arguments if loose else spoiled
    return any(re.search(rf"\b{re.escape(name)}\b", str(error)) for name in wanted)


def _of_result(
    numbers: Mapping[str, Any],
    arguments: Mapping[str, Any],
    spoiled: Mapping[str, Mutation],
    not_finite: frozenset[str],
) -> Verdict:
    has_nan = [path for path, value in numbers.items() if np.isnan(value).any()]
    kinds = {mutation.kind for mutation in spoiled.values()}
    if "nan" in kinds:
        if has_nan or len(spoiled) > 1:
            return Verdict("accepted")
        return Verdict("bad", "NaN in, no NaN out")
    if "infinite" in kinds or _overflows(arguments, spoiled):
        return Verdict("accepted")
    new_nan = [path for path in has_nan if path not in not_finite]
    if new_nan:
        return Verdict("bad", f"NaN out of finite numbers: {new_nan[0] or 'the result'}")
    infinite = [p for p, v in numbers.items() if np.isinf(v).any() and p not in not_finite]
    if infinite and "huge" not in kinds:
        return Verdict("bad", f"infinity out of finite numbers: {infinite[0] or 'the result'}")
    return Verdict("accepted")


def _overflows(arguments: Mapping[str, Any], spoiled: Mapping[str, Mutation]) -> bool:
    for name in spoiled:
        for _, value in floats_of(arguments[name]):
            limit = SQUARE_OVERFLOWS
            if value.dtype.itemsize < 8:
                limit = math.sqrt(float(np.finfo(value.dtype).max)) / 100
            sizes = np.abs(value[np.isfinite(value)]).astype(np.float64)
            if ((sizes >= limit) | ((sizes > 0) & (sizes < 1 / limit))).any():
                return True
    return False


def floats_of(  # noqa: PLR0912 - one branch a type
    value: Any, path: str = ""
) -> Iterator[tuple[str, Any]]:
    """Every floating number in a result, as arrays with the path to each."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            dense = value.detach().to_dense() if value.is_sparse else value.detach()
            if dense.dtype == torch.bfloat16:
                dense = dense.float()
            yield path, np.asarray(dense.resolve_conj().numpy())
    elif isinstance(value, float | complex):
        yield path, np.asarray(value)
    elif isinstance(value, np.ndarray):
        if value.dtype.kind in "fc":
            yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from floats_of(item, f"{path}[{key!r}]")
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for field, item in zip(value._fields, value, strict=True):
            yield from floats_of(item, f"{path}.{field}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from floats_of(item, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from floats_of(getattr(value, field.name), f"{path}.{field.name}")


def _gradients(
    result: Any, arguments: Mapping[str, Any], spoiled: Mapping[str, Mutation]
) -> dict[str, Any]:
    outputs = [value for value in _tensors(result) if value.requires_grad]
    inputs = {k: arguments[k] for k, m in spoiled.items() if m.label == "requires_grad"}
    if not outputs:
        return {}
    total = torch.stack([value.sum().abs() for value in outputs]).sum()
    found = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
    pairs = zip(inputs, found, strict=True)
    return {f"gradient of {k}": g.numpy() for k, g in pairs if g is not None}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _described(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:110]}"
