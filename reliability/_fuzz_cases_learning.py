"""Valid calls of classification, metric learning and federated averaging."""

# ruff: noqa: C408, PLW0108 - a case reads like the call it stands for

import functools

import torch

from _fuzz_values import (
    array,
    classes,
    generator,
    linear,
    ones,
    positive,
    probs,
    real,
    unit,
)
from steelyard import classification, federated, metric_learning


def logits(**more):
    """Logits of four items of three classes."""
    return dict(logits=real(4, 3), labels=classes(4, of=3)) | more


def counts():
    """A soft confusion matrix."""
    return dict(tp=positive(1)[0], fp=positive(2)[1], fn=positive(3)[2], tn=positive(4)[3])


def confusion(name):
    """The case of one confusion metric."""
    return {f"classification.{name}": counts}


def attacked(**more):
    """A linear model under attack."""
    inputs = dict(model=linear(3, 2), x=unit(4, 3), y=classes(4), bounds=(0.0, 1.0))
    return inputs | dict(epsilon=0.1, step_size=0.05, steps=2) | more


def robust_step():
    """One optimiser step on unmoved items."""
    model = linear(3, 2)
    return dict(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        x=unit(4, 3),
        y=classes(4),
        attack=lambda model, x, y: x,
    )


def ordered(**more):
    """Ordered labels 0, 1, 2 of twelve items."""
    return dict(X=array(12, 2), y=classes(12, of=3).numpy()) | more


def fitted(estimator, **fixed):
    """Construct, fit and predict: an estimator checks its settings in ``fit``."""

    def call(X, y, sample_weight=None, **settings):
        model = estimator(**fixed, **settings).fit(X, y, sample_weight=sample_weight)
        return model.predict_proba(X)

    return call


@functools.cache
def presto(kind):
    """A fitted ordered classifier."""
    settings = {"n_lambdas": 2, "cv": 2} if kind is classification.PrestoClassifierCV else {}
    return kind(**settings).fit(**ordered())


