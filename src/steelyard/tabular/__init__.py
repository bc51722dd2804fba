"""Tables: scorecards with inference that holds, optimal bins, and fairness.

Everything that can work on counts does, so it serves a thousand rows and a table that stays in a
database alike.
"""

import importlib
from typing import TYPE_CHECKING, Any

from steelyard.tabular._sensitive import encode_sensitive, intersectional_groups
from steelyard.tabular.audit import FairnessAudit, audit_fairness
from steelyard.tabular.calibration import StrengthPath, calibrate_strength, choose_strength
from steelyard.tabular.column_bins import ColumnBins
from steelyard.tabular.disparity import (
    adverse_impact_ratio,
    fairness_probability,
    score_pre_bins,
)
from steelyard.tabular.drift import Drift, PSITest, psi, psi_over_time, psi_test
from steelyard.tabular.duckdb_counts import (
    duckdb_bin_counts,
    duckdb_cuts,
    duckdb_level_counts,
    duckdb_psi,
)
from steelyard.tabular.fairness import (
    DistanceCovarianceRegularizer,
    group_js,
    ranked_probability_score,
    unfairness,
)
from steelyard.tabular.optimal_binning import OptimalBins, optimal_bins
from steelyard.tabular.pareto import ParetoPoint, pareto_front
from steelyard.tabular.tables import IVInference, WoETable, iv_inference, woe_table

if TYPE_CHECKING:
    from steelyard.tabular.binning import WoEBinner
    from steelyard.tabular.cross_fitting import CrossFittedIV, cross_fitted_iv
    from steelyard.tabular.fair_estimators import FairClassifier, FairRegressor
    from steelyard.tabular.scorecard import Scorecard

__all__ = [
    "ColumnBins",
    "CrossFittedIV",
    "DistanceCovarianceRegularizer",
    "Drift",
    "FairClassifier",
    "FairRegressor",
    "FairnessAudit",
    "IVInference",
    "OptimalBins",
    "PSITest",
    "ParetoPoint",
    "Scorecard",
    "StrengthPath",
    "WoEBinner",
    "WoETable",
    "adverse_impact_ratio",
    "audit_fairness",
    "calibrate_strength",
    "choose_strength",
    "cross_fitted_iv",
    "duckdb_bin_counts",
    "duckdb_cuts",
    "duckdb_level_counts",
    "duckdb_psi",
    "encode_sensitive",
    "fairness_probability",
    "group_js",
    "intersectional_groups",
    "iv_inference",
    "optimal_bins",
    "pareto_front",
    "psi",
    "psi_over_time",
    "psi_test",
    "ranked_probability_score",
    "score_pre_bins",
    "unfairness",
    "woe_table",
]

_NEED_SCIKIT_LEARN = {
    "CrossFittedIV": "cross_fitting",
    "FairClassifier": "fair_estimators",
    "FairRegressor": "fair_estimators",
    "Scorecard": "scorecard",
    "WoEBinner": "binning",
    "cross_fitted_iv": "cross_fitting",
}


def __getattr__(name: str) -> Any:
    # scikit-learn is optional: what needs it is loaded when asked for
    if name in _NEED_SCIKIT_LEARN:
        module = importlib.import_module(f"{__name__}.{_NEED_SCIKIT_LEARN[name]}")
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
