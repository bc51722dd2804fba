"""A mixture of isotropic Gaussians under added noise: an analytic teacher for diffusion."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from steelyard._checks import check_count, check_floating, check_not_empty, check_range, check_shape
from steelyard._reduce import accumulation_dtype


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    r"""Mixture of isotropic Gaussians, with exact density, score and denoiser at any noise.

    Data ``x0`` follow the mixture; a noised sample is ``x = x0 + sigma * noise`` with standard
    normal noise. Its law is a mixture again, of variances :math:`v_k = s_k^2 + \sigma^2`:

    .. math:: p_\sigma(x) = \sum_k w_k\,\mathcal N(x; m_k, v_k I)

    Args:
        weights: ``w``, non-negative ``[K]``, normalised inside.
        means: ``m``, ``[K, D]``.
        stds: ``s``, ``[K]``, > 0.

    Raises:
        ValueError: wrong shapes, empty input, negative or only zero weights, ``stds`` not positive.
        TypeError: a tensor is not floating point.

    Example:
        Between two equal peaks nothing pulls; nearer to one, the denoiser goes to it:

        >>> import torch
        >>> teacher = GaussianMixture(
        ...     torch.tensor([1.0, 1.0]), torch.tensor([[-2.0], [2.0]]), torch.tensor([0.1, 0.1])
        ... )
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> teacher.score(x, 0.5)[0].abs(), teacher.denoise(x, 0.5)[1].round(decimals=2)
        (tensor([0.]), tensor([1.9600]))

    Source: Xu et al. (2025), Sec. 2, arXiv:2502.15681, for the definitions of score and denoiser;
    closed forms of a mixture.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor

    def __post_init__(self) -> None:
        check_floating(weights=self.weights, means=self.means, stds=self.stds)
        check_shape("means", self.means, (None, None))
        check_not_empty("means", self.means)
        components = self.means.shape[0]
        check_shape("weights", self.weights, (components,))
        check_shape("stds", self.stds, (components,))
        if not bool((self.weights >= 0).all() and (self.weights > 0).any()):
            raise ValueError(f"weights must be >= 0 and not all 0, got {self.weights.tolist()}")
        if not bool((self.stds > 0).all()):
            raise ValueError(f"stds must be > 0, got {self.stds.tolist()}")

    def log_prob(self, x: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        """Return the log-density of noised data.

        Args:
            x: ``[N, D]``.
            sigma: noise level >= 0, a number or ``[N]``.

        Returns:
            ``[N]``, nats, dtype of ``x``; differentiable in ``x``.

        Raises:
            ValueError: wrong shapes, empty ``x``, or a negative number ``sigma``.
            TypeError: ``x`` is not floating point.
        """
        gap, variance, log_joint = self._joint(x, sigma)
        del gap, variance
        return torch.logsumexp(log_joint, dim=1).to(x.dtype)

    def score(self, x: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        """Return the gradient of :meth:`log_prob` by ``x``, in closed form.

        Args:
            x: ``[N, D]``.
            sigma: noise level >= 0, a number or ``[N]``.

        Returns:
            ``[N, D]``, dtype of ``x``.

        Raises:
            ValueError: wrong shapes, empty ``x``, or a negative number ``sigma``.
            TypeError: ``x`` is not floating point.
        """
        gap, variance, log_joint = self._joint(x, sigma)
        pull = torch.softmax(log_joint, dim=1) / variance
        return torch.einsum("nk,nkd->nd", pull, gap).to(x.dtype)

    def denoise(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        r"""Return the expected clean sample, ``x + sigma^2 score(x, sigma)`` (Tweedie).

        Args:
            x: ``[N, D]``.
            sigma: noise level >= 0, a number or ``[N]``.

        Returns:
            ``E[x0 | x]``, ``[N, D]``, dtype of ``x``.

        Raises:
            ValueError: wrong shapes, empty ``x``, or a negative number ``sigma``.
            TypeError: ``x`` is not floating point.
        """
        gap, variance, log_joint = self._joint(x, sigma)
        # sigma^2 / v is 1 - s^2 / v: a share, whatever the size of sigma.
        noise_share = 1 - self.stds.to(variance).square() / variance
        pull = torch.softmax(log_joint, dim=1) * noise_share
        return (x.to(gap.dtype) + torch.einsum("nk,nkd->nd", pull, gap)).to(x.dtype)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw clean samples.

        Args:
            n: how many, >= 1.
            generator: source of randomness, on the device of the mixture.

        Returns:
            ``[n, D]``, dtype and device of ``means``.

        Raises:
            ValueError: ``n`` is below 1.
        """
        check_count("n", n)
        chosen = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        shape = (n, self.means.shape[1])
        noise = torch.randn(
            shape, generator=generator, dtype=self.means.dtype, device=self.means.device
        )
        return self.means[chosen] + self.stds[chosen].to(noise).unsqueeze(1) * noise

    def _joint(self, x: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``m_k - x [N, K, D]``, the variances ``[N, K]``, ``log w_k N(x; m_k) [N, K]``."""
        check_floating(x=x)
        dimensions = self.means.shape[1]
        check_shape("x", x, (None, dimensions))
        check_not_empty("x", x)
        dtype = accumulation_dtype(x.dtype)
        if isinstance(sigma, Tensor):
            check_floating(sigma=sigma)
            if sigma.dim() > 0:
                check_shape("sigma", sigma, (x.shape[0],))
            noise = sigma.to(dtype).square().reshape(-1, 1)
        else:
            check_range("sigma", sigma, at_least=0.0)
            noise = torch.full((1, 1), sigma**2, dtype=dtype, device=x.device)
        variance = (self.stds.to(dtype).square() + noise).expand(x.shape[0], -1)
        gap = self.means.to(dtype) - x.to(dtype).unsqueeze(1)
        log_weights = self.weights.to(dtype).log() - self.weights.to(dtype).sum().log()
        log_normal = -0.5 * (gap.square().sum(-1) / variance)
        log_normal = log_normal - 0.5 * dimensions * (2 * math.pi * variance).log()
        return gap, variance, log_weights + log_normal
