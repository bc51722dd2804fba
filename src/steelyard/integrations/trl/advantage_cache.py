"""Token advantages of two teachers on the student's own responses, stored in one file.

With the file, training needs no teacher in memory. It is a safetensors file; a batch reads only its
own rows.
"""
# ruff: noqa: E402, a missing extra must be reported before its imports are tried

from steelyard._extras import require

require("trl", extra="trl")

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from steelyard._checks import check_count, check_shape
from steelyard.integrations.trl._backbone import LinearHead
from steelyard.integrations.trl._row_loss import TeacherRows

__all__ = ["AdvantageCache"]

_FORMAT = "steelyard-advantages-1"


class TokenAdvantages(NamedTuple):
    """Advantages of a few tokens at each place of a response."""

    indices: Tensor
    """Of the tokens, ``[T, K]``, integers."""
    values: Tensor
    """Their advantages, ``[T, K]``."""


class CachedRow(NamedTuple):
    """What is stored of one row of the data."""

    response: list[int]
    advantages: TokenAdvantages


class AdvantageCache:
    r"""File of the student's own responses and the teachers' advantages on them.

    Holds ``log pi_dpo - log pi_ref`` of the aligned teacher's ``top_k`` likeliest tokens at each
    place, both normalised over the whole vocabulary first. Made by
    :class:`~steelyard.integrations.trl.DistillationTrainer`, or by :meth:`write`.

    Args:
        path: of the file.

    Attributes:
        vocab_size: of the teachers.
        top_k: tokens at each place.

    Raises:
        ValueError: not such a file.

    Example:
        ::

            cache = AdvantageCache("advantages.safetensors")
            len(cache), cache.top_k
            cache[3].response           # tokens
            cache[3].advantages.values  # [T, K]

    Source: Gao et al. (2025), arXiv:2502.17927; the released code floors what is missing of the
    reference teacher, here it is looked up at the aligned teacher's tokens.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: Any = None
        meta = self._open().metadata() or {}
        if meta.get("format") != _FORMAT:
            raise ValueError(
                f"{self.path} must be a file of advantages ({_FORMAT}), got the format "
                f"{meta.get('format')!r}"
            )
        self.vocab_size, self.top_k = int(meta["vocab_size"]), int(meta["top_k"])
        self._starts: list[int] = self._open().get_tensor("starts").tolist()
        self._prompts: list[int] = self._open().get_tensor("prompts").tolist()

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, row: int) -> CachedRow:
        here = slice(self._starts[row], self._starts[row + 1])
        tokens, indices, values = (
            self._open().get_slice(name)[here] for name in ("tokens", "indices", "values")
        )
        return CachedRow(tokens.tolist(), TokenAdvantages(indices.long(), values.float()))

    def check(self, prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
        """Require that the file was made for this data and this vocabulary.

        Args:
            prompts: tokens of the prompts, in order.
            vocab_size: of the student.

        Raises:
            ValueError: it was not; names the first row that differs.
        """
        if vocab_size != self.vocab_size:
            raise ValueError(
                f"student and teacher must share one vocabulary, got {vocab_size} tokens and "
                f"{self.vocab_size} in {self.path}"
            )
        if len(prompts) != len(self):
            raise ValueError(
                f"{self.path} must hold a response for each of {len(prompts)} rows of the data, "
                f"got {len(self)}"
            )
        for row, (prompt, stored) in enumerate(zip(prompts, self._prompts, strict=True)):
            if _mark(prompt) != stored:
                raise ValueError(
                    f"{self.path} must have been made for this data, got another prompt in row "
                    f"{row}: the order, the texts or the tokenizer have changed"
                )

    @classmethod
    def write(
        cls,
        path: str | Path,
        rows: Iterable[tuple[Sequence[int], Sequence[int], TokenAdvantages]],
        *,
        vocab_size: int,
    ) -> "AdvantageCache":
        """Write a file and open it.

        Args:
            path: of the file; its folder is made if there is none.
            rows: for each row of the data, in order: tokens of the prompt, tokens of the response,
                and advantages at each token of the response, of equal ``K``.
            vocab_size: of the teachers.

        Raises:
            ValueError: no rows, an empty response, advantages of a wrong shape or not finite.
        """
        prompts: list[int] = []
        tokens: list[int] = []
        starts = [0]
        indices: list[Tensor] = []
        values: list[Tensor] = []
        for row, (prompt, response, advantages) in enumerate(rows):
            if len(response) == 0:
                raise ValueError(f"row {row}: the student's response is an empty completion")
            width = None if not indices else indices[0].shape[1]
            check_shape(f"indices of row {row}", advantages.indices, (len(response), width))
            check_shape(f"values of row {row}", advantages.values, tuple(advantages.indices.shape))
            check_finite(f"row {row}", advantages.values)
            prompts.append(_mark(prompt))
            tokens += list(response)
            starts.append(len(tokens))
            indices.append(advantages.indices.detach().cpu().to(torch.int32))
            values.append(advantages.values.detach().cpu().float())
        if not prompts:
            raise ValueError("rows must not be empty: there is nothing to store")
        tensors = {
            "prompts": torch.tensor(prompts),
            "tokens": torch.tensor(tokens, dtype=torch.int32),
            "starts": torch.tensor(starts),
            "indices": torch.cat(indices),
            "values": torch.cat(values),
        }
        meta = {
            "format": _FORMAT,
            "vocab_size": str(vocab_size),
            "top_k": str(tensors["indices"].shape[1]),
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # A run that is killed while it writes must not leave half a file under this name.
        unfinished = path.with_name(path.name + ".part")
        save_file(tensors, unfinished, metadata=meta)
        unfinished.replace(path)
        return cls(path)

    def _open(self) -> Any:
        if self._file is None:
            self._file = safe_open(self.path, framework="pt")
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}  # each process opens it for itself


@torch.no_grad()
def top_advantages(
    aligned_hidden: Tensor,
    aligned_head: LinearHead,
    reference_hidden: Tensor,
    reference_head: LinearHead,
    *,
    top_k: int,
    rows: int = 128,
) -> TokenAdvantages:
    """Advantages of the aligned teacher's likeliest tokens, from hidden states of two teachers.

    Args:
        aligned_hidden: ``[T, D]``.
        aligned_head: of the aligned teacher.
        reference_hidden: ``[T, D']``.
        reference_head: of the teacher before alignment.
        top_k: tokens at each place.
        rows: places at a time.
    """
    check_count("top_k", top_k)
    aligned = TeacherRows(aligned_hidden, aligned_head)
    reference = TeacherRows(reference_hidden, reference_head)
    top_k = min(top_k, aligned.head.vocabulary)
    indices, values = [], []
    for start in range(0, len(aligned_hidden), rows):
        block = slice(start, min(start + rows, len(aligned_hidden)))
        aligned.load(block)
        reference.load(block)
        above, below = aligned.logits, reference.logits
        best = above.topk(top_k, dim=1)
        indices.append(best.indices)
        ours = best.values - above.logsumexp(1, keepdim=True)
        values.append(ours - below.gather(1, best.indices) + below.logsumexp(1, keepdim=True))
    return TokenAdvantages(torch.cat(indices), torch.cat(values))


def check_finite(where: str, values: Tensor) -> None:
    """Require advantages without NaN and infinities.

    Raises:
        ValueError: there is one.
    """
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"{where}: advantages of the teachers must be finite, got "
            f"{float(values[~values.isfinite()][0])}: a teacher's scores are NaN or infinite"
        )


def _mark(prompt: Sequence[int]) -> int:
    return zlib.crc32(torch.tensor(list(prompt), dtype=torch.int64).numpy().tobytes())
