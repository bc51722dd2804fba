r"""How wide a learned distribution is, how far training and validation part, and what to draw.

Measures and sampling rules around pasting generated objects into training images.

Sources: Fan et al. (2024), DiverGen, arXiv:2405.10185; Gupta, Dollar, Girshick (2019), LVIS,
arXiv:1908.03195; Zhou, Koltun, Kraehenbuehl (2021), arXiv:2103.07461 (federated loss).
"""

import operator
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from steelyard._checks import (
    check_count,
    check_floating,
    check_integer_dtype,
    check_not_empty,
    check_range,
    check_same_dtype,
    check_shape,
)
from steelyard._reduce import accumulation_dtype

__all__ = [
    "BalancedDraws",
    "InterSimilarity",
    "RepeatFactors",
    "RepeatRange",
    "balanced_draws",
    "federated_classes",
    "federated_weights",
    "free_energy",
    "grouped_average",
    "inter_similarity",
    "repeat_factors",
    "repeat_range",
    "train_validation_gap",
]

Number = TypeVar("Number", float, Tensor)


class RepeatRange(NamedTuple):
    """What :func:`repeat_range` returns."""

    mean: Tensor
    low: Tensor
    high: Tensor


class InterSimilarity(NamedTuple):
    """What :func:`inter_similarity` returns."""

    similarity: Tensor
    """Cosine of each generated and each real item, ``[G, R]``."""
    score: Tensor
    """Mean over real items, ``[G]``."""
    keep: Tensor
    """``score >= threshold``, boolean ``[G]``."""


class RepeatFactors(NamedTuple):
    """What :func:`repeat_factors` returns, in double precision."""

    category: Tensor
    image: Tensor


class BalancedDraws(NamedTuple):
    """What :func:`balanced_draws` returns, integers ``[N]``."""

    category: Tensor
    item: Tensor


def free_energy(logits: Tensor, temperature: float = 0.9) -> Tensor:
    r"""Energy of a sample under a classifier; lower = closer to what it was trained on.

    .. math:: E(x) = -\tau \ln \sum_c e^{g_c(x) / \tau}

    It lies between :math:`-\max_c g_c - \tau \ln C` and :math:`-\max_c g_c`.

    Args:
        logits: ``[N, C]``.
        temperature: tau, > 0.

    Returns:
        ``[N]``, dtype of ``logits``.

    Raises:
        ValueError: wrong shape, empty input or ``temperature`` <= 0.
        TypeError: ``logits`` not floating point.

    Example:
        A constant added to all logits is taken off the energy:

        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> free_energy(logits) - free_energy(logits + 3.0)
        tensor([3.])

    Source: Fan et al. (2024), Sec. 3.1, arXiv:2405.10185, after Liu et al. (2020),
    arXiv:2010.03759; reconstructed from its description.
    """
    check_floating(logits=logits)
    check_shape("logits", logits, (None, None))
    check_not_empty("logits", logits)
    check_range("temperature", temperature, above=0.0)
    wide = logits.to(accumulation_dtype(logits.dtype))
    # Relative to the largest: at 1e4 the softmax of the gradient would lose four digits.
    top = wide.detach().amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)
    above = ((wide - top) / temperature).logsumexp(-1)
    return (-top.squeeze(-1) - temperature * above).to(logits.dtype)


def train_validation_gap(
    train: Mapping[str, Number], validation: Mapping[str, Number]
) -> dict[str, Number]:
    r"""Average precision on training images minus that on validation images, for each group.

    .. math:: \mathrm{TVG}_w = \mathrm{AP}_w^{\mathrm{train}} - \mathrm{AP}_w^{\mathrm{val}}

    Both must be measured in the same way: no augmentation, as many images.

    Args:
        train: group to average precision.
        validation: the same groups.

    Returns:
        Group to gap; NaN where either side is negative, the mark of a group without ground truth.

    Raises:
        ValueError: no group, or different groups.

    Example:
        >>> gap = train_validation_gap({"rare": 0.75, "all": 0.5}, {"rare": 0.25, "all": 0.5})
        >>> gap
        {'rare': 0.5, 'all': 0.0}

    Source: Fan et al. (2024), Sec. 3.1, arXiv:2405.10185; reconstructed from its description.
    """
    for name, precisions in (("train", train), ("validation", validation)):
        if not isinstance(precisions, Mapping):
            raise TypeError(f"{name} must be a mapping, got {type(precisions).__name__}")
    if not train:
        raise ValueError("train must name at least one group, got an empty mapping")
    if set(train) != set(validation):
        raise ValueError(
            f"validation must have the groups of train, {sorted(train)}, got {sorted(validation)}"
        )
    return {group: _gap(train[group], validation[group]) for group in train}


