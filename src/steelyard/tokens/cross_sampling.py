r"""Does a gain sit in the few tokens that moved? Sample from one model, switch to another there.

.. math::
    \pi_{mix}(\cdot|x_{<t}) = (1 - S_t)\, \pi_{host}(\cdot|x_{<t})
        + S_t\, \pi_{int}(\cdot|x_{<t}), \qquad S_t \in \{0, 1\}

Forward (sufficiency): the base hosts, the RL model intervenes. Backward (necessity): the other way
round. A rule decides ``S_t``; the paper's looks at the divergence, the others are its controls.

Source: Meng et al. (2026), Sparse but Critical, section 4, arXiv:2603.22446.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steelyard._checks import check_callable, check_count, check_mask, check_range, check_shape
from steelyard.fused._shift import entropy, js_and_kl
from steelyard.tokens._arguments import check_threshold, check_token_ids
from steelyard.tokens._decoding import as_next_token, next_logprobs

__all__ = [
    "CrossSample",
    "CrossSamplingTrace",
    "SwitchRule",
    "cross_sample",
    "random_switch_positions",
    "switch_above_entropy",
    "switch_above_js",
    "switch_at",
    "switch_below_js",
    "trace_cross_sampling",
]

SwitchRule = Callable[[Tensor, Tensor, int], Tensor]
"""Host and intervention log-probabilities ``[B, V]`` and the step, to switches ``[B]``, bool."""


class CrossSample(NamedTuple):
    """What :func:`cross_sample` returns, each ``[B, max_new_tokens]``."""

    tokens: Tensor
    """New tokens, int64; after the end token the row is filled with ``eos_id``."""
    switched: Tensor
    """Whether the token was drawn from the intervention model."""


class CrossSamplingTrace(NamedTuple):
    """What :func:`trace_cross_sampling` returns, each ``[B, max_new_tokens]``."""

    tokens: Tensor
    """New tokens, int64; after the end token the row is filled with ``eos_id``."""
    switched: Tensor
    """Whether the token was drawn from the intervention model."""
    effective: Tensor
    """Probability that the switch changed the token, 0 where there was none."""
    mask: Tensor
    """True up to and including the end token."""


def cross_sample(
    host_model: Any,
    intervention_model: Any,
    prompt_ids: Tensor,
    *,
    js_threshold: float,
    budget: int | None = None,
    max_new_tokens: int,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    eos_id: int | None = None,
) -> CrossSample:
    r"""Sample from a host model, and from another where the two disagree.

    .. math:: S_t = 1[JS(\pi_{host}(\cdot|x_{<t}), \pi_{int}(\cdot|x_{<t})) > \epsilon]

    Forward: ``cross_sample(base, rl, ...)``; backward: ``cross_sample(rl, base, ...)``. Each token
    takes one uniform number per row, by inversion of the cumulative law of the model it is drawn
    from. So the same generator gives paired samples: with a threshold of ``log 2`` or more they
    are exactly those of the host, below 0 exactly those of the intervention model.

    Models of Hugging Face keep their cache from token to token (:class:`CachedNextToken`). The
    intervention model is no longer run once no row can switch.

    Args:
        host_model: callable ``ids [B, T] -> next-token logits [B, V]``, or a causal language model
            of Hugging Face (in ``eval`` mode).
        intervention_model: the same, over the same vocabulary.
        prompt_ids: integers, ``[B, T]``, of equal length and without padding; ``T = 0`` starts
            from nothing, for callables that can.
        js_threshold: in nats. Models with equal laws never switch at 0 or above.
        budget: most switches in a response; ``None`` = no limit.
        max_new_tokens: tokens to draw, at least 1.
        generator: on the device of ``prompt_ids``; ``None`` = the global one.
        temperature: divides the logits of both models, before the divergence too; > 0.
        eos_id: ends a response; ``None`` = all have ``max_new_tokens`` tokens.

    Returns:
        ``tokens`` (new ones only) and ``switched``, each ``[B, max_new_tokens]``.

    Raises:
        TypeError: a model is not callable, ids are not integers, a count is no integer.
        ValueError: wrong shapes, a setting out of range, vocabularies that differ, NaN logits.

    Example:
        The base starts with 0 or 1, RL always with 1; both go on with 2, so one switch suffices:

        >>> def model(first):
        ...     def logits(ids):
        ...         law = first if ids.shape[1] == 1 else [0.0, 0.0, 1.0]
        ...         return torch.tensor(law).log().expand(len(ids), 3)
        ...     return logits
        >>> base, rl = model([0.5, 0.5, 0.0]), model([0.0, 1.0, 0.0])
        >>> cross_sample(base, rl, torch.tensor([[2]]), js_threshold=0.1, max_new_tokens=3)
        CrossSample(tokens=tensor([[1, 2, 2]]), switched=tensor([[ True, False, False]]))

    Source: Meng et al. (2026), section 4, arXiv:2603.22446.
    """
    trace = trace_cross_sampling(
        host_model,
        intervention_model,
        prompt_ids,
        rule=_rule_of(js_threshold),
        budget=budget,
        max_new_tokens=max_new_tokens,
        generator=generator,
        temperature=temperature,
        eos_id=eos_id,
    )
    return CrossSample(trace.tokens, trace.switched)


@torch.no_grad()
def trace_cross_sampling(
    host_model: Any,
    intervention_model: Any,
    prompt_ids: Tensor,
    *,
    rule: SwitchRule,
    budget: int | None = None,
    max_new_tokens: int,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    eos_id: int | None = None,
) -> CrossSamplingTrace:
    r"""Cross-sample under any switching rule, and tell which switches were effective.

    A switch is *effective* if it changed the token. Couple the two draws so that they differ as
    seldom as they can; given that the intervention model drew ``y``, the host would have drawn
    another token with probability

    .. math:: \max(0,\ 1 - \pi_{host}(y) / \pi_{int}(y)),

    and the mean of that over ``y`` is their total variation distance. The sum of ``effective``
    estimates the number of effective switches, with less noise than counting them.

    Args:
        host_model: as in :func:`cross_sample`.
        intervention_model: as in :func:`cross_sample`.
        prompt_ids: ``[B, T]``.
        rule: from :func:`switch_above_js`, a control (:func:`switch_at`,
            :func:`switch_above_entropy`, :func:`switch_below_js`), or your own: host and
            intervention log-probabilities ``[B, V]`` and the step (from 0), to bool ``[B]``.
        budget: most switches in a response; ``None`` = no limit.
        max_new_tokens: tokens to draw, at least 1.
        generator: on the device of ``prompt_ids``; ``None`` = the global one.
        temperature: divides the logits of both models, before the rule sees them; > 0.
        eos_id: ends a response; ``None`` = all have ``max_new_tokens`` tokens.

    Returns:
        ``tokens``, ``switched``, ``effective`` and ``mask``, each ``[B, max_new_tokens]``. The
        share of switched tokens is ``switched.sum() / mask.sum()``.

    Raises:
        TypeError: as :func:`cross_sample`.
        ValueError: as :func:`cross_sample`; the rule does not return bool ``[B]``.

    Example:
        A switch from (0.5, 0.5) to (0, 1) changes the token half of the time:

        >>> base = lambda ids: torch.tensor([[0.5, 0.5]]).log()
        >>> rl = lambda ids: torch.tensor([[0.0, 1.0]]).log()
        >>> trace_cross_sampling(
        ...     base, rl, torch.tensor([[0]]), rule=switch_above_js(0.1), max_new_tokens=1
        ... ).effective
        tensor([[0.5000]])

    Source: Meng et al. (2026), section 4, arXiv:2603.22446; the definition of "effective" is ours.
    """
    check_callable(rule=rule)
    host, other = (
        as_next_token("host_model", host_model),
        as_next_token("intervention_model", intervention_model),
    )
    check_token_ids("prompt_ids", prompt_ids)
    check_count("max_new_tokens", max_new_tokens)
    if budget is not None:
        check_count("budget", budget, at_least=0)
    if eos_id is not None:
        check_count("eos_id", eos_id, at_least=0)
    check_range("temperature", temperature, above=0.0, below=float("inf"))
    state = _Responses(prompt_ids, max_new_tokens, eos_id)
    for step in range(max_new_tokens):
        if bool(state.done.all()):
            break
        host_law = next_logprobs("host_model", host, state.ids, temperature)
        may_switch = ~state.done
        if budget is not None:
            may_switch = may_switch & (state.switched.sum(-1) < budget)
        uniform = _uniform(prompt_ids, generator)
        if bool(may_switch.any()):
            law = next_logprobs("intervention_model", other, state.ids, temperature)
            _check_same_vocabulary(host_law, law)
            switch = _decide(rule, host_law, law, step) & may_switch
            token = draw_token(torch.where(switch[:, None], law, host_law), uniform)
            effective = effective_probability(host_law, law, token).where(switch, 0.0)
        else:
            switch, token = may_switch, draw_token(host_law, uniform)
            effective = host_law.new_zeros(len(token))
        state.append(step, token, switch, effective)
    return CrossSamplingTrace(state.tokens, state.switched, state.effective, state.mask)


def _rule_of(js_threshold: float) -> SwitchRule:
    check_threshold("js_threshold", js_threshold)
    return switch_above_js(js_threshold)


def switch_above_js(threshold: float) -> SwitchRule:
    """Switch where the two laws differ by more than ``threshold`` nats: the paper's rule.

    Args:
        threshold: nats, any number; infinities switch never or always.

    Returns:
        A rule ``(host, other, step) -> [B]`` on log-probabilities ``[B, V]``.

    Raises:
        TypeError: not a number.
        ValueError: NaN.

    Example:
        >>> laws = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
        >>> switch_above_js(0.05)(*laws, 0), switch_above_js(0.2)(*laws, 0)
        (tensor([True]), tensor([False]))

    Source: Meng et al. (2026), section 4, arXiv:2603.22446.
    """
    check_threshold("threshold", threshold)
    return lambda host, other, step: jensen_shannon(host, other) > threshold


def switch_below_js(threshold: float) -> SwitchRule:
    """Control: switch where the two laws differ by at most ``threshold`` nats.

    Choose the threshold as the quantile of the measured divergences that gives the wanted share.

    Args:
        threshold: nats, any number; infinities switch never or always.

    Returns:
        A rule ``(host, other, step) -> [B]`` on log-probabilities ``[B, V]``.

    Raises:
        TypeError: not a number.
        ValueError: NaN.

    Example:
        >>> laws = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
        >>> switch_below_js(0.05)(*laws, 0), switch_below_js(0.2)(*laws, 0)
        (tensor([False]), tensor([True]))

    Source: control beside Meng et al. (2026), section 4, arXiv:2603.22446.
    """
    check_threshold("threshold", threshold)
    return lambda host, other, step: jensen_shannon(host, other) <= threshold


def switch_above_entropy(threshold: float) -> SwitchRule:
    """Control: switch where the host is uncertain, its entropy above ``threshold`` nats.

    Args:
        threshold: nats, any number; infinities switch never or always.

    Returns:
        A rule ``(host, other, step) -> [B]`` on log-probabilities ``[B, V]``.

    Raises:
        TypeError: not a number.
        ValueError: NaN.

    Example:
        >>> laws = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
        >>> switch_above_entropy(0.5)(laws, laws, 0)
        tensor([ True, False])

    Source: control beside Meng et al. (2026), section 4, arXiv:2603.22446.
    """
    check_threshold("threshold", threshold)
    return lambda host, other, step: entropy(host) > threshold


def switch_at(positions: Tensor) -> SwitchRule:
    """Control: switch at given positions, whatever the laws are.

    Args:
        positions: bool, ``[B, max_new_tokens]``, for example of :func:`random_switch_positions`.

    Returns:
        A rule ``(host, other, step) -> [B]``; past the last position it raises.

    Raises:
        TypeError: not bool.
        ValueError: not two-dimensional.

    Example:
        >>> rule = switch_at(torch.tensor([[False, True]]))
        >>> law = torch.zeros(1, 3)
        >>> rule(law, law, 0), rule(law, law, 1)
        (tensor([False]), tensor([True]))

    Source: control beside Meng et al. (2026), section 4, arXiv:2603.22446.
    """
    check_shape("positions", positions, (None, None))
    if positions.dtype != torch.bool:
        raise TypeError(f"positions must have dtype torch.bool, got {positions.dtype}")

    def rule(host: Tensor, other: Tensor, step: int) -> Tensor:
        if step >= positions.shape[1]:
            raise ValueError(
                f"positions must reach max_new_tokens, got {positions.shape[1]} columns"
            )
        return positions[:, step]

    return rule


def random_switch_positions(
    switched: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None
) -> Tensor:
    """Move the switches of each response to random positions, as many as there were.

    Args:
        switched: bool, ``[B, T]``, of a cross-sampling run.
        mask: ``[B, T]``, true = positions to choose from; each row needs as many as it has
            switches.
        generator: on the device of ``switched``; ``None`` = the global one.

    Returns:
        Bool ``[B, T]`` for :func:`switch_at`: per row, uniform among the choices.

    Raises:
        TypeError: ``switched`` is not boolean.
        ValueError: wrong shapes, or too few positions to choose from.

    Example:
        >>> switched = torch.tensor([[True, False, False, True], [False, False, False, False]])
        >>> random_switch_positions(switched).sum(-1)
        tensor([2, 0])

    Source: control beside Meng et al. (2026), section 4, arXiv:2603.22446.
    """
    check_shape("switched", switched, (None, None))
    if switched.dtype != torch.bool:
        raise TypeError(f"switched must have dtype torch.bool, got {switched.dtype}")
    check_mask(mask, switched)
    allowed = torch.ones_like(switched) if mask is None else mask != 0
    wanted = switched.sum(-1, keepdim=True)
    if bool((wanted > allowed.sum(-1, keepdim=True)).any()):
        raise ValueError("mask must keep at least as many positions of a row as it has switches")
    noise = torch.rand(
        switched.shape, dtype=torch.float64, device=switched.device, generator=generator
    )
    place = noise.where(allowed, 2.0).argsort(-1).argsort(-1)
    return place < wanted


def jensen_shannon(p_logprobs: Tensor, q_logprobs: Tensor) -> Tensor:
    """Return the divergence of rows ``[B, V]``: exactly 0 where they are equal."""
    js, _ = js_and_kl(p_logprobs, q_logprobs)
    return js.where((p_logprobs != q_logprobs).any(-1), 0.0)


def draw_token(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """Return the token of each row ``[B, V]`` whose cumulative interval holds ``uniform [B]``."""
    cumulative = logprobs.double().exp().cumsum(-1)
    # A number below 1 times the total stays below the total, rounding included: the first sum above
    # it exists, and it rises there, so that no token of probability 0 is ever chosen.
    point = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True)[:, 0]


def effective_probability(host: Tensor, other: Tensor, token: Tensor) -> Tensor:
    """Return ``max(0, 1 - host(token) / other(token))`` of rows ``[B, V]`` of log-probabilities."""
    log_ratio = (host - other).gather(1, token[:, None])[:, 0]
    return -torch.expm1(log_ratio.clamp(max=0.0))


class _Responses:
    """The responses so far."""

    def __init__(self, prompt_ids: Tensor, length: int, eos_id: int | None) -> None:
        shape = (prompt_ids.shape[0], length)
        self.ids = prompt_ids
        self.eos_id = eos_id
        self.done = torch.zeros(shape[0], dtype=torch.bool, device=prompt_ids.device)
        fill = 0 if eos_id is None else eos_id
        self.tokens = torch.full(shape, fill, dtype=torch.int64, device=prompt_ids.device)
        self.switched = torch.zeros(shape, dtype=torch.bool, device=prompt_ids.device)
        self.mask = torch.zeros_like(self.switched)
        self.effective = torch.zeros(shape, device=prompt_ids.device)

    def append(self, step: int, token: Tensor, switch: Tensor, effective: Tensor) -> None:
        if self.eos_id is not None:
            token = token.masked_fill(self.done, self.eos_id)
        self.tokens[:, step] = token
        self.switched[:, step] = switch
        self.effective = self.effective.to(effective.dtype)
        self.effective[:, step] = effective
        self.mask[:, step] = ~self.done
        self.ids = torch.cat((self.ids, token[:, None].to(self.ids.dtype)), 1)
        if self.eos_id is not None:
            self.done = self.done | (token == self.eos_id)


def _uniform(prompt_ids: Tensor, generator: torch.Generator | None) -> Tensor:
    size = (prompt_ids.shape[0],)
    return torch.rand(size, dtype=torch.float64, device=prompt_ids.device, generator=generator)


def _decide(rule: SwitchRule, host: Tensor, other: Tensor, step: int) -> Tensor:
    switch = rule(host, other, step)
    if not isinstance(switch, Tensor) or switch.dtype != torch.bool:
        raise TypeError("rule must return a boolean tensor")
    check_shape("rule's switches", switch, (host.shape[0],))
    return switch


def _check_same_vocabulary(host: Tensor, other: Tensor) -> None:
    if host.shape != other.shape:
        raise ValueError(
            f"intervention_model must return logits over the {host.shape[1]} tokens of host_model, "
            f"got {other.shape[1]}; cut both to their common vocabulary"
        )
