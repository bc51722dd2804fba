"""Classification: losses for a metric, for doubtful labels, against an adversary; rare classes."""

from typing import TYPE_CHECKING, Any

from steelyard.classification.adaptive_label_robust import (
    ALDRState,
    aldr_loss,
    aldr_temperature,
)
from steelyard.classification.adversarial import (
    dlr_loss,
    gairat_weights,
    mail_weights,
    mart_loss,
    tail_robust_accuracy,
    trades_loss,
)
from steelyard.classification.attacks import (
    CountedAttack,
    counted_pgd_attack,
    log_barrier_attack,
    pgd_attack,
)
from steelyard.classification.confusion_losses import (
    Metric,
    SoftConfusion,
    anyloss,
    anyloss_with_logits,
    multiclass_anyloss,
    soft_confusion,
)
from steelyard.classification.confusion_metrics import (
    ACCURACY,
    BALANCED_ACCURACY,
    COHEN_KAPPA,
    FOWLKES_MALLOWS,
    GEOMETRIC_MEAN,
    JACCARD,
    MATTHEWS,
    PRECISION,
    RECALL,
    SPECIFICITY,
    YOUDEN,
    ConfusionMetric,
    f_beta,
)
from steelyard.classification.doubly_robust import (
    DoublyRobustStep,
    ScgdTracker,
    doubly_robust_step,
    kl_dro_value,
    kl_dro_weights,
)
from steelyard.classification.label_robust import (
    ldr_loss,
    ldr_weights,
    normalize_logits,
)
from steelyard.classification.ordinal import (
    PrestoPath,
    lambda_max,
    presto_path,
    presto_penalty,
    proportional_odds_nll,
)

if TYPE_CHECKING:
    from steelyard.classification.presto import PrestoClassifier, PrestoClassifierCV

__all__ = [
    "ACCURACY",
    "BALANCED_ACCURACY",
    "COHEN_KAPPA",
    "FOWLKES_MALLOWS",
    "GEOMETRIC_MEAN",
    "JACCARD",
    "MATTHEWS",
    "PRECISION",
    "RECALL",
    "SPECIFICITY",
    "YOUDEN",
    "ALDRState",
    "ConfusionMetric",
    "CountedAttack",
    "DoublyRobustStep",
    "Metric",
    "PrestoClassifier",
    "PrestoClassifierCV",
    "PrestoPath",
    "ScgdTracker",
    "SoftConfusion",
    "aldr_loss",
    "aldr_temperature",
    "anyloss",
    "anyloss_with_logits",
    "counted_pgd_attack",
    "dlr_loss",
    "doubly_robust_step",
    "f_beta",
    "gairat_weights",
    "kl_dro_value",
    "kl_dro_weights",
    "lambda_max",
    "ldr_loss",
    "ldr_weights",
    "log_barrier_attack",
    "mail_weights",
    "mart_loss",
    "multiclass_anyloss",
    "normalize_logits",
    "pgd_attack",
    "presto_path",
    "presto_penalty",
    "proportional_odds_nll",
    "soft_confusion",
    "tail_robust_accuracy",
    "trades_loss",
]


def __getattr__(name: str) -> Any:
    # scikit-learn is optional: its estimators are loaded when asked for
    if name in ("PrestoClassifier", "PrestoClassifierCV"):
        from steelyard.classification import presto

        return getattr(presto, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
