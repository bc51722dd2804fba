"""Bounded policy optimisation (BPO) against PPO: exact theory, stability, control, pixels.

PPO clips the probability ratio and so stops pulling once a ratio has left the band; BPO fits the
ratio to the optimum of a stated problem from both sides. Four parts, in the order of how much they
promise:

exact      200 random finite MDPs: the exact optimum must raise the return at every iteration (a
           theorem); PPO and BPO fitted by gradient to sampled, noisy advantages need not.
stability  InvertedPendulum and CartPole with 4, 20 and 40 epochs a rollout: how many ratios end
           outside the band, and how far the policy moves. Each method has the learning rate and
           temperature that part ``search`` found for it, with equal budgets.
control    Hopper, HalfCheetah and Ant: final return of PPO, BPO with the learned median and BPO
           with the value in its place.
atari      Pong and Breakout from pixels, 100k steps: the discrete, convolutional path works. Curves
           only; no claim about scores at this length.

Part ``search`` is the tuning itself: run it alone (``--parts search``), on seeds that are not
reported.

Source: Ao et al. (2026), Bounded Ratio Reinforcement Learning, arXiv:2604.18578.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steelyard._checks import check_choice, check_range
from steelyard.lab import Claim, Form, Lab
from steelyard.policy import (
    BPO,
    PPO,
    Objective,
    OnPolicyLearner,
    TrainingSettings,
    bounded_ratio_optimum,
    bpo_loss,
    ppo_loss,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("exact", "stability", "control", "atari", "search")


@dataclass(frozen=True)
class Config:
    """What is run, and for how long."""

    parts: tuple[str, ...] = ("exact", "stability", "control")
    """Which of exact, stability, control, atari, search."""
    mdps: int = 200
    """Random MDPs of the exact part, for each seed."""
    iterations: int = 20
    """Policy iterations on each MDP."""
    stability_envs: tuple[str, ...] = ("InvertedPendulum-v5", "CartPole-v1")
    stability_epochs: tuple[int, ...] = (4, 20, 40)
    """Passes over each rollout that are compared."""
    stability_steps: int = 20_000
    control_envs: tuple[str, ...] = ("Hopper-v5", "HalfCheetah-v5", "Ant-v5")
    control_steps: int = 1_000_000
    atari_envs: tuple[str, ...] = ("ALE/Pong-v5", "ALE/Breakout-v5")
    atari_steps: int = 100_000
    """Agent steps, of four frames each."""
    atari_seeds: int = 2
    """Only seeds below this run the Atari part."""
    epsilon: float = 0.2
    """Half-width of the band in the parts exact, stability and atari."""

    def __post_init__(self) -> None:
        for part in self.parts:
            check_choice("parts", part, PARTS)
        check_range("epsilon", self.epsilon, above=0.0, below=1.0)
        for name in ("mdps", "iterations", "stability_steps", "control_steps", "atari_steps"):
            check_range(name, getattr(self, name), at_least=1)


QUICK = Form(
    Config(control_envs=("Hopper-v5",), control_steps=60_000, mdps=200), seeds=3, minutes=8
)
FULL = Form(
    Config(parts=("exact", "stability", "control", "atari"), stability_steps=50_000),
    seeds=5,
    minutes=240,
)
CURVES = ("return", "approx_kl", "out_of_band")
UNITS = {
    "step": "environment steps",
    "return": "return of recent episodes",
    "approx_kl": "KL from the old policy (nats)",
    "out_of_band": "share of ratios outside the band",
}

_PAPER = "Ao et al. (2026), arXiv:2604.18578"
_STABLE = "stability/{env}/epochs={epochs}"


def _stability_claims() -> Iterator[Claim]:
    for env in ("InvertedPendulum-v5", "CartPole-v1"):
        many = _STABLE.format(env=env, epochs=40)
        for metric, words in (
            ("out_of_band", "fewer ratios outside the band"),
            ("max_kl", "a smaller largest KL from the old policy"),
        ):
            yield Claim(
                f"{env}, 40 epochs a rollout: BPO leaves {words} than PPO",
                f"{_PAPER}, two-sided loss",
                metric=f"{many}/bpo/{metric}",
                baseline=f"{many}/ppo/{metric}",
                direction="lower",
            )
        yield Claim(
            f"{env}: out-of-band ratios grow less from 4 to 40 epochs with BPO",
            f"{_PAPER}, stability in epochs",
            metric=f"stability/{env}/bpo/growth",
            baseline=f"stability/{env}/ppo/growth",
            direction="lower",
        )
        yield Claim(
            f"{env}, 40 epochs: BPO's return is not more than 10 % of the maximum below PPO's",
            "check at equal tuning budgets",
            metric=f"{many}/bpo/return",
            baseline=f"{many}/ppo/return",
            direction="higher",
            margin=-0.1 * MAXIMUM_RETURN[env],
        )


def _control_claims() -> Iterator[Claim]:
    for env, margin, words in (
        ("Hopper-v5", 0.0, "ends higher than PPO"),
        ("Ant-v5", 0.0, "ends higher than PPO"),
        ("HalfCheetah-v5", -300.0, "ends at most 300 below PPO (parity)"),
    ):
        yield Claim(
            f"{env}: BPO {words}",
            f"{_PAPER}, MuJoCo curves",
            metric=f"control/{env}/bpo/return",
            baseline=f"control/{env}/ppo/return",
            direction="higher",
            margin=margin,
        )
        yield Claim(
            f"{env}: BPO leaves fewer ratios outside its band than PPO",
            f"{_PAPER}, two-sided loss",
            metric=f"control/{env}/bpo/out_of_band",
            baseline=f"control/{env}/ppo/out_of_band",
            direction="lower",
        )


MAXIMUM_RETURN = {"InvertedPendulum-v5": 1000.0, "CartPole-v1": 500.0}

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "The bounded-ratio optimum raises the return at every iteration of every MDP",
        f"{_PAPER}, Thm 4.2",
        metric="exact/optimum/monotone",
        baseline=1.0,
        direction="higher",
        min_seeds=1,
    ),
    Claim(
        "With 40 epochs on sampled advantages, BPO lowers the return less often than PPO",
        f"{_PAPER}, Cor. 4.5",
        metric="exact/bpo epochs=40/monotone",
        baseline="exact/ppo epochs=40/monotone",
        direction="higher",
    ),
    *_stability_claims(),
    *_control_claims(),
)


def run(config: Config, lab: Lab) -> dict[str, float]:
    """Run the chosen parts for one seed."""
    parts = {
        "exact": run_exact,
        "stability": run_stability,
        "control": run_control,
        "atari": run_atari,
        "search": run_search,
    }
    metrics: dict[str, float] = {}
    for part in config.parts:
        metrics |= parts[part](config, lab)
    return metrics


# ---- 1. Exact: random finite MDPs -----------------------------------------------------------

GAMMA, STATES, ACTIONS, SAMPLES, NOISE, FIT_RATE = 0.9, 20, 5, 400, 1.0, 0.1


def run_exact(config: Config, lab: Lab) -> dict[str, float]:
    """Iterate the exact optimum, and gradient fits to sampled advantages, on the same MDPs."""

    def study(method: str, epochs: int) -> dict[str, float]:
        generator = torch.Generator().manual_seed(lab.seed)
        mdps = random_mdps(config.mdps, generator)
        returns = improve(mdps, method, epochs, config, generator)
        gains = returns[1:] - returns[:-1]
        return {
            "monotone": (gains >= -1e-9).double().mean().item(),
            "worst_step": gains.min().item(),
            "final_return": returns[-1].mean().item(),
        }

    metrics: dict[str, float] = {}
    runs = [("optimum", 0), *((m, e) for e in (4, 40) for m in ("ppo", "bpo"))]
    for method, epochs in runs:
        name = f"exact/{method}" + (f" epochs={epochs}" if epochs else "")
        found = lab.compute(name, partial(study, method, epochs))
        metrics |= {f"{name}/{key}": value for key, value in found.items()}
    return metrics


def random_mdps(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Transitions ``[M, S, A, S]``, rewards ``[M, S, A]`` and first states ``[M, S]``."""

    def simplex(*shape: int) -> Tensor:
        draws = torch.empty(shape, dtype=torch.float64).exponential_(generator=generator)
        return draws / draws.sum(-1, keepdim=True)

    transitions = simplex(count, STATES, ACTIONS, STATES)
    rewards = torch.randn(count, STATES, ACTIONS, dtype=torch.float64, generator=generator)
    return transitions, rewards, simplex(count, STATES)


