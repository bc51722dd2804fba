r"""Real text for small language models: one token a word, and lexicons that score it.

A vocabulary of the most frequent words, windows of text in which only these occur, a transformer
trained on them, and rewards that look a word up in a lexicon. With a token for each word it is
known exactly which tokens a reward depends on.

Needs the extra ``lm``; importing this module does not.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steelyard._checks import check_count, check_not_empty, check_range, check_shape
from steelyard.lab.tiny_lm import pretrain, tiny_lm, tiny_tokenizer

__all__ = [
    "LexiconReward",
    "WordText",
    "distinct",
    "lexicon_score",
    "self_bleu",
    "word_model",
    "word_text",
]

_NORMAL = 15.0  # VADER's constant: a sum of 4 counts 0.72
_FIRST_WORD = 3  # ids below are padding, beginning and end
_WORD = re.compile(r"[a-z']+")


@dataclass(frozen=True)
class WordText:
    """A tokenizer and windows of text."""

    tokenizer: Any
    words: tuple[str, ...]
    """By frequency; the id of a word is its place plus 3."""
    windows: Tensor
    """``[N, W]`` ids."""

    def id_of(self, word: str) -> int:
        """Id of a word.

        Raises:
            ValueError: it is not in the vocabulary.
        """
        if word not in self.words:
            raise ValueError(f"word {word!r} is not among the {len(self.words)} most frequent ones")
        return self.words.index(word) + _FIRST_WORD

    def prompts(
        self, count: int, generator: torch.Generator, *, length: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Draw beginnings of windows: the first token and ``length`` words, with their mask."""
        rows = torch.randint(len(self.windows), (count,), generator=generator)
        first = torch.full((count, 1), self.tokenizer.bos_token_id)
        ids = torch.cat([first, self.windows[rows, :length]], dim=1)
        return ids, torch.ones_like(ids, dtype=torch.bool)


def word_text(
    texts: Iterable[str], *, words: int = 1000, window: int = 16, stride: int = 4
) -> WordText:
    """Cut texts into windows that consist of frequent words only.

    Args:
        texts: words with spaces between them.
        words: size of the vocabulary.
        window: words of a window.
        stride: words from one window to the next within a run of frequent words.

    Returns:
        Tokenizer, words and windows.

    Raises:
        ValueError: a number below 1, or no window.

    Example:
        >>> text = word_text(["a b a b c a b a"], words=2, window=2, stride=2)
        >>> text.words, text.windows.tolist()
        (('a', 'b'), [[3, 4], [3, 4], [3, 4]])
    """
    check_count("words", words)
    check_count("window", window)
    check_count("stride", stride)
    lines = [text.split() for text in texts]
    counts = Counter(word for line in lines for word in line)
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[:words]
    ids = {word: place + _FIRST_WORD for place, word in enumerate(frequent)}
    windows: list[list[int]] = []
    for line in lines:
        run: list[int] = []
        for word in line:
            if word not in ids:
                run = []
                continue
            run.append(ids[word])
            if len(run) == window:
                windows.append(run)
                run = run[stride:]
    if not windows:
        raise ValueError(f"texts have no run of {window} words among the {words} most frequent")
    return WordText(tiny_tokenizer(frequent), tuple(frequent), torch.tensor(windows))


def word_model(
    text: WordText,
    *,
    seed: int,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    hidden_size: int = 64,
) -> Any:
    """Train a transformer of two layers from scratch on the windows, after the first token.

    Args:
        text: windows.
        seed: of weights and order.
        steps: of training.
        batch_size: windows a step.
        learning_rate: peak.
        hidden_size: a multiple of 8.
    """
    check_range("seed", seed, at_least=0)
    model = tiny_lm(text.tokenizer, hidden_size=hidden_size, seed=seed)
    first = torch.full((len(text.windows), 1), text.tokenizer.bos_token_id)
    pretrain(
        model,
        first,
        torch.ones_like(first, dtype=torch.bool),
        text.windows,
        torch.ones_like(text.windows, dtype=torch.bool),
        steps=steps,
        batch_size=batch_size,
        lr=learning_rate,
        generator=torch.Generator().manual_seed(seed),
    )
    return model


