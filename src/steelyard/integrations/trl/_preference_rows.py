"""Checks of preference data, with errors that name the row."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_RESPONSES = ("chosen", "rejected")


def check_responses(name: str, dataset: Any, columns: Sequence[str] = _RESPONSES) -> None:
    """Require that no response is empty.

    Args:
        name: of the data set, for the errors.
        dataset: with texts or lists of messages in ``columns``; a stream is not looked at here.
        columns: those that hold responses.

    Raises:
        ValueError: a response without text; names its row.
    """
    for row, example in _rows(dataset, columns):
        for column in columns:
            if _is_empty(example[column]):
                raise ValueError(
                    f"{name} row {row}: {column!r} must not be empty, got {example[column]!r}: "
                    "there is nothing to learn from an empty completion"
                )


def check_tokenized_pair(
    example: Mapping[str, Any], row: int, *, name: str, max_length: int | None
) -> None:
    """Require two different responses of at least one token each.

    Args:
        example: with ``prompt_ids``, ``chosen_ids``, ``rejected_ids``.
        row: its number.
        name: of the data set, for the errors.
        max_length: tokens that are left of prompt and response; ``None`` = all.

    Raises:
        ValueError: a response is empty, or both are equal; names the row.
    """
    room = None if max_length is None else max(max_length - len(example["prompt_ids"]), 0)
    kept = {}
    for column in _RESPONSES:
        ids = example[f"{column}_ids"]
        if len(ids) == 0:
            raise ValueError(f"{name} row {row}: {column!r} is an empty completion, of no tokens")
        kept[column] = list(ids[:room])
    if kept["chosen"] == kept["rejected"]:
        cut = (
            ""
            if len(example["chosen_ids"]) <= (room or len(example["chosen_ids"]))
            else (f" within max_length={max_length}")
        )
        raise ValueError(
            f"{name} row {row}: 'chosen' and 'rejected' must differ, got identical responses of "
            f"{len(kept['chosen'])} tokens{cut}: such a pair has no gradient. Drop these rows, "
            "for example with dataset.filter(lambda row: row['chosen'] != row['rejected'])"
        )


def check_tokenized_pairs(name: str, dataset: Any, max_length: int | None) -> Any:
    """Check each pair of a data set at once, or of a stream when it comes by; return it."""
    if hasattr(dataset, "__len__"):
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
        for row, example in _rows(dataset, columns):
            check_tokenized_pair(example, row, name=name, max_length=max_length)
        return dataset

    def checked(example: dict[str, Any], row: int) -> dict[str, Any]:
        check_tokenized_pair(example, row, name=name, max_length=max_length)
        return example

    return dataset.map(checked, with_indices=True)


def _rows(dataset: Any, columns: Sequence[str]) -> Iterable[tuple[int, dict[str, Any]]]:
    """Rows of some columns, in batches; nothing of a stream or of columns that are not there."""
    if not hasattr(dataset, "__len__") or not set(columns) <= set(dataset.column_names):
        return
    for start, batch in enumerate(dataset.select_columns(list(columns)).iter(_BATCH)):
        for place in range(len(batch[columns[0]])):
            yield start * _BATCH + place, {name: batch[name][place] for name in columns}


_BATCH = 1000


def _is_empty(response: Any) -> bool:
    if isinstance(response, str):
        return not response.strip()
    if not isinstance(response, Sequence) or len(response) == 0:
        return True
    last = response[-1]
    return isinstance(last, Mapping) and not last.get("content") and not last.get("tool_calls")
