"""The verl adapter, in the registries of the installed verl and through its own callers."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("verl.trainer.ppo.core_algos")

from hypothesis import given, settings
from hypothesis import strategies as st
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos as core
from verl.workers.config import ActorConfig, PolicyLossConfig

from steelyard.integrations import verl as adapter
from steelyard.policy import (
    adora_weights,
    bpo_loss,
    bpo_target_ratio,
    canon_advantages,
    gbpo_loss,
    gbpo_signals,
    group_relative_advantages,
    grpo_loss,
)

NAMES = ("steelyard_gbpo", "steelyard_bpo", "steelyard_canon", "steelyard_adora")
AGGREGATES = {
    "token-mean": "token",
    "seq-mean-token-mean": "sequence",
    "seq-mean-token-sum": "sequence_sum",
}
REWARDS = torch.tensor([1.0, 0.0, 0.0, 0.5, 2.0, 1.0, 1.0, 0.25])
LABELS = np.array(["b", "b", "a", "b", "a", "a", "b", "a"], dtype=object)
GROUPS = torch.tensor([1, 1, 0, 1, 0, 0, 1, 0])
LENGTHS = torch.tensor([5, 2, 1, 3, 4, 5, 2, 1])
MASK = torch.arange(5) < LENGTHS[:, None]


@pytest.fixture(autouse=True)
def _registered():
    adapter.register()


def actor(**settings):
    return ActorConfig(
        strategy="fsdp", rollout_n=4, use_dynamic_bsz=True, clip_ratio_c=1e9, **settings
    )


def token_rewards():
    """Reward at the last token, as verl's reward managers put it."""
    out = torch.zeros(MASK.shape)
    return out.scatter(1, LENGTHS[:, None] - 1, REWARDS[:, None])


def estimate(name, **changes):
    given_ = {
        "token_level_rewards": token_rewards(),
        "response_mask": MASK.long(),
        "index": LABELS,
        "config": AlgoConfig(),
        **changes,
    }
    return core.get_adv_estimator_fn(name)(**given_)


def log_probs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(MASK.shape, generator=generator)
    new = old + 0.3 * torch.randn(MASK.shape, generator=generator)
    return old, new.requires_grad_()


def policy_loss(name, advantages, mode="token-mean", config=None, mask=MASK, **more):
    old, new = log_probs()
    loss, metrics = core.get_policy_loss_fn(name)(
        old_log_prob=old,
        log_prob=new,
        advantages=advantages,
        response_mask=mask,
        loss_agg_mode=mode,
        config=actor() if config is None else config,
        **more,
    )
    (gradient,) = torch.autograd.grad(loss, new)
    return loss.detach(), gradient, metrics


def by_hand(make):
    old, new = log_probs()
    loss = make(new - old)
    (gradient,) = torch.autograd.grad(loss, new)
    return loss.detach(), gradient


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_an_estimator_and_a_loss(name):
    assert name in core.ADV_ESTIMATOR_REGISTRY
    assert name in core.POLICY_LOSS_REGISTRY
    advantages, returns = estimate(name)
    assert advantages.equal(returns)
    assert advantages.shape == MASK.shape
    assert advantages[~MASK].abs().max() == 0
    loss, gradient, metrics = policy_loss(name, advantages)
    assert loss.isfinite()
    assert gradient[~MASK].abs().max() == 0
    assert gradient.abs().max() > 0
    assert set(metrics) == {"actor/pg_clipfrac", "actor/ppo_kl"}
    assert 0 < metrics["actor/pg_clipfrac"] < 1


@pytest.mark.parametrize("mode", AGGREGATES)
def test_gbpo_through_verl_is_gbpo(mode):
    adapter.register(gbpo_temperature=0.5)
    advantages, _ = estimate("steelyard_gbpo")
    signals = gbpo_signals(REWARDS, GROUPS, temperature=0.5, epsilon_low=0.1, epsilon_high=0.3)
    assert signals.target_ratio.unique().numel() > 4  # neither 0 nor 1 of the band: soft targets
    torch.testing.assert_close(
        advantages[:, 0].float(), signals.advantages, atol=1e-6, rtol=0
    )  # what verl logs is still the advantage
    config = actor(clip_ratio_low=0.1, clip_ratio_high=0.3)
    loss, gradient, _ = policy_loss("steelyard_gbpo", advantages, mode, config)
    weight = signals.advantages.abs()
    expected, expected_gradient = by_hand(
        lambda ratio: gbpo_loss(
            ratio, signals.target_ratio, weight, mask=MASK, aggregate=AGGREGATES[mode]
        )
    )
    torch.testing.assert_close(loss, expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, atol=2e-6, rtol=1e-5)


