r"""Rules that turn the clients' updates of one round into the next global parameters.

Source: Wang and Ji (2024), arXiv:2306.03401; MIFA (Gu et al. 2021) and FedVARP (Jhunjhunwala et al.
2022) as that paper's code runs them.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from steelyard._checks import check_choice, check_floating, check_not_nan, check_shape
from steelyard.federated.participation import check_probability

Rule = Literal["fedau", "participating", "all", "known", "mifa", "fedvarp"]
RULES: tuple[Rule, ...] = ("fedau", "participating", "all", "known", "mifa", "fedvarp")


class Aggregate(NamedTuple):
    """What :func:`aggregate` returns."""

    x: Tensor
    memory: Tensor | None


def aggregate(
    x: Tensor,
    deltas: Tensor,
    participated: Tensor,
    *,
    rule: Rule = "fedau",
    lr: float = 1.0,
    weights: Tensor | None = None,
    probability: Tensor | None = None,
    memory: Tensor | None = None,
) -> Aggregate:
    r"""Apply one round's updates to the global parameters.

    With :math:`I_n` = 1 for participants, ``S`` the set of them and memory :math:`U_n`:

    ===============  =============================================================================
    rule             step, times ``lr``
    ===============  =============================================================================
    "fedau"          :math:`\frac1N \sum_n I_n \omega_n \Delta_n` with ``weights``
    "participating"  :math:`\frac{1}{|S|} \sum_{n \in S} \Delta_n`, 0 if nobody came
    "all"            :math:`\frac1N \sum_n I_n \Delta_n`
    "known"          :math:`\frac1N \sum_n I_n \Delta_n / p_n` with ``probability``
    "mifa"           :math:`\frac1N \sum_n U_n` after participants have refreshed their memory
    "fedvarp"        :math:`\frac{1}{|S|} \sum_{n \in S} (\Delta_n - U_n) + \frac1N \sum_n U_n`,
                     with the memory before it is refreshed
    ===============  =============================================================================

    ``N`` is the number of registered clients, not of those who came: dividing by the latter breaks
    the method without a sign. For objectives weighted by ``a_n`` (sample sizes), pass
    ``weights * a_n * N``.

    Args:
        x: global parameters ``[D]``.
        deltas: each client's update ``[N, D]``; rows of absent clients are ignored, whatever they
            hold.
        participated: ``[N]``, bool or 0/1.
        rule: one of the six above.
        lr: global learning rate.
        weights: ``[N]``, for "fedau": of :class:`ParticipationWeights`, taken before this round was
            entered.
        probability: ``[N]`` in (0, 1], for "known".
        memory: ``[N, D]``, for "mifa" and "fedvarp"; ``None`` is zeros.

    Returns:
        ``x``, the new parameters ``[D]``, and ``memory``, refreshed ``[N, D]`` (``None`` for rules
        without one). The arguments are not changed.

    Raises:
        ValueError: a shape does not fit, ``lr`` is NaN, or the rule lacks what it needs.
        TypeError: a tensor is not floating, or ``lr`` is no number.

    Example:
        Two clients pull to 0 and to 4; the second comes every fourth round, so counts four times.

        >>> x, deltas = torch.tensor([1.0]), torch.tensor([[-1.0], [3.0]])
        >>> came, weights = torch.tensor([True, True]), torch.tensor([1.0, 4.0])
        >>> aggregate(x, deltas, came, weights=weights).x
        tensor([6.5000])
        >>> aggregate(x, deltas, came, rule="participating").x
        tensor([2.])

    Source: arXiv:2306.03401, Algorithm 1 and its baselines.
    """
    check_choice("rule", rule, RULES)
    check_not_nan("lr", lr)
    check_floating(x=x, deltas=deltas)
    check_shape("x", x, (None,))
    check_shape("deltas", deltas, (None, x.shape[0]))
    count = deltas.shape[0]
    if count == 0:
        raise ValueError(f"deltas must hold at least one client, got shape {list(deltas.shape)}")
    check_shape("participated", participated, (count,))
    came = participated.to(torch.bool).unsqueeze(1)
    present = torch.where(came, deltas, 0.0)
    attending = came.sum().clamp_min(1)
    if rule in ("mifa", "fedvarp"):
        old = torch.zeros_like(deltas) if memory is None else memory
        check_shape("memory", old, tuple(deltas.shape))
        fresh = torch.where(came, deltas, old)
        if rule == "mifa":
            return Aggregate(x + lr * fresh.mean(0), fresh)
        surprise = torch.where(came, deltas - old, 0.0).sum(0) / attending
        return Aggregate(x + lr * (surprise + old.mean(0)), fresh)
    if rule == "participating":
        step = present.sum(0) / attending
    elif rule == "all":
        step = present.mean(0)
    else:
        factor = _factor(rule, weights, probability, count)
        step = (factor.to(present).unsqueeze(1) * present).mean(0)
    return Aggregate(x + lr * step, None)


def _factor(rule: Rule, weights: Tensor | None, probability: Tensor | None, count: int) -> Tensor:
    name, given = ("weights", weights) if rule == "fedau" else ("probability", probability)
    if given is None:
        raise ValueError(f"{name} must be given for rule {rule!r}, got None")
    check_floating(**{name: given})
    check_shape(name, given, (count,))
    if rule == "fedau":
        return given
    check_probability(name, given)
    return 1 / given
