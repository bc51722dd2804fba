r"""Intervals at every covariate from data, as a scikit-learn style estimator.

Loaded when first asked for; needs scikit-learn (``steelyard[tabular]``).

Source: Jung, Kang (2026), Information-Theoretic Causal Bounds under Unmeasured Confounding,
arXiv:2601.17160.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steelyard._checks import check_choice, check_count, check_range
from steelyard._extras import require
from steelyard.causal._cross_fitting import (
    Data,
    Fold,
    NuisanceModels,
    fit_fold,
    stratified_folds,
)
from steelyard.causal._generators import GENERATORS
from steelyard.causal._inputs import check_outcome_range
from steelyard.causal._networks import Schedule
from steelyard.causal.bounds import (
    Bounds,
    Divergence,
    aggregate_bounds,
    finite_support_bounds,
    manski_bounds,
)
from steelyard.causal.policies import effect_bounds

_base = require("sklearn.base", extra="tabular")
_utils = require("sklearn.utils", extra="tabular")
_validation = require("sklearn.utils.validation", extra="tabular")

__all__ = ["CausalBounds", "CausalInterval"]

Array = NDArray[np.float64]
_ALL: tuple[Divergence, ...] = ("kl", "hellinger", "chi2", "tv", "js")
_ARRAYS, _SETTINGS = "arrays.safetensors", "estimator.json"
_UNBOUNDED = (
    "outcome_range is needed: the outcome takes more than two values, so its largest and smallest "
    "possible value cannot be read off the data. Hidden confounding allows those who did not "
    "receive the arm to lie anywhere in that range, and each bound is infinite without it. Pass "
    "outcome_range=(lowest, highest) from subject knowledge, or outcome_range='sample' to take "
    "the observed extremes and have the result labelled so; such bounds grow with the sample and "
    "are not valid bounds"
)


@dataclass(frozen=True)
class CausalInterval:
    """What :meth:`CausalBounds.interval` returns; tensors ``[N]``. Unpacks as lower, upper.

    ``manski`` is the no-assumption interval: ``lower`` and ``upper`` cannot be tighter than it in
    truth. ``noise`` marks where the estimate was, before it was widened. ``k`` is that of
    :func:`aggregate_bounds`. ``range_source`` says where the outcome range came from:
    ``"declared"``, ``"binary"``, or ``"sample"``, which is not a valid bound.
    """

    lower: Tensor
    upper: Tensor
    manski: Bounds
    by_divergence: dict[Divergence, Bounds]
    k: Tensor
    noise: Tensor
    propensity: Tensor
    range_source: str

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.lower, self.upper))


class CausalBounds(_base.BaseEstimator):  # type: ignore[misc, name-defined]
    r"""Bounds on ``E[Y | do(A = a), X = x]`` of a binary treatment with hidden confounders.

    For each fold: a propensity model is fitted on the other folds; two functions ``lambda(a, x)``
    and ``u(a, x)`` minimise :func:`debiased_risk` on the fold; the mean of the conjugate is
    regressed on ``(a, x)``; and

    .. math:: \hat\theta(a, x) = \lambda \big( B_f(e_a(x)) + \hat m(a, x) \big) + u .

    Folds are averaged, divergences combined by :func:`aggregate_bounds`. Without covariates
    (``X=None``) the exact solver is applied to the observed outcomes of each arm.

    **What the interval is worth.** Every f-ball contains the no-assumption interval on the same
    outcome range. The exact intervals are therefore never shorter than Manski's, which needs no
    divergence and no dual problem; an estimate that is, is noise, and is widened unless
    ``enforce_containment=False``. Report :attr:`CausalInterval.manski` beside it.

    ``u`` is written as ``M - lambda f(0) + nu`` with ``nu > 0``: the dual is then finite for every
    outcome up to the declared largest value ``M``, and the penalties of the published code for
    leaving the domain are not needed.

    Args:
        divergences: one or more of ``"kl" "hellinger" "chi2" "tv" "js"``.
        folds: at least 2.
        outcome_range: lowest and highest *possible* outcome. ``None`` is allowed for an outcome of
            two values. ``"sample"`` takes the observed extremes, and says so in the result.
        debias: use the debiased risk; ``False`` = the plain one.
        enforce_containment: widen intervals that came out tighter than Manski's.
        clip: propensities are kept in ``[clip, 1 - clip]``, in (0, 0.5).
        propensity_model: classifier with ``predict_proba``, cloned for each fold; ``None`` = a
            network.
        outcome_model: regressor, cloned for each regression on ``(a, x)``; ``None`` = a network.
        hidden: widths of the hidden layers of all networks.
        learning_rate: of AdamW, positive.
        weight_decay: of AdamW, at least 0.
        batch_size: at least 1.
        max_epochs: at least 1.
        patience: epochs without a better held-out value before training stops; the best weights
            are kept.
        random_state: seed.

    Attributes:
        folds_: the fitted folds.
        range_: outcome range in use.
        range_source_: where it came from.
        n_features_in_: number of covariates, 0 without.
        feature_names_in_: their names, if a frame was given.

    Example:
        >>> random = torch.Generator().manual_seed(0)
        >>> hidden = torch.rand(400, generator=random) < 0.5
        >>> a = torch.rand(400, generator=random) < torch.where(hidden, 0.8, 0.3)
        >>> y = (torch.rand(400, generator=random) < 0.2 + 0.3 * a + 0.4 * hidden).double()
        >>> model = CausalBounds(divergences=["chi2", "tv"]).fit(None, a, y)
        >>> lower, upper = model.interval(None, arm=1)
        >>> bool(lower < 0.2 + 0.3 + 0.4 * 0.5 < upper)  # the truth
        True
        >>> result = model.interval(None, arm=1)
        >>> bool(result.lower < result.manski.lower), bool(result.manski.upper < result.upper)
        (True, True)

    Source: Jung, Kang (2026), arXiv:2601.17160.
    """

    def __init__(
        self,
        *,
        divergences: Sequence[Divergence] = _ALL,
        folds: int = 2,
        outcome_range: tuple[float, float] | Literal["sample"] | None = None,
        debias: bool = True,
        enforce_containment: bool = True,
        clip: float = 0.01,
        propensity_model: Any = None,
        outcome_model: Any = None,
        hidden: Sequence[int] = (64, 64),
        learning_rate: float = 3e-3,
        weight_decay: float = 1e-4,
        batch_size: int = 64,
        max_epochs: int = 300,
        patience: int = 20,
        random_state: Any = None,
    ) -> None:
        self.divergences = divergences
        self.folds = folds
        self.outcome_range = outcome_range
        self.debias = debias
        self.enforce_containment = enforce_containment
        self.clip = clip
        self.propensity_model = propensity_model
        self.outcome_model = outcome_model
        self.hidden = hidden
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.patience = patience
        self.random_state = random_state

    def fit(self, X: Any, treatment: Any, outcome: Any) -> "CausalBounds":
        """Fit to covariates, arms and outcomes.

        Args:
            X: observed covariates ``[N, d]``, tensor, array or frame; ``None`` = none.
            treatment: 0 or 1, ``[N]``.
            outcome: ``[N]``, inside ``outcome_range``.

        Raises:
            ValueError: NaN or infinity, lengths differ, a treatment other than 0 and 1, an arm
                with too few items, an outcome outside its range, or no range where one is needed.
        """
        names = self._check_settings()
        y = _vector("outcome", outcome)
        arms = _vector("treatment", treatment)
        if len(arms) != len(y):
            raise ValueError(f"treatment must have {len(y)} items like outcome, got {len(arms)}")
        if not np.isin(arms, (0, 1)).all():
            wrong = arms[~np.isin(arms, (0, 1))][0]
            raise ValueError(f"treatment must be 0 or 1, got {wrong:g}")
        self._set_range(torch.from_numpy(y))
        least = 1 if X is None else 5 * self.folds
        for arm in (0, 1):
            if (count := int((arms == arm).sum())) < least:
                raise ValueError(
                    f"treatment must hold each arm at least {least} times, got {count} of {arm}"
                )
        self.divergences_ = names
        self.folds_: list[Fold] = []
        if X is None:
            self.n_features_in_ = 0
            self.outcomes_ = tuple(torch.from_numpy(y[arms == arm]) for arm in (0, 1))
            return self
        X = _validation.validate_data(self, _plain(X), dtype=np.float64)
        if len(X) != len(y):
            raise ValueError(f"X must have {len(y)} rows like outcome, got {len(X)}")
        self.mean_, spread = X.mean(0), X.std(0)
        self.scale_ = np.where(spread > 1e-12 * np.abs(self.mean_).clip(1e-300), spread, 1.0)
        self._fit_folds(self._standardised(X), arms, y)
        return self

    def interval(self, X: Any, arm: int) -> CausalInterval:
        """Bound the mean outcome under an arm.

        Args:
            X: covariates ``[N, d]``; ``None`` if there were none in ``fit`` (then ``N = 1``).
            arm: 0 or 1.

        Returns:
            A :class:`CausalInterval`, float64, which also unpacks as ``lower, upper``.
        """
        _validation.check_is_fitted(self, "folds_")
        check_choice("arm", arm, (0, 1))
        if (X is None) != (self.n_features_in_ == 0):
            raise ValueError("X must be None exactly if it was None in fit")
        if X is None:
            return self._marginal_interval(int(arm))
        X = _validation.validate_data(self, _plain(X), dtype=np.float64, reset=False)
        at = [fold.predict(self._standardised(X), int(arm), self.clip) for fold in self.folds_]
        low, high = self.range_
        propensity = torch.stack([p.propensity for p in at]).mean(0)
        # 0 and 1 are the ends of the range; a bound beyond them, or one that could not be
        # computed, says no more than that
        lower, upper = (
            torch.stack(ends).mean(0).nan_to_num(nan=none, posinf=none, neginf=none).clamp(0, 1)
            for ends, none in (([p.lower for p in at], 0.0), ([p.upper for p in at], 1.0))
        )
        seen = torch.stack([p.propensity * p.mean.clamp(0, 1) for p in at]).mean(0)
        manski = Bounds(seen, seen + 1 - propensity)
        return self._report(
            low + (high - low) * lower,
            low + (high - low) * upper,
            Bounds(*(low + (high - low) * end for end in manski)),
            propensity,
        )

    def effect(self, X: Any = None) -> Bounds:
        """Bound the effect of arm 1 against arm 0 at each row of ``X``, ``[N]``."""
        control, treated = self.interval(X, 0), self.interval(X, 1)
        lower = torch.stack([control.lower, treated.lower], -1)
        return effect_bounds(lower, torch.stack([control.upper, treated.upper], -1))

    def save(self, path: str | Path) -> None:
        """Write the fitted estimator to a folder: tensors as safetensors, the rest as JSON.

        Args:
            path: folder, made if it is not there.

        Raises:
            ValueError: it holds models of scikit-learn, or a setting that JSON cannot hold.
        """
        _validation.check_is_fitted(self, "folds_")
        settings = self.get_params(deep=False)
        if settings["propensity_model"] is not None or settings["outcome_model"] is not None:
            raise ValueError("an estimator with models of scikit-learn cannot be saved here")
        for name in ("divergences", "hidden", "outcome_range"):
            if not isinstance(settings[name], str | None):
                settings[name] = list(settings[name])
        fitted = {
            "n_features_in_": self.n_features_in_,
            "range_": list(self.range_),
            "range_source_": self.range_source_,
            "feature_names": list(getattr(self, "feature_names_in_", [])),
        }
        try:
            text = json.dumps({"settings": settings, "fitted": fitted}, indent=1)
        except TypeError as error:
            raise ValueError(f"a setting of CausalBounds has no JSON form: {error}") from None
        tensors = {}
        if self.n_features_in_ == 0:
            tensors = {f"outcomes.{arm}": y for arm, y in enumerate(self.outcomes_)}
        else:
            tensors = {"mean": torch.from_numpy(self.mean_), "scale": torch.from_numpy(self.scale_)}
        for k, fold in enumerate(self.folds_):
            tensors |= {f"{k}.{name}": value for name, value in fold.state().items()}
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        every = {name: tensor.contiguous() for name, tensor in tensors.items()}
        require("safetensors.torch", extra="tabular").save_file(every, folder / _ARRAYS)
        (folder / _SETTINGS).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read an estimator that :meth:`save` wrote; nothing is unpickled.

        Args:
            path: the folder.
        """
        folder = Path(path)
        written = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
        settings, fitted = written["settings"], written["fitted"]
        for name in ("divergences", "hidden", "outcome_range"):
            if isinstance(settings[name], list):
                settings[name] = tuple(settings[name])
        model = cls(**settings)
        tensors = require("safetensors.torch", extra="tabular").load_file(folder / _ARRAYS)
        model.divergences_ = model._check_settings()
        model.n_features_in_ = fitted["n_features_in_"]
        model.range_, model.range_source_ = tuple(fitted["range_"]), fitted["range_source_"]
        if fitted["feature_names"]:
            model.feature_names_in_ = np.array(fitted["feature_names"], dtype=object)
        model.folds_ = []
        if model.n_features_in_ == 0:
            model.outcomes_ = tuple(tensors[f"outcomes.{arm}"] for arm in (0, 1))
            return model
        model.mean_, model.scale_ = tensors["mean"].numpy(), tensors["scale"].numpy()
        for k in range(model.folds):
            state = {
                name.removeprefix(f"{k}."): tensor
                for name, tensor in tensors.items()
                if name.startswith(f"{k}.")
            }
            model.folds_.append(
                Fold.from_state(state, model.divergences_, model.n_features_in_, model.hidden)
            )
        return model

    def _check_settings(self) -> tuple[Divergence, ...]:
        given = self.divergences
        names = tuple(cast("Sequence[Divergence]", [given] if isinstance(given, str) else given))
        if not names or len(set(names)) < len(names):
            raise ValueError(f"divergences must be one or more different names, got {names!r}")
        for name in names:
            check_choice("divergences", name, tuple(GENERATORS))
        check_count("folds", self.folds, at_least=2)
        check_range("clip", self.clip, above=0.0, below=0.5)
        check_range("learning_rate", self.learning_rate, above=0.0, below=math.inf)
        check_range("weight_decay", self.weight_decay, at_least=0.0, below=math.inf)
        for setting in ("batch_size", "max_epochs", "patience"):
            check_count(setting, getattr(self, setting))
        for width in self.hidden:
            check_count("hidden", width, expected="a sequence of integers")
        return names

    def _set_range(self, y: Tensor) -> None:
        observed = float(y.min()), float(y.max())
        if isinstance(self.outcome_range, str):
            check_choice("outcome_range", self.outcome_range, ("sample",))
            self.range_, self.range_source_ = observed, "sample"
        elif self.outcome_range is not None:
            everywhere = torch.ones_like(y, dtype=torch.bool)
            self.range_ = check_outcome_range(self.outcome_range, y, everywhere, "outcome")
            self.range_source_ = "declared"
        elif len(torch.unique(y)) > 2:
            raise ValueError(_UNBOUNDED)
        else:
            self.range_, self.range_source_ = observed, "binary"

    def _fit_folds(self, x: Tensor, arms: Array, y: Array) -> None:
        low, high = self.range_
        scaled = torch.from_numpy((y - low) / (high - low if high > low else 1.0))
        data = Data(x, torch.from_numpy(arms == 1), scaled)
        schedule = Schedule(
            tuple(self.hidden),
            self.learning_rate,
            self.weight_decay,
            self.batch_size,
            self.max_epochs,
            self.patience,
        )
        models = NuisanceModels(
            self.divergences_,
            schedule,
            self.debias,
            self.clip,
            self.propensity_model,
            self.outcome_model,
        )
        seed = int(_utils.check_random_state(self.random_state).randint(2**31 - 1))
        generator = torch.Generator().manual_seed(seed)
        parts = stratified_folds(arms, self.folds, generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for k, inside in enumerate(parts):
                outside = torch.cat([part for j, part in enumerate(parts) if j != k])
                self.folds_.append(fit_fold(data, inside, outside, models, generator))

    def _standardised(self, X: Array) -> Tensor:
        return torch.from_numpy((X - self.mean_) / self.scale_)

    def _marginal_interval(self, arm: int) -> CausalInterval:
        y = self.outcomes_[arm]
        law = torch.full_like(y, 1 / len(y))
        share = torch.tensor(len(y) / sum(map(len, self.outcomes_)), dtype=torch.float64)
        ends = [
            finite_support_bounds(y, law, share, name, outcome_range=self.range_)
            for name in self.divergences_
        ]
        manski = manski_bounds(y, law, share, outcome_range=self.range_)
        lower, upper = (torch.stack(each)[:, None] for each in zip(*ends, strict=True))
        return self._report(lower, upper, Bounds(*(m[None] for m in manski)), share[None])

    def _report(
        self, lower: Tensor, upper: Tensor, manski: Bounds, propensity: Tensor
    ) -> CausalInterval:
        slack = 1e-9 * (self.range_[1] - self.range_[0])
        noise = ((lower > manski.lower + slack) | (upper < manski.upper - slack)).any(0)
        if self.enforce_containment:
            lower, upper = lower.minimum(manski.lower), upper.maximum(manski.upper)
        # an inverted estimate says nothing: it becomes the whole range
        inverted = lower > upper
        lower = torch.where(inverted, self.range_[0], lower)
        upper = torch.where(inverted, self.range_[1], upper)
        combined = aggregate_bounds(lower, upper)
        each = {name: Bounds(lower[f], upper[f]) for f, name in enumerate(self.divergences_)}
        return CausalInterval(
            combined.lower,
            combined.upper,
            manski,
            each,
            combined.k,
            noise,
            propensity,
            self.range_source_,
        )


def _plain(X: Any) -> Any:
    return X.detach().double().numpy(force=True) if isinstance(X, Tensor) else X


def _vector(name: str, values: Any) -> Array:
    array = np.asarray(_plain(values), dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} must have shape [N] with N >= 1, got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got NaN or infinite values")
    return array
