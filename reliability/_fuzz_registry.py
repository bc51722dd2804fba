"""The public functions and methods, found by introspection, and what needs no case.

A public name with parameters has a case in one of the ``_fuzz_cases_*`` files or a reason here.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import _fuzz_cases_core
import _fuzz_cases_generative
import _fuzz_cases_learning
import _fuzz_cases_physics
import _fuzz_cases_rl
import _fuzz_cases_statistics
import _fuzz_cases_tabular

PACKAGES = (
    *("anatomy", "causal", "classification", "diffusion", "distillation", "divergences"),
    *("equilibrium", "equivariant", "estimation", "federated", "fused", "metric_learning"),
    *("optim", "policy", "preference", "tabular", "tokens", "vision"),
)
PARTS = (
    _fuzz_cases_core,
    _fuzz_cases_generative,
    _fuzz_cases_learning,
    _fuzz_cases_physics,
    _fuzz_cases_rl,
    _fuzz_cases_statistics,
    _fuzz_cases_tabular,
)
CASES: dict[str, Callable[[], dict[str, Any]]] = {
    name: case for part in PARTS for name, case in part.CASES.items()
}
SLOW: frozenset[str] = frozenset(name for part in PARTS for name in part.SLOW)

SAVED = "reads or writes saved state, which is no argument of the mathematics"
RESULT = "a result that the package builds itself"
PROTOCOL = "a protocol, never called"
BUILDING_BLOCK = "four callables of an advanced user, checked where the divergence is used"
IN_FIT = "an estimator checks its settings in fit, where the case spoils them too"

EXEMPT_METHODS = {
    "load_state_dict": SAVED,
    "state_dict": SAVED,
    "save": SAVED,
    "load": SAVED,
    "from_json": SAVED,
    "from_dict": SAVED,
    "to": "passes a dtype on to torch",
    "add_param_group": "called by the constructor, whose case spoils it",
}
EXEMPT = {
    "causal.CausalBounds": IN_FIT,
    "causal.CausalInterval": RESULT,
    "classification.ConfusionMetric": BUILDING_BLOCK,
    "classification.PrestoClassifier": IN_FIT,
    "classification.PrestoClassifierCV": IN_FIT,
    "divergences.FDivergence": BUILDING_BLOCK,
    "divergences.Generator": BUILDING_BLOCK,
    "estimation.SGLD.step": "takes a closure of the user, as torch's optimisers do",
    "estimation.WeightedLeastSquares": IN_FIT,
    "policy.DenseNetwork.backward": "called by DenseUpdater.epoch with its own slopes",
    "policy.Objective": PROTOCOL,
    "policy.Objective.loss": PROTOCOL,
    "policy.Objective.slopes": PROTOCOL,
    "policy.Rollout": RESULT,
    "policy.Updater": PROTOCOL,
    "policy.Updater.epoch": PROTOCOL,
    "preference.AlignmentGapMetric": "its only options are those of torchmetrics",
    "preference.FlipRateMetric": "its only options are those of torchmetrics",
    "preference.FullRankingAccuracyMetric": "its only options are those of torchmetrics",
    "preference.RewardAccuracyMetric": "its only options are those of torchmetrics",
    "preference.RankingReport": RESULT,
    "tabular.ColumnBins": RESULT,
    "tabular.ColumnBins.index": "takes a column that WoEBinner has read and checked",
    "tabular.CrossFittedIV": RESULT,
    "tabular.Drift": RESULT,
    "tabular.FairClassifier": IN_FIT,
    "tabular.FairRegressor": IN_FIT,
    "tabular.FairnessAudit": RESULT,
    "tabular.IVInference": RESULT,
    "tabular.OptimalBins": RESULT,
    "tabular.PSITest": RESULT,
    "tabular.ParetoPoint": RESULT,
    "tabular.Scorecard": IN_FIT,
    "tabular.StrengthPath": RESULT,
    "tabular.WoEBinner": IN_FIT,
    "tabular.WoETable": RESULT,
    "tokens.HiddenStates": RESULT,
}
PASSED_ON = ("generator", "dtype", "device")


def public_callables() -> dict[str, Any]:
    """Every public function, class and method that takes arguments, by ``package.name``."""
    found: dict[str, Any] = {}
    for package in PACKAGES:
        module = importlib.import_module(f"steelyard.{package}")
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value):
                if not hasattr(value, "_fields"):
                    found |= dict(_of_class(f"{package}.{name}", value))
            elif callable(value) and not hasattr(value, "__origin__"):
                found[f"{package}.{name}"] = value
    return found


def _of_class(path: str, cls: type) -> Iterator[tuple[str, Any]]:
    yield path, cls
    for base in cls.__mro__:
        if not base.__module__.startswith("steelyard"):
            continue
        for name, value in vars(base).items():
            public = not name.startswith("_") or name == "__call__"
            function = getattr(value, "__func__", value)
            if not public or name in EXEMPT_METHODS or not inspect.isfunction(function):
                continue
            if len(inspect.signature(function).parameters) > 1:
                yield f"{path}.{name}", function


def missing() -> list[str]:
    """Public names without a case and without a reason to have none."""
    return sorted(set(public_callables()) - set(CASES) - set(EXEMPT))


def obsolete() -> list[str]:
    """Cases and exemptions of names that are not public, or not any more."""
    return sorted((set(CASES) | set(EXEMPT)) - set(public_callables()))


def prepared(name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What a case calls and with which valid arguments, simple defaults filled in."""
    arguments = CASES[name]()
    if "self_" in arguments:
        call = getattr(arguments.pop("self_"), name.rsplit(".", 1)[1])
    elif "call_" in arguments:
        call = arguments.pop("call_")
    else:
        call = public_callables()[name]
    return call, _with_defaults(call, arguments)


def _with_defaults(call: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    filled = dict(given)
    for parameter in inspect.signature(call).parameters.values():
        default = parameter.default
        if parameter.name in given or not isinstance(default, bool | int | float | str | tuple):
            continue
        is_number = isinstance(default, int) and not isinstance(default, bool)
        if is_number and "float" in str(parameter.annotation):
            default = float(default)
        filled[parameter.name] = default
    return filled
