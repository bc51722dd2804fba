"""Checks of what a user's functions give the trainer, with errors that name the function."""

import functools
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from trl.trainer.utils import is_async_callable

RewardFunction = Callable[..., Any]


def checked_reward_function(function: RewardFunction, name: str) -> RewardFunction:
    """Wrap a reward function so that wrong lengths and NaN are reported where they come from.

    ``None`` passes: it says that the function does not apply to that completion, which TRL takes
    for NaN from then on, so a NaN has to be caught here.

    Args:
        function: called by TRL with ``prompts``, ``completions`` and the columns; may be async.
        name: how TRL logs it.
    """
    if is_async_callable(function):

        @functools.wraps(function)
        async def awaited(*args: Any, completions: Sequence[Any], **columns: Any) -> list[Any]:
            answer: Awaitable[Any] = function(*args, completions=completions, **columns)
            return check_rewards(await answer, name, completions)

        return awaited

    @functools.wraps(function)
    def checked(*args: Any, completions: Sequence[Any], **columns: Any) -> list[Any]:
        return check_rewards(function(*args, completions=completions, **columns), name, completions)

    return checked


def check_rewards(rewards: Any, name: str, completions: Sequence[Any]) -> list[Any]:
    """Require one finite number or ``None`` for each completion.

    Raises:
        TypeError: not a sequence of numbers.
        ValueError: a wrong number of them, or one that is NaN or infinite.
    """
    try:
        values = list(rewards)
        finite = [value is None or math.isfinite(value) for value in values]
    except TypeError:
        raise TypeError(
            f"reward function {name!r} must return a list with a number or None for each "
            f"completion, got {rewards!r}"
        ) from None
    if len(values) != len(completions):
        raise ValueError(
            f"reward function {name!r} must return {len(completions)} rewards, one for each "
            f"completion, got {len(values)}"
        )
    if not all(finite):
        where = finite.index(False)
        raise ValueError(
            f"reward function {name!r} must return finite numbers, or None where it does not "
            f"apply, got {float(values[where])} for completion {where}: {completions[where]!r}"
        )
    return values


def checked_rollout(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a ``rollout_func`` so that missing and empty completions are reported."""

    @functools.wraps(function)
    def checked(prompts: list[Any], trainer: Any) -> Any:
        output = function(prompts, trainer)
        completions = output.get("completion_ids")
        if completions is None:
            return output  # TRL names the missing keys
        if len(completions) != len(prompts):
            raise ValueError(
                f"rollout_func must return {len(prompts)} completions, one for each prompt it is "
                f"given, got {len(completions)}: groups would not match their prompts"
            )
        for where, ids in enumerate(completions):
            if len(ids) == 0:
                raise ValueError(
                    f"completion {where} of rollout_func is empty: a completion must have at least "
                    "one token, its end token if nothing else"
                )
        return output

    return checked


def check_masks(masks: Sequence[Sequence[int]] | None) -> None:
    """Require that the model wrote at least one token of each completion.

    Args:
        masks: 1 for the model's tokens, 0 for those of tools or the environment.

    Raises:
        ValueError: a completion without a token of the model.
    """
    for where, mask in enumerate(masks or ()):
        if not any(mask):
            raise ValueError(
                f"completion {where} has no token of the model: its mask of {len(mask)} tokens "
                "(env_mask) is all 0"
            )


def check_prompt_column(name: str, dataset: Any) -> None:
    """Require the column ``prompt`` of a dataset whose columns are known.

    Raises:
        ValueError: there is none; names the columns.
    """
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_prompt_column(f"{name}[{key!r}]", part)
        return
    columns = getattr(dataset, "column_names", None)
    if columns is not None and "prompt" not in columns:
        raise ValueError(f"{name} must have a column 'prompt', got the columns {list(columns)}")


def check_groups(prompts: Sequence[Any], first: int, size: int) -> None:
    """Require that completions of one group answer one prompt.

    Args:
        prompts: of the completions of this process.
        first: place of the first of them among the completions of all processes.
        size: completions of a group.

    Raises:
        ValueError: two prompts in one group.
    """
    for row in range(1, len(prompts)):
        group = (first + row) // size
        if group == (first + row - 1) // size and prompts[row] != prompts[row - 1]:
            raise ValueError(
                f"groups must be {size} completions of one prompt each, got two prompts in group "
                f"{group}: {prompts[row - 1]!r} and {prompts[row]!r}"
            )
