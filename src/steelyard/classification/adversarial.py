r"""Losses, item weights and measures of adversarial training, as their authors' code has them.

TRADES and MART add a divergence between the clean and the attacked prediction; GAIRAT and MAIL
weigh items by how easily they fall; DLR is a loss for attacks that does not saturate; the tail
accuracy looks at the worst classes. A weighted method can look robust to one attack only: evaluate
with several.

Sources, one per function: Zhang et al. (2019), arXiv:1901.08573; Wang et al. (2020), MART; Zhang et
al. (2021), arXiv:2010.01736; Wang et al. (2021), arXiv:2106.07904; Croce and Hein (2020),
arXiv:2003.01690; Sow et al. (2023), arXiv:2308.00311.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from steelyard._checks import (
    check_choice,
    check_count,
    check_floating,
    check_mask,
    check_not_empty,
    check_not_nan,
    check_range,
    check_same_shape,
    check_shape,
)
from steelyard._reduce import Reduction, accumulation_dtype, fill_masked, reduce_masked
from steelyard.classification._labels import check_logits, class_labels

__all__ = [
    "dlr_loss",
    "gairat_weights",
    "mail_weights",
    "mart_loss",
    "tail_robust_accuracy",
    "trades_loss",
]


def trades_loss(
    clean_logits: Tensor,
    adversarial_logits: Tensor,
    labels: Tensor,
    *,
    beta: float = 6.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Fit the clean input and predict the same for the attacked one: TRADES.

    .. math::
        L_i = -\log p_{y} + \beta\,\mathrm{KL}(p \,\|\, q), \qquad
        p = \mathrm{softmax}(f(x)), \quad q = \mathrm{softmax}(f(x'))

    Nothing is detached. The attack of the paper climbs the KL divergence from a start of
    ``0.001 * randn``, with the model in eval mode.

    Args:
        clean_logits: ``[B, K]``.
        adversarial_logits: ``[B, K]``.
        labels: integer classes, ``[B]``, in ``[0, K)``.
        beta: >= 0.
        mask: ``[B]``, true = counts.
        reduction: over items.

    Returns:
        0-d or ``[B]``, dtype of ``clean_logits``.

    Raises:
        ValueError: wrong shapes, empty input, a label or ``beta`` out of range.
        TypeError: logits not floating point or ``labels`` not integer.

    Example:
        Without a change of the prediction the loss is cross-entropy:

        >>> import torch
        >>> clean, labels = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
        >>> trades_loss(clean, clean, labels)
        tensor(0.1269)
        >>> trades_loss(clean, -clean, labels)
        tensor(9.2661)

    Source: Zhang et al. (2019), Eq. 5 with a KL divergence, arXiv:1901.08573.
    """
    check_range("beta", beta, at_least=0.0)
    clean, attacked, index = _checked_pair(clean_logits, adversarial_logits, labels, mask)
    log_p, log_q = clean.log_softmax(-1), attacked.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    values = beta * divergence - log_p.gather(1, index.unsqueeze(1)).squeeze(1)
    return reduce_masked(values.to(clean_logits.dtype), mask, reduction)


