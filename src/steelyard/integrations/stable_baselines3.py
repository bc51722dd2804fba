r"""BPO as a stable-baselines3 algorithm.

The trainer, its rollouts, callbacks, logger and files stay those of stable-baselines3; what this
module adds is the update: the losses of :mod:`steelyard.policy` and a head for the threshold.

Source: Ao et al. (2026), Bounded Ratio Reinforcement Learning, Eq. 16, arXiv:2604.18578.
"""
# ruff: noqa: E402, a missing extra must be reported before its imports are tried

from steelyard._extras import require

require("stable_baselines3", extra="rl")

import functools
import warnings
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.type_aliases import (
    GymEnv,
    MaybeCallback,
    PyTorchObs,
    RolloutBufferSamples,
    Schedule,
)
from stable_baselines3.common.utils import explained_variance
from torch import Tensor, nn

from steelyard._checks import check_choice, check_range
from steelyard.policy import bpo_loss, bpo_target_ratio, bpo_threshold_loss

__all__ = ["BPO", "ThresholdPolicy", "with_threshold"]

BAND_TOLERANCE = 0.01
"""A ratio counts as out of the band when it is farther than this outside."""

MIN_CLIP_RANGE = 1e-6
"""Where a schedule that runs down to 0 stops: the target ratio is then 1 for every action."""

_ACTION_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