def improve(
    mdps: tuple[Tensor, Tensor, Tensor],
    method: str,
    epochs: int,
    config: Config,
    generator: torch.Generator,
) -> Tensor:
    """Exact returns ``[iterations + 1, M]`` of successive policies, all MDPs at once."""
    transitions, rewards, first = mdps
    logits = torch.zeros_like(rewards)
    returns = []
    for _ in range(config.iterations + 1):
        policy = logits.softmax(-1)
        chain = torch.einsum("msa,msap->msp", policy, transitions)
        system = torch.eye(STATES, dtype=chain.dtype) - GAMMA * chain
        values = torch.linalg.solve(system, (policy * rewards).sum(-1))
        visits = torch.linalg.solve(system.transpose(1, 2), first)
        q_values = rewards + GAMMA * torch.einsum("msap,mp->msa", transitions, values)
        returns.append((first * values).sum(-1))
        if method == "optimum":
            bounds = {"low": 1 - config.epsilon, "high": 1 + config.epsilon}
            logits = (policy * bounded_ratio_optimum(policy, q_values, **bounds).ratio).log()
        else:
            law = (visits[..., None] * policy).flatten(1)
            index = torch.multinomial(law, SAMPLES, replacement=True, generator=generator)
            advantages = (q_values - values[..., None]).flatten(1).gather(1, index)
            noise = torch.randn(advantages.shape, dtype=law.dtype, generator=generator)
            advantages = advantages + NOISE * noise
            logits = fit(logits, index, advantages, method, epochs, config.epsilon)
    return torch.stack(returns)


