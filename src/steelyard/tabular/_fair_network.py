"""What the fair estimators share: settings, training, raw predictions, files."""

import json
import math
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from steelyard._checks import check_count, check_range
from steelyard._extras import require
from steelyard.tabular._fair_training import Schedule, build_network, fit_network
from steelyard.tabular._sensitive import cell_index, encode_sensitive, intersectional_groups
from steelyard.tabular.fairness import DistanceCovarianceRegularizer, Measure

_base = require("sklearn.base", extra="tabular")
_utils = require("sklearn.utils", extra="tabular")
_validation = require("sklearn.utils.validation", extra="tabular")

Array = NDArray[np.float64]
NetworkFactory = Callable[[int], nn.Module]
RawFunction = Callable[[Tensor, Tensor], Tensor]  # of raw predictions and the rows they are of
_PREDICT_ROWS = 1 << 16
_ARRAYS, _SETTINGS = "arrays.safetensors", "estimator.json"


class FairNetwork(_base.BaseEstimator):  # type: ignore[misc, name-defined]
    """What the two estimators share: training, raw predictions, files."""

    def __init__(
        self,
        *,
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
        self.measure = measure
        self.strength = strength
        self.c = c
        self.hidden = hidden
        self.dropout = dropout
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.categorical = categorical
        self.network = network
        self.device = device
        self.random_state = random_state

    def _train(
        self,
        X: Array,
        loss: RawFunction,
        output: RawFunction,
        sensitive: Any,
        strata: NDArray[np.int64],
    ) -> None:
        """Fit the network to ``loss + penalty(output)``, both of the raw predictions of rows."""
        schedule = self._schedule()
        penalty = DistanceCovarianceRegularizer(self.measure, self.strength, c=self.c)
        attributes, strata = self._attributes(sensitive, strata)
        device = torch.device("cpu" if self.device is None else self.device)
        self.mean_, scale = X.mean(0), X.std(0)
        self.scale_ = np.where(scale > 1e-12 * np.abs(self.mean_).clip(1e-300), scale, 1.0)
        inputs = torch.from_numpy((X - self.mean_) / self.scale_).to(device)
        attributes = [attribute.to(device) for attribute in attributes]
        seed = int(_utils.check_random_state(self.random_state).randint(2**31 - 1))

        def objective(rows: Tensor, *, penalised: bool) -> Tensor:
            rows = rows.to(device)
            raw = self._forward(inputs[rows])
            value = loss(raw, rows)
            if penalised:
                value = value + penalty(output(raw, rows), [s[rows] for s in attributes])
            return value

        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            self.network_ = self._network(X.shape[1]).to(device=device, dtype=torch.float64)
            self.objective_curve_ = fit_network(
                self.network_,
                objective,
                [False, True] if attributes else [False],
                strata,
                schedule,
                torch.Generator().manual_seed(seed),
            )
        self.n_iter_ = len(self.objective_curve_)

    def _schedule(self) -> Schedule:
        check_range("learning_rate", self.learning_rate, above=0.0, below=math.inf)
        check_range("weight_decay", self.weight_decay, at_least=0.0, below=math.inf)
        check_range("dropout", self.dropout, at_least=0.0, below=1.0)
        check_range("validation_fraction", self.validation_fraction, at_least=0.0, below=1.0)
        for name in ("batch_size", "max_epochs", "patience"):
            check_count(name, getattr(self, name), at_least=4 if name == "batch_size" else 1)
        return Schedule(
            self.learning_rate,
            self.weight_decay,
            self.batch_size,
            self.max_epochs,
            self.patience,
            self.validation_fraction,
        )

    def _attributes(
        self, sensitive: Any, strata: NDArray[np.int64]
    ) -> tuple[list[Tensor], NDArray[np.int64]]:
        """Return the encoded attributes if they are used, and the strata of the rows."""
        self.sensitive_names_: list[str] = []
        if sensitive is None:
            if self.strength > 0:
                warnings.warn(
                    "no sensitive attributes were given: the model is fitted without a penalty "
                    "and is no fairer than any other. Pass fit(X, y, sensitive=...), or "
                    "strength=0 if that is meant",
                    UserWarning,
                    stacklevel=4,
                )
            return [], strata
        encoded = encode_sensitive(sensitive, categorical=self.categorical)
        self.sensitive_names_ = list(encoded)
        cells = intersectional_groups(sensitive, categorical=self.categorical)
        if len(cells) != len(strata):
            raise ValueError(f"sensitive must have {len(strata)} items like X, got {len(cells)}")
        if self.strength == 0:
            return [], strata
        if len(strata) < 4:
            raise ValueError(f"the penalty needs at least 4 samples, got {len(strata)}")
        strata, _ = cell_index(np.stack([strata.astype(str), cells], 1), len(cells))
        return list(encoded.values()), strata

    def _network(self, features: int) -> nn.Module:
        if self.network is None:
            return build_network(features, self.hidden, self.dropout)
        network: nn.Module = self.network(features)
        return network

    def _forward(self, inputs: Tensor) -> Tensor:
        raw: Tensor = self.network_(inputs)
        raw = self.base_ + raw.reshape(len(inputs))
        return raw

    def _raw(self, X: Any) -> Array:
        _validation.check_is_fitted(self)
        X = _validation.validate_data(self, X, dtype=np.float64, reset=False)
        device = next(self.network_.parameters()).device
        inputs = torch.from_numpy((X - self.mean_) / self.scale_)
        with torch.no_grad():
            parts = [
                self._forward(part.to(device)).cpu() for part in torch.split(inputs, _PREDICT_ROWS)
            ]
        raw: Array = torch.cat(parts).numpy()
        return raw

    def save(self, path: str | Path) -> None:
        """Write the fitted estimator to a folder: arrays as safetensors, the rest as JSON.

        Args:
            path: folder, made if it is not there.

        Raises:
            ValueError: a setting that JSON cannot hold, such as a ``RandomState``.
        """
        _validation.check_is_fitted(self)
        settings = self.get_params(deep=False)
        settings["network"] = None if self.network is None else "custom"
        for name in ("hidden", "categorical"):
            settings[name] = None if settings[name] is None else list(settings[name])
        written = {
            "class": type(self).__name__,
            "settings": settings,
            "fitted": {name: _plain(getattr(self, name)) for name in self._fitted_names()},
        }
        try:
            text = json.dumps(written, indent=1)
        except TypeError as error:
            raise ValueError(
                f"a setting of {type(self).__name__} has no JSON form: {error}"
            ) from None
        weights = {f"network.{name}": w for name, w in self.network_.state_dict().items()}
        arrays = {name: torch.from_numpy(getattr(self, name)) for name in ("mean_", "scale_")}
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        every = {name: tensor.cpu().contiguous() for name, tensor in (weights | arrays).items()}
        require("safetensors.torch", extra="tabular").save_file(every, folder / _ARRAYS)
        (folder / _SETTINGS).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, *, network: NetworkFactory | None = None) -> Self:
        """Read an estimator that :meth:`save` wrote; nothing is unpickled.

        Args:
            path: the folder.
            network: the factory the estimator was made with, if it had one.

        Raises:
            ValueError: another class was saved there, or ``network`` is missing or not wanted.
        """
        folder = Path(path)
        written = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
        if written["class"] != cls.__name__:
            raise ValueError(f"path holds a {written['class']}, expected a {cls.__name__}")
        settings = written["settings"]
        if (settings["network"] is None) != (network is None):
            wanted = "no network" if settings["network"] is None else "network=its factory"
            raise ValueError(f"this estimator was saved with {wanted}: pass the same to load")
        settings["network"] = network
        settings["hidden"] = tuple(settings["hidden"])
        model = cls(**settings)
        for name, value in written["fitted"].items():
            setattr(model, name, _array(value))
        arrays = require("safetensors.torch", extra="tabular").load_file(folder / _ARRAYS)
        model.mean_, model.scale_ = (arrays.pop(name).numpy() for name in ("mean_", "scale_"))
        model.network_ = model._network(model.n_features_in_).double()
        model.network_.load_state_dict(
            {name.removeprefix("network."): tensor for name, tensor in arrays.items()}
        )
        model.network_.eval()
        return model

    def _fitted_names(self) -> list[str]:
        names = ["n_features_in_", "feature_names_in_", "classes_", "base_", "target_mean_"]
        names += ["target_scale_", "sensitive_names_", "objective_curve_", "n_iter_"]
        return [name for name in names if hasattr(self, name)]


def _plain(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    return {
        "values": value.tolist(),
        "dtype": "object" if value.dtype == object else value.dtype.str,
    }


def _array(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return np.array(value["values"], dtype=value["dtype"])
