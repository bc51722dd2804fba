"""Beside the experiment of ``ranking-accuracy``: a minimiser, what is measured, the figures."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steelyard.lab.preferences import Pairs, PairScores, score_pairs
from steelyard.preference import (
    PUBLISHED_BETAS,
    dpo_flip_threshold,
    dpo_gamma_loss,
    idealized_ranking_accuracy,
    ranking_accuracy,
    ranking_report,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAMMAS = (0.0, 0.5, 1.0, 2.0)
QUARTERS = ("q1", "q2", "q3", "q4")


FIT_STEPS = 300


def minimise(
    loss: Callable[[Tensor], Tensor], start: Tensor, watch: Callable[[Tensor], None]
) -> Tensor:
    """Run L-BFGS in double precision until nothing moves; ``watch`` sees every iterate."""
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=20,
        history_size=50,
        tolerance_grad=1e-14,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(logits)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    for _ in range(FIT_STEPS):
        before = logits.detach().clone()
        optimizer.step(closure)  # type: ignore[no-untyped-call]
        watch(logits.detach())
        if torch.equal(before, logits):
            break
    return logits.detach()


def raters_loss(
    policy: PairScores, reference: PairScores, share: Tensor, beta: float, gamma: float = 1.0
) -> Tensor:
    """Mean loss over the raters of each pair: those who prefer "chosen", and the others."""
    usual, reversed_ = (
        dpo_gamma_loss(*p, *r, beta=beta, gamma=gamma, reduction="none")
        for p, r in ((policy, reference), (policy[::-1], reference[::-1]))
    )
    return (share * usual + (1 - share) * reversed_).mean()


BAND = 1e-6  # nats of loss around the threshold within which rounding decides


def broken_thresholds(
    policy: PairScores, reference: PairScores, beta: float, gamma: float = 1.0
) -> int:
    """Count pairs that are right above their threshold, or wrong below it."""
    loss = dpo_gamma_loss(*policy, *reference, beta=beta, gamma=gamma, reduction="none")
    threshold = dpo_flip_threshold(reference.chosen - reference.rejected, beta, gamma=gamma)
    right = ranking_accuracy(*policy, reduction="none") == 1
    clear = (loss - threshold).abs() > BAND
    return int((((loss <= threshold) != right) & clear).sum())


def rank_metrics(
    model: Any, pairs: Pairs, reference: PairScores, beta: float, gamma: float
) -> dict[str, float]:
    """Everything about the ranking of held-out pairs."""
    policy = score_pairs(model, pairs)
    chosen, rejected = pairs.lengths
    report = ranking_report(*policy, *reference, beta=beta)
    normalized = ranking_accuracy(*policy, chosen_lengths=chosen, rejected_lengths=rejected)
    metrics = {
        "held_out_loss": raters_loss(policy, reference, pairs.share, beta, gamma).item(),
        "ranking_accuracy": report.ranking_accuracy.item(),
        "normalized_accuracy": normalized.item(),
        "reward_accuracy": report.reward_accuracy.item(),
        "flip_rate": report.transitions.flip_rate.item(),
        "violations": float(broken_thresholds(policy, reference, beta, gamma)),
        "shift": ((policy.chosen - reference.chosen).abs().mean()).item(),
    }
    return metrics | flips_by_error(report.reference_error, policy)


def flips_by_error(error: Tensor, policy: PairScores) -> dict[str, float]:
    """Share of flipped pairs among those the reference has wrong, by quarters of how wrong."""
    wrong = error > 0
    right = ranking_accuracy(*policy, reduction="none")[wrong]
    order = error[wrong].argsort()
    parts = right[order].tensor_split(len(QUARTERS))
    return {
        f"flips/{name}": part.mean().item() if len(part) else 0.0
        for name, part in zip(QUARTERS, parts, strict=True)
    }


@torch.no_grad()
def distance(model: Any, reference: Any) -> float:
    """Euclidean distance of the weights."""
    squares = [
        (p - q).double().square().sum()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True)
    ]
    return torch.stack(squares).sum().sqrt().item()


def ceiling_metrics(reference: Any, held_out: Pairs, beta: float) -> dict[str, float]:
    """What the reference alone says: its accuracy, and the ceiling for each beta."""
    scores = score_pairs(reference, held_out)
    ratio = scores.chosen - scores.rejected
    betas = (*PUBLISHED_BETAS, beta)
    ideal = idealized_ranking_accuracy(ratio, held_out.share, betas)
    median = idealized_ranking_accuracy(ratio, held_out.share, PUBLISHED_BETAS).median
    threshold = dpo_flip_threshold(ratio, beta)
    lengths = [side.double().mean().item() for side in held_out.lengths]
    return {
        "reference_accuracy": ranking_accuracy(*scores).item(),
        "ceiling": ideal.per_beta[-1].item(),
        "median_ceiling": median.item(),
        **{f"ceiling/beta={b}": v.item() for b, v in zip(betas, ideal.per_beta, strict=True)},
        "threshold_p10": threshold.quantile(0.1).item(),
        "mean_share": held_out.share.mean().item(),
        "chosen_length": lengths[0],
        "rejected_length": lengths[1],
    }


def summarise(rows: list[dict[str, float]]) -> dict[str, float]:
    """The row of the lowest held-out loss, and the last one."""
    best = min(rows, key=lambda row: row["held_out_loss"])
    wanted = (
        *("held_out_loss", "ranking_accuracy", "normalized_accuracy", "reward_accuracy"),
        *("flip_rate", "shift", "distance", *(f"flips/{name}" for name in QUARTERS)),
    )
    easy, hard = best["flips/q1"], best["flips/q4"]
    found = {key: best[key] for key in wanted}
    found |= {f"final_{key}": rows[-1][key] for key in ("ranking_accuracy", "shift", "distance")}
    return found | {
        "flip_ratio": hard / easy if easy > 0 else 1.0,  # nothing flips: no evidence
        "violations": sum(row["violations"] for row in rows),
        "best_step": best["step"],
    }


def draw_figures(seeds: list[dict[str, float]]) -> "dict[str, Figure]":
    """Draw the share of pairs that flip by how wrong the reference is, and accuracies by gamma."""
    from steelyard.lab.plots import draw_against

    flips = {
        ("pairs that the reference has wrong", "share that flipped"): {
            f"gamma {gamma}": {
                quarter: [values[f"tokens/gamma={gamma}/flips/{name}"] for values in seeds]
                for quarter, name in zip((1.0, 2.0, 3.0, 4.0), QUARTERS, strict=True)
            }
            for gamma in GAMMAS
        }
    }
    accuracies = {
        ("lowest held-out loss", "share of pairs"): {
            label: {
                gamma: [values[f"tokens/gamma={gamma}/{key}"] for values in seeds]
                for gamma in GAMMAS
            }
            for label, key in (
                ("reward accuracy", "reward_accuracy"),
                ("ranking accuracy", "ranking_accuracy"),
                ("per token", "normalized_accuracy"),
            )
        }
    }
    return {
        "flips": draw_against(
            flips, "quarter, from slightly to badly wrong", "Pairs that are badly wrong stay wrong"
        ),
        "accuracies": draw_against(
            accuracies, "weight gamma of the reference", "What trainers log is not how it ranks"
        ),
    }
