"""Optimisers for scale-invariant weights: AdamP and SGDP, and the projection they are made of."""

from steelyard.optim.adamp import SGDP, AdamP
from steelyard.optim.projection import scale_invariance_score, tangent_project

__all__ = ["SGDP", "AdamP", "scale_invariance_score", "tangent_project"]
