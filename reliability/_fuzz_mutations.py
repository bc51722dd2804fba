"""Ways to spoil one argument: wrong values, shapes, dtypes, types and layouts.

Each way is a ``Mutation``: a label for the report, its kind and the function that spoils. The kind
decides what a function may answer, see ``_fuzz_verdict``.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

HUGE = (1e4, 1e30, 1e300)


@dataclass(frozen=True)
class Mutation:
    """One way to spoil an argument.

    ``kind`` is ``"nan"``, ``"infinite"``, ``"huge"`` (finite, 1e4 or more), ``"value"``,
    ``"shape"``, ``"dtype"``, ``"type"`` or ``"layout"`` (same numbers, stored otherwise).
    """

    label: str
    kind: str
    apply: Callable[[Any], Any]


def mutations(value: Any) -> st.SearchStrategy[Mutation]:  # noqa: PLR0911 - one line a type
    """All ways to spoil a valid value, by its type."""
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, np.ndarray):
        return _of_array(value)
    if isinstance(value, bool):
        return st.sampled_from(_replacements(None, "yes", 2))
    if isinstance(value, int):
        return st.sampled_from(
            _replacements(-1, 0, 1, 2, 3, 2.5, math.nan, math.inf, None, "many", True, [1])
        )
    if isinstance(value, float):
        return _of_float(value)
    if isinstance(value, str):
        return st.sampled_from(_replacements("", "no such choice", None, 3, ["mean"]))
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return _of_sequence(value)
    if isinstance(value, Mapping):
        return st.sampled_from(_replacements({}, None, "text", 3))
    return st.sampled_from(_replacements(None, "text", 3, torch.zeros(2)))


def kind_of(number: float) -> str:
    """The kind of a number put in place of a valid one."""
    if math.isnan(number):
        return "nan"
    if math.isinf(number):
        return "infinite"
    return "huge" if abs(number) >= HUGE[0] else "value"


def _replacements(*values: Any) -> list[Mutation]:
    return [_replacement(value) for value in values]


def _replacement(value: Any) -> Mutation:
    number = isinstance(value, float)
    label = "tensor of zeros" if isinstance(value, Tensor) else repr(value)
    return Mutation(label, kind_of(value) if number else "type", lambda _: value)


def _of_float(value: float) -> st.SearchStrategy[Mutation]:
    fixed = _replacements(
        math.nan, math.inf, -math.inf, 0.0, -1.0, 1.0, -value, 1e-300, *HUGE, -1e30
    )
    others = _replacements(None, "0.1", True, [0.5], 1j)
    numbers = st.floats(allow_nan=False).map(_replacement)
    return st.one_of(st.sampled_from(fixed), st.sampled_from(others), numbers)


def _of_sequence(value: Any) -> st.SearchStrategy[Mutation]:
    as_is = type(value)
    several = [
        Mutation("empty", "shape", lambda v: as_is()),
        Mutation("one more", "shape", lambda v: as_is([*v, v[-1]])),
        Mutation("one fewer", "shape", lambda v: as_is(v[:-1])),
        *_replacements(None, "text", 3),
    ]
    if not value:
        return st.sampled_from(several)

    def entry(index: int, mutation: Mutation) -> Mutation:
        def apply(v: Any) -> Any:
            return as_is([mutation.apply(x) if i == index else x for i, x in enumerate(v)])

        return Mutation(f"[{index}] {mutation.label}", mutation.kind, apply)

    entries = [mutations(item).map(lambda m, i=i: entry(i, m)) for i, item in enumerate(value)]
    return st.one_of(st.sampled_from(several), *entries)


def _entries(value: Any, numbers: st.SearchStrategy[float]) -> st.SearchStrategy[Mutation]:
    def entry(position: int, number: float) -> Mutation:
        def apply(v: Any) -> Any:
            spoiled = v.clone() if isinstance(v, Tensor) else v.copy()
            place = np.unravel_index(position, tuple(v.shape))  # reshape(-1) may be a copy
            spoiled[tuple(map(int, place))] = _within(number, v.dtype)
            return spoiled

        return Mutation(f"{number!r} at flat position {position}", kind_of(number), apply)

    return st.builds(entry, st.integers(0, math.prod(value.shape) - 1), numbers)


def _within(number: float, dtype: Any) -> float:
    # the largest number of the dtype instead of one beyond it
    if not math.isfinite(number) or dtype not in (torch.float32, np.float32):
        return number
    most = torch.finfo(torch.float32).max
    return min(max(number, -most), most)


def _of_tensor(value: Tensor) -> st.SearchStrategy[Mutation]:
    parts: list[st.SearchStrategy[Mutation]] = [
        st.sampled_from(_tensor_shapes(value)),
        st.sampled_from(_tensor_dtypes(value)),
        st.sampled_from(
            [
                *_replacements(None, "text", 0.5, math.nan),
                Mutation("as a list", "type", lambda v: v.tolist()),
                Mutation("as an array", "type", lambda v: v.numpy(force=True)),
            ]
        ),
        st.sampled_from(_tensor_layouts(value)),
    ]
    if value.is_floating_point():
        special = st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-300, *HUGE, -1e30])
        parts += [st.sampled_from(_float_fills()), _entries(value, special)]
        parts.append(_entries(value, st.floats(allow_nan=False)))
    elif value.dtype == torch.bool:
        parts.append(st.sampled_from([Mutation("all false", "value", torch.zeros_like)]))
    elif value.numel():
        parts.append(_entries(value, st.sampled_from([-1, 1, 100, -100, 2**40])))
        parts.append(st.sampled_from([Mutation("all zero", "value", torch.zeros_like)]))
    return st.one_of(parts)


def _float_fills() -> list[Mutation]:
    def fill(number: float) -> Mutation:
        kind = kind_of(number)
        return Mutation(
            f"all {number!r}", kind, lambda v: v.clone().fill_(_within(number, v.dtype))
        )

    return [
        *(fill(number) for number in (math.nan, math.inf, 0.0, 1e-300, *HUGE)),
        Mutation("minus its absolute value", "value", lambda v: -v.abs()),
        Mutation("negated", "value", lambda v: -v),
    ]


def _tensor_shapes(value: Tensor) -> list[Mutation]:
    several = [
        Mutation("an axis more in front", "shape", lambda v: v.unsqueeze(0)),
        Mutation("an axis more at the end", "shape", lambda v: v.unsqueeze(-1)),
    ]
    for axis in range(value.dim()):
        if not value.shape[axis]:
            continue
        several += [
            Mutation(f"axis {axis} empty", "shape", lambda v, a=axis: v.narrow(a, 0, 0)),
            Mutation(f"axis {axis} removed", "shape", lambda v, a=axis: v.select(a, 0)),
            Mutation(f"axis {axis} of length 1", "shape", lambda v, a=axis: v.narrow(a, 0, 1)),
            Mutation(
                f"axis {axis} longer by 1",
                "shape",
                lambda v, a=axis: torch.cat([v, v.narrow(a, 0, 1)], a),
            ),
        ]
    return several


def _tensor_dtypes(value: Tensor) -> list[Mutation]:
    others = {torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.float64}
    others |= {torch.int64, torch.int32, torch.uint8, torch.bool}
    return [
        Mutation(str(dtype), "dtype", lambda v, d=dtype: v.to(d))
        for dtype in sorted(others - {value.dtype}, key=str)
    ]


def _tensor_layouts(value: Tensor) -> list[Mutation]:
    several = [
        Mutation("not contiguous", "layout", lambda v: torch.stack([v, v], -1)[..., 0]),
        Mutation("expanded", "value", lambda v: v[:1].expand(v.shape) if v.dim() else v),
        Mutation("sparse", "type", lambda v: v.to_sparse() if v.dim() else v),
    ]
    if value.is_floating_point():
        several.append(Mutation("requires_grad", "layout", lambda v: v.detach().requires_grad_()))
    return several


def _of_array(value: Any) -> st.SearchStrategy[Mutation]:
    several = [
        Mutation("an axis more", "shape", lambda v: v[None]),
        Mutation("0-d", "shape", lambda v: v.reshape(-1)[0]),
        Mutation("as objects", "dtype", lambda v: v.astype(object)),
        Mutation("as text", "dtype", lambda v: v.astype(str)),
        Mutation("complex", "dtype", lambda v: v.astype(complex)),
        Mutation("bool", "dtype", lambda v: v.astype(bool)),
        Mutation("float32", "dtype", lambda v: v.astype(np.float32)),
        Mutation("all zero", "value", np.zeros_like),
        Mutation("as a list", "layout", lambda v: v.tolist()),
        Mutation("as a tensor", "layout", torch.from_numpy),
        *_replacements(None, "text", 3),
    ]
    for axis in range(value.ndim):
        several += [
            Mutation(f"axis {axis} empty", "shape", lambda v, a=axis: v.take([], a)),
            Mutation(f"axis {axis} of length 1", "shape", lambda v, a=axis: v.take([0], a)),
            Mutation(
                f"axis {axis} longer by 1",
                "shape",
                lambda v, a=axis: np.concatenate([v, v.take([0], a)], a),
            ),
        ]
    parts: list[st.SearchStrategy[Mutation]] = [st.sampled_from(several)]
    if value.dtype.kind == "f":
        special = st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-300, *HUGE])
        parts += [_entries(value, special), st.sampled_from(_array_fills())]
        parts.append(_entries(value, st.floats(allow_nan=False)))
    elif value.dtype.kind == "i":
        parts.append(_entries(value, st.sampled_from([-1, 1, 100, 2**40])))
    return st.one_of(parts)


def _array_fills() -> list[Mutation]:
    return [
        Mutation("all nan", "nan", lambda v: np.full_like(v, math.nan)),
        Mutation("all inf", "infinite", lambda v: np.full_like(v, math.inf)),
        Mutation("all 1e30", "huge", lambda v: np.full_like(v, 1e30)),
        Mutation("negated", "value", lambda v: -v),
    ]