CLASSIFICATION = {
    **{
        key: case
        for name in (
            *("ACCURACY", "BALANCED_ACCURACY", "COHEN_KAPPA", "FOWLKES_MALLOWS", "JACCARD"),
            *("GEOMETRIC_MEAN", "MATTHEWS", "PRECISION", "RECALL", "SPECIFICITY", "YOUDEN"),
        )
        for key, case in confusion(name).items()
    },
    "classification.ConfusionMetric.__call__": lambda: dict(
        call_=classification.ACCURACY, **counts()
    ),
    "classification.ALDRState": lambda: dict(num_items=6),
    "classification.ALDRState.forward": lambda: logits(
        self_=classification.ALDRState(6), index=classes(4, of=6), mask=ones(4)
    ),
    "classification.ScgdTracker": lambda: dict(eta=0.5, temperature=1.0),
    "classification.ScgdTracker.update": lambda: dict(
        self_=classification.ScgdTracker(0.5, 1.0),
        losses=positive(4),
        previous_losses=positive(4, shift=1),
        mask=ones(4),
    ),
    "classification.PrestoClassifier.fit": lambda: ordered(
        call_=fitted(classification.PrestoClassifier), lam=0.01, max_iter=20, crossing="sort"
    ),
    **{
        f"classification.{kind.__name__}.{name}": lambda kind=kind: dict(
            self_=presto(kind), X=array(4, 2)
        )
        for kind in (classification.PrestoClassifier, classification.PrestoClassifierCV)
        for name in ("predict", "predict_proba", "predict_log_proba", "crossing_share")
    },
    "classification.PrestoClassifierCV.fit": lambda: ordered(
        call_=fitted(classification.PrestoClassifierCV), n_lambdas=2, ratio=0.1, cv=2
    ),
    "classification.aldr_loss": lambda: logits(mask=ones(4)),
    "classification.aldr_temperature": logits,
    "classification.ldr_loss": lambda: logits(mask=ones(4)),
    "classification.ldr_weights": logits,
    "classification.anyloss": lambda: dict(
        probs=unit(6), labels=classes(6), metric=classification.ACCURACY, mask=ones(6)
    ),
    "classification.anyloss_with_logits": lambda: dict(
        logits=real(6), labels=classes(6), metric=classification.ACCURACY, mask=ones(6)
    ),
    "classification.multiclass_anyloss": lambda: dict(
        probs=probs(6, 3), labels=classes(6, of=3), metric=classification.ACCURACY, mask=ones(6)
    ),
    "classification.soft_confusion": lambda: dict(probs=unit(6), labels=classes(6), mask=ones(6)),
    "classification.f_beta": lambda: dict(beta=1.0),
    "classification.counted_pgd_attack": lambda: attacked(generator=generator()),
    "classification.pgd_attack": lambda: attacked(generator=generator()),
    "classification.log_barrier_attack": lambda: attacked(barrier=0.1),
    "classification.dlr_loss": lambda: dict(
        logits=real(4, 4), labels=classes(4, of=4), targets=classes(4, of=4).flip(0)
    ),
    "classification.doubly_robust_step": robust_step,
    "classification.gairat_weights": lambda: dict(kappa=classes(4, of=4), steps=10, mask=ones(4)),
    "classification.kl_dro_value": lambda: dict(losses=positive(4), temperature=1.0, mask=ones(4)),
    "classification.kl_dro_weights": lambda: dict(
        losses=positive(4), temperature=1.0, mask=ones(4)
    ),
    "classification.lambda_max": ordered,
    "classification.presto_path": lambda: dict(
        X=array(12, 2), y=classes(12, of=3).numpy(), n_lambdas=2, max_iter=20
    ),
    "classification.mail_weights": lambda: dict(
        adversarial_logits=real(4, 3), labels=classes(4, of=3), mask=ones(4)
    ),
    "classification.mart_loss": lambda: dict(
        clean_logits=real(4, 3),
        adversarial_logits=real(4, 3, shift=1),
        labels=classes(4, of=3),
        mask=ones(4),
    ),
    "classification.trades_loss": lambda: dict(
        clean_logits=real(4, 3),
        adversarial_logits=real(4, 3, shift=1),
        labels=classes(4, of=3),
        mask=ones(4),
    ),
    "classification.normalize_logits": lambda: dict(logits=real(4, 3)),
    "classification.presto_penalty": lambda: dict(beta=real(4, 2)),
    "classification.proportional_odds_nll": lambda: dict(
        X=real(6, 2),
        y=classes(6, of=3),
        intercept=torch.tensor([-0.5, 0.5]).double(),
        coef=real(2, 2) / 9,
    ),
    "classification.tail_robust_accuracy": lambda: dict(class_accuracy=unit(5), fraction=0.4),
}


def views(first, second, **more):
    """Two views of four items."""
    return {first: real(4, 3), second: real(4, 3, shift=1)} | more


def documents(**more):
    """Scores of two queries with three documents."""
    labels = torch.eye(3, dtype=torch.long)[:2]
    inputs = dict(yes_logits=real(2, 3), no_logits=real(2, 3, shift=1), labels=labels)
    return inputs | dict(mask=ones(2, 3), mask_threshold=0.1) | more


def opis_metric(**given):
    """One update of the metric."""
    metric = metric_learning.OPISMetric()
    metric.update(**given)
    return metric.compute()