def _gap(train: Number, validation: Number) -> Number:
    if train < 0 or validation < 0:
        return (train - validation) * float("nan")
    return train - validation


def repeat_range(values: Tensor, *, sigmas: float = 3.0) -> RepeatRange:
    r"""Range that repeated trainings fall in: :math:`\bar x \pm k s`, ``s`` the sample deviation.

    Two sources of data whose ranges do not overlap differ by more than training noise.

    Args:
        values: one number for each training, ``[R]``, ``R`` >= 2.
        sigmas: ``k``, >= 0.

    Returns:
        ``mean``, ``low`` and ``high``, 0-d, dtype of ``values``.

    Raises:
        ValueError: wrong shape, fewer than two values or ``sigmas`` < 0.
        TypeError: ``values`` not floating point.

    Example:
        >>> import torch
        >>> repeat_range(torch.tensor([1.0, 2.0, 3.0]))
        RepeatRange(mean=tensor(2.), low=tensor(-1.), high=tensor(5.))

    Source: Fan et al. (2024), App. A.1, arXiv:2405.10185.
    """
    check_floating(values=values)
    check_shape("values", values, (None,))
    if len(values) < 2:
        raise ValueError(f"values must have shape [R] with R >= 2, got {list(values.shape)}")
    check_range("sigmas", sigmas, at_least=0.0)
    wide = values.to(accumulation_dtype(values.dtype))
    mean, reach = wide.mean(), sigmas * wide.std()
    return RepeatRange(*(bound.to(values.dtype) for bound in (mean, mean - reach, mean + reach)))


def inter_similarity(
    real: Tensor, generated: Tensor, *, threshold: float = 0.6, top_k: int | None = None
) -> InterSimilarity:
    r"""Keep generated items that look like the real ones of their category.

    .. math:: s(x) = \frac{1}{|R|} \sum_{r \in R} \cos\bigl(f(x), f(r)\bigr), \qquad
        \text{keep } s(x) \ge \theta

    The mean over *all* real items punishes categories with several looks and favours typical
    items; ``top_k`` averages over the ``k`` most similar real items only (1 = the maximum).
    Real items must come from the training images.

    Args:
        real: features of real crops of one category, ``[R, D]``; detached.
        generated: features of generated items of that category, ``[G, D]``; detached.
        threshold: theta; at -1 everything is kept, above 1 nothing.
        top_k: in [1, R]; ``None`` = all, as published.

    Returns:
        ``similarity`` in [-1, 1] (0 for a feature of zeros), ``score`` and ``keep``.

    Raises:
        ValueError: shapes that do not fit, an empty input, or ``top_k`` out of range.
        TypeError: not floating point.

    Example:
        The length of a feature does not count:

        >>> import torch
        >>> real = torch.tensor([[1.0, 0.0]])
        >>> inter_similarity(real, torch.tensor([[5.0, 0.0], [0.0, 2.0]])).keep
        tensor([ True, False])

    Source: Fan et al. (2024), arXiv:2405.10185; ``top_k`` is ours.
    """
    check_floating(real=real, generated=generated)
    check_shape("real", real, (None, None))
    check_not_empty("real", real)
    check_shape("generated", generated, (None, real.shape[1]))
    check_not_empty("generated", generated)
    check_same_dtype(real=real, generated=generated)
    check_range("threshold", threshold)
    count = len(real) if top_k is None else top_k
    check_count("top_k", count)
    check_range("top_k", count, at_most=len(real))
    cosine = (_unit_rows(generated) @ _unit_rows(real).T).clamp(-1, 1)
    score = cosine.mean(1) if top_k is None else cosine.topk(count, dim=1).values.mean(1)
    dtype = generated.dtype
    return InterSimilarity(cosine.to(dtype), score.to(dtype), score >= threshold)


