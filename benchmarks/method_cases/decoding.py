"""Info-Gain scores of candidate actions: one batched call of the model or one call for each."""

import torch
from torch import Tensor, nn

from paired import OURS, Contest, Run, agreeing

PEER = "one call a candidate"
VOCABULARY = 256


def contest(candidates: int, length: int, width: int, layers: int) -> Contest:
    """A transformer of that width; without layers an embedding, its mean and a linear map."""
    runs, small = runs_of(candidates, length, width, layers), runs_of(3, 8, width, layers)
    return Contest(
        runs, lambda: agreeing({name: run() for name, run in runs.items()}, PEER, 1e-4), small
    )


class Denoiser(nn.Module):
    """What a masked diffusion model is made of, without dropout."""

    def __init__(self, length: int, width: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY + 1, width)
        self.places = nn.Parameter(0.1 * torch.randn(length, width))
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, layers) if layers else None
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.tokens(ids) + self.places
        mixed = (
            hidden + hidden.mean(1, keepdim=True) if self.blocks is None else self.blocks(hidden)
        )
        logits: Tensor = self.head(mixed)
        return logits


def runs_of(candidates: int, length: int, width: int, layers: int) -> dict[str, Run]:
    from steelyard.diffusion import information_gain_scores

    torch.manual_seed(0)
    model = Denoiser(length, width, layers).eval().requires_grad_(False)
    tokens = torch.full((length,), VOCABULARY)
    tokens[: length // 4] = torch.randint(VOCABULARY, (length // 4,))
    masked = (tokens == VOCABULARY).nonzero().flatten()
    positions = masked[torch.arange(candidates) % len(masked)]
    values = torch.randint(VOCABULARY, (candidates,))
    actions = [([p], [v]) for p, v in zip(positions.tolist(), values.tolist(), strict=True)]

    @torch.no_grad()
    def one_by_one() -> Tensor:
        now = entropies(model(tokens[None])[0])
        found = []
        for (position,), (value,) in actions:
            state = tokens.clone()
            state[position] = value
            left = model(state[None])[0][state == VOCABULARY]
            found.append(-entropies(left).mean() - now[position])
        return torch.stack(found)

    return {
        OURS: lambda: information_gain_scores(model, tokens, actions, VOCABULARY).objective,
        PEER: one_by_one,
    }


def entropies(logits: Tensor) -> Tensor:
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)
