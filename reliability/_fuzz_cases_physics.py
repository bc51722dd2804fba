"""Valid calls of the equivariant networks and of equilibrium propagation."""

# ruff: noqa: C408 - a case reads like the call it stands for

import torch

from _fuzz_values import classes, generator, integers, positive, real
from steelyard import equilibrium, equivariant

EDGES = ((0, 1, 2, 0), (1, 2, 0, 2))


def edges():
    """Four edges among three nodes."""
    return torch.tensor(EDGES)


def geometry():
    """The geometry of those edges for a model without orientations."""
    from steelyard.equivariant.layers import Geometry

    return Geometry(edges(), real(4, 1, 8), None, None)


def convolution():
    """A convolution over positions."""
    return equivariant.BundleConvolution(4, 8, fiber=False, receiver=False).double()


def block():
    """A block over positions."""
    return equivariant.PonitaBlock(
        4, 8, fiber=False, receiver=False, widening=2, layer_scale=0.1
    ).double()


def ponita():
    """A small equivariant network."""
    torch.manual_seed(0)
    return equivariant.Ponita(1, 1, 4, 1, 1, 1, orientations=4, basis=4).double()


def molecule(**more):
    """Three points with a scalar and a vector each."""
    inputs = dict(pos=real(3, 3), x=real(3, 1), vec=real(3, 1, 3, shift=1))
    return inputs | dict(edge_index=edges(), batch=integers(0, 0, 0)) | more


def particles(**more):
    """Two systems of three charged particles."""
    charge = torch.tensor([1.0, -1.0, 1.0]).double().repeat(2, 1)
    physics = equivariant.ChargedParticles()
    return dict(self_=physics, pos=real(2, 3, 3), vel=real(2, 3, 3, shift=1), charge=charge) | more


def still_particles():
    """Positions and charges only."""
    return {key: value for key, value in particles().items() if key != "vel"}


def directions():
    """Four unit vectors in space."""
    return torch.nn.functional.normalize(real(4, 3), dim=-1)


EQUIVARIANT = {
    "equivariant.BundleConvolution": lambda: dict(hidden=4, basis=8, fiber=False, receiver=False),
    "equivariant.BundleConvolution.forward": lambda: dict(
        self_=convolution(), x=real(3, 1, 4), geometry=geometry()
    ),
    "equivariant.BundleConvolution.calibrate": lambda: dict(
        self_=convolution(), x=real(3, 1, 4), geometry=geometry()
    ),
    "equivariant.ChargedParticles": lambda: dict(clamp=100.0),
    "equivariant.ChargedParticles.force": still_particles,
    "equivariant.ChargedParticles.energy": particles,
    "equivariant.ChargedParticles.advance": lambda: particles(steps=2),
    "equivariant.ChargedParticles.frames": lambda: particles(count=2, every=2),
    "equivariant.ChargedParticles.sample": lambda: dict(
        self_=equivariant.ChargedParticles(), systems=2, particles=3, generator=generator()
    ),
    "equivariant.KernelBasis": lambda: dict(attributes=3, hidden=4, basis=8, degree=2),
    "equivariant.KernelBasis.forward": lambda: dict(
        self_=equivariant.KernelBasis(3, 4, 8, 2).double(), attributes=real(5, 3)
    ),
    "equivariant.Ponita": lambda: dict(
        in_scalars=1,
        in_vectors=1,
        hidden=4,
        layers=1,
        out_scalars=1,
        out_vectors=1,
        orientations=4,
        basis=4,
        radius=2.0,
    ),
    "equivariant.Ponita.forward": lambda: molecule(self_=ponita()),
    "equivariant.Ponita.calibrate": lambda: molecule(self_=ponita()),
    "equivariant.Ponita.parameter_groups": lambda: dict(self_=ponita(), weight_decay=0.1),
    "equivariant.PonitaBlock": lambda: dict(
        hidden=4, basis=8, fiber=False, receiver=False, widening=2, layer_scale=0.1
    ),
    "equivariant.PonitaBlock.forward": lambda: dict(
        self_=block(), x=real(3, 1, 4), geometry=geometry()
    ),
    "equivariant.convnext_residual": lambda: dict(
        conv_out=real(3, 4),
        block_in=real(3, 4, shift=1),
        w1=real(8, 4),
        b1=real(8),
        w2=real(4, 8),
        b2=real(4),
        norm_weight=positive(4),
        norm_bias=real(4, shift=2),
        layer_scale=positive(4, shift=1),
    ),
    "equivariant.invariant_attributes": lambda: dict(
        pos=real(3, 3), ori=directions()[:3], edge_index=edges()
    ),
    "equivariant.lift_tensor": lambda: dict(A=real(2, 3, 3), grid=directions()),
    "equivariant.lift_vector": lambda: dict(v=real(2, 3), grid=directions()),
    "equivariant.read_tensor": lambda: dict(c=real(2, 4), grid=directions()),
    "equivariant.read_vector": lambda: dict(c=real(2, 4), grid=directions()),
    "equivariant.orientation_grid": lambda: dict(count=12, kind="icosahedron"),
    "equivariant.polynomial_cutoff": lambda: dict(r=positive(4), r_max=1.5),
    "equivariant.polynomial_features": lambda: dict(x=real(4, 2), degree=2),
    "equivariant.radius_graph": lambda: dict(
        pos=real(4, 3), radius=1.0, batch=integers(0, 0, 1, 1)
    ),
    "equivariant.separable_convolution": lambda: dict(
        x=real(3, 2, 4),
        spatial_kernel=real(4, 2, 4),
        fiber_kernel=real(2, 2, 4),
        edge_index=edges(),
    ),
}


