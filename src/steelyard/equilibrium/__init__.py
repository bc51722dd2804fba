"""Equilibrium propagation: gradients of a network at rest, with and without symmetric weights."""

from steelyard.equilibrium.activations import dsilu, holomorphic_sigmoid
from steelyard.equilibrium.fixed_points import fixed_point, relax
from steelyard.equilibrium.network import EquilibriumGradients, EquilibriumNetwork
from steelyard.equilibrium.propagation import error_vector
from steelyard.equilibrium.symmetry import (
    feedback_angle,
    homeostatic_loss,
    rotated_feedback,
    symmetry_measure,
)

__all__ = [
    "EquilibriumGradients",
    "EquilibriumNetwork",
    "dsilu",
    "error_vector",
    "feedback_angle",
    "fixed_point",
    "holomorphic_sigmoid",
    "homeostatic_loss",
    "relax",
    "rotated_feedback",
    "symmetry_measure",
]
