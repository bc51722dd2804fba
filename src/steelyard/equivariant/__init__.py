"""Equivariant networks on point clouds: PONITA, its parts, and physics to learn from."""

from steelyard.equivariant.attributes import (
    invariant_attributes,
    polynomial_cutoff,
    polynomial_features,
    radius_graph,
)
from steelyard.equivariant.charged_particles import (
    ChargedParticles,
    ParticleState,
    ParticleSystems,
)
from steelyard.equivariant.grids import (
    lift_tensor,
    lift_vector,
    orientation_grid,
    read_tensor,
    read_vector,
)
from steelyard.equivariant.layers import (
    BundleConvolution,
    Geometry,
    KernelBasis,
    PonitaBlock,
    convnext_residual,
    separable_convolution,
)
from steelyard.equivariant.ponita import Ponita, PonitaOutput

__all__ = [
    "BundleConvolution",
    "ChargedParticles",
    "Geometry",
    "KernelBasis",
    "ParticleState",
    "ParticleSystems",
    "Ponita",
    "PonitaBlock",
    "PonitaOutput",
    "convnext_residual",
    "invariant_attributes",
    "lift_tensor",
    "lift_vector",
    "orientation_grid",
    "polynomial_cutoff",
    "polynomial_features",
    "radius_graph",
    "read_tensor",
    "read_vector",
    "separable_convolution",
]