def _unit_rows(features: Tensor) -> Tensor:
    """Scale rows to length 1, whatever their magnitude; rows of zeros stay."""
    wide = features.detach().to(accumulation_dtype(features.dtype))
    largest = wide.abs().amax(-1, keepdim=True)
    wide = wide / torch.where(largest > 0, largest, 1.0)
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return wide / torch.where(length > 0, length, 1.0)


def grouped_average(ap: Tensor, groups: Sequence[str]) -> dict[str, Tensor]:
    """Average precision over the categories of each group, and over all.

    Args:
        ap: of each category, ``[C]``; negative = no ground truth, left out.
        groups: name of the group of each category, length ``C``; ``"all"`` is taken.

    Returns:
        Group to mean, 0-d, in order of appearance, then ``"all"``; -1 where no category counts.

    Raises:
        ValueError: wrong shape, empty input, another number of groups, or a group named ``"all"``.
        TypeError: ``ap`` not floating point.

    Example:
        >>> import torch
        >>> means = grouped_average(torch.tensor([0.5, -1.0, 0.25]), ["rare", "rare", "common"])
        >>> {group: round(float(mean), 3) for group, mean in means.items()}
        {'rare': 0.5, 'common': 0.25, 'all': 0.375}

    Source: Gupta et al. (2019), arXiv:1908.03195.
    """
    check_floating(ap=ap)
    check_shape("ap", ap, (None,))
    check_not_empty("ap", ap)
    try:
        names = list(groups)
        distinct = list(dict.fromkeys(names))
    except TypeError:
        raise TypeError(f"groups must be a sequence of names, got {groups!r:.60}") from None
    if len(names) != len(ap):
        raise ValueError(f"groups must have {len(ap)} names, got {len(names)}")
    if "all" in names:
        raise ValueError('groups must not contain "all", which names the average over all')
    counted = ~(ap.detach() < 0)  # a NaN counts, and stays
    result = {}
    for group in [*distinct, "all"]:
        member = [group in ("all", name) for name in names]
        chosen = counted & torch.tensor(member, device=ap.device)
        total = torch.where(chosen, ap.detach(), 0.0).sum()
        result[group] = torch.where(chosen.any(), total / chosen.sum().clamp(min=1), -1.0)
    return result


def repeat_factors(
    image_categories: Sequence[Sequence[int]], num_categories: int, threshold: float = 0.001
) -> RepeatFactors:
    r"""How often to show an image in an epoch so that rare categories are seen.

    .. math:: r_c = \max\left(1, \sqrt{t / f_c}\right), \qquad r_i = \max_{c \in i} r_c

    with :math:`f_c` the share of images that contain ``c``.

    Args:
        image_categories: categories in each image; repetitions count once.
        num_categories: ``C``, >= 1.
        threshold: ``t``, > 0.

    Returns:
        ``category``, ``[C]`` (1 for one in no image), and ``image``, ``[N]`` (1 for one without
        objects).

    Raises:
        ValueError: no image, a category out of range, or a setting out of range.

    Example:
        Category 1 is in a quarter of the images, half as often as the threshold asks:

        >>> repeat_factors([[0], [0], [0], [0, 1]], 2, threshold=0.5).image
        tensor([1.0000, 1.0000, 1.0000, 1.4142], dtype=torch.float64)

    Source: Gupta et al. (2019), arXiv:1908.03195.
    """
    check_count("num_categories", num_categories)
    check_range("threshold", threshold, above=0.0)
    try:
        images = [sorted(set(map(operator.index, categories))) for categories in image_categories]
        flat = torch.tensor([c for categories in images for c in categories], dtype=torch.long)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"image_categories must be sequences of integers, got {image_categories!r:.60}"
        ) from None
    if not images:
        raise ValueError("image_categories must have at least one image, got none")
    for categories in images:
        if categories and (categories[0] < 0 or categories[-1] >= num_categories):
            raise ValueError(
                f"image_categories must lie in [0, num_categories = {num_categories}), "
                f"got {categories}"
            )
    share = torch.bincount(flat, minlength=num_categories).double() / len(images)
    factor = (threshold / share).sqrt().clamp(min=1)
    category = torch.where(share > 0, factor, 1.0)
    image = [max((float(category[c]) for c in row), default=1.0) for row in images]
    return RepeatFactors(category, torch.tensor(image, dtype=torch.float64))


