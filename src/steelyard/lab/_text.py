"""Between texts and tokens: a tokenizer over a handful of symbols, padding, decoding."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steelyard._checks import check_mask, check_shape
from steelyard._extras import require

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def tiny_tokenizer(symbols: Sequence[str]) -> Any:
    """Make a tokenizer whose tokens are the given symbols, written with spaces between them.

    Ids 0, 1 and 2 are ``<pad>``, ``<bos>`` and ``<eos>``; the symbols follow in order. Nothing is
    added to a text on its own, so the tokens of a prompt and of its completion are the tokens of
    the text of both. A word that is no symbol is an error, not an unknown token.

    Args:
        symbols: distinct non-empty strings without white space.

    Returns:
        A ``transformers.PreTrainedTokenizerFast`` that pads on the left.

    Raises:
        ValueError: no symbols, a symbol twice, with white space, or one of the three above.

    Example:
        >>> tokenizer = tiny_tokenizer(["a", "b", "->"])
        >>> tokenizer("b a ->")["input_ids"], tokenizer.decode([4, 3, 5])
        ([4, 3, 5], 'b a ->')
    """
    words = list(symbols)
    if not words:
        raise ValueError("symbols must not be empty")
    for word in words:
        if not isinstance(word, str) or word.split() != [word] or word in {PAD, BOS, EOS}:
            raise ValueError(
                "symbols must be strings without white space, other than "
                f"{PAD}, {BOS}, {EOS}; got {word!r}"
            )
    if len(set(words)) < len(words):
        twice = sorted({word for word in words if words.count(word) > 1})
        raise ValueError(f"symbols must be distinct, got {', '.join(map(repr, twice))} twice")
    tokenizers = require("tokenizers", extra="lm")
    vocabulary = {word: index for index, word in enumerate([PAD, BOS, EOS, *words])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return require("transformers", extra="lm").PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def encode_rows(tokenizer: Any, rows: Iterable[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
    """Turn the ``prompt`` of each row into ids, padded on the left.

    Args:
        tokenizer: any Hugging Face tokenizer with a padding token.
        rows: each with a text under ``"prompt"``.

    Returns:
        Ids ``[B, P]`` and their boolean mask ``[B, P]``.

    Raises:
        ValueError: no rows, a row without a prompt, or a prompt without tokens.

    Example:
        >>> encode_rows(tiny_tokenizer(["a", "b"]), [{"prompt": "b"}, {"prompt": "a b"}])
        (tensor([[0, 4],
                [3, 4]]), tensor([[False,  True],
                [ True,  True]]))
    """
    prompts = [row.get("prompt") for row in rows]
    if not prompts:
        raise ValueError("rows must not be empty")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"rows must have a text under 'prompt', got {prompt!r} in row {index}")
    ids = [list(line) for line in tokenizer(prompts)["input_ids"]]
    if not all(ids):
        raise ValueError("prompts must have at least one token each")
    return _pad(ids, tokenizer.pad_token_id, left=True)


def encode_completions(
    tokenizer: Any, completions: Iterable[str], *, append_eos: bool = True
) -> tuple[Tensor, Tensor]:
    """Turn completions into ids, padded on the right, each followed by the end token.

    Args:
        tokenizer: as in :func:`encode_rows`.
        completions: texts; an empty one is its end token alone.
        append_eos: ``False`` leaves the end token out.

    Returns:
        Ids ``[B, T]`` and their boolean mask ``[B, T]``.

    Raises:
        ValueError: no completions.

    Example:
        >>> encode_completions(tiny_tokenizer(["a", "b"]), ["b a", "a"])[0]
        tensor([[4, 3, 2],
                [3, 2, 0]])
    """
    texts = list(completions)
    if not texts:
        raise ValueError("completions must not be empty")
    end = [tokenizer.eos_token_id] if append_eos else []
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return _pad([list(line) + end for line in encoded], tokenizer.pad_token_id, left=False)


def decode_completions(tokenizer: Any, tokens: Tensor, mask: Tensor) -> list[str]:
    """Turn sampled tokens into texts without special tokens, as TRL hands them to a reward.

    Args:
        tokenizer: as in :func:`encode_rows`.
        tokens: ``[B, T]``.
        mask: ``[B, T]``, which tokens belong to the completion.

    Returns:
        ``B`` strings.

    Example:
        >>> tokens = torch.tensor([[4, 3, 2], [3, 2, 0]])
        >>> decode_completions(tiny_tokenizer(["a", "b"]), tokens, tokens != 0)
        ['b a', 'a']
    """
    check_shape("tokens", tokens, (None, None))
    check_mask(mask, tokens)
    kept = [
        [token for token, keep in zip(line, keeps, strict=True) if keep]
        for line, keeps in zip(tokens.tolist(), mask.tolist(), strict=True)
    ]
    texts: list[str] = tokenizer.batch_decode(kept, skip_special_tokens=True)
    return texts


def _pad(lines: Sequence[list[int]], pad_id: int, *, left: bool) -> tuple[Tensor, Tensor]:
    length = max(map(len, lines))
    gaps = [length - len(line) for line in lines]
    ids, kept = [], []
    for line, gap in zip(lines, gaps, strict=True):
        fill, no, yes = [pad_id] * gap, [False] * gap, [True] * len(line)
        ids.append(fill + line if left else line + fill)
        kept.append(no + yes if left else yes + no)
    return torch.tensor(ids), torch.tensor(kept, dtype=torch.bool)
