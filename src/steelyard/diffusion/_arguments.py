"""Argument checks of samplers and measures, which may look at values as losses may not."""

from torch import Tensor


def check_no_nan(name: str, tensor: Tensor) -> None:
    """Require a tensor without NaN."""
    if bool(tensor.isnan().any()):
        raise ValueError(f"{name} must not contain NaN")
