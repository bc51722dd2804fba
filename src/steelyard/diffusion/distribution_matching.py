r"""Distribution matching distillation under any f-divergence (DMD, DMD2, f-distill).

A one-step generator is trained until its noised samples follow the noised law of a diffusion
teacher. The gradient of ``D_f(teacher || student)`` is that of DMD, the difference of two scores,
times a weight ``h(r)`` on each sample, with ``r`` the ratio of teacher to student density read from
a discriminator. The reverse KL has ``h = 1`` and is DMD2; ``h`` that grows with ``r`` keeps modes.

Per step of the student: :func:`dmd_loss` with :func:`f_distill_weight` of the log-ratio of
:class:`RatioNormalizer`, plus :func:`generator_loss`. Between: :func:`fake_score_loss` for the
network that follows the student and :func:`discriminator_loss`.

Sources: Xu, Nie, Vahdat (2025), f-distill, arXiv:2502.15681; Yin et al. (2024), DMD,
arXiv:2311.18828, and DMD2, arXiv:2405.14867; Karras et al. (2022), EDM, arXiv:2206.00364.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from steelyard._checks import check_count, check_floating, check_not_empty, check_range, check_shape
from steelyard._reduce import Reduction, reduce_masked, widen
from steelyard.diffusion._gaussian_mixture import GaussianMixture
from steelyard.diffusion._time import as_column, check_items, item_mean
from steelyard.divergences import FDivergence
from steelyard.divergences.f_divergences import check_divergence

__all__ = [
    "GaussianMixture",
    "RatioNormalizer",
    "discriminator_loss",
    "dmd_loss",
    "f_distill_weight",
    "fake_score_loss",
    "generator_loss",
    "karras_sigmas",
]

# Released code: the discriminator's logit is clamped to plus or minus this before its exponential.
_LOGIT_LIMIT = 10.0
_EPS = 1e-6


def f_distill_weight(
    log_ratio: Tensor, divergence: FDivergence, *, normalize: bool = False
) -> Tensor:
    r"""Weight of each sample in the gradient of ``D_f(teacher || student)``.

    .. math:: h(r) = r^2 f''(r), \qquad r = p_\mathrm{teacher} / p_\mathrm{student}

    ============================ =================== =============================
    divergence                   ``h``               behaviour
    ============================ =================== =============================
    ``REVERSE_KL``               1                   seeks modes; this is DMD2
    ``SOFTENED_REVERSE_KL``      1/(r+1)             seeks modes, bounded
    ``JENSEN_SHANNON_DOUBLE``    r/(r+1)             between, bounded
    ``SQUARED_HELLINGER``        sqrt(r)/2           between
    ``KL``                       r                   covers modes, high variance
    ``JEFFREYS``                 r + 1               both, high variance
    ``NEYMAN_CHI2``              2/r                 seeks modes most
    ============================ =================== =============================

    The paper's ``js`` is ``JENSEN_SHANNON_DOUBLE``; its ``sh`` and ``neyman`` are half of ours.
    ``TOTAL_VARIATION`` has weight 0 everywhere but at ``r = 1`` and cannot be used.

    Args:
        log_ratio: ``log r``, shape ``[B]``; detached.
        divergence: any of ``steelyard.divergences``.
        normalize: divide by the mean over the batch + 1e-6, so that the step does not depend on
            the scale of ``f``. Under several ranks the mean is that of each rank.

    Returns:
        Weights ``[B]`` >= 0, dtype of ``log_ratio``; ``inf`` where the exact value overflows it.

    Raises:
        ValueError: ``log_ratio`` is not ``[B]`` or is empty.
        TypeError: ``log_ratio`` is not floating point.

    Example:
        Where the student is short of samples (``r = 3``) covering divergences push three times:

        >>> import torch
        >>> from steelyard.divergences import JENSEN_SHANNON_DOUBLE, KL, REVERSE_KL
        >>> log_ratio = torch.tensor([1.0, 3.0]).log()
        >>> for divergence in (REVERSE_KL, JENSEN_SHANNON_DOUBLE, KL):
        ...     print(f_distill_weight(log_ratio, divergence))
        tensor([1., 1.])
        tensor([0.5000, 0.7500])
        tensor([1., 3.])

    Source: Xu et al. (2025), Theorem 1 and Table 1, arXiv:2502.15681.
    """
    check_divergence(divergence)
    check_floating(log_ratio=log_ratio)
    check_shape("log_ratio", log_ratio, (None,))
    check_not_empty("log_ratio", log_ratio)
    # The two terms may cancel to the last digit of log r, so they are added in double precision.
    precise = log_ratio.detach().to(_widest(log_ratio))
    log_weight = 2 * precise + divergence.generator.log_second_derivative(precise)
    if not normalize:
        return log_weight.exp().to(log_ratio.dtype)
    # Relative to the largest weight nothing overflows; the floor admits weights that are all 0.
    top = log_weight.max().clamp(min=0.0)
    scaled = (log_weight - top).exp()
    return (scaled / (scaled.mean() + _EPS * (-top).exp())).to(log_ratio.dtype)


def _widest(tensor: Tensor) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


class RatioNormalizer(nn.Module):
    r"""Turn discriminator logits into log density ratios whose mean is 1 at every noise level.

    The best discriminator has the logit :math:`\log(p/q)`, and :math:`E_q[p/q] = 1` at each time;
    a real one drifts from that. With the mean logit over patches ``l`` and ``b`` the running mean
    of a bin of times,

    .. math::
        r = \mathrm{clip}\big(e^{\mathrm{clip}(l, -10, 10)}, \text{lower}, \text{upper}\big), \qquad
        b_j \leftarrow k\,b_j + (1 - k)\,\mathrm{mean}_{i \in j} r_i, \qquad
        \log \frac{r}{b_{j} + 10^{-6}}

    In training mode the bins of the batch are updated before they are used; in evaluation mode
    they are used as they are. NaN logits come out as NaN and do not enter the bins. With ``ema=0``
    a sample alone in its bin gets the ratio 1: use large batches, or ``ema > 0``. Under several
    ranks gather logits and times before the call, so that the bins agree.

    Args:
        bins: number of equal bins of ``[t_min, t_max]``, >= 1.
        ema: ``k``, in [0, 1).
        lower: smallest ratio, > 0.
        upper: largest ratio, > ``lower``.
        t_min: start of the first bin; earlier times count into it.
        t_max: end of the last bin, > ``t_min``; later times count into it.

    Attributes:
        means: buffer ``[bins]``, 1 at the start.

    Raises:
        ValueError: a setting out of range; at a call, wrong shapes or empty input.
        TypeError: at a call, a tensor is not floating point.

    Example:
        A discriminator that is sure of everything still gives ratios of mean 1:

        >>> import torch
        >>> normalizer = RatioNormalizer(bins=1)
        >>> log_ratio = normalizer(torch.tensor([2.0, 1.0, 2.0, 1.0]), torch.rand(4))
        >>> round(log_ratio.exp().mean().item(), 4)
        1.0

    Source: Xu et al. (2025), released code, arXiv:2502.15681.
    """

    means: Tensor

    def __init__(
        self,
        bins: int = 10,
        ema: float = 0.0,
        lower: float = 0.1,
        upper: float = 20.0,
        *,
        t_min: float = 0.0,
        t_max: float = 1.0,
    ) -> None:
        super().__init__()
        check_count("bins", bins)
        check_range("ema", ema, at_least=0.0, below=1.0)
        check_range("lower", lower, above=0.0)
        check_range("upper", upper, above=lower)
        check_range("t_min", t_min)
        check_range("t_max", t_max, above=t_min)
        self.bins, self.ema = bins, ema
        self.lower, self.upper = lower, upper
        self.t_min, self.t_max = t_min, t_max
        self.register_buffer("means", torch.ones(bins))

    def forward(self, logits: Tensor, t: Tensor) -> Tensor:
        """Return normalised log-ratios.

        Args:
            logits: of the discriminator, real = positive, ``[B]`` or ``[B, P]`` with ``P`` patches;
                detached. The mean over patches is a geometric mean of their ratios.
            t: time of each sample, ``[B]``.

        Returns:
            ``log r``, ``[B]``, dtype of ``logits``; without gradient.
        """
        check_floating(logits=logits, t=t)
        if logits.dim() not in (1, 2):
            raise ValueError(f"logits must have shape [B] or [B, P], got {list(logits.shape)}")
        check_not_empty("logits", logits)
        check_shape("t", t, (logits.shape[0],))
        clamped = item_mean(widen(logits.detach())).clamp(-_LOGIT_LIMIT, _LOGIT_LIMIT)
        ratio = clamped.exp().clamp(self.lower, self.upper)
        share = (t.detach().to(ratio.dtype) - self.t_min) / (self.t_max - self.t_min)
        place = (share * self.bins).floor().clamp(0, self.bins - 1).long()
        means = self.means.to(ratio.dtype)
        if self.training:
            means = self._updated(means, ratio, place)
            self.means.copy_(means)
        return (ratio / (means[place] + _EPS)).log().to(logits.dtype)

    def _updated(self, means: Tensor, ratio: Tensor, place: Tensor) -> Tensor:
        known = ~ratio.isnan()
        count = torch.zeros_like(means).index_add(0, place, known.to(ratio.dtype))
        total = torch.zeros_like(means).index_add(0, place, ratio.where(known, 0.0))
        seen = self.ema * means + (1 - self.ema) * total / count.clamp(min=1)
        return torch.where(count > 0, seen, means)

    def extra_repr(self) -> str:
        """Return the settings, for ``print(module)``."""
        return (
            f"bins={self.bins}, ema={self.ema}, lower={self.lower}, upper={self.upper}, "
            f"t_min={self.t_min}, t_max={self.t_max}"
        )


def dmd_loss(
    x: Tensor,
    teacher_x0: Tensor,
    fake_x0: Tensor,
    *,
    weight: Tensor | None = None,
    factor: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    r"""Pull generated samples along the difference of two denoisers (DMD, f-distill).

    .. math::
        g_i = w_i\,\frac{D_q(x_{t,i}) - D_p(x_{t,i})}{\mathrm{mean}|x_i - D_p(x_{t,i})| + \epsilon},
        \qquad L = \tfrac12\,\mathrm{mean}\,g^2, \qquad
        \frac{\partial L}{\partial x} := \frac{g}{\mathrm{numel}}

    The value is that of half the squared distance to the pseudo target ``x - g``; it grows with
    ``w^2`` and says little: log ``mean |g|``. The gradient is given directly, so that it does not
    lose digits where ``g`` is small beside ``x``.

    Args:
        x: generated samples, ``[B, *D]``; the only argument with a gradient.
        teacher_x0: ``D_p(x_t, t)``, the teacher's clean prediction, same shape; detached.
        fake_x0: ``D_q(x_t, t)``, that of the network that follows the student, same shape;
            detached.
        weight: ``w``, ``[B]``, for example from :func:`f_distill_weight`; detached; ``None`` = 1.
        factor: ``[B]``; detached. What multiplies ``fake_x0 - teacher_x0`` in place of one over the
            sample's normaliser: with ``alpha_t^2 / sigma_t^2`` the gradient is exactly that of
            ``D_f``, averaged over ``B`` and ``D``.
        eps: added to the normaliser, >= 0.

    Returns:
        0-d tensor, dtype of ``x``.

    Raises:
        ValueError: shapes differ or are empty, or ``eps`` is negative.
        TypeError: a tensor is not floating point.

    Example:
        Descent moves ``x`` from the student's denoiser towards the teacher's:

        >>> import torch
        >>> x = torch.tensor([[0.0]], requires_grad=True)
        >>> dmd_loss(x, torch.tensor([[2.0]]), torch.tensor([[1.0]])).backward()
        >>> x.grad
        tensor([[-0.5000]])

    Source: Yin et al. (2024), Eq. 7 and 8, arXiv:2311.18828; Xu et al. (2025), Theorem 1,
    arXiv:2502.15681.
    """
    check_items(x=x, teacher_x0=teacher_x0, fake_x0=fake_x0)
    check_range("eps", eps, at_least=0.0)
    teacher = widen(teacher_x0.detach())
    direction = widen(fake_x0.detach()) - teacher
    if factor is None:
        size = item_mean((widen(x.detach()) - teacher).abs())
        direction = direction / (as_column("size", size, x) + eps)
    else:
        direction = direction * _item_column("factor", factor, x)
    if weight is not None:
        direction = direction * _item_column("weight", weight, x)
    moved = widen(x) - widen(x.detach())  # 0 in value, 1 in slope
    return (direction.square() / 2 + direction * moved).mean().to(x.dtype)


def _item_column(name: str, values: Tensor, like: Tensor) -> Tensor:
    check_floating(**{name: values})
    check_shape(name, values, (like.shape[0],))
    return as_column(name, values.detach(), like)


def fake_score_loss(
    fake_x0: Tensor,
    x: Tensor,
    *,
    sigma: Tensor | None = None,
    sigma_data: float = 0.5,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Denoising loss that keeps the fake network at the student's present law.

    .. math:: L_i = \lambda_i\,\frac1d \|D_q(x_{t,i}) - x_i\|^2, \qquad
        \lambda = \sigma^{-2} + \sigma_\mathrm{data}^{-2}

    or :math:`\lambda = 1` without ``sigma``.

    Args:
        fake_x0: clean prediction of the fake network at the noised ``x``, ``[B, *D]``.
        x: the student's samples, same shape; detached.
        sigma: noise level of each sample, ``[B]``, > 0; detached.
        sigma_data: standard deviation of the data, > 0.
        reduction: over the batch, ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        0-d tensor, or ``[B]`` for ``"none"``; dtype of ``fake_x0``.

    Raises:
        ValueError: shapes differ or are empty, or ``sigma_data`` is out of range.
        TypeError: a tensor is not floating point.

    Example:
        An error at low noise counts more:

        >>> import torch
        >>> prediction, x = torch.ones(2, 3), torch.zeros(2, 3)
        >>> fake_score_loss(prediction, x, sigma=torch.tensor([0.5, 80.0]), reduction="none")
        tensor([8.0000, 4.0002])

    Source: Yin et al. (2024), DMD2, released ImageNet code, arXiv:2405.14867.
    """
    check_items(fake_x0=fake_x0, x=x)
    check_range("sigma_data", sigma_data, above=0.0)
    losses = item_mean((widen(fake_x0) - widen(x.detach())).square())
    if sigma is not None:
        check_floating(sigma=sigma)
        check_shape("sigma", sigma, (x.shape[0],))
        losses = losses * (sigma.detach().to(losses.dtype) ** -2 + sigma_data**-2)
    return reduce_masked(losses, None, reduction).to(fake_x0.dtype)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    r"""Teach the discriminator to tell noised real data from noised generated samples.

    .. math:: L = \mathrm{mean}\,\mathrm{softplus}(-d_\mathrm{real})
        + \mathrm{mean}\,\mathrm{softplus}(d_\mathrm{fake})

    Its minimum is at the log density ratio :math:`d = \log(p / q)`, which
    :class:`RatioNormalizer` and :func:`f_distill_weight` use.

    Args:
        real_logits: any shape.
        fake_logits: any shape.

    Returns:
        0-d tensor, dtype of ``real_logits``.

    Raises:
        ValueError: an empty tensor.
        TypeError: a tensor is not floating point.

    Example:
        >>> import torch
        >>> discriminator_loss(torch.zeros(2), torch.zeros(3))  # 2 log 2: it knows nothing
        tensor(1.3863)

    Source: Yin et al. (2024), DMD2, arXiv:2405.14867.
    """
    check_floating(real_logits=real_logits, fake_logits=fake_logits)
    check_not_empty("real_logits", real_logits)
    check_not_empty("fake_logits", fake_logits)
    loss = -logsigmoid(widen(real_logits)).mean() - logsigmoid(-widen(fake_logits)).mean()
    return loss.to(real_logits.dtype)


