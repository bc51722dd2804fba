"""Running normalisation of observations and rewards, with a state that can be stored."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from steelyard._checks import check_count, check_range
from steelyard.policy._arguments import check_array, check_lengths, check_rows

__all__ = ["ObservationNormalizer", "RewardNormalizer", "RunningMoments"]

_CLIP = 10.0
_EPS = 1e-8


class RunningMoments:
    """Mean and population variance of all rows seen, merged batch by batch in float64.

    Args:
        shape: of a row.

    Raises:
        TypeError: ``shape`` is no sequence of integers.
        ValueError: a negative length.

    Example:
        >>> import numpy as np
        >>> moments = RunningMoments(())
        >>> moments.update(np.array([1.0, 2.0]))
        >>> moments.update(np.array([3.0]))
        >>> float(moments.mean), round(float(moments.variance), 4)
        (2.0, 0.6667)
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        check_lengths("shape", shape)
        self.mean: NDArray[np.float64] = np.zeros(shape)
        self.variance: NDArray[np.float64] = np.ones(shape)
        self.count = 0

    def update(self, batch: NDArray[Any]) -> None:
        """Merge rows ``[B, *shape]``; no rows change nothing.

        Raises:
            TypeError: ``batch`` is no NumPy array of numbers.
            ValueError: its rows have another shape.

        Source: Chan, Golub, LeVeque (1979), parallel update of mean and variance.
        """
        check_rows("batch", batch, self.mean.shape)
        rows = len(batch)
        if rows == 0:
            return
        total = self.count + rows
        mean = batch.mean(0, dtype=np.float64)
        delta = mean - self.mean
        spread = np.square(batch - mean).mean(0)
        self.variance = (
            self.count * self.variance
            + rows * spread
            + np.square(delta) * (self.count * rows / total)
        ) / total
        self.mean = self.mean + delta * (rows / total)
        self.count = total

    def state_dict(self) -> dict[str, Any]:
        """Mean, variance and count."""
        return {
            "mean": torch.from_numpy(np.array(self.mean)),
            "variance": torch.from_numpy(np.array(self.variance)),
            "count": self.count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.mean = state["mean"].numpy().copy()
        self.variance = state["variance"].numpy().copy()
        self.count = state["count"]


class ObservationNormalizer(RunningMoments):
    """Shift and scale observations to mean 0 and variance 1, clipped to plus or minus 10.

    Example:
        >>> import numpy as np
        >>> normalizer = ObservationNormalizer((1,))
        >>> normalizer.update(np.array([[0.0], [2.0]]))
        >>> normalizer(np.array([[3.0]])).round(4)
        array([[2.]])
    """

    def update(self, batch: NDArray[Any]) -> None:
        """Merge rows ``[B, *shape]``."""
        super().update(batch)
        self._scale = 1 / np.sqrt(self.variance + _EPS)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        self._scale = 1 / np.sqrt(self.variance + _EPS)

    def __call__(self, observations: NDArray[Any]) -> NDArray[np.float64]:
        """Normalise rows with the moments so far.

        Raises:
            TypeError: ``observations`` is no NumPy array of numbers.
            ValueError: its rows have another shape.
        """
        check_array("observations", observations)
        shape = self.mean.shape
        if observations.shape[observations.ndim - len(shape) :] != shape:
            raise ValueError(
                f"observations must end in the shape {list(shape)}, got {list(observations.shape)}"
            )
        scaled = (observations - self.mean) * self._scale
        return np.clip(scaled, -_CLIP, _CLIP)


class RewardNormalizer:
    """Divide rewards by the deviation of the discounted return, clipped to plus or minus 10.

    Every temperature in reward units changes its meaning with this scale.

    Args:
        num_envs: B.
        gamma: discount of the running return, in [0, 1).

    Raises:
        TypeError: ``num_envs`` is not an integer, or ``gamma`` not a number.
        ValueError: either is out of range.

    Example:
        >>> import numpy as np
        >>> normalizer = RewardNormalizer(2, gamma=0.0)
        >>> for _ in range(3):
        ...     scaled = normalizer(np.array([0.0, 4.0]), np.array([False, False]))
        >>> scaled  # the deviation of {0, 4} is 2
        array([0., 2.])
    """

    def __init__(self, num_envs: int, *, gamma: float) -> None:
        check_count("num_envs", num_envs)
        check_range("gamma", gamma, at_least=0.0, below=1.0)
        self.gamma = gamma
        self.moments = RunningMoments(())
        self.running = np.zeros(num_envs)

    def __call__(
        self,
        rewards: NDArray[np.float64],
        done: NDArray[np.bool_],
        valid: NDArray[np.bool_] | None = None,
    ) -> NDArray[np.float64]:
        """Scale the rewards ``[B]`` of one step.

        Args:
            rewards: of this step.
            done: restarts a running return after it.
            valid: false where the step only reset an environment: left out of the moments.

        Raises:
            TypeError: ``rewards`` is no NumPy array of numbers, or another none of booleans.
            ValueError: an array is not ``[B]``.
        """
        _check_step("rewards", rewards, self.running, kinds="biuf")
        _check_step("done", done, self.running, kinds="b")
        if valid is not None:
            _check_step("valid", valid, self.running, kinds="b")
        self.running = self.running * self.gamma + rewards
        self.moments.update(self.running if valid is None else self.running[valid])
        self.running[done] = 0.0
        scaled: NDArray[np.float64] = rewards / np.sqrt(self.moments.variance + _EPS)
        return np.clip(scaled, -_CLIP, _CLIP)

    def state_dict(self) -> dict[str, Any]:
        """Moments and running returns."""
        return {
            "moments": self.moments.state_dict(),
            "running": torch.from_numpy(self.running.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.moments.load_state_dict(state["moments"])
        self.running = state["running"].numpy().copy()


def _check_step(name: str, array: NDArray[Any], like: NDArray[Any], *, kinds: str) -> None:
    """Require one value of each environment."""
    check_array(name, array, kinds=kinds)
    if array.shape != like.shape:
        raise ValueError(f"{name} must have shape {list(like.shape)}, got {list(array.shape)}")
