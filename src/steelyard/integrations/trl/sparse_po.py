r"""SparsePO in TRL's DPO trainer: a weight for each token, from the reference model's states.

Masks that learn are trained with the policy, and stored in files of their own: they are thrown away
afterwards, and a model that is saved should load as it always did.
"""
# ruff: noqa: E402, a missing extra must be reported before its imports are tried

from steelyard._extras import require

require("trl", extra="trl")

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from steelyard._checks import check_choice, check_range, check_shape
from steelyard.integrations.trl._backbone import LinearHead
from steelyard.integrations.trl._calls import names_wanted
from steelyard.integrations.trl._watch import Seen
from steelyard.preference import (
    fused_token_kl,
    mask_sparsity,
    sparse_po_loss,
    sparse_po_reward,
)

__all__ = ["SparsePO"]

TokenMask = Callable[..., Tensor]
"""``mask(hidden, mask)`` or ``mask(hidden)``: hidden ``[L, B, T, D]`` to weights ``[B, T]``."""

_FILE = "token_masks.safetensors"


@dataclass(frozen=True)
class SparsePO:
    r"""Weights of tokens for :class:`DPOTrainer`, from hidden states of the reference model.

    ================ ============================================================
    method           setting
    ================ ============================================================
    TDPO1            ``SparsePO()``
    MaPO             ``SparsePO(activation_mask)``
    SparsePO-common  ``SparsePO(LearnedTokenMask(L, D), l1_reward=1e-3, l1_kl=1e-3)``
    SparsePO-indep   ``SparsePO(LearnedTokenMask(L, D), LearnedTokenMask(L, D))``
    ================ ============================================================

    Attributes:
        reward_mask: weighs the log ratio of each token, function or module; ``None`` = 1.
            It is given ``hidden [L, 2B, T, D]``, the states that predict each token, first those of
            the chosen responses; and, if it has such a parameter, ``mask [2B, T]``, the tokens that
            count. The parameters of a module are trained with the policy.
        kl_mask: weighs the divergence of each state; ``None`` = ``reward_mask``.
        l1_reward: weight of the size of reward masks, see
            :func:`steelyard.preference.sparse_po_loss`.
        l1_kl: of KL masks.
        l1_aggregate: ``"sum"`` or ``"mean"`` over the tokens of a response.
        learning_rate: of the modules' parameters; ``None`` = that of the policy, which is small
            for them.
        weight_decay: of the modules' parameters. Default 0.01, the paper's.
    """

    reward_mask: TokenMask | None = None
    kl_mask: TokenMask | None = None
    l1_reward: float = 0.0
    l1_kl: float = 0.0
    l1_aggregate: Literal["sum", "mean"] = "sum"
    learning_rate: float | None = None
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        check_range("l1_reward", self.l1_reward, at_least=0.0, below=math.inf)
        check_range("l1_kl", self.l1_kl, at_least=0.0, below=math.inf)
        check_range("weight_decay", self.weight_decay, at_least=0.0, below=math.inf)
        check_choice("l1_aggregate", self.l1_aggregate, ("sum", "mean"))
        if self.learning_rate is not None:
            check_range("learning_rate", self.learning_rate, above=0.0, below=math.inf)
        for name, mask in self.functions().items():
            names_wanted(_signature_of(mask), f"{name}=", ("hidden", "mask"))

    def functions(self) -> dict[str, TokenMask]:
        """The masks that are given, by name."""
        given = {"reward_mask": self.reward_mask, "kl_mask": self.kl_mask}
        return {name: mask for name, mask in given.items() if mask is not None}

    def modules(self) -> dict[str, nn.Module]:
        """Those that have parameters."""
        return {
            name: mask
            for name, mask in self.functions().items()
            if isinstance(mask, nn.Module) and any(True for _ in mask.parameters())
        }


class Weights(NamedTuple):
    """Weights of tokens, each ``[2B, T]`` or ``None`` for 1."""

    reward: Tensor | None
    kl: Tensor | None


