"""The data sets of reasoning-gym as tasks, in words or in symbols."""

import functools
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from steelyard._checks import check_choice, check_count, check_range
from steelyard._extras import require
from steelyard.lab._task import ASK, Row, Task, completion_texts, uniform

_MINUS = "-"
_GYM_CHARACTERS = {
    # What the compact form of a data set is written in, beside the mark of the end of the prompt.
    "chain_sum": "0123456789+-",
    "basic_arithmetic": "0123456789+-*/()",
    "products": "0123456789*-",
    "number_sorting": "0123456789-.,",
    "gcd": "0123456789,",
}


def reasoning_gym_task(
    dataset_name: str,
    *,
    seed: int,
    form: Literal["symbols", "text"] = "symbols",
    exact: bool = False,
    right: float = 0.5,
    max_new_tokens: int | None = None,
    **config: Any,
) -> Task:
    """Put a data set of reasoning-gym behind the same interface, scored by its own verifier.

    ``form="text"`` gives the question as it is, for a real model: the text between
    ``<answer>`` tags is scored if there are such tags, else the whole completion. ``"symbols"``
    writes question and answer character by character for a tiny model; it exists for
    ``chain_sum``, ``basic_arithmetic``, ``products``, ``gcd`` and ``number_sorting``. Mixed
    demonstrations give the answer of another row with probability ``1 - right``.

    Args:
        dataset_name: as reasoning-gym calls it.
        seed: of the data set; two seeds share no order of items.
        form: see above.
        exact: give 1 for full marks and 0 for anything less. The verifiers of many data sets give
            part of the mark to a text that contains the answer.
        right: in [0, 1].
        max_new_tokens: ``None`` = the longest of 2,000 answers and its end token for ``"symbols"``
            (a longer one that turns up later does not fit), 64 for ``"text"``.
        config: settings of the data set, for example ``max_terms=3``.

    Returns:
        A :class:`Task` with the columns ``answer`` and ``index`` (of the item in the data set).

    Raises:
        ValueError: unknown data set, setting or form.
        ModuleNotFoundError: reasoning-gym is not installed; names the extra.

    Example:
        >>> task = reasoning_gym_task("chain_sum", seed=0, max_terms=3, max_digits=1)
        >>> rows = task.sample(4, torch.Generator().manual_seed(0))
        >>> rows[1]["prompt"], rows[1]["answer"], task.demonstrate(rows, torch.Generator())[1]
        ('7 + 7 :', '14', '1 4')
        >>> columns = {name: [row[name] for row in rows] for name in ("answer", "index")}
        >>> shown = task.demonstrate(rows, torch.Generator())
        >>> task.reward([row["prompt"] for row in rows], shown, **columns)
        [1.0, 1.0, 1.0, 1.0]

    Source: package ``reasoning-gym``, Stojanovski et al. (2025), arXiv:2505.24760.
    """
    check_choice("form", form, ("symbols", "text"))
    check_range("right", right, at_least=0.0, at_most=1.0)
    if form == "symbols":
        check_choice("dataset_name", dataset_name, tuple(_GYM_CHARACTERS))
    dataset = _gym_dataset(dataset_name, {"seed": seed, "size": _GYM_SIZE, **config})
    item = functools.lru_cache(maxsize=65536)(dataset.__getitem__)
    compact = form == "symbols"
    size = int(dataset.size)

    def draw(count: int, generator: torch.Generator) -> list[Row]:
        check_count("count", count)
        rows = []
        for index in torch.randint(size, (count,), generator=generator).tolist():
            entry = item(index)
            prompt = _gym_prompt(dataset_name, entry) if compact else entry["question"]
            rows.append({"prompt": prompt, "answer": str(entry["answer"]), "index": index})
        return rows

    def reasoning_gym_reward(
        prompts: Sequence[Any], completions: Sequence[Any], *, index: Sequence[int], **_: Any
    ) -> list[float]:
        texts = completion_texts(prompts, completions, index=index)
        read = functools.partial(_gym_answer, dataset_name, compact)
        scores = [
            float(dataset.score_answer(read(text), item(int(i))))
            for text, i in zip(texts, index, strict=True)
        ]
        return [float(score == 1.0) for score in scores] if exact else scores

    def shape(answer: str) -> str:
        return _gym_completion(dataset_name, answer) if compact else answer

    def show(rows: Sequence[Row], generator: torch.Generator) -> list[str]:
        del generator  # One right answer only.
        return [shape(row["answer"]) for row in rows]

    def show_mixed(rows: Sequence[Row], generator: torch.Generator) -> list[str]:
        other = torch.randperm(len(rows), generator=generator).tolist()
        keep = uniform(len(rows), generator)
        return [
            shape(row["answer"] if u < right else rows[j]["answer"])
            for row, u, j in zip(rows, keep, other, strict=True)
        ]

    if max_new_tokens is None:
        draws = random.Random(0)
        tried = [item(draws.randrange(size)) for _ in range(2000)] if compact else []
        longest = max((len(shape(str(entry["answer"])).split()) for entry in tried), default=63)
        max_new_tokens = longest + 1
    check_count("max_new_tokens", max_new_tokens)
    symbols = (*_GYM_CHARACTERS[dataset_name], ASK) if compact else ()
    name = f"reasoning-gym/{dataset_name}"
    return Task(name, symbols, max_new_tokens, draw, reasoning_gym_reward, show, show_mixed)


_GYM_SIZE = 2**31 - 1  # Items are made when asked for, so a data set costs nothing to be large.


def _gym_dataset(name: str, config: Mapping[str, Any]) -> Any:
    gym = require("reasoning_gym", extra="reasoning")
    try:
        return gym.create_dataset(name, **config)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"reasoning-gym does not make {name!r} with {config}: {error}") from error


def _gym_prompt(name: str, entry: Mapping[str, Any]) -> str:
    about = entry["metadata"]
    if name == "gcd":
        text = ",".join(map(str, about["numbers"]))
    elif name == "number_sorting":
        # The mark of the direction comes first: "-" for descending.
        text = ("" if about["direction"] == "ascending" else _MINUS + ",") + ",".join(
            about["original_numbers"]
        )
    else:
        text = about["expression"].replace(" ", "")
    return f"{' '.join(text)} {ASK}"


def _gym_completion(name: str, answer: str) -> str:
    """Write an answer of the data set as symbols: numbers digit by digit."""
    if name == "number_sorting":
        answer = answer.translate(str.maketrans("", "", "[]' "))
    return " ".join(answer)


def _gym_answer(name: str, compact: bool, text: str) -> str:
    """Read the answer out of a completion in the form that the data set scores."""
    if not compact:
        before, opened, after = text.rpartition("<answer>")
        return (after.partition("</answer>")[0] if opened else before + after).strip()
    joined = text.replace(" ", "")
    if name == "number_sorting":
        return str(joined.split(","))
    return joined