@settings(max_examples=30)
@given(st.floats(-1000, 1000), st.floats(0, 1))
def test_an_advantage_carries_a_share_to_a_millionth(advantage, share):
    packed = adapter._pack(torch.tensor(advantage), torch.tensor(share))
    found = adapter._unpack(packed.reshape(1))
    assert abs(found[0].item() - torch.tensor(advantage).item()) <= 2.0**-20
    assert abs(found[1].item() - share) <= 1e-6


@pytest.mark.parametrize("mode", AGGREGATES)
def test_canon_and_adora_through_verl_are_theirs(mode):
    adapter.register(canon_mu=0.9, canon_alpha=0.8, adora_mode="amplify", adora_max_length=5)
    expected = {
        "steelyard_canon": canon_advantages(REWARDS, LENGTHS, GROUPS, mu=0.9, alpha=0.8),
        "steelyard_adora": group_relative_advantages(REWARDS, GROUPS)
        * adora_weights(REWARDS, LENGTHS, GROUPS, mode="amplify", max_length=5).weights,
    }
    for name, values in expected.items():
        advantages, _ = estimate(name)
        torch.testing.assert_close(advantages, values[:, None] * MASK)
        loss, gradient, _ = policy_loss(name, advantages, mode, actor(clip_ratio_high=0.28))
        wanted, slope = by_hand(
            lambda ratio, a=values: grpo_loss(
                ratio, a, epsilon_high=0.28, mask=MASK, aggregate=AGGREGATES[mode]
            )
        )
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(gradient, slope)


@pytest.mark.parametrize("mode", [*AGGREGATES, "seq-mean-token-sum-norm", "token-sum"])
def test_the_clip_and_its_mean_are_those_of_verl(mode):
    config = actor(clip_ratio_low=0.1, clip_ratio_high=0.25)
    config.global_batch_info.update(
        dp_size=2, batch_num_tokens=37, global_batch_size=16, loss_scale_factor=8
    )
    advantages, _ = estimate("steelyard_canon")
    weights = torch.rand(MASK.shape, generator=torch.Generator().manual_seed(1)) + 0.5
    more = {"mode": mode, "config": config, "rollout_is_weights": weights}
    ours = policy_loss("steelyard_canon", advantages, **more)
    theirs = policy_loss("vanilla", advantages, **more)
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])
    assert ours[2]["actor/ppo_kl"] == pytest.approx(theirs[2]["actor/ppo_kl"], rel=1e-5)


def test_adora_without_useless_prompts_is_grpo_of_verl():
    adapter.register(adora_weight=1.0)
    for by_deviation in (True, False):
        ours, _ = estimate(
            "steelyard_adora", config=AlgoConfig(norm_adv_by_std_in_grpo=by_deviation)
        )
        theirs, _ = core.get_adv_estimator_fn("grpo")(
            token_level_rewards=token_rewards(),
            response_mask=MASK.long(),
            index=LABELS,
            norm_adv_by_std_in_grpo=by_deviation,
        )
        torch.testing.assert_close(ours, theirs)


def test_bpo_fits_each_token_to_the_target_of_its_advantage():
    adapter.register(bpo_temperature=0.2)
    advantages, _ = estimate("steelyard_bpo")
    centred = group_relative_advantages(REWARDS, GROUPS, scale="none")
    torch.testing.assert_close(advantages, centred[:, None] * MASK)
    uneven = advantages * torch.linspace(0.5, 1.5, 5)  # GAE differs from token to token
    loss, gradient, _ = policy_loss("steelyard_bpo", uneven)
    target = bpo_target_ratio(uneven, torch.zeros_like(uneven), temperature=0.2)
    expected, slope = by_hand(lambda ratio: bpo_loss(ratio, target, uneven.abs(), mask=MASK))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, slope)


@pytest.mark.parametrize("name", NAMES)
def test_extreme_ratios_and_masked_batches_stay_finite(name):
    advantages, _ = estimate(name)
    old = torch.zeros(MASK.shape)
    for shift in (-1e4, 1e4):
        new = torch.full(MASK.shape, shift, requires_grad=True)
        loss, metrics = core.get_policy_loss_fn(name)(old, new, advantages, MASK, config=actor())
        loss.backward()
        assert loss.isfinite()
        assert new.grad.isfinite().all()
        assert metrics["actor/pg_clipfrac"] == 1
    config = actor()
    config.global_batch_info.update(batch_num_tokens=1)
    loss, gradient, _ = policy_loss(name, advantages, config=config, mask=torch.zeros_like(MASK))
    assert loss == 0
    assert gradient.abs().max() == 0


