"""The recipe's own mathematics, and a tiny run of every part."""

from dataclasses import replace

import pytest
import torch

from steelyard.lab import Lab, load_recipe
from steelyard.policy import ppo_loss
from steelyard.recipes import bpo

TINY = bpo.Config(
    parts=("exact", "stability", "control", "search"),
    mdps=5,
    iterations=3,
    stability_envs=("CartPole-v1",),
    stability_epochs=(1, 2),
    stability_steps=1,  # one rollout
    control_envs=("Hopper-v5",),
    control_steps=1,
)


def returns_of(method: str, epochs: int, config: bpo.Config) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return bpo.improve(bpo.random_mdps(config.mdps, generator), method, epochs, config, generator)


def test_exact_optimum_raises_the_return_of_every_mdp_at_every_iteration():
    returns = returns_of("optimum", 0, replace(TINY, mdps=50, iterations=10))
    assert (returns.diff(dim=0) > 0).all()


def test_many_epochs_on_sampled_advantages_lower_some_returns_and_ppo_more_often():
    """At 40 MDPs and 10 iterations; the recipe judges the difference over seeds."""
    config = replace(TINY, mdps=40, iterations=10)
    falls = {
        method: (returns_of(method, 40, config).diff(dim=0) < -1e-9).double().mean()
        for method in ("ppo", "bpo")
    }
    assert falls["ppo"] > falls["bpo"] > 0


def test_ppo_with_exact_advantages_of_all_pairs_never_lowers_the_return():
    """Why the contrast needs samples: see "PPO with exact advantages" in docs/systems/bpo."""
    generator = torch.Generator().manual_seed(1)
    transitions, rewards, first = bpo.random_mdps(20, generator)
    logits = torch.zeros_like(rewards)
    returns = []
    for _ in range(6):
        policy = logits.softmax(-1)
        chain = torch.einsum("msa,msap->msp", policy, transitions)
        system = torch.eye(bpo.STATES, dtype=chain.dtype) - bpo.GAMMA * chain
        values = torch.linalg.solve(system, (policy * rewards).sum(-1))
        returns.append((first * values).sum(-1))
        q_values = rewards + bpo.GAMMA * torch.einsum("msap,mp->msa", transitions, values)
        advantages, base = q_values - values[..., None], policy.log()
        parameters = logits.clone().requires_grad_()
        optimizer = torch.optim.Adam([parameters], lr=0.1)
        for _ in range(40):
            log_ratio = parameters.log_softmax(-1) - base
            losses = ppo_loss(log_ratio, advantages, epsilon=0.2, reduction="none")
            optimizer.zero_grad()
            (policy * losses).sum().backward()
            optimizer.step()
        logits = parameters.detach()
    assert (torch.stack(returns).diff(dim=0) > -1e-9).all()


@pytest.mark.rl
def test_every_part_runs_and_gives_what_its_claims_need(tmp_path):
    metrics = bpo.run(TINY, Lab(tmp_path, 0, tensorboard=False, checkpoint_seconds=3600))
    assert metrics["exact/optimum/monotone"] == 1.0
    assert metrics["stability/CartPole-v1/bpo/growth"] == pytest.approx(
        metrics["stability/CartPole-v1/epochs=2/bpo/out_of_band"]
        - metrics["stability/CartPole-v1/epochs=1/bpo/out_of_band"]
    )
    assert {f"control/Hopper-v5/{m}/return" for m in ("ppo", "bpo", "bpo-value")} <= set(metrics)
    searched = [key for key in metrics if key.startswith("search/") and key.endswith("max_kl")]
    assert len([key for key in searched if "/ppo " in key]) == 12
    assert len([key for key in searched if "/bpo " in key]) == 12


def test_claims_ask_for_metrics_that_the_full_form_returns():
    """Names only: the full form itself runs for hours."""
    config = bpo.FULL.config
    trials = {
        f"stability/{env}/epochs={epochs}/{method}"
        for env in config.stability_envs
        for epochs in config.stability_epochs
        for method in ("ppo", "bpo")
    } | {f"control/{env}/{method}" for env in config.control_envs for method in ("ppo", "bpo")}
    for claim in bpo.CLAIMS:
        for key in (claim.metric, claim.baseline):
            if isinstance(key, str) and not key.startswith("exact/") and "growth" not in key:
                assert key.rpartition("/")[0] in trials, key


def test_recipe_loads_and_its_config_survives_storage():
    recipe = load_recipe("bpo")
    assert recipe.config_from(recipe.config_to(recipe.full.config)) == recipe.full.config


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"parts": ("exat",)}, "parts must be one of"),
        ({"epsilon": -0.1}, "epsilon must be > 0.0"),
        ({"control_steps": 0}, "control_steps must be >= 1"),
    ],
)
def test_wrong_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        bpo.Config(**setting)


def test_stability_figure_has_a_panel_for_each_task_and_quantity():
    values = {
        f"stability/{env}/epochs={epochs}/{method}/{metric}": 0.01 * epochs
        for env in ("A-v0", "B-v0")
        for epochs in (4, 40)
        for method in ("ppo", "bpo")
        for metric in ("out_of_band", "max_kl")
    }
    growth = {
        f"stability/{env}/{method}/growth": value
        for env in ("A-v0", "B-v0")
        for method, value in (("ppo", 0.2), ("bpo", 0.1))
    }
    values |= growth
    config = {"parts": ["stability"], "stability_envs": ["A-v0", "B-v0"]}
    result = {
        "metrics": {"0": values, "1": values},
        "config": config | {"stability_epochs": [4, 40]},
    }
    figure = bpo.figures(result)["stability"]
    assert len(figure.axes) == 4
    assert "BPO pulls them back" in figure.get_suptitle()
    for metrics in result["metrics"].values():
        metrics["stability/A-v0/bpo/growth"] = 0.3
    assert "BPO" not in bpo.figures(result)["stability"].get_suptitle()
    assert bpo.figures({"metrics": {}, "config": {"parts": ["exact"]}}) == {}
