"""Activations that are complex-differentiable, as a nudge on a circle in the complex plane needs.

Source: Laborieux and Zenke (2024), Improving equilibrium propagation without weight symmetry
through Jacobian homeostasis, arXiv:2309.02214.
"""

import torch
from torch import Tensor

from steelyard._checks import check_tensor


def holomorphic_sigmoid(z: Tensor) -> Tensor:
    r"""Logistic function with slope 1 at its middle, 1/2.

    .. math:: \sigma(z) = \frac{1}{1 + e^{-4z + 2}}

    Args:
        z: any shape, real or complex. Poles at ``1/2 + i pi (2k + 1) / 4``.

    Returns:
        The activities, in the shape and dtype of ``z``.

    Raises:
        TypeError: ``z`` is no dense tensor.

    Example:
        >>> holomorphic_sigmoid(torch.tensor([0.5, 40.0, -40.0]))
        tensor([0.5000, 1.0000, 0.0000])

    Source: arXiv:2309.02214, experiments.
    """
    check_tensor("z", z)
    return torch.sigmoid(4 * z - 2)


def dsilu(z: Tensor) -> Tensor:
    r"""Difference of two SiLUs: rises from 0 to 1, with small dips.

    .. math:: \frac z2 s(z) + \Bigl(1 - \frac z2\Bigr) s(z - 2), \qquad s(z) = \frac1{1 + e^{-z}}

    Args:
        z: any shape, real or complex.

    Returns:
        The activities, in the shape and dtype of ``z``.

    Raises:
        TypeError: ``z`` is no dense tensor of numbers.

    Example:
        >>> dsilu(torch.tensor([0.0, 1.0, 60.0]))
        tensor([0.1192, 0.5000, 1.0000])

    Source: arXiv:2309.02214, experiments.
    """
    check_tensor("z", z)
    if z.dtype == torch.bool:
        raise TypeError(f"z must hold numbers, got {z.dtype}")
    half = z / 2
    return half * torch.sigmoid(z) + (1 - half) * torch.sigmoid(z - 2)
