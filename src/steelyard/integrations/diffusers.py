r"""Advantage weighted matching and f-distill for models and schedulers of Hugging Face Diffusers.

The functions read a scheduler, flow matching or one with ``alphas_cumprod``, and call the model as
its pipelines do: ``model(noised, timestep=timesteps, return_dict=False, **conditioning)[0]``.
Nothing of ``diffusers`` is imported here; the objects you pass bring it.

:func:`awm_step` is the update of AWM, :func:`denoising_step` a sampling step with its
log-probability (Flow-GRPO, DDPO), :func:`f_distill_step` the student's update of f-distill.

Flows are given in the convention of :mod:`steelyard.diffusion`: data at time 0, noise at time 1. A
variance-preserving model with :math:`\bar\alpha` is a flow at the time
:math:`\sqrt{1 - \bar\alpha} / (\sqrt{\bar\alpha} + \sqrt{1 - \bar\alpha})`, with its sample scaled
by :math:`\sqrt{\bar\alpha} + \sqrt{1 - \bar\alpha}`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steelyard._checks import (
    check_callable,
    check_count,
    check_floating,
    check_range,
    check_same_shape,
    given,
)
from steelyard._reduce import Reduction, widen
from steelyard.diffusion import (
    awm_log_likelihood,
    awm_loss,
    awm_proximity,
    ddpo_step,
    dmd_loss,
    f_distill_weight,
    flow_grpo_step,
)
from steelyard.diffusion._transitions import DenoisingStep
from steelyard.diffusion.advantage_weighted import Weighting
from steelyard.divergences import FDivergence
from steelyard.integrations._diffusers_schedulers import (
    clean_prediction,
    neighbours,
    noised_samples,
    read_schedule,
    target_of,
)

__all__ = [
    "AWMStep",
    "awm_step",
    "awm_timesteps",
    "clean_prediction",
    "denoising_step",
    "f_distill_step",
    "noised_samples",
]

Model = Callable[..., Any]


class AWMStep(NamedTuple):
    """What :func:`awm_step` returns.

    Attributes:
        loss: 0-d, or ``[B]`` with ``reduction="none"``.
        log_likelihood: of each sample, ``[B]``, without gradient: ``old_log_likelihood`` of a
            later step on the same noise and timesteps.
        noise: the noise that was used, ``[B, *D]``.
    """

    loss: Tensor
    log_likelihood: Tensor
    noise: Tensor


def awm_timesteps(
    scheduler: Any, count: int, *, generator: torch.Generator | None = None
) -> Tensor:
    """Draw timesteps for training from the schedule that the samples were made with.

    The noisiest 90 % of the schedule without its first step are cut into ``count`` stretches of
    about the same length, and one step is drawn from each, as the released code does.

    Args:
        scheduler: after ``set_timesteps``.
        count: how many, at least 1; at most nine tenths of the steps, less one.
        generator: source of the draws, on the CPU.

    Returns:
        ``[count]``, from noisy to clean; all samples of a batch share them in the released code.

    Raises:
        ValueError: the schedule is too short for ``count``.
        TypeError: ``count`` is no integer, or the scheduler has no timesteps.

    Example:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> scheduler = SimpleNamespace(timesteps=torch.arange(1000, 0, -100))
        >>> awm_timesteps(scheduler, 2, generator=torch.Generator().manual_seed(0))
        tensor([800, 200])

    Source: Xue et al. (2025), released code (``discrete_wo_init``), arXiv:2509.25050.
    """
    check_count("count", count)
    timesteps = getattr(scheduler, "timesteps", None)
    if not isinstance(timesteps, Tensor):
        raise TypeError("scheduler must have timesteps; call its set_timesteps first")
    last = len(timesteps) * 9 // 10
    if last - 1 < count:
        raise ValueError(
            f"count must be at most {max(last - 1, 0)} for a schedule of {len(timesteps)} steps, "
            f"got {count}"
        )
    borders = torch.linspace(1, last, count + 1).long()
    share = torch.rand(count, generator=generator)
    index = borders[:-1] + (share * (borders[1:] - borders[:-1])).long()
    return timesteps[index.to(timesteps.device)]


def awm_step(
    model: Model,
    scheduler: Any,
    samples: Tensor,
    advantages: Tensor,
    timesteps: Tensor,
    *,
    conditioning: Mapping[str, Any] | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    old_log_likelihood: Tensor | None = None,
    ref_model: Model | None = None,
    proximity: float = 0.0,
    weighting: Weighting = "ghuber",
    power: float = 0.25,
    clip: float = 1.0,
    reduction: Reduction = "mean",
) -> AWMStep:
    r"""Loss of advantage weighted matching on finished samples of any sampler.

    The samples are noised, the model predicts, and minus its own pretraining loss (of what it
    predicts: velocity, noise, ``v`` or the sample) is the log-likelihood that
    :func:`~steelyard.diffusion.awm_loss` weighs with the advantages.

    Args:
        model: of Diffusers, or any callable with that call.
        scheduler: a flow-matching scheduler, or one with ``alphas_cumprod``.
        samples: clean (latents), ``[B, *D]``, as the sampler made them.
        advantages: ``[B]``, for example
            ``clip_advantages(prompt_advantages(rewards, prompts))``.
        timesteps: ``[B]``, or 0-d for all samples, for example one of :func:`awm_timesteps`.
        conditioning: further arguments of the model, such as ``encoder_hidden_states``.
        noise: as ``samples``; ``None`` draws it.
        generator: source of that draw, on the samples' device.
        old_log_likelihood: ``[B]``, of an earlier step with the same noise and timesteps; ``None``
            = this step is on-policy.
        ref_model: the pretrained model, for the proximity term.
        proximity: weight of :func:`~steelyard.diffusion.awm_proximity`, >= 0.
        weighting: see :func:`~steelyard.diffusion.awm_log_likelihood`.
        power: see there.
        clip: of the ratio; 1 never binds on-policy.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        :class:`AWMStep`: ``loss``, ``log_likelihood``, ``noise``.

    Raises:
        ValueError: shapes do not fit, a setting is out of range, or ``proximity`` has no
            ``ref_model``.
        TypeError: the scheduler is of a kind that is not known, or a tensor is not floating point.

    Example:
        A model that predicts no movement, and rewards that prefer the first sample:

        >>> from types import SimpleNamespace
        >>> import torch
        >>> layer = torch.nn.Linear(2, 2)
        >>> model = lambda x, timestep, return_dict: (layer(x),)
        >>> config = SimpleNamespace(num_train_timesteps=1000)
        >>> scheduler = SimpleNamespace(config=config, scale_noise=None)
        >>> samples, advantages = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, -1.0])
        >>> step = awm_step(model, scheduler, samples, advantages, torch.tensor(500.0))
        >>> step.loss.backward()
        >>> step.loss.item(), layer.weight.grad.shape
        (0.0, torch.Size([2, 2]))

    Source: Xue et al. (2025), Sec. 4, arXiv:2509.25050.
    """
    check_floating(samples=samples, advantages=advantages, **given(noise=noise))
    check_range("proximity", proximity, at_least=0.0)
    if proximity and ref_model is None:
        raise ValueError("ref_model must be given with a proximity above 0, got None")
    noise = _noise_like(samples, noise, generator)
    at = read_schedule(scheduler, timesteps, samples)
    noised = (at.data * widen(samples) + at.noise * widen(noise)).to(samples.dtype)
    steps = timesteps.expand(len(samples))
    output = _predict("model", model, noised, steps, conditioning)
    target = target_of(at, widen(samples), widen(noise))
    score = awm_log_likelihood(
        widen(output), -target, torch.zeros_like(target), at.time, weighting=weighting, power=power
    )
    old = score if old_log_likelihood is None else old_log_likelihood
    loss = awm_loss(score, old, advantages, clip=clip, reduction=reduction)
    if proximity:
        with torch.no_grad():
            reference = _predict("ref_model", ref_model, noised, steps, conditioning)
        near = awm_proximity(widen(output), widen(reference), at.time, reduction=reduction)
        loss = loss + proximity * near
    return AWMStep(loss, score.detach(), noise)


def denoising_step(
    scheduler: Any,
    model_output: Tensor,
    timestep: float | Tensor,
    sample: Tensor,
    *,
    noise_level: float = 0.7,
    eta: float = 1.0,
    generator: torch.Generator | None = None,
    prev_sample: Tensor | None = None,
) -> DenoisingStep:
    """Take a stochastic step like ``scheduler.step`` and say how likely it was.

    A flow takes :func:`~steelyard.diffusion.flow_grpo_step`, another model
    :func:`~steelyard.diffusion.ddpo_step` (DDIM). The step ends at the next entry of
    ``scheduler.timesteps``.

    Args:
        scheduler: after ``set_timesteps``.
        model_output: ``[B, *D]``.
        timestep: one of ``scheduler.timesteps``, for the whole batch.
        sample: the input of the model, same shape.
        noise_level: of a flow, >= 0.
        eta: of the others, in [0, 1].
        generator: source of the noise when a sample is drawn.
        prev_sample: a stored one to be scored instead, same shape.

    Returns:
        ``x_prev``, ``mean``, ``std``, ``logprob [B]`` (mean over ``*D``).

    Raises:
        ValueError: the schedule does not hold ``timestep``, shapes do not fit, or the scheduler
            scales the model's input.
        TypeError: the scheduler is of another kind, or a tensor is not floating point.

    Example:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> config = SimpleNamespace(num_train_timesteps=1000)
        >>> timesteps = torch.tensor([1000.0, 500.0])
        >>> scheduler = SimpleNamespace(config=config, scale_noise=None, timesteps=timesteps)
        >>> velocity, sample = torch.ones(1, 2), torch.zeros(1, 2)
        >>> denoising_step(scheduler, velocity, 500.0, sample, noise_level=0.0).x_prev
        tensor([[-0.5000, -0.5000]])

    Source: Liu et al. (2025), Eq. 9, arXiv:2505.05470; Black et al. (2023), arXiv:2305.13301.
    """
    check_floating(model_output=model_output, sample=sample)
    check_same_shape(sample=sample, model_output=model_output)
    now, following = neighbours(scheduler, timestep)
    steps = torch.full((len(sample),), now, dtype=torch.float64, device=sample.device)
    at = read_schedule(scheduler, steps, sample)
    if at.prediction == "flow_prediction":
        last = 0.0 if following is None else following / scheduler.config.num_train_timesteps
        return flow_grpo_step(
            sample,
            model_output,
            at.time,
            torch.full_like(at.time, last),
            noise_level=noise_level,
            generator=generator,
            x_prev=prev_sample,
        )
    if float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0:
        raise ValueError(
            "scheduler must keep the variance of its samples, as DDIM does; "
            f"{type(scheduler).__name__} scales the model's input"
        )
    kept = scheduler.alphas_cumprod.double()
    final = torch.as_tensor(getattr(scheduler, "final_alpha_cumprod", 1.0))
    after = final if following is None else kept[int(following)]
    clean = clean_prediction(scheduler, model_output, sample, steps)
    eps = ((widen(sample) - at.data * widen(clean)) / at.noise).to(sample.dtype)
    pair = (float(kept[int(now)]), float(after))
    return ddpo_step(sample, eps, *pair, eta=eta, generator=generator, x_prev=prev_sample)


def f_distill_step(
    generated: Tensor,
    teacher: Model,
    fake: Model,
    scheduler: Any,
    timesteps: Tensor,
    log_ratio: Tensor,
    divergence: FDivergence,
    *,
    conditioning: Mapping[str, Any] | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    normalize: bool = True,
) -> Tensor:
    """Loss of a one-step student under any f-divergence from its teacher.

    Both denoisers look at the noised samples; their difference, weighted by
    :func:`~steelyard.diffusion.f_distill_weight`, is the student's gradient.

    Args:
        generated: samples of the student, ``[B, *D]``, with gradient.
        teacher: the pretrained model.
        fake: the model that follows the student.
        scheduler: of both models.
        timesteps: ``[B]`` or 0-d.
        log_ratio: log of teacher over student density, ``[B]``: a
            :class:`~steelyard.diffusion.RatioNormalizer` of a discriminator's logits at
            ``noised_samples(scheduler, generated, noise, timesteps)``.
        divergence: of :mod:`steelyard.divergences`.
        conditioning: further arguments of both models.
        noise: as ``generated``; ``None`` draws it.
        generator: source of that draw.
        normalize: divide the weights by their mean.

    Returns:
        0-d tensor; its gradient reaches ``generated`` only.

    Raises:
        ValueError: shapes do not fit.
        TypeError: the scheduler is of another kind, or a tensor is not floating point.

    Example:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> from steelyard.divergences import KL
        >>> config = SimpleNamespace(num_train_timesteps=1000)
        >>> scheduler = SimpleNamespace(config=config, scale_noise=None)
        >>> teacher, fake = (lambda x, timestep, return_dict, v=v: (x - v,) for v in (1.0, 2.0))
        >>> x, noise = torch.zeros(2, 1, requires_grad=True), torch.zeros(2, 1)
        >>> t, ratio = torch.tensor(500.0), torch.tensor([1.0, 3.0]).log()
        >>> f_distill_step(x, teacher, fake, scheduler, t, ratio, KL, noise=noise).backward()
        >>> x.grad  # three times the teacher's density, three times the pull
        tensor([[0.2500],
                [0.7500]])

    Source: Xu et al. (2025), Theorem 1, arXiv:2502.15681.
    """
    check_floating(generated=generated, log_ratio=log_ratio, **given(noise=noise))
    noise = _noise_like(generated, noise, generator)
    noised = noised_samples(scheduler, generated.detach(), noise, timesteps)
    steps = timesteps.expand(len(generated))
    with torch.no_grad():
        teacher_x0, fake_x0 = (
            clean_prediction(
                scheduler, _predict(name, model, noised, steps, conditioning), noised, steps
            )
            for name, model in (("teacher", teacher), ("fake", fake))
        )
    weight = f_distill_weight(log_ratio, divergence, normalize=normalize)
    return dmd_loss(generated, teacher_x0, fake_x0, weight=weight)


def _noise_like(samples: Tensor, noise: Tensor | None, generator: torch.Generator | None) -> Tensor:
    if noise is not None:
        check_same_shape(samples=samples, noise=noise)
        return noise
    return torch.randn(
        samples.shape, generator=generator, device=samples.device, dtype=samples.dtype
    )


def _predict(
    name: str,
    model: Model | None,
    noised: Tensor,
    timesteps: Tensor,
    conditioning: Mapping[str, Any] | None,
) -> Tensor:
    check_callable(**{name: model})
    assert model is not None
    output = model(noised, timestep=timesteps, return_dict=False, **(conditioning or {}))[0]
    if not isinstance(output, Tensor) or output.shape != noised.shape:
        found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"{name} must return the shape of the samples, {list(noised.shape)}, got {found} (one "
            "that predicts variances too must be wrapped to return its mean alone)"
        )
    return output
