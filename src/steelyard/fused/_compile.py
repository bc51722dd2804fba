"""Keep ``torch.compile`` out of the blocked loops."""

from collections.abc import Callable
from typing import Any

import torch
from torch._compile import _disable_dynamo


def run_eagerly(function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function``; a compiled caller breaks its graph here and goes on afterwards.

    Traced, the loop over blocks would be unrolled and its buffers made whole again. The indirection
    exists because ``torch.compiler.disable`` imports the compiler, a second or two, at once.
    """
    if torch.compiler.is_compiling():
        return _untraced(function, *args)
    return function(*args)


@_disable_dynamo
def _untraced(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)
