"""A user's own preferences: a file of prompts with two responses, read and turned into tokens.

The format is that of TRL: JSON lines with ``prompt``, ``chosen`` and ``rejected``, which are texts,
or lists of chat messages. What cannot be learned from is an error that names its line.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from steelyard._checks import check_count
from steelyard.lab._text import _pad
from steelyard.lab.json_lines import read_json_lines
from steelyard.lab.preferences import Pairs

__all__ = ["encode_pairs", "read_pairs"]

_FIELDS = ("prompt", "chosen", "rejected")


def read_pairs(path: str | Path) -> list[dict[str, Any]]:
    r"""Read preference pairs.

    Args:
        path: JSON lines with ``prompt``, ``chosen`` and ``rejected``: texts, or lists of messages
            with a text under ``content``; other fields are ignored.

    Returns:
        The records, at least one, with these three fields.

    Raises:
        ValueError: no such file, a line that is no such record, an empty prompt or response, or two
            identical responses; names the line.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        ...     _ = file.write('{"prompt": "a", "chosen": "b", "rejected": "c"}\n\n')
        ...     _ = file.write('{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
        ...     file.flush()
        ...     read_pairs(file.name)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: line 3 of ...: 'chosen' and 'rejected' must differ, got 'b' twice
    """
    records = read_json_lines(path, required=_FIELDS)
    with Path(path).open(encoding="utf-8") as lines:
        numbers = [number for number, line in enumerate(lines, start=1) if line.strip()]
    for number, record in zip(numbers, records, strict=True):
        _check_record(record, f"line {number} of {path}")
    return [{field: record[field] for field in _FIELDS} for record in records]


def encode_pairs(
    tokenizer: Any, records: Sequence[Mapping[str, Any]], *, max_tokens: int = 512
) -> Pairs:
    """Turn records into tokens, each response with an end token.

    Args:
        tokenizer: any Hugging Face tokenizer with an end token; chats need a chat template.
        records: from :func:`read_pairs`.
        max_tokens: longest prompt, of which the end is kept, and longest response, of which the
            beginning is kept.

    Returns:
        The pairs; the share of raters is 1.

    Raises:
        ValueError: a response is empty, or both are the same in what is kept; names the record,
            from 0. No records, a prompt without tokens, or a chat without a chat template.

    Example:
        >>> from steelyard.lab.tiny_lm import tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(["a", "b"])
        >>> record = {"prompt": "a", "chosen": "b a", "rejected": "b"}
        >>> pairs = encode_pairs(tokenizer, [record])
        >>> pairs.chosen.tolist(), pairs.rejected.tolist()
        ([[4, 3, 2]], [[4, 2, 0]])
    """
    check_count("max_tokens", max_tokens)
    if not records:
        raise ValueError("records must not be empty")
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    pad = end if pad is None else pad
    prompts = [_prompt_ids(tokenizer, record["prompt"])[-max_tokens:] for record in records]
    if not all(prompts):
        raise ValueError(f"record {prompts.index([])}: the prompt has no tokens")
    responses: list[list[int]] = []
    for field in ("chosen", "rejected"):
        for record in records:
            ids = list(tokenizer(_text(record[field]), add_special_tokens=False)["input_ids"])
            responses.append([*ids, end][:max_tokens])
    tokens, mask = _pad(responses, pad, left=False)
    (chosen, rejected), (chosen_mask, rejected_mask) = tokens.chunk(2), mask.chunk(2)
    share = torch.ones(len(records), dtype=torch.float64)
    return Pairs(
        *_pad(prompts, pad, left=True), chosen, chosen_mask, rejected, rejected_mask, share
    )


def _check_record(record: Mapping[str, Any], where: str) -> None:
    for field in _FIELDS:
        value = record[field]
        if not isinstance(value, str) and not _is_chat(value):
            raise ValueError(
                f"{where}: {field!r} must be a text or a list of messages, got {value!r}"
            )
        if not _text(value).strip():
            kind = "prompt" if field == "prompt" else "completion"
            raise ValueError(f"{where}: {field!r} must not be an empty {kind}, got {value!r}")
    if _text(record["chosen"]) == _text(record["rejected"]):
        shown = _text(record["chosen"])
        raise ValueError(f"{where}: 'chosen' and 'rejected' must differ, got {shown!r} twice")


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in value)
    )


def _text(value: Any) -> str:
    """A text, or the content of the last message."""
    return value if isinstance(value, str) else str(value[-1]["content"])


def _prompt_ids(tokenizer: Any, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("prompts are lists of messages, but the tokenizer has no chat template")
    shown = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(shown, add_special_tokens=False)["input_ids"])
