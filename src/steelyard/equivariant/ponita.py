r"""PONITA: a message-passing network on positions and directions, equivariant to rigid motions.

Each point carries features on a grid of directions; kernels depend on invariants of pairs of
(position, direction) only, so that a turned cloud is treated as the cloud. Ordinary linear layers
and gathers, no spherical harmonics and no compiled companion.

Source: Bekkers, Vadgama, Hesselink, van der Linden, Romero (2024), Fast, Expressive SE(n)
Equivariant Networks through Weight-Sharing in Position-Orientation Space, arXiv:2310.02970.
"""

import warnings
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from steelyard._checks import (
    check_choice,
    check_count,
    check_floating,
    check_range,
    check_shape,
    given,
)
from steelyard.equivariant._elements import Elements, count_of, lift, mean_at, pairs_of_elements
from steelyard.equivariant.attributes import (
    Invariants,
    check_batch,
    check_edge_index,
    check_points,
    fiber_attributes,
    invariant_attributes,
    polynomial_cutoff,
    radius_graph,
    safe_norm,
    spatial_attributes,
)
from steelyard.equivariant.grids import orientation_grid
from steelyard.equivariant.layers import Geometry, KernelBasis, PonitaBlock

__all__ = ["Ponita", "PonitaOutput"]

Pool = Literal["none", "sum", "mean"]
# Under the root of a length, so that forces have bounded derivatives at self-loops.
NORM_SMOOTHING = 1e-12


class PonitaOutput(NamedTuple):
    """What a network returns: scalars ``[P, S]`` and vectors ``[P, V, n]``, or ``None``.

    With pooling the first dimension is the number of clouds.
    """

    scalar: Tensor | None
    vector: Tensor | None


class _Edges(NamedTuple):
    pairs: Tensor
    """``[2, E]``, ending with one self-loop for each point."""
    counts: Tensor
    """``[E]``: 0 for a self-loop that the caller had given, which would count twice; else 1."""


