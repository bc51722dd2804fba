"""How numbers and claims are written out, the same on the terminal, in figures and in reports."""

import math
from collections.abc import Mapping
from typing import Any


def number(value: float | None, *, sign: bool = False) -> str:
    """Write a number with three digits that matter, or all whole digits from 1000 on.

    Example:
        >>> number(2310.4), number(0.012345), number(-3.0), number(0.5, sign=True), number(None)
        ('2,310', '0.0123', '-3', '+0.5', 'n/a')
    """
    if value is None:
        return "n/a"
    plus = "+" if sign else ""
    if not math.isfinite(value) or abs(value) < 999.5:
        return f"{value:{plus}.3g}"
    return f"{value:{plus},.0f}" if abs(value) < 1e12 else f"{value:{plus}.3e}"


def effect(row: Mapping[str, Any]) -> str:
    """Write a judged claim's effect with its interval.

    Args:
        row: a claim of ``result.json``: at least ``effect``, ``low``, ``high``.

    Example:
        >>> effect({"effect": 1.5, "low": 1.0, "high": 2.0})
        '+1.5 [1, 2]'
    """
    if row["effect"] is None:
        return ""
    text = number(row["effect"], sign=True)
    if row["low"] is None or row["high"] is None:
        return text
    return f"{text} [{number(row['low'])}, {number(row['high'])}]"
