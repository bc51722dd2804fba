"""From rows of text to padded batches of tokens, and responses written by a model."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from trl.data_utils import common_prefix_length, is_conversational

IGNORED = -100


def prompt_tokens(row: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """Tokens of a row's prompt, a text or a list of messages."""
    if is_conversational({"prompt": row["prompt"]}):
        return _chat(tokenizer, row["prompt"], add_generation_prompt=True)
    return list(tokenizer(row["prompt"])["input_ids"])


def response_tokens(
    row: Mapping[str, Any], tokenizer: Any, columns: Sequence[str]
) -> dict[str, list[int]]:
    """Tokens of a row's prompt and of its responses, split where they begin to differ.

    Texts get the end token, conversations what their template puts there.

    Args:
        row: with ``prompt`` and ``columns``.
        tokenizer: with a chat template for conversations.
        columns: of the responses.

    Returns:
        ``prompt_ids`` and ``NAME_ids`` for each column.
    """
    start, whole = prompt_tokens(row, tokenizer), {}
    for column in columns:
        if is_conversational({"prompt": row["prompt"]}):
            whole[column] = _chat(tokenizer, [*row["prompt"], *row[column]])
        else:
            end, text = tokenizer.eos_token or "", row[column]
            text = text if end and text.endswith(end) else text + end
            whole[column] = list(tokenizer(row["prompt"] + text)["input_ids"])
    shared = min([common_prefix_length(start, ids) for ids in whole.values()], default=len(start))
    found = {f"{column}_ids": ids[shared:] for column, ids in whole.items()}
    return {"prompt_ids": start[:shared], **found}


def pad_batch(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    padding: int,
    max_length: int | None,
) -> dict[str, Tensor]:
    """Pairs of prompt and response as one batch, padded on the right.

    Args:
        sequences: token lists.
        padding: the token to fill up with.
        max_length: tokens that are kept of prompt and response together.

    Returns:
        ``input_ids``, ``attention_mask`` and ``completion_mask`` (the tokens of responses), each
        ``[B, T]``.
    """
    rows = [([*prompt, *response][:max_length], len(prompt)) for prompt, response in sequences]
    longest = max(len(ids) for ids, _ in rows)
    shape = (len(rows), longest)
    batch = {
        "input_ids": torch.full(shape, padding),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "completion_mask": torch.zeros(shape, dtype=torch.long),
    }
    for place, (ids, start) in enumerate(rows):
        batch["input_ids"][place, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        batch["attention_mask"][place, : len(ids)] = 1
        batch["completion_mask"][place, start : len(ids)] = 1
    return batch


@torch.no_grad()
def generate_responses(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 16,
) -> list[list[int]]:
    """Responses sampled from the whole distribution of a model, one for each prompt.

    Args:
        model: with ``generate``.
        tokenizer: knows the end token and padding.
        prompts: token lists.
        max_new_tokens: longest response.
        temperature: of the sampling.
        batch_size: prompts at a time.

    Returns:
        Token lists, up to and with the end token, or cut without it.
    """
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    training, device = model.training, next(model.parameters()).device
    model.eval()
    written: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        longest = max(len(ids) for ids in part)
        ids = torch.full((len(part), longest), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(part):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
            mask[row, longest - len(prompt) :] = 1
        output = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
        )
        written += [_until_end(row, tokenizer.eos_token_id) for row in output[:, longest:].tolist()]
    model.train(training)
    return written


def check_tokenizer(tokenizer: Any) -> None:
    """Require an end token, and use it for padding if there is no other.

    Raises:
        ValueError: there is none.
    """
    if tokenizer is None or getattr(tokenizer, "eos_token_id", None) is None:
        raise ValueError(
            "processing_class must be a tokenizer with an end token (eos_token), got "
            f"{type(tokenizer).__name__}"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def _until_end(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


def _chat(tokenizer: Any, messages: Any, **options: Any) -> list[int]:
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    return list(ids)
