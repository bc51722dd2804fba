r"""Charged particles in free space: exact physics to learn from.

Source: Kipf et al. (2018), Neural Relational Inference, arXiv:1802.04687, as used by Satorras et
al. (2021), arXiv:2102.09844, and Bekkers et al. (2024), arXiv:2310.02970.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from steelyard._checks import (
    check_count,
    check_floating,
    check_not_empty,
    check_range,
    check_same_shape,
    check_shape,
)

__all__ = ["ChargedParticles", "ParticleState", "ParticleSystems"]

INITIAL_SPEED = 0.5


class ParticleState(NamedTuple):
    """Positions and velocities, each ``[.., n, d]``."""

    pos: Tensor
    vel: Tensor


class ParticleSystems(NamedTuple):
    """What :meth:`ChargedParticles.sample` draws: ``[S, n, d]``, ``[S, n, d]`` and ``[S, n]``."""

    pos: Tensor
    vel: Tensor
    charge: Tensor


@dataclass(frozen=True)
class ChargedParticles:
    r"""Particles of unit mass that attract and repel by Coulomb's law.

    .. math:: F_i = \sum_{j \ne i} q_i q_j \frac{x_i - x_j}{\lVert x_i - x_j \rVert^3}

    Every method is vectorised over the leading dimensions.

    Args:
        dt: time step, > 0.
        clamp: each *component* of a force is kept within plus and minus this; ``None`` = off. The
            clamp bounds close encounters; where it acts, momentum is not conserved and a rotated
            start does not give the rotated path.

    Raises:
        ValueError: a setting out of range.

    Example:
        Opposite charges at distance 2 attract with force 1/4; a step conserves momentum:

        >>> import torch
        >>> pos, charge = torch.tensor([[0.0, 0, 0], [2.0, 0, 0]]), torch.tensor([1.0, -1.0])
        >>> physics = ChargedParticles()
        >>> physics.force(pos, charge)[:, 0]
        tensor([ 0.2500, -0.2500])
        >>> physics.advance(pos, torch.zeros(2, 3), charge, 10).vel.sum(0)
        tensor([0., 0., 0.])

    Source: Kipf et al. (2018), arXiv:1802.04687.
    """

    dt: float = 1e-3
    clamp: float | None = 100.0

    def __post_init__(self) -> None:
        check_range("dt", self.dt, above=0.0)
        if self.clamp is not None:
            check_range("clamp", self.clamp, above=0.0)

    def force(self, pos: Tensor, charge: Tensor) -> Tensor:
        """Force on each particle.

        Args:
            pos: ``[.., n, d]``.
            charge: ``[.., n]``.

        Returns:
            ``[.., n, d]``; two particles at one point exert no force on each other.

        Raises:
            ValueError: shapes that do not fit. TypeError: not floating point.
        """
        _check_particles(pos, charge)
        difference = pos[..., :, None, :] - pos[..., None, :, :]
        squared = difference.square().sum(-1)
        apart = squared > 0
        inverse = torch.where(apart, torch.where(apart, squared, 1.0) ** -1.5, 0.0)
        strength = charge[..., :, None] * charge[..., None, :] * inverse
        force = (strength[..., None] * difference).sum(-2)
        return force if self.clamp is None else force.clamp(-self.clamp, self.clamp)

    def energy(self, pos: Tensor, vel: Tensor, charge: Tensor) -> Tensor:
        r"""Kinetic and potential energy of each system.

        .. math::
            \tfrac12 \sum_i \lVert v_i \rVert^2 +
            \sum_{i < j} \frac{q_i q_j}{\lVert x_i - x_j \rVert}

        Args:
            pos: ``[.., n, d]``.
            vel: ``[.., n, d]``.
            charge: ``[.., n]``.

        Returns:
            ``[..]``; a pair at one point is left out.

        Raises:
            ValueError: shapes that do not fit. TypeError: not floating point.
        """
        _check_particles(pos, charge)
        check_floating(vel=vel)
        check_same_shape(pos=pos, vel=vel)
        squared = (pos[..., :, None, :] - pos[..., None, :, :]).square().sum(-1)
        same = squared == 0  # and not "> 0", which would hide a NaN
        inverse = torch.where(same, 0.0, torch.where(same, 1.0, squared).rsqrt())
        pairs = charge[..., :, None] * charge[..., None, :] * inverse
        return 0.5 * vel.square().sum((-2, -1)) + 0.5 * pairs.sum((-2, -1))

    def advance(
        self, pos: Tensor, vel: Tensor, charge: Tensor, steps: int, *, kick: bool = True
    ) -> ParticleState:
        r"""Move the particles: once ``v += dt F``, then each step ``x += dt v; v += dt F``.

        After the first kick velocities run half a step ahead (symplectic Euler), so a path that is
        continued must not be kicked again: ``advance(a)`` and then ``advance(b, kick=False)`` is
        ``advance(a + b)``.

        Args:
            pos: ``[.., n, d]``; not changed in place.
            vel: ``[.., n, d]``.
            charge: ``[.., n]``.
            steps: >= 0.
            kick: whether to do the first velocity update.

        Returns:
            ``pos`` and ``vel`` after the last step, its velocity update included.

        Raises:
            ValueError: shapes that do not fit, or ``steps`` < 0. TypeError: not floating point.
        """
        _check_particles(pos, charge)
        check_floating(vel=vel)
        check_same_shape(pos=pos, vel=vel)
        check_count("steps", steps, at_least=0)
        if kick:
            vel = vel + self.dt * self.force(pos, charge)
        for _ in range(steps):
            pos = pos + self.dt * vel
            vel = vel + self.dt * self.force(pos, charge)
        return ParticleState(pos, vel)

    def frames(
        self, pos: Tensor, vel: Tensor, charge: Tensor, count: int, *, every: int = 100
    ) -> ParticleState:
        """Record a path as the published data set does.

        Frame ``k`` is the state after ``every * (k + 1)`` steps, the velocity of a frame being
        the one that carried the particles there (before the update at that place).

        Args:
            pos: ``[.., n, d]``.
            vel: ``[.., n, d]``.
            charge: ``[.., n]``.
            count: number of frames, >= 1.
            every: steps from frame to frame, >= 1.

        Returns:
            ``pos`` and ``vel``, each ``[count, .., n, d]``.

        Raises:
            ValueError: shapes that do not fit, ``count`` or ``every`` < 1.
        """
        check_count("count", count)
        check_count("every", every)
        positions, velocities = [], []
        for k in range(count):
            before = self.advance(pos, vel, charge, every - 1, kick=k == 0)
            pos, vel = before.pos + self.dt * before.vel, before.vel
            positions.append(pos)
            velocities.append(vel)
            vel = vel + self.dt * self.force(pos, charge)
        return ParticleState(torch.stack(positions), torch.stack(velocities))

    def sample(
        self,
        systems: int,
        particles: int = 5,
        generator: torch.Generator | None = None,
        *,
        dim: int = 3,
        dtype: torch.dtype | None = None,
    ) -> ParticleSystems:
        """Draw systems: Gaussian positions, speeds of 0.5, charges of either sign alike.

        Positions have standard deviation ``(particles / 5) ** (1/3)``, which keeps the density.

        Args:
            systems: number ``S``, >= 1.
            particles: number ``n`` in each, >= 1.
            generator: source of randomness; ``None`` = the global one.
            dim: of space, >= 1.
            dtype: ``None`` = the default one.

        Returns:
            ``pos [S, n, d]``, ``vel [S, n, d]``, ``charge [S, n]``, on the generator's device.

        Raises:
            ValueError: a number < 1.
        """
        for name, value in (("systems", systems), ("particles", particles), ("dim", dim)):
            check_count(name, value)
        device = None if generator is None else generator.device
        shape = (systems, particles, dim)
        pos = torch.randn(shape, generator=generator, dtype=dtype, device=device)
        vel = torch.randn(shape, generator=generator, dtype=dtype, device=device)
        sign = torch.randint(0, 2, shape[:2], generator=generator, device=device)
        return ParticleSystems(
            pos * (particles / 5) ** (1 / 3),
            vel * (INITIAL_SPEED / vel.norm(dim=-1, keepdim=True)),
            (2 * sign - 1).to(pos.dtype),
        )


def _check_particles(pos: Tensor, charge: Tensor) -> None:
    check_floating(pos=pos, charge=charge)
    if pos.dim() < 2:
        raise ValueError(f"pos must have shape [.., n, d], got {list(pos.shape)}")
    check_not_empty("pos", pos)
    check_shape("charge", charge, tuple(pos.shape[:-1]))