class BPO(OnPolicyAlgorithm):
    r"""Bounded-ratio policy optimisation: PPO's trainer, with a loss that pulls back overshoots.

    With the return estimate ``R`` (GAE advantage + old value), the value ``V``, the threshold
    ``u`` and the ratio ``rho`` to the policy that made the rollout, each minibatch minimises

    .. math::
        \mathrm{mean}\big[\,|R - V|\,|\rho - \rho^*|\,\big]
        + c_v\, \mathrm{mean}\,(R - V)^2 + c_u\, L_u(R, u) - c_e\, H(\pi),
        \qquad \rho^* = 1 - \epsilon + 2\epsilon\, \sigma\big((R - u)/\lambda\big).

    The weight ``|R - V|`` and the target ``rho*`` are detached. Advantages are never normalised.
    ``learn``, ``predict``, ``save``, ``load``, callbacks and logging are stable-baselines3's own.

    Logged under ``train/`` beside PPO's names: ``threshold_loss``, and ``out_of_band``, the share
    of ratios more than 0.01 outside the band; it and ``approx_kl`` are means over the last epoch,
    the losses over all minibatches.

    Args:
        policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"`` or a subclass of
            ``ActorCriticPolicy``; gets the threshold head by :func:`with_threshold`.
        env: environment, vector environment or registered name.
        learning_rate: a number, or a function of the remaining progress (1 to 0).
        n_steps: steps of each environment in a rollout.
        batch_size: items of a minibatch.
        n_epochs: passes over each rollout.
        gamma: discount, in [0, 1].
        gae_lambda: bias-variance setting of the advantages, in [0, 1].
        clip_range: epsilon, half-width of the band, in (0, 1], or a function of the remaining
            progress; a schedule at or below 0 counts as 1e-6.
        ent_coef: weight of the entropy bonus.
        vf_coef: weight of the value loss, >= 0.
        max_grad_norm: largest norm of the gradient, > 0. The paper's 1.0, where PPO has 0.5.
        temperature: lambda, *in reward units*, >= 0; 0 is the hard target ``1 +- epsilon``.
            Scaling rewards, with ``VecNormalize`` too, changes what it means.
        use_threshold: learn u with a head of its own; ``False`` uses the value in its place.
        threshold_coef: weight of the threshold loss, >= 0.
        threshold_kind: see :func:`steelyard.policy.bpo_threshold_loss`: ``"code"`` is what the
            released code trains, ``"temperature"`` the loss whose minimum is u at ``temperature``,
            ``"median"`` its limit at 0.
        online_weight: weigh with the value as it is trained, as the released code does;
            ``False`` keeps that of the rollout, so that the weights are the GAE advantages.
            It holds for the target too where that is made from the value.
        use_sde: state-dependent exploration, for continuous actions.
        sde_sample_freq: steps between its noise matrices; -1 = one for each rollout.
        rollout_buffer_class: ``None`` = chosen by the observation space.
        rollout_buffer_kwargs: its further arguments.
        target_kl: stop the update when ``approx_kl`` exceeds 1.5 times this; ``None`` = never.
        stats_window_size: episodes in the logged means.
        tensorboard_log: folder for TensorBoard; ``None`` = no log.
        policy_kwargs: further arguments of the policy.
        verbose: 0 silent, 1 messages, 2 debugging.
        seed: seed of the environment, NumPy and torch.
        device: where to train.
        _init_setup_model: build the networks now; ``load`` sets it.

    Raises:
        ValueError: a setting is out of range.
        TypeError: ``policy`` is not an actor-critic policy, or ``clip_range`` neither a number
            nor a function.
        FloatingPointError: from ``learn``, when a return or a gradient is NaN or infinite. The
            parameters keep the last finite update.

    Example:
        The threshold is a head on the critic's features, saved and optimised with the policy. Many
        epochs on one rollout leave few ratios outside the band:

        >>> model = BPO("MlpPolicy", "CartPole-v1", n_steps=256, n_epochs=20, seed=0, device="cpu")
        >>> model.policy.threshold_net
        Linear(in_features=64, out_features=1, bias=True)
        >>> logged = model.learn(512).logger.name_to_value
        >>> bool(logged["train/out_of_band"] < 0.1)
        True

    Source: Ao et al. (2026), Eq. 16 and Table of settings, arXiv:2604.18578. There u is an MLP on
    the critic's features; here it is linear on the last hidden layer of the critic, like V.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": ActorCriticPolicy,
        "CnnPolicy": ActorCriticCnnPolicy,
        "MultiInputPolicy": MultiInputActorCriticPolicy,
    }

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: int = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.2,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 1.0,
        *,
        temperature: float = 1e-3,
        use_threshold: bool = True,
        threshold_coef: float = 0.5,
        threshold_kind: Literal["code", "temperature", "median"] = "code",
        online_weight: bool = True,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        target_kl: float | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
            supported_action_spaces=_ACTION_SPACES,
        )
        self.batch_size = batch_size
        self.n_epochs = n_epochs
        self.clip_range = clip_range
        self.temperature = temperature
        self.use_threshold = use_threshold
        self.threshold_coef = threshold_coef
        self.threshold_kind = threshold_kind
        self.online_weight = online_weight
        self.target_kl = target_kl
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        self._check_settings()
        given = self.policy_class
        if self.use_threshold:
            self.policy_class = with_threshold(given)
        super()._setup_model()
        self.policy_class = given  # `save` then stores a class that can be imported

    def _check_settings(self) -> None:
        """Check all settings in one place, by which ``load`` comes too."""
        if not hasattr(self, "observation_space"):
            raise ValueError("env must be an environment or the name of one, got None")
        if not (
            isinstance(self.policy_class, type) and issubclass(self.policy_class, ActorCriticPolicy)
        ):
            raise TypeError(
                f"policy must be one of {', '.join(self.policy_aliases)} or a subclass of "
                f"ActorCriticPolicy, got {self.policy_class!r}"
            )
        for name in ("n_steps", "batch_size", "n_epochs"):
            check_range(name, getattr(self, name), at_least=1)
        for name in ("gamma", "gae_lambda"):
            check_range(name, getattr(self, name), at_least=0.0, at_most=1.0)
        for name in ("vf_coef", "threshold_coef", "temperature"):
            check_range(name, getattr(self, name), at_least=0.0)
        check_range("ent_coef", self.ent_coef)
        check_range("max_grad_norm", self.max_grad_norm, above=0.0)
        if self.target_kl is not None:
            check_range("target_kl", self.target_kl, above=0.0)
        check_range("clip_range", _clip_range_at(self.clip_range, 1.0), above=0.0, at_most=1.0)
        check_choice("threshold_kind", self.threshold_kind, ("code", "temperature", "median"))
        if self.use_threshold and self.threshold_kind == "temperature" and self.temperature == 0:
            raise ValueError(
                "temperature must be > 0 with threshold_kind='temperature', got 0; "
                "its limit there is threshold_kind='median'"
            )
        self._check_minibatches()

    def _check_minibatches(self) -> None:
        rollout = self.n_steps * self.n_envs
        if rollout % self.batch_size:
            warnings.warn(
                f"batch_size should divide n_steps * n_envs = {rollout}, got {self.batch_size}: "
                f"the last minibatch of each epoch has {rollout % self.batch_size} items, which "
                "then weigh more than the others",
                stacklevel=5,  # the line that calls BPO
            )

    def train(self) -> None:
        """Update the policy from the rollout in the buffer."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        self._check_rollout()
        epsilon = max(
            _clip_range_at(self.clip_range, self._current_progress_remaining), MIN_CLIP_RANGE
        )
        check_range("clip_range", epsilon, at_most=1.0)
        epochs: list[Tensor] = []
        stop = False
        while len(epochs) < self.n_epochs and not stop:
            steps: list[_Step] = []
            for batch in self.rollout_buffer.get(self.batch_size):
                step = self._evaluate(batch, epsilon)
                steps.append(step)
                stop = self._too_far(step, len(epochs))
                if stop:
                    break
                self._descend(step)
            epochs.append(torch.stack([torch.stack(step).detach() for step in steps]))
            self._n_updates += 1
        self._log(torch.cat(epochs).mean(0), epochs[-1].mean(0), epsilon)

    def _evaluate(self, batch: RolloutBufferSamples, epsilon: float) -> "_Step":
        """Return the losses of a minibatch and how far the policy has gone from the rollout's."""
        actions = batch.actions
        if isinstance(self.action_space, spaces.Discrete):
            actions = actions.long().flatten()
        threshold: Tensor | None = None
        if isinstance(self.policy, ThresholdPolicy):
            values, logprob, entropy, threshold = self.policy.evaluate_actions_and_threshold(
                batch.observations, actions
            )
        else:
            values, logprob, entropy = self.policy.evaluate_actions(batch.observations, actions)
        values = values.flatten()
        baseline = values.detach() if self.online_weight else batch.old_values
        log_ratio = logprob - batch.old_log_prob
        target = bpo_target_ratio(
            batch.returns,
            baseline if threshold is None else threshold,
            epsilon=epsilon,
            temperature=self.temperature,
        )
        policy_loss = bpo_loss(log_ratio, target, (batch.returns - baseline).abs())
        value_loss = nn.functional.mse_loss(values, batch.returns)
        threshold_loss = self._threshold_loss(batch.returns, threshold)
        entropy_loss = logprob.mean() if entropy is None else -entropy.mean()
        loss = policy_loss + self.vf_coef * value_loss + self.ent_coef * entropy_loss
        if threshold is not None:
            loss = loss + self.threshold_coef * threshold_loss
        gone = log_ratio.detach()
        approx_kl = (gone.expm1() - gone).mean()
        out_of_band = (gone.expm1().abs() > epsilon + BAND_TOLERANCE).to(gone.dtype).mean()
        return _Step(
            loss, policy_loss, value_loss, threshold_loss, entropy_loss, approx_kl, out_of_band
        )

    def _threshold_loss(self, returns: Tensor, threshold: Tensor | None) -> Tensor:
        if threshold is None:
            return returns.new_zeros(())
        # The temperature is used by one kind only; the others admit 0 as the target's.
        temperature = self.temperature if self.threshold_kind == "temperature" else 1.0
        return bpo_threshold_loss(
            returns, threshold, temperature=temperature, kind=self.threshold_kind
        )

    def _too_far(self, step: "_Step", epoch: int) -> bool:
        """Say whether ``target_kl`` ends the update before this minibatch's step."""
        if self.target_kl is None or step.approx_kl.item() <= 1.5 * self.target_kl:
            return False
        if self.verbose >= 1:
            print(f"Update stopped in epoch {epoch}: approx_kl is {step.approx_kl.item():.4f}")
        return True

    def _descend(self, step: "_Step") -> None:
        """Take one clipped step, or none if the gradient is not finite."""
        self.policy.optimizer.zero_grad()
        step.loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        if not torch.isfinite(norm):
            named = ", ".join(f"{name} {x.item():.4g}" for name, x in step._asdict().items())
            raise FloatingPointError(
                f"the gradient is not finite at timestep {self.num_timesteps} ({named}); "
                "the parameters keep the last finite update"
            )
        self.policy.optimizer.step()

    def _check_rollout(self) -> None:
        if not np.isfinite(self.rollout_buffer.returns).all():
            raise FloatingPointError(
                f"returns are NaN or infinite at timestep {self.num_timesteps}: check the rewards "
                "of the environment; the parameters keep the last finite update"
            )

    def _log(self, mean: Tensor, last_epoch: Tensor, epsilon: float) -> None:
        means, last = _Step(*mean.tolist()), _Step(*last_epoch.tolist())
        record = self.logger.record
        record("train/loss", means.loss)
        record("train/policy_gradient_loss", means.policy_loss)
        record("train/value_loss", means.value_loss)
        if self.use_threshold:
            record("train/threshold_loss", means.threshold_loss)
        record("train/entropy_loss", means.entropy_loss)
        record("train/approx_kl", last.approx_kl)
        record("train/out_of_band", last.out_of_band)
        buffer = self.rollout_buffer
        explained = explained_variance(buffer.values.flatten(), buffer.returns.flatten())
        record("train/explained_variance", explained)
        if hasattr(self.policy, "log_std"):
            record("train/std", self.policy.log_std.detach().exp().mean().item())
        record("train/n_updates", self._n_updates, exclude="tensorboard")
        record("train/clip_range", epsilon)

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "BPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Train for at least this many timesteps; arguments as in stable-baselines3."""
        return super().learn(
            total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )


