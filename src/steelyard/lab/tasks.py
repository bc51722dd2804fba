r"""Tasks whose answers can be checked: sorting, sorting after filler, modular sums, reasoning-gym.

A task is a sampler of prompts and a reward with the signature of TRL,
``reward(prompts, completions, **columns) -> list[float]``, so it serves a model of four thousand
parameters and one from the shop alike. It also shows solutions: ``demonstrate`` gives correct ones
(supervised training), ``demonstrate_mixed`` gives them right only part of the time, which makes a
base model that reinforcement learning can improve.

Texts are symbols with single spaces between them, one token each for
:func:`steelyard.lab.tiny_lm.tiny_tokenizer`. An answer must end: ``max_new_tokens`` leaves room
for the end token, and a completion that fills all of it is too long to be right.

Sources of the settings: Sec. 11 of the specifications of Meng et al. (2026), arXiv:2603.22446
(token-level shift), Ren et al. (2026), arXiv:2602.10019 (ADORA) and Chen et al. (2025),
arXiv:2509.23962 (CANON).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from steelyard._checks import check_choice, check_count, check_range
from steelyard.lab._gym import reasoning_gym_task
from steelyard.lab._task import ASK, Reward, Row, Task, completion_texts, uniform

__all__ = [
    "FillerFamily",
    "Reward",
    "Row",
    "Task",
    "filler_sorting",
    "modular_arithmetic",
    "reasoning_gym_task",
    "sorting",
]

Direction = Literal["long", "short", "none", "mixed"]

FILLER, EQUALS = ".", "="


@dataclass(frozen=True)
class FillerFamily:
    """A kind of prompts in :func:`filler_sorting`: how often each length of filler is right."""

    name: str
    right: tuple[float, ...]
    """Probability that a mixed demonstration with ``k`` fillers is right, ``k = 0, 1, ...``."""
    share: float = 1.0
    """Relative share among the prompts."""


def sorting(size: int = 7, *, values: int | None = None, right: float = 0.3) -> Task:
    """Sort distinct numbers: the first token decides, the rest follows.

    Mixed demonstrations ascend with probability ``right`` and descend otherwise; only ascending is
    rewarded. The two differ in their first token, and after it every token is forced.

    Args:
        size: how many numbers, >= 2.
        values: they are drawn from ``0 .. values - 1``; ``None`` = ``max(10, size)``.
        right: in [0, 1].

    Returns:
        A :class:`Task` with the column ``answer``.

    Raises:
        ValueError: a setting out of range.

    Example:
        >>> task = sorting(3)
        >>> [row] = task.sample(1, torch.Generator().manual_seed(1))
        >>> row
        {'prompt': '4 1 6 :', 'answer': '1 4 6'}
        >>> task.reward([row["prompt"]] * 2, ["1 4 6", "6 4 1"], answer=["1 4 6"] * 2)
        [1.0, 0.0]

    Source: Meng et al. (2026), arXiv:2603.22446: the claim that few tokens carry the gain.
    """
    values = max(10, size) if values is None else values
    _check_numbers(size, values)
    check_range("right", right, at_least=0.0, at_most=1.0)

    def draw(count: int, generator: torch.Generator) -> list[Row]:
        return [
            {"prompt": f"{' '.join(map(str, line))} {ASK}", "answer": _join(sorted(line))}
            for line in _distinct(count, size, values, generator)
        ]

    def sorting_reward(
        prompts: Sequence[Any], completions: Sequence[Any], *, answer: Sequence[str], **_: Any
    ) -> list[float]:
        texts = completion_texts(prompts, completions, answer=answer)
        return [float(text == want) for text, want in zip(texts, answer, strict=True)]

    def show(rows: Sequence[Row], generator: torch.Generator) -> list[str]:
        del generator  # One right answer only.
        return [row["answer"] for row in rows]

    def show_mixed(rows: Sequence[Row], generator: torch.Generator) -> list[str]:
        keep = uniform(len(rows), generator)
        return [
            row["answer"] if u < right else _reverse(row["answer"])
            for row, u in zip(rows, keep, strict=True)
        ]

    symbols = (*map(str, range(values)), ASK)
    return Task(f"sort{size}", symbols, size + 1, draw, sorting_reward, show, show_mixed)


def filler_sorting(
    size: int = 4,
    *,
    values: int = 10,
    max_filler: int = 5,
    direction: Direction = "long",
    base: float = 0.10,
    slope: float = 0.08,
    families: Sequence[FillerFamily] | None = None,
) -> Task:
    r"""Sort after a free number of filler tokens, so that an answer has a length of its own.

    A completion is ``k`` fillers, ``0 <= k <= max_filler``, then the numbers ascending; the reward
    looks at the numbers only. In the mixed demonstrations ``k`` is uniform and the numbers ascend
    with a probability that depends on it, else descend:

    ============ ============================================= =================================
    direction    probability with ``k`` fillers                setting
    ============ ============================================= =================================
    ``"long"``   ``base + slope * k``                          longer answers are right more often
    ``"short"``  ``base + slope * (max_filler - k)``           the mirrored task
    ``"none"``   ``base + slope * max_filler / 2``             length does not matter (efficiency)
    ``"mixed"``  two families told apart by a first symbol:    mixed difficulty
                 ``hard`` as ``"long"``; ``easy`` as
                 ``"short"`` about a mean of 0.8
    ============ ============================================= =================================

    Args:
        size: how many numbers, >= 2.
        values: they are drawn from ``0 .. values - 1``.
        max_filler: most fillers, >= 1.
        direction: see the table; unused with ``families``.
        base: see the table.
        slope: see the table, >= 0.
        families: your own kinds of prompts; with more than one, the prompt starts with the name.

    Returns:
        A :class:`Task` with the columns ``answer`` and ``family``.

    Raises:
        ValueError: a setting out of range, a probability outside [0, 1], or a family with other
            than ``max_filler + 1`` probabilities.

    Example:
        >>> task = filler_sorting(3)
        >>> task.reward([": "] * 3, [". . 1 2 3", "1 2 3", ". 3 2 1"], answer=["1 2 3"] * 3)
        [1.0, 1.0, 0.0]

    Source: settings of arXiv:2603.22446, arXiv:2602.10019 and arXiv:2509.23962 at small scale.
    """
    _check_numbers(size, values)
    check_count("max_filler", max_filler)
    check_choice("direction", direction, ("long", "short", "none", "mixed"))
    check_range("slope", slope, at_least=0.0)
    if families is None:
        families = _families(direction, max_filler, base, slope)
    _check_families(families, max_filler, {*map(str, range(values)), ASK, FILLER})
    chances = {family.name: family.right for family in families}
    names, named = [family.name for family in families], len(families) > 1
    shares = torch.tensor([family.share for family in families])

    def draw(count: int, generator: torch.Generator) -> list[Row]:
        check_count("count", count)
        kinds = torch.multinomial(shares, count, replacement=True, generator=generator).tolist()
        return [
            {
                "prompt": f"{names[kind] + ' ' if named else ''}{_join(line)} {ASK}",
                "answer": _join(sorted(line)),
                "family": names[kind],
            }
            for kind, line in zip(kinds, _distinct(count, size, values, generator), strict=True)
        ]

    def filler_sorting_reward(
        prompts: Sequence[Any], completions: Sequence[Any], *, answer: Sequence[str], **_: Any
    ) -> list[float]:
        scores = []
        for text, want in zip(
            completion_texts(prompts, completions, answer=answer), answer, strict=True
        ):
            words = text.split()
            filler = len(words) - size
            right = (
                0 <= filler <= max_filler
                and _join(words[filler:]) == want
                and words[:filler].count(FILLER) == filler
            )
            scores.append(float(right))
        return scores

    def styled(rows: Sequence[Row], generator: torch.Generator, *, mixed: bool) -> list[str]:
        fillers = torch.randint(max_filler + 1, (len(rows),), generator=generator).tolist()
        keep = uniform(len(rows), generator)
        shown = []
        for row, filler, u in zip(rows, fillers, keep, strict=True):
            right = not mixed or u < chances[row["family"]][filler]
            numbers = row["answer"] if right else _reverse(row["answer"])
            shown.append(f"{FILLER} " * filler + numbers)
        return shown

    return Task(
        f"filler{size}-{direction}",
        (*map(str, range(values)), ASK, FILLER, *(names if named else ())),
        max_filler + size + 1,
        draw,
        filler_sorting_reward,
        functools.partial(styled, mixed=False),
        functools.partial(styled, mixed=True),
    )


def _families(
    direction: Direction, most: int, base: float, slope: float
) -> tuple[FillerFamily, ...]:
    rising = tuple(base + slope * k for k in range(most + 1))
    falling = rising[::-1]
    flat = (base + slope * most / 2,) * (most + 1)
    if direction == "mixed":
        easy = tuple(min(1.0, max(0.0, 0.8 + slope * (most / 2 - k))) for k in range(most + 1))
        return (FillerFamily("hard", rising), FillerFamily("easy", easy))
    return (FillerFamily("all", {"long": rising, "short": falling, "none": flat}[direction]),)


def _check_families(families: Sequence[FillerFamily], most: int, taken: set[str]) -> None:
    if not families:
        raise ValueError("families must not be empty")
    names = [family.name for family in families]
    if len(set(names)) < len(names) or any(n.split() != [n] or n in taken for n in names):
        raise ValueError(
            f"families must have distinct names without white space or symbols, got {names}"
        )
    for family in families:
        if len(family.right) != most + 1:
            raise ValueError(
                f"family {family.name!r} must have {most + 1} probabilities, for 0 to {most} "
                f"fillers, got {len(family.right)}"
            )
        for chance in family.right:
            check_range(f"probability in family {family.name!r}", chance, at_least=0.0, at_most=1.0)
        check_range(f"share of family {family.name!r}", family.share, above=0.0)


_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}


def modular_arithmetic(
    modulus: int = 7,
    terms: int = 4,
    *,
    operations: Sequence[str] = ("+",),
    scratch: float = 0.5,
    right: float = 0.6,
    right_direct: float = 0.3,
) -> Task:
    """Reckon from left to right modulo a number, with or without the steps written down.

    The steps of ``3 + 5 + 6 + 1`` modulo 7 are ``1 0 = 1``: the running results, then the answer;
    without scratch work ``= 1``. The reward looks at the answer only. Mixed demonstrations with
    scratch are right with probability ``right``, those without with ``right_direct``; a wrong one
    slips at one step and goes on from there.

    Args:
        modulus: >= 2.
        terms: how many numbers, >= 2.
        operations: drawn from these, of ``"+"``, ``"-"``, ``"*"``; no precedence.
        scratch: share of demonstrations with scratch work.
        right: in [0, 1].
        right_direct: in [0, 1].

    Returns:
        A :class:`Task` with the column ``answer``.

    Raises:
        ValueError: a setting out of range.

    Example:
        >>> task = modular_arithmetic(7, 4)
        >>> task.reward([""] * 3, ["1 0 = 1", "= 1", "1 0 1"], answer=["1"] * 3)
        [1.0, 1.0, 0.0]
        >>> rows = [{"prompt": "3 + 5 + 6 + 1 :", "answer": "1"}]
        >>> modular_arithmetic(7, 4, scratch=1.0).demonstrate(rows, torch.Generator())
        ['1 0 = 1']
    """
    check_count("modulus", modulus, at_least=2)
    check_count("terms", terms, at_least=2)
    if not operations:
        raise ValueError("operations must not be empty")
    for operation in operations:
        check_choice("operations", operation, tuple(_OPERATIONS))
    for name, chance in (("scratch", scratch), ("right", right), ("right_direct", right_direct)):
        check_range(name, chance, at_least=0.0, at_most=1.0)

    def draw(count: int, generator: torch.Generator) -> list[Row]:
        check_count("count", count)
        numbers = torch.randint(modulus, (count, terms), generator=generator).tolist()
        kinds = torch.randint(len(operations), (count, terms - 1), generator=generator).tolist()
        rows = []
        for line, kind in zip(numbers, kinds, strict=True):
            words = [str(line[0])]
            for number, operation in zip(line[1:], kind, strict=True):
                words += [operations[operation], str(number)]
            answer = _running(words, modulus)[-1]
            rows.append({"prompt": f"{_join(words)} {ASK}", "answer": str(answer)})
        return rows

    def modular_arithmetic_reward(
        prompts: Sequence[Any], completions: Sequence[Any], *, answer: Sequence[str], **_: Any
    ) -> list[float]:
        scores = []
        for text, want in zip(
            completion_texts(prompts, completions, answer=answer), answer, strict=True
        ):
            words = text.split()
            ends = words[-2:] == [EQUALS, want] and words.count(EQUALS) == 1
            scores.append(float(ends and len(words) <= terms))
        return scores

    def styled(rows: Sequence[Row], generator: torch.Generator, *, mixed: bool) -> list[str]:
        long, keep = uniform(len(rows), generator), uniform(len(rows), generator)
        at = torch.randint(terms - 1, (len(rows),), generator=generator).tolist()
        by = torch.randint(1, modulus, (len(rows),), generator=generator).tolist()
        shown = []
        for row, u, v, slip_at, slip_by in zip(rows, long, keep, at, by, strict=True):
            written = u < scratch
            slip = mixed and v >= (right if written else right_direct)
            words = row["prompt"].split()[:-1]
            # Where only the answer is shown the slip is in it: an earlier one could cancel.
            where = slip_at if written else terms - 2
            steps = _running(words, modulus, slip=(where, slip_by) if slip else None)
            head = f"{_join(steps[:-1])} " if written and terms > 2 else ""
            shown.append(f"{head}{EQUALS} {steps[-1]}")
        return shown

    return Task(
        f"mod{modulus}x{terms}",
        (*map(str, range(modulus)), *dict.fromkeys(operations), EQUALS, ASK),
        terms + 1,
        draw,
        modular_arithmetic_reward,
        functools.partial(styled, mixed=False),
        functools.partial(styled, mixed=True),
    )


def _running(words: list[str], modulus: int, slip: tuple[int, int] | None = None) -> list[int]:
    """Results after each operation; ``slip = (step, error)`` adds an error at one step."""
    result, results = int(words[0]), []
    for step in range(len(words) // 2):
        result = _OPERATIONS[words[2 * step + 1]](result, int(words[2 * step + 2])) % modulus
        if slip is not None and step == slip[0]:
            result = (result + slip[1]) % modulus
        results.append(result)
    return results


def _check_numbers(size: int, values: int) -> None:
    check_count("size", size, at_least=2)
    check_count("values", values, at_least=size)


def _distinct(count: int, size: int, values: int, generator: torch.Generator) -> list[list[int]]:
    check_count("count", count)
    order = torch.rand(count, values, generator=generator).argsort(dim=1)
    lines: list[list[int]] = order[:, :size].tolist()
    return lines


def _join(words: Sequence[Any]) -> str:
    return " ".join(map(str, words))


def _reverse(text: str) -> str:
    return " ".join(reversed(text.split()))
