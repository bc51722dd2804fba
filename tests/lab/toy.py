"""A toy regression: momentum against plain gradient descent.

Small, deterministic and slow on purpose, so that a kill falls inside it. Gradient and update are
written out: autograd refuses to work in a fork of a process that has used it, and the first use of
``torch.optim`` imports for seconds.
"""

import os
import signal
import time
from dataclasses import dataclass
from typing import Any

import torch

from steelyard.lab import Claim, Form, Lab


@dataclass(frozen=True)
class Config:
    steps: int = 24
    """Updates of each trial."""
    pause: float = 0.002
    """Seconds to sleep in an update."""
    momenta: tuple[float, ...] = (0.0, 0.9)
    """One trial each."""
    faults: tuple[str, ...] = ()
    """What each seed does halfway through: "", "nan", "floating", "kill" or "raise"."""


QUICK = Form(Config(), seeds=3, minutes=0.1)
FULL = Form(Config(steps=48), seeds=5, minutes=0.2)
CLAIMS = (
    Claim("momentum ends lower", "the toy", "sgd/0.9/loss", "sgd/0.0/loss", "lower"),
    Claim("nobody ran this", "the toy", "absent", 0.0, "higher"),
)
CURVES = ("loss",)


class Regression:
    """Linear regression by SGD on fresh noise; everything it reads next is in its state."""

    def __init__(self, seed: int, momentum: float, config: Config) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(4, generator=self.generator)
        self.velocity = torch.zeros(4)
        self.momentum = momentum
        self.step = 0
        self.config = config
        self.fault = config.faults[seed] if seed < len(config.faults) else ""

    def advance(self) -> dict[str, float]:
        time.sleep(self.config.pause)
        if self.step == self.config.steps // 2:
            self._fail()
        x = torch.randn(16, 4, generator=self.generator)
        error = x @ (self.weight - 1) - 0.1 * torch.randn(16, generator=self.generator)
        self.velocity = self.momentum * self.velocity + x.T @ error / 8
        self.weight = self.weight - 0.02 * self.velocity
        self.step += 1
        broken = self.fault == "nan" and self.step > self.config.steps // 2
        loss = float("nan") if broken else error.square().mean().item()
        return {"loss": loss, "weight": self.weight[0].item()}

    def _fail(self) -> None:
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "raise":
            raise KeyError("the toy's own mistake")
        if self.fault == "floating":
            raise FloatingPointError("gradient of weight is nan")

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "weight": self.weight,
            "velocity": self.velocity,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.weight, self.velocity = state["weight"], state["velocity"]
        self.generator.set_state(state["generator"])

    def close(self) -> None:
        pass


def run(config: Config, lab: Lab) -> dict[str, float]:
    metrics = lab.compute("exact", lambda: {"optimum": 0.01 + lab.seed / 3})
    for momentum in config.momenta:
        name = f"sgd/{momentum}"
        rows = lab.train(name, lambda m=momentum: Regression(lab.seed, m, config), config.steps)
        metrics[f"{name}/loss"] = sum(row["loss"] for row in rows[-5:]) / 5
    return metrics