class TokenWeights(TrainerCallback):
    """The masks of a setting on the trainer's devices, their parameters and their file.

    As a callback of the trainer, which sets only the gradients of its model to zero, it does so
    for the masks.

    Args:
        setting: what to use.
        accelerator: the trainer's.
    """

    def __init__(self, setting: SparsePO, accelerator: Any) -> None:
        self.setting = setting
        self.accelerator = accelerator
        self.functions = dict(setting.functions())
        several = accelerator.num_processes > 1
        for name, module in setting.modules().items():
            module.to(accelerator.device)
            self.functions[name] = accelerator.prepare_model(module) if several else module

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Forget the gradients that have been used."""
        for module in self.setting.modules().values():
            module.zero_grad()

    def of(self, reference: Seen, mask: Tensor, *, training: bool) -> Weights:
        """Weights of the tokens of a batch.

        Args:
            reference: with the states of all layers, if there are masks.
            mask: tokens that count, ``[2B, T]``.
            training: dropout of modules is on.

        Raises:
            ValueError: a mask returned another shape.
        """
        if reference.states is None or reference.states.layers is None:
            return Weights(None, None)
        given = {"hidden": reference.states.layers[:, :, :-1], "mask": mask}
        found = {}
        for name, function in self.setting.functions().items():
            if isinstance(function, nn.Module):
                function.train(training)
            wanted = names_wanted(_signature_of(function), f"{name}=", given)
            weight = self.functions[name](**{key: given[key] for key in wanted})
            check_shape(f"weights returned by {name}=", weight, tuple(mask.shape))
            found[name] = weight
        reward = found.get("reward_mask")
        return Weights(reward, found.get("kl_mask", reward))

    def join(self, optimizer: torch.optim.Optimizer, *, add: bool) -> None:
        """Give the masks' parameters to an optimizer, or require that it has them.

        Raises:
            ValueError: it has not, and may not be changed.
        """
        modules = {id(module): module for module in self.setting.modules().values()}
        parameters = [p for module in modules.values() for p in module.parameters()]
        parameters = [p for p in parameters if p.requires_grad]
        if parameters and add:
            group = {"params": parameters, "weight_decay": self.setting.weight_decay}
            if self.setting.learning_rate is not None:
                group["lr"] = self.setting.learning_rate
            optimizer.add_param_group(group)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(parameter) not in known for parameter in parameters):
            raise ValueError(
                "optimizers must hold the parameters of the token masks too, or these stay as they "
                "are; leave optimizers out and they get a group of their own"
            )

    def save(self, folder: Path) -> None:
        """Store the parameters beside the model's."""
        tensors = {
            f"{name}.{key}": value.detach().cpu().clone()
            for name, module in self.setting.modules().items()
            for key, value in module.state_dict().items()
        }
        if tensors:
            save_file(tensors, folder / _FILE)

    def load(self, folder: Path) -> None:
        """Read them again."""
        tensors = load_file(folder / _FILE) if self.setting.modules() else {}
        for name, module in self.setting.modules().items():
            start = f"{name}."
            module.load_state_dict(
                {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
            )


@dataclass(frozen=True)
class TokenPairs:
    """Log ratios and divergences of the tokens of a batch, ``[2B, T]``, chosen ones first."""

    log_ratio: Tensor
    kl: Tensor
    mask: Tensor

    @classmethod
    def of(
        cls,
        tokens: Tensor,
        policy: Seen,
        reference: Seen,
        heads: tuple[LinearHead, LinearHead],
        mask: Tensor,
    ) -> "TokenPairs":
        """From what the two models showed.

        Args:
            tokens: log-probabilities of the policy, ``[2B, T]``.
            policy: with its last states.
            reference: with its last states and log-probabilities.
            heads: of policy and reference.
            mask: tokens that count.
        """
        assert policy.states is not None  # as the watch was told to look at them
        assert reference.states is not None
        assert reference.logprobs is not None
        with torch.autocast(mask.device.type, enabled=False):
            kl = fused_token_kl(
                policy.states.last[:, :-1].to(heads[0].weight.dtype),
                heads[0].weight,
                reference.states.last[:, :-1].to(heads[1].weight.dtype),
                heads[1].weight,
                mask=mask,
                policy_bias=heads[0].bias,
                ref_bias=heads[1].bias,
            )
        return cls(tokens - reference.logprobs, kl, mask)

    def loss(self, weights: Weights, setting: SparsePO, beta: float) -> Tensor:
        """Mean loss of the pairs."""
        ratio, kl = self.log_ratio.chunk(2), self.kl.chunk(2)
        reward, leash = _halves(weights.reward), _halves(weights.kl)
        mask = self.mask.chunk(2)
        return sparse_po_loss(
            *ratio,
            *kl,
            beta=beta,
            reward_mask_chosen=reward[0],
            reward_mask_rejected=reward[1],
            kl_mask_chosen=leash[0],
            kl_mask_rejected=leash[1],
            l1_reward=setting.l1_reward,
            l1_kl=setting.l1_kl,
            l1_aggregate=setting.l1_aggregate,
            mask_chosen=mask[0],
            mask_rejected=mask[1],
        )

    @torch.no_grad()
    def rewards(self, weights: Weights, beta: float) -> tuple[Tensor, ...]:
        """Implicit rewards of chosen and of rejected responses, each ``[B]``."""
        reward = sparse_po_reward(
            self.log_ratio,
            self.kl,
            beta=beta,
            reward_mask=weights.reward,
            kl_mask=weights.kl,
            mask=self.mask,
        )
        return tuple(reward.chunk(2))

    @torch.no_grad()
    def summary(self, weights: Weights) -> dict[str, Tensor]:
        """What is logged, as sums over tokens: divergences, masks and their zeros."""
        totals = {"token_kl": self.kl.sum()}
        for name, weight in weights._asdict().items():
            if weight is not None:
                totals[f"{name}_mean"] = (weight.float() * self.mask).sum()
                totals[f"{name}_zeros"] = mask_sparsity(weight, self.mask) * self.mask.sum()
        return totals


def _halves(values: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if values is None:
        return None, None
    chosen, rejected = values.chunk(2)
    return chosen, rejected


def _signature_of(mask: TokenMask) -> Callable[..., Any]:
    return mask.forward if isinstance(mask, nn.Module) else mask
