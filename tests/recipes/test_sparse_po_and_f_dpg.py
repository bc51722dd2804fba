"""The mathematics of the recipes for SparsePO and f-DPG; their parts run in the file beside it."""

import copy
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from steelyard.recipes import f_dpg, sparse_po
from steelyard.recipes._f_dpg_testbed import ExactLearner
from steelyard.recipes._sparse_po_testbed import LENGTH, PLACE, Problem, TokenWeighted


def weighted(name, beta=0.3):
    def at(side):
        return (torch.arange(LENGTH) == PLACE).expand(side.logprobs.shape)

    return TokenWeighted(name, beta, relevant=at, noise=at, size=LENGTH).double()


def moved(problem):
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(problem.table.shape, generator=generator, dtype=torch.float64)
    return problem.table + noise


def test_without_masks_and_leash_the_loss_is_that_of_dpo():
    problem = Problem(20, 0)
    batch = problem.batch(moved(problem), problem.train)
    chosen, rejected = (side.log_ratio.sum(-1) for side in batch)
    expected = -torch.nn.functional.logsigmoid(0.3 * (chosen - rejected)).mean()
    torch.testing.assert_close(weighted("dpo")(batch), expected)


def test_learned_masks_start_as_tdpo1():
    problem = Problem(20, 0)
    batch = problem.batch(moved(problem), problem.train)
    for name in ("common l1=0.0", "independent l1=0.0"):
        torch.testing.assert_close(weighted(name)(batch), weighted("tdpo1")(batch))


def test_every_head_pays_once_for_its_mask():
    problem = Problem(20, 0)
    batch = problem.batch(problem.table, problem.train)
    one = weighted("common l1=0.01")(batch)
    two = weighted("independent l1=0.01")(batch)
    torch.testing.assert_close(one, torch.tensor(math.log(2) + 0.01 * 2 * LENGTH).double())
    torch.testing.assert_close(two, torch.tensor(math.log(2) + 2 * 0.01 * 2 * LENGTH).double())


def test_the_oracle_changes_no_law_but_those_of_its_position():
    problem = Problem(20, 0)
    config = sparse_po.Config(updates=3)
    assert sparse_po.fit(problem, "oracle", 0.3, config)["wasted"] == 0
    assert sparse_po.fit(problem, "oracle", 0.3, config)["kl"] > 0


def test_methods_that_miss_the_level_get_no_cost():
    def row(reward, wasted):
        return {"reward": reward, "wasted": wasted, "kl": 2 * wasted}

    curves = {
        "dpo": [row(0.5, 1.0), row(1.0, 4.0)],
        "oracle": [row(1.0, 1.0)],
        "common": [row(0.1, 0.2)],
        "random": [row(-0.1, 0.2)],
    }
    found = sparse_po.at_equal_reward(curves, 0.0)
    assert found["level"] == pytest.approx(sparse_po.LEVEL)
    assert found["dpo/wasted_at_level"] == pytest.approx(1.2**2)  # 2 * 0.6, squared
    assert found["oracle/wasted_at_level"] == pytest.approx(0.36)
    assert found["oracle/kl_at_level"] == pytest.approx(0.72)
    assert not any("common" in key or "random" in key for key in found)


def test_an_exact_run_resumes_with_its_estimates():
    problem = f_dpg.Exact(3, 0, 0.07)

    def make():
        divergence = f_dpg.DIVERGENCES["js"]
        sizes = {"updates": 200, "batch_size": 8, "learning_rate": 0.03}
        return ExactLearner(problem, divergence, **sizes, seed=0)

    whole, broken, resumed = make(), make(), make()
    broken.advance()
    resumed.load_state_dict(copy.deepcopy(broken.state_dict()))
    assert [whole.advance(), whole.advance()][1] == resumed.advance()
    assert whole.step == resumed.step == 200
    assert whole.advance()  # nothing left to do: only measures
    assert whole.step == 200


def test_the_target_is_where_every_measure_is_best():
    problem = f_dpg.Exact(3, 0, 0.07)
    found = problem.measures(problem.table)
    assert found["satisfied"] == pytest.approx(0.07)
    assert found["kl_to_base"] == pytest.approx(0.0, abs=1e-12)
    assert found["forward_kl"] == pytest.approx(-math.log(0.07))
    assert found["tv"] == pytest.approx(0.93)


def test_rewards_at_the_start_spread_as_derived():
    """TV 1, JS log(1 + 1/Z), forward KL 1/Z: and the standard deviation of the gradient so too."""
    problem = f_dpg.Exact(4, 0, 0.006)
    z = problem.log_z.exp().item()
    spread = {"tv": 1.0, "js": math.log1p(1 / z), "forward-kl": 1 / z}
    noise = {
        name: f_dpg.gradient_noise(problem, f_dpg.DIVERGENCES[name])[0] ** 0.5 for name in spread
    }
    for name, width in spread.items():
        assert noise[name] / noise["tv"] == pytest.approx(width)


@pytest.mark.parametrize("recipe", [f_dpg, sparse_po])
def test_the_full_form_only_adds_to_the_quick_one(recipe):
    assert set(recipe.QUICK.config.parts) < set(recipe.FULL.config.parts) == set(recipe.PARTS)
    assert recipe.FULL.seeds >= 5
    assert replace(recipe.FULL.config, parts=("exact",)).parts == ("exact",)
