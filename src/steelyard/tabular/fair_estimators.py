r"""Regression, classification and counts with a fairness penalty, as scikit-learn estimators.

Loaded when first asked for; needs scikit-learn and safetensors (``steelyard[tabular]``).
"""

import math
from collections.abc import Collection, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor, nn

from steelyard._checks import check_choice
from steelyard._extras import require
from steelyard.tabular._fair_network import FairNetwork, NetworkFactory, RawFunction
from steelyard.tabular.fairness import Measure

_base = require("sklearn.base", extra="tabular")
_multiclass = require("sklearn.utils.multiclass", extra="tabular")
_validation = require("sklearn.utils.validation", extra="tabular")

__all__ = ["FairClassifier", "FairRegressor"]

Array = NDArray[np.float64]
_MAX_LOG_RATE = 700.0  # the exponential of more overflows


class FairRegressor(_base.RegressorMixin, FairNetwork):  # type: ignore[misc, name-defined]
    r"""Network for means or counts whose predictions depend little on protected attributes.

    .. math:: \min_\theta \ \frac1N \sum_i \ell(y_i, \hat y_i) + \lambda R(\hat y, S)

    ``R`` is :class:`DistanceCovarianceRegularizer` on each mini-batch. ``S`` is used in ``fit``
    only: it is no input of the model, and prediction doesn't need it.

    ``loss="squared"``: mean squared error; loss and penalty are in standard deviations of the
    target, so that ``strength`` doesn't depend on its unit. ``loss="poisson"``: counts with an
    optional exposure; ``predict`` returns rates. Inputs are standardised inside. Training first
    fits without the penalty, then continues with it; each phase stops early.

    Args:
        measure: see :class:`DistanceCovarianceRegularizer`.
        strength: ``lambda``, at least 0. See :func:`calibrate_strength`.
        c: offset of the joint measure.
        loss: ``"squared"`` or ``"poisson"``.
        penalise: of a Poisson model, the ``"rate"``, or the expected ``"count"`` as in the paper's
            code, where differences of exposure between groups count as unfairness.
        hidden: widths of the hidden layers; ``()`` is a linear model.
        dropout: in [0, 1).
        learning_rate: of AdamW, positive.
        weight_decay: of AdamW, at least 0.
        batch_size: rows of a batch, at least 4 (up to twice that are used, so that no batch is
            small). The noise of the penalty falls with it; batches are stratified by cell.
        max_epochs: of each phase.
        patience: epochs without a better objective before the learning rate falls to a tenth; the
            third time the phase stops.
        validation_fraction: share of the rows that are held out to stop early, stratified by
            outcome and cell, in [0, 1). With fewer than 20 such rows the training objective is
            watched.
        categorical: numeric attributes that are codes of categories, see :func:`encode_sensitive`.
        network: ``network(n_features) -> nn.Module`` with one output, instead of ``hidden``.
        device: of training, ``None`` = CPU.
        random_state: seed; equal seeds give equal models on one machine.

    Attributes:
        network_: the trained network.
        sensitive_names_: names of the attributes of ``fit``.
        objective_curve_: the watched objective by epoch, both phases.
        n_iter_: number of epochs.
        n_features_in_: number of features.
        feature_names_in_: their names, if a frame was given.

    Example:
        >>> import numpy as np
        >>> from steelyard.tabular.audit import audit_fairness
        >>> random = np.random.default_rng(0)
        >>> age = random.uniform(20, 60, 400)
        >>> X = np.column_stack([random.normal(size=400), age + 5 * random.normal(size=400)])
        >>> y = X[:, 0] + X[:, 1] / 20
        >>> for strength in (0.0, 20.0):
        ...     model = FairRegressor(strength=strength, hidden=(), learning_rate=0.05,
        ...                           max_epochs=60, random_state=0)
        ...     model = model.fit(X, y, sensitive={"age": age})
        ...     print(audit_fairness(model.predict(X), {"age": age}).covariance > 0.01)
        True
        False

    Source: Lee et al. (2025), arXiv:2509.08163.
    """

    def __init__(
        self,
        *,
        loss: Literal["squared", "poisson"] = "squared",
        penalise: Literal["rate", "count"] = "rate",
        measure: Measure = "concatenated",
        strength: float = 1.0,
        c: float = 1.0,
        hidden: Sequence[int] = (64, 64),
        dropout: float = 0.0,
        learning_rate: float = 5e-3,
        weight_decay: float = 1e-4,
        batch_size: int = 512,
        max_epochs: int = 500,
        patience: int = 10,
        validation_fraction: float = 0.2,
        categorical: Collection[str | int] | None = None,
        network: NetworkFactory | None = None,
        device: str | None = None,
        random_state: Any = None,
    ) -> None:
        super().__init__(
            measure=measure,
            strength=strength,
            c=c,
            hidden=hidden,
            dropout=dropout,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            batch_size=batch_size,
            max_epochs=max_epochs,
            patience=patience,
            validation_fraction=validation_fraction,
            categorical=categorical,
            network=network,
            device=device,
            random_state=random_state,
        )
        self.loss = loss
        self.penalise = penalise

    def fit(self, X: Any, y: Any, sensitive: Any = None, exposure: Any = None) -> "FairRegressor":
        """Fit features ``[n, m]`` to outcomes ``[n]``.

        Args:
            X: features, array or frame.
            y: numbers, or counts for ``loss="poisson"``.
            sensitive: protected attributes of any type, see :func:`encode_sensitive`; under
                cross-validation a frame or an array, because mappings cannot be split.
            exposure: positive, ``[n]``, for ``loss="poisson"`` only.
        """
        check_choice("loss", self.loss, ("squared", "poisson"))
        check_choice("penalise", self.penalise, ("rate", "count"))
        X, y = _validation.validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        y = y.astype(np.float64)
        if exposure is not None and self.loss != "poisson":
            raise ValueError(f"exposure belongs to loss='poisson', got loss={self.loss!r}")
        if self.loss == "poisson":
            loss, output = self._poisson(y, exposure)
        else:
            loss, output = self._squared(y)
        self._train(X, loss, output, sensitive, _outcome_strata(y))
        return self

    def predict(self, X: Any) -> Array:
        """Return means, or rates for a unit of exposure, ``[n]``."""
        raw = self._raw(X)
        if self.loss == "poisson":
            return np.exp(np.minimum(raw, _MAX_LOG_RATE))
        return self.target_mean_ + self.target_scale_ * raw

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.positive_only = self.loss == "poisson"
        return tags

    def _squared(self, y: Array) -> tuple[RawFunction, RawFunction]:
        spread = float(y.std())
        self.base_ = 0.0
        self.target_mean_, self.target_scale_ = float(y.mean()), spread if spread > 0 else 1.0
        target = torch.from_numpy((y - self.target_mean_) / self.target_scale_)
        target = target.to(self.device or "cpu")

        def loss(raw: Tensor, rows: Tensor) -> Tensor:
            return (raw - target[rows]).square().mean()

        return loss, lambda raw, rows: raw

    def _poisson(self, y: Array, exposure: Any) -> tuple[RawFunction, RawFunction]:
        if (y < 0).any() or not y.any():
            raise ValueError(
                "y must hold counts >= 0, at least one positive, for loss='poisson', "
                f"got {y.min():g} to {y.max():g}"
            )
        time = np.ones(len(y)) if exposure is None else np.asarray(exposure, dtype=np.float64)
        if time.shape != y.shape or not (np.isfinite(time) & (time > 0)).all():
            raise ValueError(f"exposure must be {len(y)} positive finite numbers, or None")
        self.base_ = math.log(y.sum() / time.sum())
        device, of_counts = self.device or "cpu", self.penalise == "count"
        counts, length = (torch.from_numpy(values).to(device) for values in (y, time))

        def loss(raw: Tensor, rows: Tensor) -> Tensor:
            return (raw.exp() * length[rows] - counts[rows] * raw).mean()

        def output(raw: Tensor, rows: Tensor) -> Tensor:
            return raw.exp() * length[rows] if of_counts else raw.exp()

        return loss, output


