"""Records from a user's file: JSON lines, with errors that name the line."""

import json
from pathlib import Path
from typing import Any

__all__ = ["MAX_BYTES", "read_json_lines"]

MAX_BYTES = 2**31
"""Larger files are refused: what is read here is held in memory."""


def read_json_lines(path: str | Path, *, required: tuple[str, ...]) -> list[dict[str, Any]]:
    r"""Read a file of one JSON object a line; empty lines are skipped.

    Args:
        path: the file, UTF-8, at most :data:`MAX_BYTES`.
        required: fields that every object must have.

    Returns:
        The objects, at least one.

    Raises:
        ValueError: no such file, too large, no record, or a line that is no JSON object or lacks a
            field; names the line.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        ...     _ = file.write('{"prompt": "a"}\n{"text": "b"}\n')
        ...     file.flush()
        ...     read_json_lines(file.name, required=("prompt",))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: line 2 of ... lacks the field 'prompt'; it has: text
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file at {path}")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES} bytes; split it")
    records: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    records.append(_record(line, f"line {number} of {path}", required))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if not records:
        raise ValueError(f"{path} holds no record")
    return records


def _record(line: str, where: str, required: tuple[str, ...]) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        place = f"{error.msg} at character {error.pos + 1}"
        raise ValueError(f"{where} is not JSON: {place}") from error
    except RecursionError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be a JSON object, got {type(record).__name__}")
    for field in required:
        if field not in record:
            has = ", ".join(record) or "none"
            raise ValueError(f"{where} lacks the field {field!r}; it has: {has}")
    return record
