"""Numbers and laws as this package takes them: floats or tensors in, float64 inside."""

import torch
from torch import Tensor

from steelyard._checks import check_floating, check_not_empty

Number = float | Tensor

# A law may miss a total of 1 by this many square roots of its dtype's rounding unit.
_LAW_TOLERANCE = 8.0


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on the one device type that has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def widen(tensor: Tensor) -> Tensor:
    """Convert a floating tensor to the wide dtype of its device."""
    return tensor.to(wide_dtype(tensor.device))


def as_wide(**numbers: Number) -> list[Tensor]:
    """Convert floats and floating tensors to wide tensors on the device of the tensors."""
    device = next((x.device for x in numbers.values() if isinstance(x, Tensor)), None)
    wide = torch.float64 if device is None else wide_dtype(device)
    converted = []
    for name, number in numbers.items():
        if isinstance(number, Tensor):
            check_floating(**{name: number})
        elif isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{name} must be a number or a tensor, got {type(number).__name__}")
        converted.append(torch.as_tensor(number, dtype=wide, device=device))
    return converted


def broadcast(*tensors: Tensor) -> list[Tensor]:
    """Expand tensors to their common shape."""
    shapes = [x.shape for x in tensors]
    shape = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    return [x.expand(shape) for x in tensors]


def narrow_dtype(*numbers: Number) -> torch.dtype:
    """Return the dtype of results: that of the tensors given, float64 for plain floats."""
    given = [x.dtype for x in numbers if isinstance(x, Tensor)]
    dtype = given[0] if given else torch.float64
    for other in given[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype


def check_values(name: str, tensor: Tensor, *, above: float | None = None, at_least: float) -> None:
    """Require every element in a half-line; NaN never fits. Reads the values."""
    fits = tensor >= at_least if above is None else tensor > above
    if not bool(fits.all()):
        limit = f">= {at_least:g}" if above is None else f"> {above:g}"
        raise ValueError(f"{name} must be {limit} everywhere, got {tensor[~fits][0].item():g}")


def check_law(name: str, probs: Tensor) -> None:
    """Require non-negative numbers whose last dimension sums to 1. Reads the values."""
    check_floating(**{name: probs})
    check_not_empty(name, probs)
    check_values(name, probs, at_least=0.0)
    tolerance = _LAW_TOLERANCE * torch.finfo(probs.dtype).eps ** 0.5
    totals = widen(probs.detach()).sum(-1)
    off = (totals - 1).abs() > tolerance
    if bool(off.any()):
        raise ValueError(f"{name} must sum to 1, got {totals[off].flatten()[0].item():g}")