class FairClassifier(_base.ClassifierMixin, FairNetwork):  # type: ignore[misc, name-defined]
    r"""Network for two classes whose probabilities depend little on protected attributes.

    .. math:: \min_\theta \ -\frac1N \sum_i \log p_\theta(y_i \mid x_i) + \lambda R(\hat y, S)

    with the probability of the second class, in sorted order, as :math:`\hat y`. The penalty is on
    probabilities, not on decisions: after a cutoff the shares of groups can still differ where
    their densities do.

    Args:
        measure: see :class:`FairRegressor`, as for all others.
        strength: ``lambda``, at least 0.
        c: offset of the joint measure.
        hidden: widths of the hidden layers.
        dropout: in [0, 1).
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        batch_size: rows of a batch.
        max_epochs: of each phase.
        patience: epochs without a better objective.
        validation_fraction: share held out to stop early.
        categorical: numeric attributes that are codes.
        network: ``network(n_features) -> nn.Module`` with one output, instead of ``hidden``.
        device: of training.
        random_state: seed.

    Attributes:
        classes_: the two classes.
        network_: the trained network; its output plus ``base_`` is the log-odds.
        sensitive_names_: names of the attributes of ``fit``.
        objective_curve_: the watched objective by epoch, both phases.
        n_iter_: number of epochs.
        n_features_in_: number of features.
        feature_names_in_: their names, if a frame was given.

    Example:
        The second feature stands for the exclusive or of race and sex, which no attribute alone
        shows:

        >>> import numpy as np
        >>> from steelyard.tabular.audit import audit_fairness
        >>> random = np.random.default_rng(0)
        >>> race, sex = random.integers(0, 2, (2, 400))
        >>> proxy = 2 * (race ^ sex) - 1 + 0.7 * random.normal(size=400)
        >>> X = np.column_stack([random.normal(size=400), proxy])
        >>> y = np.where(X.sum(1) + random.logistic(size=400) > 0, "yes", "no")
        >>> both = np.column_stack([race, sex])
        >>> for measure in ("marginal", "concatenated"):
        ...     model = FairClassifier(measure=measure, strength=20, hidden=(16,), max_epochs=60,
        ...                            learning_rate=0.02, random_state=0)
        ...     model = model.fit(X, y, sensitive=both)
        ...     cells = audit_fairness(model.predict_proba(X)[:, 1], both).group_means.values()
        ...     print(measure, max(cells) - min(cells) > 0.3)
        marginal True
        concatenated False

    Source: Lee et al. (2025), arXiv:2509.08163.
    """

    def fit(self, X: Any, y: Any, sensitive: Any = None) -> "FairClassifier":
        """Fit features ``[n, m]`` to labels ``[n]`` of two classes.

        Args:
            X: features, array or frame.
            y: labels of any type.
            sensitive: protected attributes of any type, see :func:`encode_sensitive`; under
                cross-validation a frame or an array, because mappings cannot be split.
        """
        X, y = _validation.validate_data(self, X, y, dtype=np.float64)
        _multiclass.check_classification_targets(y)
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) > 2:
            raise ValueError(
                "Only binary classification is supported. The type of the target is "
                f"{_multiclass.type_of_target(y)}."
            )
        if len(self.classes_) < 2:
            raise ValueError(f"y must hold two classes, got one class: {self.classes_.tolist()}")
        share = float(index.mean())
        self.base_ = math.log(share / (1 - share))
        target = torch.from_numpy(index.astype(np.float64)).to(self.device or "cpu")

        def loss(raw: Tensor, rows: Tensor) -> Tensor:
            return nn.functional.binary_cross_entropy_with_logits(raw, target[rows])

        self._train(X, loss, lambda raw, rows: raw.sigmoid(), sensitive, index)
        return self

    def decision_function(self, X: Any) -> Array:
        """Return the log-odds of the second class, ``[n]``."""
        return self._raw(X)

    def predict_proba(self, X: Any) -> Array:
        """Return the probabilities of both classes, ``[n, 2]``."""
        positive = special.expit(self._raw(X))
        return np.column_stack([1 - positive, positive])

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the more probable class, ``[n]``."""
        raw = self._raw(X)
        labels: NDArray[Any] = self.classes_[(raw > 0).astype(np.intp)]
        return labels

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


def _outcome_strata(y: Array) -> NDArray[np.int64]:
    """The value itself if there are few, else its quarter of the order."""
    values, index = np.unique(y, return_inverse=True)
    if len(values) <= 10:
        return index
    return np.searchsorted(np.quantile(y, [0.25, 0.5, 0.75]), y, side="right")