def fit(
    logits: Tensor, index: Tensor, advantages: Tensor, method: str, epochs: int, epsilon: float
) -> Tensor:
    """Take full-batch Adam steps on the loss of sampled state-action pairs ``[M, N]``."""
    base = logits.log_softmax(-1).flatten(1).gather(1, index)
    parameters = logits.clone().requires_grad_()
    optimizer = torch.optim.Adam([parameters], lr=FIT_RATE)
    for _ in range(epochs):
        log_ratio = parameters.log_softmax(-1).flatten(1).gather(1, index) - base
        if method == "ppo":
            losses = ppo_loss(log_ratio, advantages, epsilon=epsilon, reduction="none")
        else:
            target = 1 + epsilon * advantages.sign()
            losses = bpo_loss(log_ratio, target, advantages.abs(), reduction="none")
        optimizer.zero_grad()
        losses.mean(1).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return parameters.detach()


# ---- 2. Stability: many epochs --------------------------------------------------------------

SMALL = TrainingSettings(rollout_steps=128, epochs=10, minibatch=64, hidden=(64, 64))
SMALL_ENVS = 8

# The best mean return of the two search seeds on each task, out of 12 settings of each method. The
# whole table is in results/bpo/search.json.
TUNED: dict[str, dict[str, tuple[float, PPO | BPO]]] = {
    "InvertedPendulum-v5": {
        "ppo": (1e-3, PPO(normalize_advantages=False)),
        "bpo": (3e-3, BPO(temperature=0.1)),
    },
    "CartPole-v1": {
        "ppo": (1e-3, PPO()),
        "bpo": (3e-3, BPO(temperature=1e-3)),
    },
}


def run_stability(config: Config, lab: Lab) -> dict[str, float]:
    """Train both methods with few and many epochs; measure ratios, KL and return."""
    metrics: dict[str, float] = {}
    for env in config.stability_envs:
        for epochs in config.stability_epochs:
            for method, (rate, tuned) in TUNED[env].items():
                name = f"{_STABLE.format(env=env, epochs=epochs)}/{method}"
                objective = replace(tuned, epsilon=config.epsilon)
                settings = replace(SMALL, learning_rate=rate, epochs=epochs)
                steps = config.stability_steps
                rows = train(lab, name, env, SMALL_ENVS, objective, settings, steps)
                metrics |= summarise(name, rows)
        few, many = (min(config.stability_epochs), max(config.stability_epochs))
        for method in TUNED[env]:
            low, high = (
                metrics[f"{_STABLE.format(env=env, epochs=e)}/{method}/out_of_band"]
                for e in (few, many)
            )
            metrics[f"stability/{env}/{method}/growth"] = high - low
    return metrics


def run_search(config: Config, lab: Lab) -> dict[str, float]:
    """Try 12 settings of each method on seeds of their own; report the return of each."""
    rates = (3e-4, 1e-3, 3e-3, 1e-2)
    candidates: dict[str, Objective] = {
        f"ppo normalize={normalize} entropy={entropy}": PPO(
            normalize_advantages=normalize, entropy_coef=entropy
        )
        for normalize, entropy in ((True, 0.0), (False, 0.0), (True, 0.01))
    }
    for temperature in (1e-3, 0.1, 1.0):
        candidates[f"bpo temperature={temperature}"] = BPO(temperature=temperature)
    metrics: dict[str, float] = {}
    for env, (words, objective), rate in product(config.stability_envs, candidates.items(), rates):
        name = f"search/{env}/{words} rate={rate}"
        settings, seed = replace(SMALL, learning_rate=rate), lab.seed + 1000
        steps = config.stability_steps
        rows = train(lab, name, env, SMALL_ENVS, objective, settings, steps, seed=seed)
        metrics |= summarise(name, rows)
    return metrics


# ---- 3. Control: MuJoCo locomotion ----------------------------------------------------------