METRIC_LEARNING = {
    "metric_learning.MultiHeadContrastive": lambda: dict(in_dim=3, hidden_dim=4, out_dim=3),
    "metric_learning.MultiHeadContrastive.project": lambda: dict(
        self_=metric_learning.MultiHeadContrastive(3, 4, 3).double(), features=real(4, 3)
    ),
    "metric_learning.MultiHeadContrastive.forward": lambda: views(
        "features_a", "features_b", self_=metric_learning.MultiHeadContrastive(3, 4, 3).double()
    ),
    "metric_learning.OPISMetric": lambda: dict(),
    "metric_learning.OPISMetric.update": lambda: dict(
        call_=opis_metric, embeddings=real(8, 3), labels=classes(8)
    ),
    "metric_learning.PairTemperature": lambda: dict(dim=3),
    "metric_learning.PairTemperature.forward": lambda: views(
        "z_i", "z_j", self_=metric_learning.PairTemperature(3).double()
    ),
    "metric_learning.adaptive_temperature_loss": lambda: dict(
        anchor=real(2, 4, 3),
        positive=real(2, 4, 3, shift=1),
        negatives=real(2, 4, 5, 3, shift=2),
        temperature_positive=unit(2, 4),
        temperature_negative=unit(2, 4, 5, shift=1),
    ),
    "metric_learning.barlow_twins_loss": lambda: views("z_a", "z_b"),
    "metric_learning.bounded_temperature": lambda: dict(raw=real(4)),
    "metric_learning.contrastive_rerank_loss": lambda: dict(
        scores=real(2, 3), labels=torch.eye(3, dtype=torch.long)[:2], mask=ones(2, 3)
    ),
    "metric_learning.moco_loss": lambda: views("query", "key", queue=real(5, 3, shift=2)),
    "metric_learning.ndcg": lambda: dict(scores=real(2, 4), relevance=classes(2, 4, of=3), k=2),
    "metric_learning.recall": lambda: dict(scores=real(2, 4), relevance=classes(2, 4, of=3), k=2),
    "metric_learning.reciprocal_rank": lambda: dict(
        scores=real(2, 4), relevance=classes(2, 4, of=3)
    ),
    "metric_learning.operating_point_utility": lambda: dict(
        embeddings=real(8, 3), labels=classes(8), thresholds=positive(3)
    ),
    "metric_learning.opis": lambda: dict(
        embeddings=real(8, 3), labels=classes(8), threshold_range=(0.2, 1.2), grid=5
    ),
    "metric_learning.rerank_weights": documents,
    "metric_learning.sft_rerank_loss": lambda: {
        key: value for key, value in documents().items() if key != "mask_threshold"
    },
    "metric_learning.unified_rerank_loss": documents,
    "metric_learning.simclr_loss": lambda: views("z_a", "z_b"),
    "metric_learning.simsiam_loss": lambda: views("p_a", "p_b") | views("z_a", "z_b"),
    "metric_learning.tcm_loss": lambda: dict(embeddings=real(6, 3), labels=classes(6)),
    "metric_learning.temperature_penalty": lambda: dict(temperature=unit(4), dim=3),
}

FEDERATED = {
    "federated.ParticipationWeights": lambda: dict(num_clients=4, cutoff=9),
    "federated.ParticipationWeights.update": lambda: dict(
        self_=federated.ParticipationWeights(4), participated=classes(4).bool()
    ),
    "federated.aggregate": lambda: dict(
        x=real(3), deltas=real(4, 3), participated=classes(4).bool(), weights=positive(4)
    ),
    "federated.cyclic_participation": lambda: dict(
        probability=unit(4), rounds=6, period=4, generator=generator()
    ),
    "federated.interval_moments": lambda: dict(probability=unit(4), cutoff=9),
    "federated.markov_participation": lambda: dict(
        probability=unit(4), rounds=6, generator=generator()
    ),
    "federated.markov_rates": lambda: dict(probability=unit(4)),
    "federated.participation_from_labels": lambda: dict(
        label_distribution=probs(4, 3), preference=positive(3)
    ),
}

CASES = {**CLASSIFICATION, **METRIC_LEARNING, **FEDERATED}
SLOW = {"classification.PrestoClassifierCV.fit", "classification.PrestoClassifier.fit"}
