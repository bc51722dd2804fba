"""Cross-sampling on a finite tree, by enumeration."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from steelyard._checks import check_choice, check_count
from steelyard.tokens._arguments import check_threshold
from steelyard.tokens.cross_sampling import jensen_shannon

Prefix = tuple[int, ...]
Law = Mapping[Prefix, Any]


class ExactCrossSampling(NamedTuple):
    """What :func:`exact_cross_sampling` returns."""

    success_probability: float
    """Probability that the mixed policy's response succeeds."""
    expected_switches: float
    """Expected number of switched tokens in a response."""


def exact_cross_sampling(
    base: Law,
    rl: Law,
    success: Callable[[Prefix], bool],
    *,
    js_threshold: float,
    budget: int | None = None,
    direction: Literal["forward", "backward"] = "forward",
) -> ExactCrossSampling:
    r"""Success probability and switches of :func:`cross_sample` on a small tree, without noise.

    .. math::
        P(\text{success}) = \sum_{x \text{ complete}} 1[x \text{ succeeds}]
            \prod_t \pi_{mix}(x_t | x_{<t})

    Args:
        base: next-token probabilities ``[V]`` by prefix (a tuple of token ids, ``()`` the root);
            a prefix that is not in it is a complete response.
        rl: the same for the RL model, with the same prefixes.
        success: tells whether a complete response succeeds.
        js_threshold: a position is switched where its divergence is larger, in nats.
        budget: most switches in a response; ``None`` = no limit.
        direction: ``"forward"`` = the base hosts, ``"backward"`` = the RL model hosts.

    Returns:
        ``success_probability`` and ``expected_switches``, floats, computed in float64.

    Raises:
        TypeError: ``budget`` is no integer, ``success`` not callable.
        ValueError: an empty tree, prefixes in one of the two only, rows that are no probabilities
            or differ in length, a setting out of range.

    Example:
        Only the first token matters, and only there do the models differ:

        >>> second = {(0,): [0.5, 0.5], (1,): [0.5, 0.5]}
        >>> base, rl = {(): [0.9, 0.1], **second}, {(): [0.1, 0.9], **second}
        >>> exact_cross_sampling(base, rl, lambda response: response[0] == 1, js_threshold=0.1)
        ExactCrossSampling(success_probability=0.9, expected_switches=1.0)

    Source: Meng et al. (2026), section 4, arXiv:2603.22446.
    """
    check_choice("direction", direction, ("forward", "backward"))
    check_threshold("js_threshold", js_threshold)
    if budget is not None:
        check_count("budget", budget, at_least=0)
    if not callable(success):
        raise TypeError(f"success must be callable, got {type(success).__name__}")
    laws = {"base": _checked("base", base), "rl": _checked("rl", rl)}
    if laws["base"].keys() != laws["rl"].keys():
        odd = next(iter(laws["base"].keys() ^ laws["rl"].keys()))
        raise ValueError(f"base and rl must have the same prefixes, {odd} is in one only")
    host, other = (
        (laws["base"], laws["rl"]) if direction == "forward" else (laws["rl"], laws["base"])
    )
    nodes = {prefix: _node(prefix, host, other, js_threshold) for prefix in host}
    won = switches = 0.0
    for prefix, prob, used in _responses(nodes, budget):
        won += prob * bool(success(prefix))
        switches += prob * used
    return ExactCrossSampling(won, switches)


class _Node(NamedTuple):
    host: list[float]
    other: list[float]
    wants_switch: bool


def _responses(
    nodes: Mapping[Prefix, _Node], budget: int | None
) -> Iterator[tuple[Prefix, float, int]]:
    # Complete responses with their probability and their switches; a stack, as trees may be deep.
    stack: list[tuple[Prefix, float, int]] = [((), 1.0, 0)]
    while stack:
        prefix, prob, used = stack.pop()
        node = nodes.get(prefix)
        if node is None:
            yield prefix, prob, used
            continue
        switch = node.wants_switch and (budget is None or used < budget)
        for token, chance in enumerate(node.other if switch else node.host):
            if chance > 0:
                stack.append(((*prefix, token), prob * chance, used + switch))


def _checked(name: str, law: Law) -> dict[Prefix, Tensor]:
    if not isinstance(law, Mapping):
        raise TypeError(f"{name} must be a mapping of prefixes, got {type(law).__name__}")
    if () not in law:
        raise ValueError(f"{name} must have the root () among its prefixes")
    rows = {prefix: torch.as_tensor(p, dtype=torch.float64).detach() for prefix, p in law.items()}
    for prefix, row in rows.items():
        good = row.dim() == 1 and row.numel() > 0 and bool((row >= 0).all())
        if not good or abs(float(row.sum()) - 1.0) > 1e-6:
            raise ValueError(f"{name}{list(prefix)} must hold probabilities [V] that sum to 1")
    return rows


def _node(
    prefix: Prefix, host: Mapping[Prefix, Tensor], other: Mapping[Prefix, Tensor], threshold: float
) -> _Node:
    p, q = host[prefix], other[prefix]
    if p.shape != q.shape:
        raise ValueError(
            f"base and rl must have as many tokens at {prefix}, got {len(p)} and {len(q)}"
        )
    js = jensen_shannon(p.log()[None], q.log()[None])
    return _Node(p.tolist(), q.tolist(), bool(js > threshold))
