"""One fold of the estimator: propensity from the other folds, dual and regression on its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steelyard._extras import require
from steelyard.causal._generators import GENERATORS
from steelyard.causal._networks import Members, Schedule, train_members
from steelyard.causal.bounds import Divergence
from steelyard.causal.risk import own_conjugate, pointwise_risk

_LOG_SCALE = 7.0  # lambda stays within exp(-7) and exp(7) times the outcome range
_LOG_ROOM = (-16.0, 7.0)  # and nu, the distance of the dual from the end of its domain, in these
_START = -0.7  # of both logarithms


class Data(NamedTuple):
    """Covariates ``[N, d]``, arm 1 or not ``[N]``, outcome on [0, 1] ``[N]``."""

    x: Tensor
    treated: Tensor
    y: Tensor


class FoldPrediction(NamedTuple):
    """One fold's answer for one arm, on the scale of [0, 1]: ``[N]``, ``[F, N]``."""

    propensity: Tensor
    mean: Tensor
    lower: Tensor
    upper: Tensor


@dataclass(frozen=True)
class NuisanceModels:
    """The settings of a fold."""

    divergences: tuple[Divergence, ...]
    schedule: Schedule
    debias: bool
    clip: float
    propensity_model: Any
    outcome_model: Any


@dataclass
class Fold:
    """The fitted parts. Members ``2 f`` and ``2 f + 1`` are the upper and lower end of ``f``."""

    divergences: tuple[Divergence, ...]
    propensity: Any
    dual: Members
    regression: Any
    centre: Tensor  # of the regressed values, [2 F + 1, 1]; the last is the outcome itself
    spread: Tensor

    def predict(self, x: Tensor, arm: int, clip: float) -> FoldPrediction:
        """Evaluate the bounds at covariates."""
        with torch.no_grad():
            treated = torch.full((len(x),), arm == 1)
            probability = propensity_of(self.propensity, x, clip)
            own = probability if arm else 1 - probability
            fitted = self.centre + self.spread * _regressed(self.regression, x, treated)
            ends = []
            for f, name in enumerate(self.divergences):
                scale, shift = dual_variables(self.dual(x)[2 * f : 2 * f + 2], name)
                conjugate, radius = fitted[2 * f : 2 * f + 2], GENERATORS[name].radius(own)
                ends.append(scale[..., arm] * (radius + conjugate) + shift[..., arm])
            upper, negative = torch.stack(ends, 1)
            return FoldPrediction(own, fitted[-1], 1 - negative, upper)

    def state(self) -> dict[str, Tensor]:
        """Return every tensor by name; the models must be networks."""
        found = {"centre": self.centre, "spread": self.spread}
        for part in ("propensity", "dual", "regression"):
            weights = getattr(self, part).state_dict()
            found |= {f"{part}.{name}": value for name, value in weights.items()}
        return found

    @classmethod
    def from_state(
        cls,
        state: dict[str, Tensor],
        names: tuple[Divergence, ...],
        width: int,
        hidden: Sequence[int],
    ) -> "Fold":
        """Rebuild a fold from :meth:`state`."""
        count = 2 * len(names)
        shapes = {"propensity": (1, 1), "dual": (count, 4), "regression": (count + 1, 2)}
        parts = {}
        for part, (members, outputs) in shapes.items():
            parts[part] = Members(members, width, hidden, outputs, torch.zeros(outputs))
            mine = {n.removeprefix(f"{part}."): v for n, v in state.items() if n.startswith(part)}
            parts[part].load_state_dict(mine)
        return cls(names, **parts, centre=state["centre"], spread=state["spread"])


def fit_fold(
    data: Data, inside: Tensor, outside: Tensor, models: NuisanceModels, generator: torch.Generator
) -> Fold:
    """Fit the propensity on ``outside`` and the rest on the rows ``inside``."""
    propensity = _fit_propensity(data, outside, models, generator)
    data = Data(*(part[inside] for part in data))
    rows, width = torch.arange(len(inside)), data.x.shape[1]
    e = propensity_of(propensity, data.x, models.clip)
    phi = torch.stack([data.y, 1 - data.y])
    names, hidden = models.divergences, models.schedule.hidden
    dual = Members(2 * len(names), width, hidden, 4, torch.full((4,), _START))

    def risks(batch: Tensor) -> Tensor:
        raw, found = dual(data.x[batch]), []
        for f, name in enumerate(names):
            scale, shift = dual_variables(raw[2 * f : 2 * f + 2], name)
            risk = pointwise_risk(
                phi[:, batch],
                data.treated[batch],
                e[batch],
                scale,
                shift,
                GENERATORS[name],
                debias=models.debias,
            )
            found.append(risk.mean(1))
        return torch.cat(found)

    train_members(dual, risks, rows, models.schedule, generator)
    targets = torch.cat([_conjugates(dual, data, phi, names), data.y[None]])
    centre, spread = targets.mean(1, keepdim=True), targets.std(1, keepdim=True)
    spread = torch.where(spread > 0, spread, 1.0)
    regression = _fit_regression(data, (targets - centre) / spread, models, generator)
    return Fold(names, propensity, dual, regression, centre, spread)


