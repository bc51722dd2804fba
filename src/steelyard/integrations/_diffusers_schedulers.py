"""What a scheduler of Hugging Face Diffusers says of noise, time and what its model predicts."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from steelyard._checks import check_floating, check_range, check_same_shape, check_shape
from steelyard._reduce import widen

__all__ = ["clean_prediction", "neighbours", "noised_samples", "read_schedule", "target_of"]

_PREDICTIONS = ("epsilon", "sample", "v_prediction")


class Schedule(NamedTuple):
    """Shares of data and noise in a noised sample, as columns, and the flow's time ``[B]``."""

    data: Tensor
    noise: Tensor
    time: Tensor
    prediction: str


def noised_samples(scheduler: Any, samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    r"""Noise clean samples as the scheduler's model saw them in its training.

    Args:
        scheduler: a flow-matching scheduler, or one with ``alphas_cumprod``.
        samples: clean, ``[B, *D]``.
        noise: same shape.
        timesteps: ``[B]`` or 0-d, in the scheduler's units; flows take any number in between.

    Returns:
        :math:`(1 - t)\,x + t\,\epsilon` or
        :math:`\sqrt{\bar\alpha}\,x + \sqrt{1 - \bar\alpha}\,\epsilon`, dtype of ``samples``.

    Raises:
        ValueError: shapes do not fit, or a prediction type is not known.
        TypeError: the scheduler is of another kind, or a tensor is not floating point.

    Example:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> config = SimpleNamespace(num_train_timesteps=1000)
        >>> scheduler = SimpleNamespace(config=config, scale_noise=None)  # what marks a flow
        >>> noised_samples(scheduler, torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([250.0]))
        tensor([[0.7500, 0.7500]])

    Source: Ho et al. (2020), Eq. 4, arXiv:2006.11239; Liu et al. (2022),
    arXiv:2209.03003.
    """
    check_floating(samples=samples, noise=noise)
    check_same_shape(samples=samples, noise=noise)
    at = read_schedule(scheduler, timesteps, samples)
    return (at.data * widen(samples) + at.noise * widen(noise)).to(samples.dtype)


def clean_prediction(
    scheduler: Any, model_output: Tensor, noised: Tensor, timesteps: Tensor
) -> Tensor:
    """Turn a model's output, whatever it predicts, into its estimate of the clean sample.

    Args:
        scheduler: tells what the model predicts: a flow's velocity, ``"epsilon"``, ``"sample"`` or
            ``"v_prediction"``.
        model_output: ``[B, *D]``.
        noised: input of the model, same shape.
        timesteps: ``[B]`` or 0-d.

    Returns:
        ``[B, *D]``, dtype of ``model_output``.

    Raises:
        ValueError: shapes do not fit, or a prediction type is not known.
        TypeError: the scheduler is of another kind, or a tensor is not floating point.

    Example:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> config = SimpleNamespace(num_train_timesteps=1000)
        >>> scheduler = SimpleNamespace(config=config, scale_noise=None)
        >>> velocity, noised = torch.full((1, 2), 2.0), torch.ones(1, 2)
        >>> clean_prediction(scheduler, velocity, noised, torch.tensor([250.0]))
        tensor([[0.5000, 0.5000]])

    Source: Ho et al. (2020), arXiv:2006.11239; Salimans and Ho (2022), arXiv:2202.00512, for ``v``.
    """
    check_floating(model_output=model_output, noised=noised)
    check_same_shape(noised=noised, model_output=model_output)
    at = read_schedule(scheduler, timesteps, noised)
    output, x = widen(model_output), widen(noised)
    if at.prediction == "flow_prediction":
        clean = x - at.noise * output
    elif at.prediction == "epsilon":
        clean = (x - at.noise * output) / at.data
    elif at.prediction == "v_prediction":
        clean = at.data * x - at.noise * output
    else:
        clean = output
    return clean.to(model_output.dtype)


def neighbours(scheduler: Any, timestep: float | Tensor) -> tuple[float, float | None]:
    """Return a timestep of the schedule and the one after it; ``None`` after the last."""
    if isinstance(timestep, Tensor):
        check_shape("timestep", timestep, ())
    check_range("timestep", timestep)  # type: ignore[arg-type]
    schedule = torch.as_tensor(getattr(scheduler, "timesteps", ())).tolist()
    places = [i for i, each in enumerate(schedule) if abs(each - float(timestep)) < 1e-3]
    if not places:
        raise ValueError(
            f"timestep must be one of scheduler.timesteps, {schedule}, got {float(timestep)}"
        )
    after = schedule[places[-1] + 1 :]
    return float(schedule[places[-1]]), float(after[0]) if after else None


def read_schedule(scheduler: Any, timesteps: Tensor, like: Tensor) -> Schedule:
    """Read what a scheduler says of timesteps, in the precision of the samples or float32."""
    if not isinstance(timesteps, Tensor):
        raise TypeError(f"timesteps must be a torch.Tensor, got {type(timesteps).__name__}")
    if timesteps.dim():
        check_shape("timesteps", timesteps, (like.shape[0],))
    config = getattr(scheduler, "config", None)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    steps = timesteps.to(like.device).expand(like.shape[0])
    if config is not None and hasattr(scheduler, "scale_noise"):
        prediction = "flow_prediction"
        noise = steps.to(widen(like).dtype) / config.num_train_timesteps
        data, time = 1 - noise, noise
    elif config is not None and isinstance(alphas, Tensor):
        prediction = config.prediction_type
        if prediction not in _PREDICTIONS:  # such as a solver that is set to a flow's sigmas
            raise ValueError(
                f"scheduler must predict one of {_PREDICTIONS} by alphas_cumprod, got {prediction}"
            )
        kept = alphas.to(like.device, torch.float64)[steps.long()]
        data, noise = kept.sqrt(), (1 - kept).sqrt()
        time = noise / (data + noise)
    else:
        raise TypeError(
            "scheduler must be a flow-matching one or have alphas_cumprod, got "
            f"{type(scheduler).__name__}"
        )
    shape = (-1, *[1] * (like.dim() - 1))
    data, noise, time = (each.to(widen(like).dtype) for each in (data, noise, time))
    return Schedule(data.reshape(shape), noise.reshape(shape), time, prediction)


def target_of(at: Schedule, clean: Tensor, noise: Tensor) -> Tensor:
    """Return what the model was trained to predict."""
    if at.prediction == "flow_prediction":
        return noise - clean
    if at.prediction == "epsilon":
        return noise
    return at.data * noise - at.noise * clean if at.prediction == "v_prediction" else clean