LARGE = TrainingSettings(
    rollout_steps=512,
    epochs=10,
    minibatch=256,
    hidden=(256, 256),
    activation="relu",
    normalize_observations=True,
    normalize_rewards=True,
)
LARGE_ENVS = 4


def run_control(config: Config, lab: Lab) -> dict[str, float]:
    """Train PPO and both forms of BPO on locomotion tasks."""
    metrics: dict[str, float] = {}
    for env in config.control_envs:
        bpo = BPO(epsilon=0.3)  # the paper's usual band; PPO's usual one is 0.2
        methods: dict[str, Objective] = {
            "ppo": PPO(),
            "bpo": bpo,
            "bpo-value": replace(bpo, threshold="value"),
        }
        for method, objective in methods.items():
            name = f"control/{env}/{method}"
            rows = train(lab, name, env, LARGE_ENVS, objective, LARGE, config.control_steps)
            metrics |= summarise(name, rows)
    return metrics


# ---- 4. Atari: pixels -----------------------------------------------------------------------

PIXELS = TrainingSettings(
    rollout_steps=128,
    epochs=4,
    minibatch=256,
    learning_rate=2.5e-4,
    gamma=0.98,
    normalize_rewards=True,
)
PIXEL_ENVS = 8


def run_atari(config: Config, lab: Lab) -> dict[str, float]:
    """Train both methods from pixels for a short while."""
    if lab.seed >= config.atari_seeds:
        return {}
    metrics: dict[str, float] = {}
    for env in config.atari_envs:
        methods: dict[str, Objective] = {
            "ppo": PPO(epsilon=config.epsilon, entropy_coef=0.01),
            "bpo": BPO(epsilon=config.epsilon, entropy_coef=0.01),
        }
        for method, objective in methods.items():
            name = f"atari/{env.removeprefix('ALE/')}/{method}"
            rows = train(lab, name, env, PIXEL_ENVS, objective, PIXELS, config.atari_steps)
            metrics |= summarise(name, rows)
    return metrics


# ---- shared by the parts --------------------------------------------------------------------


def train(
    lab: Lab,
    name: str,
    env: str,
    num_envs: int,
    objective: Objective,
    settings: TrainingSettings,
    steps: int,
    *,
    seed: int | None = None,
) -> list[dict[str, float]]:
    """Train one method on one task; return the rows it logged."""
    from steelyard.integrations import atari, mujoco

    make_envs = atari.make_atari_env if env.startswith("ALE/") else mujoco.make_vector_env

    def make() -> OnPolicyLearner:
        return OnPolicyLearner(
            make_envs(env, num_envs),
            objective,
            replace(settings, total_steps=steps),
            seed=lab.seed if seed is None else seed,
        )

    return lab.train(name, make, total=steps)


def summarise(name: str, rows: list[dict[str, float]]) -> dict[str, float]:
    """Final return (last tenth of training) and how far the ratios went."""
    late = [row["return"] for row in rows[-max(1, len(rows) // 10) :] if "return" in row]
    metrics = {
        "out_of_band": sum(row["out_of_band"] for row in rows) / len(rows),
        "mean_kl": sum(row["approx_kl"] for row in rows) / len(rows),
        "max_kl": max(row["approx_kl"] for row in rows),
        "max_ratio": max(row["max_ratio"] for row in rows),
    }
    if late:
        metrics["return"] = sum(late) / len(late)
    return {f"{name}/{key}": value for key, value in metrics.items()}


def figures(result: dict[str, Any]) -> "dict[str, Figure]":
    """Out-of-band share and largest KL against the number of epochs."""
    from steelyard.lab.plots import draw_against

    metrics, config = result["metrics"], result["config"]
    if "stability" not in config["parts"]:
        return {}
    panels = {
        (env, label): {
            method: {
                epochs: [
                    values[f"{_STABLE.format(env=env, epochs=epochs)}/{method}/{metric}"]
                    for values in metrics.values()
                ]
                for epochs in config["stability_epochs"]
            }
            for method in ("ppo", "bpo")
        }
        for env in config["stability_envs"]
        for metric, label in (
            ("out_of_band", "share of ratios outside the band"),
            ("max_kl", "largest KL of an update (nats)"),
        )
    }
    grew = [
        sum(
            values[f"stability/{env}/ppo/growth"] - values[f"stability/{env}/bpo/growth"]
            for values in metrics.values()
        )
        for env in config["stability_envs"]
    ]
    pushed = "More epochs push PPO's ratios out of the band; BPO pulls them back"
    title = pushed if min(grew) > 0 else "Ratios and KL against the number of epochs"
    return {"stability": draw_against(panels, "epochs a rollout", title)}