def mart_loss(
    clean_logits: Tensor,
    adversarial_logits: Tensor,
    labels: Tensor,
    *,
    beta: float = 6.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Push the attacked margin, and the divergence where the clean prediction is unsure: MART.

    .. math::
        L_i = -\log q_y - \log\big(1.0001 - \max_{k \ne y} q_k + 10^{-12}\big)
            + \beta \sum_k p_k \log\frac{p_k}{q_k + 10^{-12}}\, (1.0000001 - p_y)

    with p the clean and q the attacked softmax. Nothing is detached. The small constants are those
    of the released code; they bound the second term by 9.3.

    Args:
        clean_logits: ``[B, K]``, K >= 2.
        adversarial_logits: ``[B, K]``.
        labels: integer classes, ``[B]``, in ``[0, K)``.
        beta: >= 0; 6 in the code, 5 in the paper.
        mask: ``[B]``, true = counts.
        reduction: over items.

    Returns:
        0-d or ``[B]``, dtype of ``clean_logits``.

    Raises:
        ValueError: wrong shapes, empty input, a label or ``beta`` out of range.
        TypeError: logits not floating point or ``labels`` not integer.

    Example:
        The same attacked prediction costs more where the clean one is unsure:

        >>> import torch
        >>> attacked, labels = torch.tensor([[0.0, 1.0]]), torch.tensor([0])
        >>> unsure, sure = torch.tensor([[0.1, 0.0]]), torch.tensor([[9.0, 0.0]])
        >>> mart_loss(unsure, attacked, labels) > mart_loss(sure, attacked, labels)
        tensor(True)

    Source: Wang et al. (2020), Improving Adversarial Robustness Requires Revisiting Misclassified
    Examples, ICLR, and its released code.
    """
    check_range("beta", beta, at_least=0.0)
    clean, attacked, index = _checked_pair(clean_logits, adversarial_logits, labels, mask)
    log_p, log_q = clean.log_softmax(-1), attacked.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    own = index.unsqueeze(1)
    margin = (1.0001 - _largest_other(q, index) + 1e-12).log()
    divergence = (p * (log_p - (q + 1e-12).log())).sum(-1)
    unsure = 1.0000001 - p.gather(1, own).squeeze(1)
    values = beta * divergence * unsure - log_q.gather(1, own).squeeze(1) - margin
    return reduce_masked(values.to(clean_logits.dtype), mask, reduction)


def gairat_weights(
    kappa: Tensor,
    steps: int,
    *,
    kind: Literal["tanh", "sigmoid", "discrete"] = "tanh",
    lam: float = -1.0,
    normalize: Literal["mean", "none"] = "mean",
    mask: Tensor | None = None,
) -> Tensor:
    r"""Weigh items by how few attack steps turn them: GAIRAT.

    .. math::
        \omega = \frac{1 + \tanh(\lambda + 5 (1 - 2\kappa/S))}{2}, \qquad
        \omega = \sigma(\lambda + 5 (1 - 2\kappa/S)), \qquad
        \omega = \frac{S + 1 - \kappa}{S + 1}

    The released code rounds S/2 down, which differs for odd S.

    Args:
        kappa: number of iterates that were still right, counted before each step, ``[B]`` in 0 to
            ``steps``, integer or floating point: see
            :func:`~steelyard.classification.counted_pgd_attack`.
        steps: S >= 1.
        kind: which of the three formulas.
        lam: shifts the curve; ``inf`` gives equal weights. Not used by ``"discrete"``.
        normalize: ``"mean"`` divides by the mean over kept items, ``"none"`` does not.
        mask: ``[B]``, true = counts; the others get weight 0.

    Returns:
        ``[B]``, dtype of ``kappa`` or the default one if that is integer, without a gradient.

    Raises:
        ValueError: wrong shapes, empty input or a setting out of range.
        TypeError: ``lam`` is not a number, or ``steps`` not an integer.

    Example:
        >>> import torch
        >>> gairat_weights(torch.tensor([0, 5, 10]), 10, normalize="none")
        tensor([9.9966e-01, 1.1920e-01, 6.1442e-06])

    Source: Zhang et al. (2021), Eq. 6 and 7, arXiv:2010.01736.
    """
    check_shape("kappa", kappa, (None,))
    check_not_empty("kappa", kappa)
    check_count("steps", steps)
    check_choice("kind", kind, ("tanh", "sigmoid", "discrete"))
    check_choice("normalize", normalize, ("mean", "none"))
    check_mask(mask, kappa)
    check_not_nan("lam", lam)
    if lam == -math.inf:
        raise ValueError(f"lam must be a number > -inf, got {lam}")
    dtype = kappa.dtype if kappa.is_floating_point() else torch.get_default_dtype()
    count = kappa.detach().to(accumulation_dtype(dtype))
    if kind == "discrete":
        weights = (steps + 1 - count) / (steps + 1)
    else:
        place = lam + 5 * (1 - 2 * count / steps)
        # (1 + tanh x)/2 = sigmoid(2x), which keeps its digits far below 0.
        weights = (2 * place if kind == "tanh" else place).sigmoid()
    return _normalized(weights, normalize, mask).to(dtype)


def mail_weights(
    adversarial_logits: Tensor,
    labels: Tensor,
    *,
    slope: float = 10.0,
    bias: float = -0.5,
    normalize: Literal["mean", "code", "none"] = "mean",
    mask: Tensor | None = None,
) -> Tensor:
    r"""Weigh items by their probability margin under attack: MAIL.

    .. math::
        \omega = \sigma\big(\mathrm{slope}\,(\mathrm{PM} + \mathrm{bias})\big), \qquad
        \mathrm{PM} = \max_{k \ne y} q_k - q_y \in [-1, 1]

    Args:
        adversarial_logits: ``[B, K]``, K >= 2; detached.
        labels: integer classes, ``[B]``, in ``[0, K)``.
        slope: steepness; 10 for the AT form.
        bias: -0.5 for the AT form.
        normalize: ``"mean"`` divides by the mean over kept items, as the paper says; ``"code"``
            multiplies by 3, as the released code does, which changes the learning rate; ``"none"``
            leaves the sigmoid.
        mask: ``[B]``, true = counts; the others get weight 0.

    Returns:
        ``[B]``, dtype of ``adversarial_logits``, without a gradient.

    Raises:
        ValueError: wrong shapes, empty input, a label or a setting out of range.
        TypeError: logits not floating point or ``labels`` not integer.

    Example:
        A fallen item, one on the border, a safe one:

        >>> import torch
        >>> logits = torch.tensor([[-3.0, 3.0], [0.0, 0.0], [3.0, -3.0]])
        >>> mail_weights(logits, torch.zeros(3, dtype=torch.long)).round(decimals=2)
        tensor([2.9800, 0.0200, 0.0000])

    Source: Wang et al. (2021), Probabilistic Margins for Instance Reweighting in Adversarial
    Training, arXiv:2106.07904.
    """
    check_logits("adversarial_logits", adversarial_logits)
    check_mask(mask, adversarial_logits[:, 0])
    check_range("slope", slope)
    check_range("bias", bias)
    check_choice("normalize", normalize, ("mean", "code", "none"))
    index = class_labels(labels, adversarial_logits, mask)
    values = adversarial_logits.detach().to(accumulation_dtype(adversarial_logits.dtype))
    probs = values.softmax(-1)
    margin = _largest_other(probs, index) - probs.gather(1, index.unsqueeze(1)).squeeze(1)
    weights = (slope * (margin + bias)).sigmoid()
    return _normalized(weights, normalize, mask).to(adversarial_logits.dtype)


def dlr_loss(logits: Tensor, labels: Tensor, *, targets: Tensor | None = None) -> Tensor:
    r"""Difference of logits ratio: an attack loss that no scaling of the logits can flatten.

    .. math::
        -\frac{z_y - \max_{k \ne y} z_k}{z_{(1)} - z_{(3)} + 10^{-12}}, \qquad
        -\frac{z_y - z_t}{z_{(1)} - \tfrac12 (z_{(3)} + z_{(4)}) + 10^{-12}}

    with :math:`z_{(1)} \ge z_{(2)} \ge \dots` the sorted logits; the second with ``targets``. The
    first is in [-1, 0] for a correctly classified item and positive iff it is misclassified.

    Args:
        logits: ``[B, K]``, K >= 3, with targets K >= 4.
        labels: integer classes, ``[B]``, in ``[0, K)``.
        targets: class t to push each item to, ``[B]``.

    Returns:
        ``[B]``, dtype of ``logits``, with a gradient.

    Raises:
        ValueError: wrong shapes, empty input, too few classes, or a label out of range.
        TypeError: ``logits`` is not floating point, ``labels`` or ``targets`` not integer.

    Example:
        Scaling the logits leaves it, while cross-entropy goes flat:

        >>> import torch
        >>> logits, labels = torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([0])
        >>> dlr_loss(logits, labels), dlr_loss(1000 * logits, labels)
        (tensor([-0.6667]), tensor([-0.6667]))

    Source: Croce and Hein (2020), Eq. 6 and 7, arXiv:2003.01690.
    """
    check_logits("logits", logits, classes=3 if targets is None else 4)
    index = class_labels(labels, logits)
    values = logits.to(accumulation_dtype(logits.dtype))
    own = values.gather(1, index.unsqueeze(1)).squeeze(1)
    if targets is None:
        top = values.topk(3, -1).values
        gap = own - _largest_other(values, index)
        scale = top[:, 0] - top[:, 2]
    else:
        aim = class_labels(targets, logits, name="targets")
        top = values.topk(4, -1).values
        gap = own - values.gather(1, aim.unsqueeze(1)).squeeze(1)
        scale = top[:, 0] - (top[:, 2] + top[:, 3]) / 2
    return (-gap / (scale + 1e-12)).to(logits.dtype)


def tail_robust_accuracy(class_accuracy: Tensor, fraction: float) -> Tensor:
    r"""Mean accuracy of the worst classes.

    .. math:: \frac1m \sum_{k=1}^m a_{(k)}, \qquad m = \lceil \mathrm{fraction} \cdot K \rceil,
        \quad a_{(1)} \le a_{(2)} \le \dots

    Args:
        class_accuracy: accuracy of each class under attack, ``[K]``.
        fraction: in (0, 1]; 0.3 in the paper.

    Returns:
        0-d, dtype of ``class_accuracy``. A NaN comes through.

    Raises:
        ValueError: wrong shape, empty input or ``fraction`` out of range.
        TypeError: ``class_accuracy`` is not floating point.

    Example:
        The mean is 0.7, the worst three of ten classes reach 0.2:

        >>> import torch
        >>> accuracy = torch.tensor([0.9, 0.2, 0.9, 0.9, 0.3, 1.0, 0.1, 0.9, 0.9, 0.9])
        >>> tail_robust_accuracy(accuracy, 0.3)
        tensor(0.2000)

    Source: Sow et al. (2023), Sec. 4, arXiv:2308.00311; the classes are chosen per model.
    """
    check_floating(class_accuracy=class_accuracy)
    check_shape("class_accuracy", class_accuracy, (None,))
    check_not_empty("class_accuracy", class_accuracy)
    check_range("fraction", fraction, above=0.0, at_most=1.0)
    # 0.07 * 100 is a little above 7 in floating point and must not count as 8 classes.
    worst = math.ceil(fraction * class_accuracy.numel() - 1e-9)
    values = class_accuracy.to(accumulation_dtype(class_accuracy.dtype))
    mean = values.sort().values[: max(worst, 1)].mean()
    # NaN sorts last and would drop out unseen.
    return torch.where(values.isnan().any(), math.nan, mean).to(class_accuracy.dtype)


def _checked_pair(
    clean_logits: Tensor, adversarial_logits: Tensor, labels: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the inputs; return both logits in the dtype of sums, 0 where masked, and labels."""
    check_logits("clean_logits", clean_logits)
    check_logits("adversarial_logits", adversarial_logits)
    check_same_shape(clean_logits=clean_logits, adversarial_logits=adversarial_logits)
    check_mask(mask, clean_logits[:, 0])
    index = class_labels(labels, clean_logits, mask)
    row_mask = None if mask is None else (mask != 0).unsqueeze(1)
    clean = fill_masked(clean_logits.to(accumulation_dtype(clean_logits.dtype)), row_mask)
    attacked = fill_masked(adversarial_logits.to(clean.dtype), row_mask)
    return clean, attacked, index


def _largest_other(values: Tensor, index: Tensor) -> Tensor:
    """Largest entry of each row but the label's, ``[B]``."""
    own = torch.arange(values.shape[1], device=values.device) == index.unsqueeze(1)
    return values.masked_fill(own, -math.inf).amax(-1)


def _normalized(weights: Tensor, normalize: str, mask: Tensor | None) -> Tensor:
    weights = fill_masked(weights, mask)
    if normalize == "code":
        return 3 * weights
    if normalize == "none":
        return weights
    mean = reduce_masked(weights, mask, "mean")
    return weights / mean.where(mean != 0, 1.0)