def dual_variables(raw: Tensor, divergence: str) -> tuple[Tensor, Tensor]:
    """Lambda and u from raw outputs ``[..., 4]``, with ``u + lambda f(0) = 1 + nu > 1``."""
    scale = raw[..., :2].clamp(-_LOG_SCALE, _LOG_SCALE).exp()
    room = raw[..., 2:].clamp(*_LOG_ROOM).exp()
    return scale, 1 - scale * GENERATORS[divergence].at_zero + room


def propensity_of(model: Any, x: Tensor, clip: float) -> Tensor:
    """Probability of arm 1, clipped, ``[N]``."""
    if isinstance(model, Members):
        with torch.no_grad():
            probability: Tensor = model(x)[0, :, 0].sigmoid()
    else:
        probability = torch.from_numpy(np.asarray(model.predict_proba(x.numpy()), np.float64)[:, 1])
    return probability.clamp(clip, 1 - clip)


def stratified_folds(arms: NDArray[Any], folds: int, generator: torch.Generator) -> list[Tensor]:
    """Deal the rows of each arm out to the folds at random."""
    shuffled = torch.randperm(len(arms), generator=generator)
    order = shuffled[torch.from_numpy(np.asarray(arms))[shuffled].argsort(stable=True)]
    return [order[k::folds] for k in range(folds)]


def _fit_propensity(
    data: Data, rows: Tensor, models: NuisanceModels, generator: torch.Generator
) -> Any:
    if models.propensity_model is not None:
        clone = require("sklearn.base", extra="tabular").clone
        x, arms = data.x[rows].numpy(), data.treated[rows].numpy().astype(int)
        return clone(models.propensity_model).fit(x, arms)
    share = data.treated[rows].double().mean()
    start = torch.logit(share, eps=1e-6)[None]
    network = Members(1, data.x.shape[1], models.schedule.hidden, 1, start)

    def losses(batch: Tensor) -> Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(
            network(data.x[batch])[0, :, 0], data.treated[batch].double()
        )[None]

    train_members(network, losses, rows, models.schedule, generator)
    return network


def _conjugates(dual: Members, data: Data, phi: Tensor, names: Sequence[str]) -> Tensor:
    """The conjugate of each row at its own arm, ``[2 F, N]``."""
    found = []
    with torch.no_grad():
        raw = dual(data.x)
        for f, name in enumerate(names):
            pair = dual_variables(raw[2 * f : 2 * f + 2], name)
            scale, shift = (torch.where(data.treated, v[..., 1], v[..., 0]) for v in pair)
            found.append(own_conjugate(phi, scale, shift, GENERATORS[name]))
    return torch.cat(found)


def _fit_regression(
    data: Data, targets: Tensor, models: NuisanceModels, generator: torch.Generator
) -> Any:
    if models.outcome_model is not None:
        clone = require("sklearn.base", extra="tabular").clone
        inputs = _with_arm(data.x, data.treated)
        return [clone(models.outcome_model).fit(inputs, target) for target in targets.numpy()]
    members = len(targets)
    network = Members(members, data.x.shape[1], models.schedule.hidden, 2, torch.zeros(2))

    def losses(batch: Tensor) -> Tensor:
        fitted = _regressed(network, data.x[batch], data.treated[batch])
        return (fitted - targets[:, batch]).square().mean(1)

    train_members(network, losses, torch.arange(targets.shape[1]), models.schedule, generator)
    return network


def _regressed(model: Any, x: Tensor, treated: Tensor) -> Tensor:
    if isinstance(model, Members):
        both: Tensor = model(x)
        return torch.where(treated, both[..., 1], both[..., 0])
    fitted = [each.predict(_with_arm(x, treated)) for each in model]
    return torch.from_numpy(np.asarray(fitted, dtype=np.float64))


def _with_arm(x: Tensor, treated: Tensor) -> NDArray[np.float64]:
    return torch.cat([treated[:, None].to(x.dtype), x], 1).numpy()
