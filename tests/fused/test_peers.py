"""The same numbers as other packages, where their definitions are ours."""

import pytest
import torch

from steelyard.divergences import JENSEN_SHANNON, KL, REVERSE_KL, skew_jensen_shannon
from steelyard.fused import linear_divergence, linear_logprobs

TARGETS = torch.tensor([0, 12, 3, 3, 7, 1, 11, 5])
LABELS = torch.tensor([4, -100, 0, 12, -100, 7, 1, 2])


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture
def heads(tensor):
    """Hidden states and weight of a teacher ``p``, then those of a narrower student ``q``."""
    return tensor(8, 5), tensor(13, 5), tensor(8, 4), tensor(13, 4)


def generalized(beta):
    """Divergence that TRL and Liger call JSD of weight ``beta``: at the ends they switch to KL."""
    return {0.0: KL, 1.0: REVERSE_KL}.get(beta) or skew_jensen_shannon(beta)


def assert_same(mine, theirs, leaves, bound=1e-10):
    """Compare the values, then the gradients of a sum that weighs all of them differently."""
    gradients = []
    for value in (mine, theirs):
        loss = value if value.dim() == 0 else value @ torch.linspace(0.5, 2.0, len(value)).double()
        gradients.append(torch.autograd.grad(loss, leaves, retain_graph=True))
    torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=bound, atol=bound)
    torch.testing.assert_close(*gradients, rtol=bound, atol=bound)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_are_those_of_trl(heads, temperature):
    trl = pytest.importorskip("trl.trainer.utils")
    hidden, weight = heads[:2]
    mine = linear_logprobs(hidden, weight, TARGETS, temperature=temperature)
    logits = hidden @ weight.T / temperature
    logprobs = trl.selective_log_softmax(logits, TARGETS)
    assert_same(mine.logprobs, logprobs, (hidden, weight))
    assert_same(mine.entropy, trl.entropy_from_logits(logits), (hidden, weight))


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_generalized_jsd_is_that_of_trl(heads, beta):
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    p_hidden, p_weight, q_hidden, q_weight = heads
    mine = linear_divergence(
        *heads, generalized(beta), temperature=1.5, mask=LABELS != -100, reduction="mean"
    )
    theirs = gkd.GKDTrainer.generalized_jsd_loss(
        (q_hidden @ q_weight.T)[None],
        (p_hidden @ p_weight.T)[None],
        LABELS[None],
        beta=beta,
        temperature=1.5,
    )
    assert_same(mine, theirs, heads)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_generalized_jsd_is_that_of_liger(heads, beta):
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    p_hidden, p_weight, q_hidden, q_weight = heads
    mine = linear_divergence(
        *heads, generalized(beta), temperature=1.5, mask=LABELS != -100, reduction="mean"
    )
    loss = liger.LigerFusedLinearJSDLoss(
        0.0, 1.0, beta=beta, temperature=1.5, compiled=False, chunk_size=3
    )
    theirs = loss(q_hidden, q_weight, p_hidden.detach(), p_weight.detach(), LABELS)
    # Liger adds the loss up in float32.
    assert_same(mine, theirs, (q_hidden, q_weight), 1e-6)


def test_the_policy_gradient_is_that_of_liger(tensor):
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    hidden, weight = tensor(8, 5), tensor(13, 5)
    advantages = torch.tensor([1.0, -2.0], dtype=torch.float64)
    loss = liger.LigerFusedLinearGRPOLoss(
        0.0, compiled=False, use_ref_model=False, temperature=0.7, loss_type="bnpo"
    )
    ids = TARGETS.view(2, 4)
    theirs = loss(hidden.view(2, 4, 5), weight, ids, torch.ones_like(ids), advantages)[0]
    logprobs = linear_logprobs(hidden, weight, TARGETS, temperature=0.7).logprobs
    surrogate = (logprobs - logprobs.detach()).exp() * advantages.repeat_interleave(4)
    assert_same(-surrogate.mean(), theirs, (hidden, weight), 1e-6)


def test_the_gradient_of_cross_entropy_is_that_of_torch(tensor):
    hidden, weight, bias = tensor(8, 5), tensor(13, 5), tensor(13)
    mine = -linear_logprobs(hidden, weight, TARGETS, bias=bias).logprobs
    logits = torch.nn.functional.linear(hidden, weight, bias)
    theirs = torch.nn.functional.cross_entropy(logits, TARGETS, reduction="none")
    assert_same(mine, theirs, (hidden, weight, bias))


def test_jensen_shannon_is_that_of_scipy(heads):
    distance = pytest.importorskip("scipy.spatial.distance")
    p, q = ((h @ w.T).softmax(-1).detach().numpy() for h, w in (heads[:2], heads[2:]))
    mine = linear_divergence(*heads, JENSEN_SHANNON, reduction="none")
    theirs = torch.from_numpy(distance.jensenshannon(p, q, axis=1) ** 2)
    torch.testing.assert_close(mine.detach(), theirs, rtol=1e-10, atol=1e-12)