class LexiconReward:
    r"""Sum of the ratings of the words, squeezed into (-1, 1) as VADER does.

    .. math:: r = \frac{s}{\sqrt{s^2 + 15}}, \qquad s = \sum_t \text{rating}(y_t)

    Without the rules of VADER for negation and emphasis: a reward is a sum over tokens, so the
    tokens that matter are known.

    Args:
        text: gives the vocabulary.
        lexicon: ratings by word.

    Example:
        >>> text = word_text(["good day good day"], words=2, window=2)
        >>> reward = LexiconReward(text, {"good": 2.0})
        >>> reward.values
        tensor([0., 0., 0., 0., 2.])
        >>> reward(torch.tensor([[4, 3], [3, 3]]), torch.ones(2, 2, dtype=torch.bool))
        tensor([0.4588, 0.0000])
    """

    def __init__(self, text: WordText, lexicon: Mapping[str, float]) -> None:
        ratings = [0.0] * _FIRST_WORD + [lexicon.get(word, 0.0) for word in text.words]
        self.values = torch.tensor(ratings)
        """``[V]``, rating of each token."""

    def total(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Sum of the ratings, ``[N]``, for tokens ``[N, T]``."""
        return (self.values[tokens] * mask).sum(-1)

    def __call__(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Score of each row, ``[N]``."""
        total = self.total(tokens, mask)
        return total / (total.square() + _NORMAL).sqrt()


def lexicon_score(text: str, lexicon: Mapping[str, float]) -> float:
    """Score any text as :class:`LexiconReward` does.

    Example:
        >>> round(lexicon_score("A good day!", {"good": 2.0}), 4)
        0.4588
    """
    total = sum(lexicon.get(word, 0.0) for word in _WORD.findall(text.lower()))
    return total / math.sqrt(total * total + _NORMAL)


def distinct(tokens: Tensor, mask: Tensor, n: int = 2) -> float:
    """Share of different n-grams among all n-grams of the rows: 1 = none occurs twice.

    It falls with the number of rows: compare equal numbers.

    Args:
        tokens: ``[N, T]``.
        mask: ``[N, T]``, padded on the right.
        n: length of the n-grams.

    Example:
        >>> distinct(torch.tensor([[1, 2, 1, 2]]), torch.ones(1, 4, dtype=torch.bool))
        0.6666666666666666
    """
    counts = _ngrams(tokens, mask, n)
    total = sum(sum(row.values()) for row in counts)
    return len(set().union(*counts)) / total if total else 1.0


def self_bleu(tokens: Tensor, mask: Tensor, most: int = 3) -> float:
    """Mean over rows of how much of a row is found in some other row: 1 = all are copies.

    The geometric mean of the shares of n-grams, n up to ``most``, that another row has as often.
    There is no penalty on length.

    Args:
        tokens: ``[N, T]``, at least two rows.
        mask: ``[N, T]``, padded on the right.
        most: longest n-gram.

    Raises:
        ValueError: wrong shape, or fewer than two rows.

    Example:
        >>> every = torch.ones(2, 4, dtype=torch.bool)
        >>> self_bleu(torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]]), every)
        1.0
        >>> self_bleu(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), every)
        0.0
    """
    check_shape("tokens", tokens, (None, None))
    check_not_empty("tokens", tokens)
    check_count("tokens rows", len(tokens), at_least=2)
    log_share = torch.zeros(len(tokens), dtype=torch.float64)
    for n in range(1, most + 1):
        rows = _ngrams(tokens, mask, n)
        largest: dict[tuple[int, ...], list[int]] = {}
        for row in rows:
            for gram, count in row.items():
                largest[gram] = sorted([*largest.get(gram, [0, 0]), count])[1:]
        shares = []
        for row in rows:
            found = 0
            for gram, count in row.items():
                second, first = largest[gram]
                found += min(count, second if count == first else first)
            shares.append(found / max(sum(row.values()), 1))
        log_share += torch.tensor(shares, dtype=torch.float64).log() / most
    return log_share.exp().mean().item()


def _ngrams(tokens: Tensor, mask: Tensor, n: int) -> list[Counter[tuple[int, ...]]]:
    lines: Sequence[list[int]] = [
        row[:length] for row, length in zip(tokens.tolist(), mask.sum(-1).tolist(), strict=True)
    ]
    return [Counter(zip(*(line[k:] for k in range(n)), strict=False)) for line in lines]