def generator_loss(fake_logits: Tensor) -> Tensor:
    r"""Non-saturating loss of the generator: samples that pass for real.

    .. math:: L = \mathrm{mean}\,\mathrm{softplus}(-d_\mathrm{fake})

    Args:
        fake_logits: of the frozen discriminator on noised generated samples, any shape.

    Returns:
        0-d tensor, dtype of ``fake_logits``.

    Raises:
        ValueError: an empty tensor.
        TypeError: ``fake_logits`` is not floating point.

    Example:
        A sample that is seen through still has a full gradient:

        >>> import torch
        >>> logits = torch.tensor([-50.0], requires_grad=True)
        >>> generator_loss(logits).backward()
        >>> logits.grad
        tensor([-1.])

    Source: Yin et al. (2024), DMD2, arXiv:2405.14867.
    """
    check_floating(fake_logits=fake_logits)
    check_not_empty("fake_logits", fake_logits)
    return -logsigmoid(widen(fake_logits)).mean().to(fake_logits.dtype)


def karras_sigmas(
    n: int,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Noise levels from the largest to the smallest, dense at low noise.

    .. math:: \sigma_i = \Big(\sigma_\max^{1/\rho}
        + \frac{i}{n - 1}\big(\sigma_\min^{1/\rho} - \sigma_\max^{1/\rho}\big)\Big)^\rho

    Args:
        n: number of levels, >= 1; 1 gives ``sigma_max``.
        sigma_min: > 0.
        sigma_max: > ``sigma_min``.
        rho: > 0; 1 is linear, large is logarithmic.
        dtype: floating dtype of the result; ``None`` = PyTorch's default.
        device: of the result.

    Returns:
        ``[n]``, decreasing, computed in float64.

    Raises:
        ValueError: a setting out of range.

    Example:
        >>> karras_sigmas(3)
        tensor([8.0000e+01, 2.5152e+00, 2.0000e-03])

    Source: Karras et al. (2022), Eq. 5, arXiv:2206.00364.
    """
    check_count("n", n)
    check_range("sigma_min", sigma_min, above=0.0)
    check_range("sigma_max", sigma_max, above=sigma_min)
    check_range("rho", rho, above=0.0)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = torch.linspace(high, low, n, dtype=torch.float64) ** rho
    return sigmas.to(dtype=dtype or torch.get_default_dtype(), device=device)