def test_the_trainer_of_verl_finds_the_estimators():
    ray_trainer = pytest.importorskip("verl.trainer.ppo.ray_trainer")
    from verl import DataProto

    for name in NAMES:
        data = DataProto.from_dict(
            tensors={"token_level_rewards": token_rewards(), "response_mask": MASK.long()},
            non_tensors={"uid": LABELS},
        )
        data = ray_trainer.compute_advantage(data, name, config=AlgoConfig(adv_estimator=name))
        assert data.batch["advantages"].equal(estimate(name)[0])


def test_the_actor_of_verl_finds_the_losses():
    """Through verl's own loss of a micro-batch, which pads, selects columns and adds the KL."""
    losses = pytest.importorskip("verl.workers.utils.losses")
    from tensordict import TensorDict

    old, new = log_probs()
    for name in NAMES:
        mode = PolicyLossConfig(loss_mode=name)
        config = actor(use_kl_loss=True, kl_loss_coef=0.1, policy_loss=mode)
        advantages, _ = estimate(name)
        batch = TensorDict(
            {
                "response_mask": MASK,
                "old_log_probs": old,
                "advantages": advantages,
                "ref_log_prob": old,
            },
            batch_size=len(MASK),
        )
        for key, value in (("dp_size", 1), ("batch_num_tokens", None), ("global_batch_size", None)):
            batch.set_non_tensor(key, value)
        plain = losses.no_padding_2_padding
        losses.no_padding_2_padding = lambda values, _: values  # ours are padded already
        try:
            loss, metrics = losses.ppo_loss(config, {"log_probs": new}, batch)
        finally:
            losses.no_padding_2_padding = plain
        expected, _, _ = policy_loss(name, advantages)
        kl = metrics["kl_loss"].values[0]
        assert math.isclose(float(loss), float(expected + 0.1 * kl), rel_tol=1e-5)


def test_registering_again_replaces_the_settings():
    adapter.register(canon_mu=0.0)
    intra, _ = estimate("steelyard_canon")
    adapter.register(canon_mu=1.0)
    inter, _ = estimate("steelyard_canon")
    assert not intra.equal(inter)


@pytest.mark.slow
def test_workers_register_through_the_variable_of_verl(tmp_path):
    (tmp_path / "my_objectives.py").write_text(
        "from steelyard.integrations import verl\nverl.register(canon_mu=0.8)\n"
    )
    code = (
        "import verl, sys\n"
        "from verl.trainer.ppo import core_algos as c\n"
        "assert 'steelyard_gbpo' in c.POLICY_LOSS_REGISTRY\n"
        "assert 'steelyard_gbpo' in c.ADV_ESTIMATOR_REGISTRY\n"
    )
    environment = {
        **os.environ,
        "VERL_USE_EXTERNAL_MODULES": "my_objectives",
        "PYTHONPATH": str(tmp_path),
    }
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"index": LABELS[:-1]}, ValueError, r"one group label for each of the 8 .*\[7\]"),
        ({"index": None}, ValueError, "index must be given"),
        ({"response_mask": MASK[:, 1:]}, ValueError, "response_mask must have shape"),
        ({"token_level_rewards": token_rewards().long()}, TypeError, "floating"),
        (
            {"token_level_rewards": token_rewards() * torch.tensor(math.nan)},
            ValueError,
            "must be finite, got a sum of nan for answer 0",
        ),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_batch_is_reported(name, changes, kind, message):
    with pytest.raises(kind, match=message):
        estimate(name, **changes)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("gbpo_temperature", 0.0),
        ("bpo_temperature", -1.0),
        ("canon_mu", 1.5),
        ("canon_alpha", 0.0),
        ("adora_mode", "double"),
        ("adora_weight", -1.0),
    ],
)
def test_a_setting_out_of_range_is_reported(setting, value):
    with pytest.raises(ValueError, match=setting):
        adapter.register(**{setting: value})


def test_gbpo_refuses_advantages_that_are_not_its_own():
    with pytest.raises(TypeError, match="estimator steelyard_gbpo, in float64"):
        policy_loss("steelyard_gbpo", torch.zeros(MASK.shape))
    with pytest.raises(ValueError, match="config must be given"):
        core.get_policy_loss_fn("steelyard_bpo")(*log_probs(), torch.zeros(MASK.shape), MASK)