def contraction(u):
    """A field with one fixed point."""
    return 0.3 * torch.tanh(u.flip(-1)) + 0.5 - u


def settled():
    """Its zero."""
    return equilibrium.fixed_point(contraction, torch.zeros(2, dtype=torch.float64))


def network():
    """A network of two units."""
    weight = torch.tensor([[0.0, 0.4], [0.3, 0.0]]).double()
    eye = torch.eye(2).double()
    return equilibrium.EquilibriumNetwork(weight, real(2), eye, readout_bias=real(2))


def states(**more):
    """Two settled states of that network."""
    drive = real(2, 2)
    model = network()
    return dict(self_=model, u=model.settle(drive).detach(), drive=drive, target=classes(2)) | more


EQUILIBRIUM = {
    "equilibrium.EquilibriumNetwork": lambda: dict(
        weight=real(2, 2) / 4,
        bias=real(2),
        readout=real(2, 2),
        readout_bias=real(2),
        mask=1.0 - torch.eye(2).double(),
    ),
    "equilibrium.EquilibriumNetwork.field": lambda: dict(
        self_=network(), u=real(2, 2), drive=real(2, 2, shift=1)
    ),
    "equilibrium.EquilibriumNetwork.settle": lambda: dict(self_=network(), drive=real(2, 2)),
    "equilibrium.EquilibriumNetwork.logits": lambda: dict(self_=network(), u=real(2, 2)),
    "equilibrium.EquilibriumNetwork.loss": lambda: dict(
        self_=network(), u=real(2, 2), target=classes(2)
    ),
    "equilibrium.EquilibriumNetwork.error_vectors": states,
    "equilibrium.EquilibriumNetwork.gradients": states,
    "equilibrium.dsilu": lambda: dict(z=real(4)),
    "equilibrium.holomorphic_sigmoid": lambda: dict(z=real(4)),
    "equilibrium.error_vector": lambda: dict(
        field=contraction, loss_gradient=lambda r: r - 0.25, u=settled()
    ),
    "equilibrium.feedback_angle": lambda: dict(forward=real(3, 2), feedback=real(2, 3, shift=1)),
    "equilibrium.rotated_feedback": lambda: dict(
        forward=real(3, 2), random=real(2, 3, shift=1), alpha=30.0
    ),
    "equilibrium.fixed_point": lambda: dict(
        field=contraction, start=torch.zeros(2, dtype=torch.float64)
    ),
    "equilibrium.relax": lambda: dict(field=contraction, start=torch.zeros(2, dtype=torch.float64)),
    "equilibrium.homeostatic_loss": lambda: dict(field=contraction, u=settled(), probes=real(3, 2)),
    "equilibrium.symmetry_measure": lambda: dict(jacobian=real(3, 3)),
}

CASES = {**EQUIVARIANT, **EQUILIBRIUM}
SLOW = {"equivariant.Ponita", "equilibrium.EquilibriumNetwork.error_vectors"}