class Ponita(nn.Module):
    r"""Map clouds of points with scalars and vectors to scalars and vectors.

    For a rigid motion, :math:`x \mapsto R x + t` and :math:`v \mapsto R v`, scalar outputs stay and
    vector outputs turn:

    .. math:: \Phi(R x + t, s, R v) = \bigl(\Phi_s,\ R\, \Phi_v\bigr)(x, s, v)

    *exactly* for every translation and permutation of points, for rotations that permute the grid
    of directions (60 of them for 12 or 20 in space, ``O`` for ``O`` in the plane), for every
    rotation with ``orientations="edges"`` or 0; up to an error that falls with ``O`` otherwise.

    ================ ==============================================================================
    ``orientations`` features live on
    ================ ==============================================================================
    ``O > 0``        points times a grid of ``O`` directions, memory ``P O C``
    ``0``            points; distances only, no vectors in or out
    ``"edges"``      the directions of incoming edges, memory ``E C`` and pairs of edges; points
                     without an edge get 0
    ================ ==============================================================================

    Args:
        in_scalars: scalars of each point, >= 0; ``in_scalars + in_vectors`` >= 1.
        in_vectors: vectors of each point, >= 0.
        hidden: channels ``C``.
        layers: number of blocks, >= 1.
        out_scalars: >= 0; ``out_scalars + out_vectors`` >= 1.
        out_vectors: >= 0.
        dim: 2 or 3.
        orientations: see the table.
        invariants: ``"paper"`` or ``"complete"``. In space a separable kernel sees the direction
            of the sender against the edge, not that of the receiver; ``"complete"`` gives it a
            third factor that does, at ``E O^2 C`` operations.
        basis: functions ``B`` that the kernels are combined from; ``None`` = ``2 * hidden``.
        degree: of the polynomials of the invariants.
        radius: cut-off: edges are built within it, and kernels fade to 0 there. ``None`` = all
            pairs of a cloud, no fading.
        envelope_exponent: ``p`` of :func:`polynomial_cutoff`.
        widening: width of the blocks' network over ``hidden``.
        layer_scale: start of the learned scale of a block; ``None`` = no scale.
        separable: false = one kernel of all invariants, ``[E, O, O, C]``: for small clouds.
        grid_kind: see :func:`orientation_grid`.
        pool: over the points of a cloud: ``"none"``, ``"sum"`` or ``"mean"``.

    Raises:
        ValueError: a setting out of range; vectors in or out with ``orientations=0``.

    Example:
        A third of a turn that permutes the grid turns the output with the input:

        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = Ponita(1, 0, 8, 2, 1, 1, layer_scale=None).double()
        >>> pos, x = torch.randn(5, 3).double(), torch.randn(5, 1).double()
        >>> turn = torch.eye(3).double()[[2, 0, 1]]
        >>> scalar, vector = model(pos, x)
        >>> turned_scalar, turned_vector = model(pos @ turn.T + 7, x)
        >>> torch.allclose(turned_scalar, scalar), torch.allclose(turned_vector, vector @ turn.T)
        (True, True)

    Source: Bekkers et al. (2024), arXiv:2310.02970; defaults of its N-body experiment, with an
    icosahedron in place of 16 repelled directions. Complete invariants: Bellaard et al. (2025),
    arXiv:2504.03299; their separable form is ours.
    """

    def __init__(
        self,
        in_scalars: int,
        in_vectors: int,
        hidden: int,
        layers: int,
        out_scalars: int,
        out_vectors: int,
        *,
        dim: int = 3,
        orientations: int | Literal["edges"] = 12,
        invariants: Invariants = "paper",
        basis: int | None = None,
        degree: int = 3,
        radius: float | None = None,
        envelope_exponent: int = 6,
        widening: int = 4,
        layer_scale: float | None = 1e-6,
        separable: bool = True,
        grid_kind: str | None = None,
        pool: Pool = "none",
    ) -> None:
        super().__init__()
        basis = 2 * hidden if basis is None else basis
        _check_counts(in_scalars, in_vectors, out_scalars, out_vectors, orientations)
        positive = {"hidden": hidden, "layers": layers, "basis": basis, "degree": degree}
        for name, value in {**positive, "widening": widening}.items():
            check_count(name, value)
        check_choice("dim", dim, (2, 3))
        check_choice("invariants", invariants, ("paper", "complete"))
        check_choice("pool", pool, ("none", "sum", "mean"))
        check_count("envelope_exponent", envelope_exponent)
        if radius is not None:
            check_range("radius", radius, above=0.0)
        self.in_scalars, self.in_vectors = in_scalars, in_vectors
        self.out_scalars, self.out_vectors = out_scalars, out_vectors
        self.dim, self.orientations, self.invariants = dim, orientations, invariants
        self.radius, self.envelope_exponent, self.pool = radius, envelope_exponent, pool
        self._register_grid(grid_kind)
        # Elements of their own, one direction each, instead of points with a whole grid.
        self._bundle = separable and isinstance(orientations, int) and orientations > 0
        third = self._bundle and invariants == "complete" and dim == 3
        if self._bundle:
            fiber_count = 2 if invariants == "complete" and dim == 2 else 1
            self.spatial_basis = KernelBasis(2, hidden, basis, degree)
            self.fiber_basis = KernelBasis(fiber_count, hidden, basis, degree)
        else:
            pair_count = 1 if orientations == 0 else 3 + (invariants == "complete")
            self.spatial_basis = KernelBasis(pair_count, hidden, basis, degree)
        self.receiver_basis = KernelBasis(2, hidden, basis, degree) if third else None
        self.embed = nn.Linear(in_scalars + in_vectors, hidden, bias=False)
        shape: dict[str, Any] = {"widening": widening, "layer_scale": layer_scale}
        self.blocks = nn.ModuleList(
            PonitaBlock(hidden, basis, fiber=self._bundle, receiver=third, **shape)
            for _ in range(layers)
        )
        self.readouts = nn.ModuleList(
            nn.Linear(hidden, out_scalars + out_vectors) for _ in range(layers)
        )

    def forward(
        self,
        pos: Tensor,
        x: Tensor | None = None,
        vec: Tensor | None = None,
        edge_index: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> PonitaOutput:
        """Compute the outputs of each point, or of each cloud with pooling.

        Args:
            pos: positions, ``[P, n]``.
            x: scalars, ``[P, in_scalars]``; ``None`` if there are none.
            vec: vectors, ``[P, in_vectors, n]``; ``None`` if there are none.
            edge_index: integers in ``[0, P)``, ``[2, E]``, senders in row 0, receivers in row 1;
                ``None`` = by distance within each cloud. Each point gets one self-loop anyway.
            batch: integer cloud of each point, from 0, ``[P]``; ``None`` = one cloud.

        Returns:
            ``scalar``, ``[P, out_scalars]``, and ``vector``, ``[P, out_vectors, n]``; ``None``
            where the model has none. With pooling ``P`` becomes the number of clouds.

        Raises:
            ValueError: wrong shapes, missing inputs, or an edge out of range.
            TypeError: wrong dtypes.

        Warns:
            UserWarning: no two points are within ``radius``.
        """
        return self._run(pos, x, vec, edge_index, batch, calibrating=False)

    @torch.no_grad()
    def calibrate(
        self,
        pos: Tensor,
        x: Tensor | None = None,
        vec: Tensor | None = None,
        edge_index: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> None:
        """Scale the kernels so that every convolution keeps the spread of its input.

        Call once, before training, with a typical batch. A second call with the same batch changes
        nothing. With several ranks, call before the parameters are broadcast.

        Args:
            pos: as in :meth:`forward`.
            x: as in :meth:`forward`.
            vec: as in :meth:`forward`.
            edge_index: as in :meth:`forward`.
            batch: as in :meth:`forward`.
        """
        self._run(pos, x, vec, edge_index, batch, calibrating=True)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Split parameters for an optimiser: only weights of linear layers decay.

        Args:
            weight_decay: >= 0.

        Returns:
            Two groups: decayed matrices; biases, norms and layer scales without decay.
        """
        check_range("weight_decay", weight_decay, at_least=0.0)
        matrices = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() <= 1]
        return [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]

    @property
    def grid(self) -> Tensor | None:
        """Directions, ``[O, n]`` in double precision; ``None`` without a grid."""
        if self._grid is None:
            return None
        return self._grid.double().sum(0)

    def _register_grid(self, kind: str | None) -> None:
        self._grid: Tensor | None
        if not isinstance(self.orientations, int) or self.orientations == 0:
            self.register_buffer("_grid", None)
            return
        exact = orientation_grid(self.orientations, dim=self.dim, kind=kind)
        # A rounded value and what it lacks: `.double()` brings the exact symmetry back, and a
        # device without double precision can still hold the buffer.
        rounded = exact.to(torch.get_default_dtype())
        self.register_buffer("_grid", torch.stack((rounded, (exact - rounded).to(rounded.dtype))))

    def _directions(self, pos: Tensor) -> Tensor:
        grid = self._grid
        if grid is None:
            raise RuntimeError("there is no grid without orientations")
        return grid.to(pos.dtype).sum(0)

    def _run(
        self,
        pos: Tensor,
        x: Tensor | None,
        vec: Tensor | None,
        edge_index: Tensor | None,
        batch: Tensor | None,
        *,
        calibrating: bool,
    ) -> PonitaOutput:
        self._check_inputs(pos, x, vec, batch)
        edges = self._edges(pos, edge_index, batch)
        elements = self._elements(pos, edges)
        geometry = self._geometry(pos, edges, elements)
        features = self.embed(lift(x, vec, elements))
        shape = (len(pos), -1) if self._bundle else (len(elements.base), 1)
        features = features.reshape(*shape, features.shape[-1])
        outputs = []
        for block, readout in zip(self.blocks, self.readouts, strict=True):
            if calibrating:
                cast(PonitaBlock, block).convolution.calibrate(features, geometry)
            features = block(features, geometry)
            outputs.append(readout(features))
        output = torch.stack(outputs).mean(0).flatten(0, 1)
        return self._read(output, elements, len(pos), batch)

    def _check_inputs(
        self, pos: Tensor, x: Tensor | None, vec: Tensor | None, batch: Tensor | None
    ) -> None:
        check_points(pos)
        check_shape("pos", pos, (None, self.dim))
        check_batch(batch, pos)
        check_floating(**given(x=x, vec=vec))
        wanted = (("x", x, (self.in_scalars,)), ("vec", vec, (self.in_vectors, self.dim)))
        for name, features, shape in wanted:
            if shape[0] == 0 and features is not None:
                raise ValueError(f"{name} must be None for this model, got {list(features.shape)}")
            if shape[0] > 0 and features is None:
                raise ValueError(f"{name} must have {shape[0]} channels, got None")
            if features is not None:
                check_shape(name, features, (len(pos), *shape))

    def _edges(self, pos: Tensor, edge_index: Tensor | None, batch: Tensor | None) -> _Edges:
        if edge_index is None:
            given = radius_graph(pos, self.radius, batch)
            if given.shape[1] == 0 and len(pos) > 1 and self.radius is not None:
                warnings.warn(
                    f"no two points are within radius {self.radius}: each sees only itself",
                    UserWarning,
                    stacklevel=4,
                )
        else:
            check_edge_index(edge_index, len(pos))
            given = edge_index
        loops = torch.arange(len(pos), device=pos.device).expand(2, -1)
        counts = torch.cat((given[0] != given[1], torch.ones_like(loops[0], dtype=torch.bool)))
        return _Edges(torch.cat((given, loops), dim=1), counts.to(pos.dtype))

    def _elements(self, pos: Tensor, edges: _Edges) -> Elements:
        points = torch.arange(len(pos), device=pos.device)
        if self.orientations == 0:
            return Elements(points, None)
        if self.orientations == "edges":
            send, receive = edges.pairs
            apart = (pos[send] != pos[receive]).any(-1)
            send, receive = send[apart], receive[apart]
            w = pos[send] - pos[receive]
            return Elements(receive, w / w.norm(dim=-1, keepdim=True))
        grid = self._directions(pos)
        return Elements(points.repeat_interleave(len(grid)), grid.repeat(len(pos), 1))

    def _geometry(self, pos: Tensor, edges: _Edges, elements: Elements) -> Geometry:
        send, receive = edges.pairs
        w = pos[send] - pos[receive]
        distance = safe_norm(w, eps=NORM_SMOOTHING)
        weight = edges.counts[:, None]
        if self.radius is not None:
            weight = weight * polynomial_cutoff(distance, self.radius, self.envelope_exponent)
        if self._bundle:
            grid = self._directions(pos)
            seen = spatial_attributes(w[:, None], grid, eps=NORM_SMOOTHING)
            among = fiber_attributes(grid[:, None], grid, invariants=self.invariants)
            spatial = self.spatial_basis(seen) * weight[..., None]
            fiber = self.fiber_basis(among)
            receiver = None if self.receiver_basis is None else self.receiver_basis(seen)
            return Geometry(edges.pairs, spatial, fiber, receiver)
        if elements.ori is None:
            basis = self.spatial_basis(distance) * weight
            return Geometry(edges.pairs, basis[:, None], None, None)
        pairs, edge = pairs_of_elements(edges.pairs, elements.base, len(pos))
        attributes = invariant_attributes(
            pos[elements.base],
            elements.ori,
            pairs,
            invariants=self.invariants,
            eps=NORM_SMOOTHING,
        )
        # A mean over the sender's directions, whose number may differ from point to point.
        share = count_of(elements.base, len(pos)).to(pos.dtype).clamp(min=1)[send[edge]]
        basis = self.spatial_basis(attributes) * weight[edge] / share[:, None]
        return Geometry(pairs, basis[:, None], None, None)

    def _read(
        self, output: Tensor, elements: Elements, points: int, batch: Tensor | None
    ) -> PonitaOutput:
        scalars, coefficients = output[:, : self.out_scalars], output[:, self.out_scalars :]
        scalar = mean_at(scalars, elements.base, points) if self.out_scalars else None
        vector = None
        if self.out_vectors and elements.ori is not None:
            turned = coefficients[..., None] * elements.ori[:, None]
            vector = mean_at(turned, elements.base, points)
        if self.pool == "none":
            return PonitaOutput(scalar, vector)
        return PonitaOutput(self._pooled(scalar, batch), self._pooled(vector, batch))

    def _pooled(self, values: Tensor | None, batch: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        if batch is None:
            batch = torch.zeros(len(values), dtype=torch.long, device=values.device)
        clouds = int(batch.max()) + 1
        if self.pool == "mean":
            return mean_at(values, batch, clouds)
        return values.new_zeros(clouds, *values.shape[1:]).index_add(0, batch, values)


def _check_counts(
    in_scalars: int, in_vectors: int, out_scalars: int, out_vectors: int, orientations: int | str
) -> None:
    counts = {"in_scalars": in_scalars, "in_vectors": in_vectors}
    counts |= {"out_scalars": out_scalars, "out_vectors": out_vectors}
    for name, value in counts.items():
        check_count(name, value, at_least=0)
    if in_scalars + in_vectors == 0:
        raise ValueError("in_scalars + in_vectors must be >= 1, got 0")
    if out_scalars + out_vectors == 0:
        raise ValueError("out_scalars + out_vectors must be >= 1, got 0")
    if isinstance(orientations, str):
        check_choice("orientations", orientations, ("edges",))
        return
    check_count("orientations", orientations, at_least=0)
    if orientations == 0 and in_vectors > 0:
        raise ValueError(f"in_vectors must be 0 with orientations=0, got {in_vectors}")
    if orientations == 0 and out_vectors > 0:
        raise ValueError(f"out_vectors must be 0 with orientations=0, got {out_vectors}")