class _Step(NamedTuple):
    """What one minibatch is logged with; scalars."""

    loss: Tensor
    policy_loss: Tensor
    value_loss: Tensor
    threshold_loss: Tensor
    entropy_loss: Tensor
    approx_kl: Tensor
    out_of_band: Tensor


class ThresholdPolicy(ActorCriticPolicy):
    """Actor-critic policy with a second head on the critic, ``threshold_net``, for u(s).

    The head is a module like the others, so that the optimiser, ``state_dict``, ``save`` and
    ``load`` hold it. Arguments are those of ``ActorCriticPolicy``.
    """

    threshold_net: nn.Linear

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        self.threshold_net = nn.Linear(self.mlp_extractor.latent_dim_vf, 1)
        if self.ortho_init:
            self.init_weights(self.threshold_net, gain=1)
        self.optimizer.add_param_group({"params": list(self.threshold_net.parameters())})

    def evaluate_actions_and_threshold(
        self, obs: PyTorchObs, actions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Evaluate actions, and the threshold from the same pass through the critic.

        Args:
            obs: ``B`` observations.
            actions: ``[B, ..]``, as ``evaluate_actions`` takes them.

        Returns:
            ``values [B, 1]``, ``logprob [B]``, ``entropy [B]`` or ``None``, ``threshold [B]``.

        Raises:
            RuntimeError: the policy's own ``evaluate_actions`` does not call ``value_net``.
        """
        latents: list[Tensor] = []
        with self.value_net.register_forward_pre_hook(lambda _, inputs: latents.append(inputs[0])):
            values, logprob, entropy = self.evaluate_actions(obs, actions)
        if not latents:
            raise RuntimeError(
                f"{type(self).__name__}.evaluate_actions must call value_net: the threshold head "
                "reads its input; use_threshold=False needs no head"
            )
        return values, logprob, entropy, self.threshold_net(latents[-1]).flatten()


@functools.cache
def with_threshold(policy_class: type[ActorCriticPolicy]) -> type[ActorCriticPolicy]:
    """Return the policy class with a threshold head; a class that has one, as it is.

    :class:`BPO` calls it. You need it to read a policy that was saved on its own:
    ``with_threshold(ActorCriticPolicy).load(path)``.

    Args:
        policy_class: ``ActorCriticPolicy`` or a subclass.

    Returns:
        A subclass of both ``policy_class`` and :class:`ThresholdPolicy`, always the same one.

    Example:
        >>> from stable_baselines3.common.policies import ActorCriticCnnPolicy
        >>> issubclass(with_threshold(ActorCriticCnnPolicy), ActorCriticCnnPolicy)
        True
        >>> with_threshold(ThresholdPolicy) is ThresholdPolicy
        True
    """
    if issubclass(policy_class, ThresholdPolicy):
        return policy_class
    # The name is kept: stable-baselines3 looks at it to advise on the device.
    return type(policy_class.__name__, (ThresholdPolicy, policy_class), {})


def _clip_range_at(schedule: float | Schedule, progress_remaining: float) -> float:
    """Return ``clip_range`` at a moment of the training."""
    value = schedule(progress_remaining) if callable(schedule) else schedule
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"clip_range must be a number or a function that returns one, got {value!r}"
        ) from None