def federated_weights(image_counts: Tensor, power: float = 0.5) -> Tensor:
    r"""Weights that negative classes are drawn with in the federated loss: :math:`n_c^p`.

    Args:
        image_counts: images with each class, >= 0, integer or floating point, ``[C]``.
        power: >= 0; a class without images keeps weight 0 unless it is 0.

    Returns:
        ``[C]``, not normalised; integers give double precision.

    Raises:
        ValueError: wrong shape, empty input or ``power`` < 0.

    Example:
        >>> import torch
        >>> federated_weights(torch.tensor([100, 4, 0]))
        tensor([10.,  2.,  0.], dtype=torch.float64)

    Source: Zhou et al. (2021), arXiv:2103.07461.
    """
    check_shape("image_counts", image_counts, (None,))
    check_not_empty("image_counts", image_counts)
    check_range("power", power, at_least=0.0)
    counts = image_counts if image_counts.is_floating_point() else image_counts.double()
    return counts**power


def federated_classes(
    present: Tensor,
    weights: Tensor,
    *,
    total: int = 50,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose the classes a federated loss is taken over: those present and drawn negatives.

    Args:
        present: classes in the batch, integers in ``[0, C)``, any shape, repetitions allowed.
        weights: of each class, from :func:`federated_weights`, ``[C]``.
        total: classes to reach, >= 1; present ones are all kept even if they are more.
        generator: source of randomness; ``None`` = the global one.

    Returns:
        Boolean ``[C]``: the mask of a sigmoid cross-entropy.

    Raises:
        ValueError: wrong shape or ``total`` < 1. TypeError: wrong dtypes.

    Example:
        >>> import torch
        >>> federated_classes(torch.tensor([2, 2]), torch.tensor([1.0, 0.0, 5.0, 0.0]), total=2)
        tensor([ True, False,  True, False])

    Source: Zhou et al. (2021), arXiv:2103.07461.
    """
    check_floating(weights=weights)
    check_shape("weights", weights, (None,))
    check_not_empty("weights", weights)
    check_count("total", total)
    check_integer_dtype(present=present)
    if not bool((weights >= 0).all()) or bool(weights.isinf().any()):
        raise ValueError("weights must be finite and >= 0")
    if bool(((present < 0) | (present >= len(weights))).any()):
        raise ValueError(f"present must be classes in [0, {len(weights)})")
    chosen = torch.zeros(len(weights), dtype=torch.bool, device=weights.device)
    chosen[present.flatten().long()] = True  # bytes would be a mask
    absent = weights.detach().masked_fill(chosen, 0.0)
    wanted = min(total - int(chosen.sum()), int((absent > 0).sum()))
    if wanted > 0:
        chosen[torch.multinomial(absent, wanted, generator=generator)] = True
    return chosen


def balanced_draws(
    pool_sizes: Tensor, count: int, *, generator: torch.Generator | None = None
) -> BalancedDraws:
    """Draw cut-outs so that each category comes alike: a category, then an item of it.

    Args:
        pool_sizes: cut-outs of each category, integers >= 0, ``[C]``; not all 0.
        count: draws ``N``, >= 0, with replacement.
        generator: source of randomness; ``None`` = the global one.

    Returns:
        ``category`` and ``item`` (from 0 within the category), integers ``[N]``.

    Raises:
        ValueError: wrong shape, only empty categories, or ``count`` < 0.
        TypeError: ``pool_sizes`` not integer.

    Example:
        A category of 1 is drawn as often as one of 1000:

        >>> import torch
        >>> g = torch.Generator().manual_seed(0)
        >>> draws = balanced_draws(torch.tensor([1, 1000]), 1000, generator=g)
        >>> 450 < int(draws.category.sum()) < 550
        True

    Source: Fan et al. (2024), code, arXiv:2405.10185.
    """
    check_shape("pool_sizes", pool_sizes, (None,))
    check_integer_dtype(pool_sizes=pool_sizes)
    check_count("count", count, at_least=0)
    filled = (pool_sizes > 0).nonzero().squeeze(1)
    if len(filled) == 0:
        raise ValueError("pool_sizes must have a positive entry, got none")
    device = pool_sizes.device
    place = torch.randint(len(filled), (count,), generator=generator, device=device)
    category = filled[place]
    uniform = torch.rand(count, generator=generator, dtype=torch.float64, device=device)
    size = pool_sizes[category]
    item = (uniform * size).long().clamp(max=size - 1)
    return BalancedDraws(category, item)
