"""Valid calls of diffusion, flows, masked decoding and the vision tools."""

# ruff: noqa: C408, PLW0108 - a case reads like the call it stands for

import torch

from _fuzz_values import (
    DTYPE,
    classes,
    generator,
    integers,
    negative,
    ones,
    positive,
    probs,
    real,
    unit,
)
from steelyard import diffusion
from steelyard.divergences import KL

STATES = ((0, 0, 1), (0, 1, 1), (1, 1, 0))


def field(x, t):
    """A smooth velocity."""
    return -x * (1 + t.reshape(-1, *[1] * (x.dim() - 1)))


def masked_model():
    """An exact model of three sequences of length three."""
    return diffusion.TabularMaskedModel(torch.tensor(STATES), probs(3), vocab_size=2, mask_id=2)


def mixture():
    """A mixture of two Gaussians in the plane."""
    return diffusion.GaussianMixture(probs(2), real(2, 2), positive(2))


def two(first, second, **more):
    """Two tensors of four points in the plane."""
    return {first: real(4, 2), second: real(4, 2, shift=1)} | more


DIFFUSION = {
    "diffusion.GaussianMixture": lambda: dict(weights=probs(2), means=real(2, 2), stds=positive(2)),
    "diffusion.GaussianMixture.log_prob": lambda: dict(self_=mixture(), x=real(4, 2), sigma=0.5),
    "diffusion.GaussianMixture.score": lambda: dict(self_=mixture(), x=real(4, 2), sigma=0.5),
    "diffusion.GaussianMixture.denoise": lambda: dict(self_=mixture(), x=real(4, 2), sigma=0.5),
    "diffusion.GaussianMixture.sample": lambda: dict(self_=mixture(), n=3, generator=generator()),
    "diffusion.RatioNormalizer": lambda: dict(),
    "diffusion.RatioNormalizer.forward": lambda: dict(
        self_=diffusion.RatioNormalizer(), logits=real(4, 2), t=unit(4)
    ),
    "diffusion.TabularMaskedModel": lambda: dict(
        states=torch.tensor(STATES), probs=probs(3), vocab_size=2, mask_id=2
    ),
    "diffusion.TabularMaskedModel.forward": lambda: dict(
        self_=masked_model(), ids=torch.tensor([[2, 0, 2], [0, 2, 1]])
    ),
    "diffusion.awm_log_likelihood": lambda: (
        two("velocity", "clean", noise=real(4, 2, shift=2)) | dict(t=unit(4))
    ),
    "diffusion.awm_loss": lambda: dict(
        log_likelihood=negative(4),
        old_log_likelihood=negative(4, shift=1),
        advantages=real(4),
        mask=ones(4),
    ),
    "diffusion.awm_proximity": lambda: two("velocity", "ref_velocity", t=unit(4)),
    "diffusion.categorical_to_logits": lambda: dict(codes=classes(4, of=3), num_classes=3),
    "diffusion.clip_advantages": lambda: dict(advantages=real(4)),
    "diffusion.cone_select": lambda: dict(
        scores=real(2, 3, 2), weights=probs(2, 2), cone_angle=positive(2)
    ),
    "diffusion.data_to_velocity": lambda: two("data", "x", t=unit(4)),
    "diffusion.noise_to_velocity": lambda: two("noise", "x", t=unit(4)),
    "diffusion.score_to_velocity": lambda: two("score", "x", t=unit(4)),
    "diffusion.velocity_to_data": lambda: two("velocity", "x", t=unit(4)),
    "diffusion.velocity_to_noise": lambda: two("velocity", "x", t=unit(4)),
    "diffusion.velocity_to_score": lambda: two("velocity", "x", t=unit(4)),
    "diffusion.interpolate": lambda: two("data", "noise", t=0.3),
    "diffusion.velocity_target": lambda: two("data", "noise"),
    "diffusion.ddpo_step": lambda: (
        two("x", "eps_pred", x_prev=real(4, 2, shift=2)) | dict(alphabar=0.5, alphabar_prev=0.7)
    ),
    "diffusion.decode_masked": lambda: dict(
        model=masked_model(),
        tokens=integers(2, 2, 2),
        mask_id=2,
        steps=2,
        num_candidates=3,
        block_size=2,
        generator=generator(),
    ),
    "diffusion.discriminator_loss": lambda: dict(real_logits=real(4), fake_logits=real(5, shift=1)),
    "diffusion.dmd_loss": lambda: (
        two("x", "teacher_x0", fake_x0=real(4, 2, shift=2)) | dict(weight=positive(4))
    ),
    "diffusion.edm_noisy_target_variance": lambda: dict(sigma_t=2.0, sigma_s=positive(4)),
    "diffusion.f_distill_weight": lambda: dict(log_ratio=real(4), divergence=KL, normalize=True),
    "diffusion.fake_score_loss": lambda: two("fake_x0", "x", sigma=positive(4)),
    "diffusion.finite_data_velocity": lambda: dict(
        x=real(4, 2), data=real(3, 2, shift=1), t=0.5, probs=probs(3)
    ),
    "diffusion.flow_grpo_kl": lambda: two("velocity", "ref_velocity", t=0.6, t_prev=0.5),
    "diffusion.flow_grpo_step": lambda: (
        two("x", "velocity", x_prev=real(4, 2, shift=2)) | dict(t=0.6, t_prev=0.5)
    ),
    "diffusion.flow_times": lambda: dict(steps=3),
    "diffusion.generator_loss": lambda: dict(fake_logits=real(4)),
    "diffusion.guided_velocity": lambda: dict(
        velocity_fn=field, predictors=torch.square, x=real(4, 2), weights=probs(4, 2), t=0.8
    ),
    "diffusion.hypervolume": lambda: dict(points=real(4, 2), reference=positive(2) + 1),
    "diffusion.information_gain_scores": lambda: dict(
        model=masked_model(),
        tokens=integers(2, 2, 2),
        candidates=[([0], [0]), ([1, 2], [1, 1])],
        mask_id=2,
    ),
    "diffusion.karras_sigmas": lambda: dict(n=4),
    "diffusion.logits_to_categorical": lambda: dict(logits=real(4, 2)),
    "diffusion.masked_nelbo": lambda: dict(
        model=masked_model(),
        tokens=torch.tensor(STATES),
        mask_id=2,
        form="enumerate",
        mask=ones(3, 3),
        generator=generator(),
    ),
    "diffusion.minimum_partitions": lambda: dict(objectives=3, count=40),
    "diffusion.noisy_score_target": lambda: two("x_t", "x_s", t=0.6, s=0.3),
    "diffusion.noisy_target_variance_ratio": lambda: dict(t=0.6, s=unit(3) / 2),
    "diffusion.non_dominated_sort": lambda: dict(points=real(5, 2)),
    "diffusion.position_entropies": lambda: dict(logits=real(2, 3, 4), mask=ones(2, 3)),
    "diffusion.prompt_advantages": lambda: dict(
        rewards=real(6), prompts=["a", "a", "a", "b", "b", "b"]
    ),
    "diffusion.repair_to_box": lambda: (
        two("x", "velocity", t=0.5, low=-positive(2)) | dict(high=positive(2))
    ),
    "diffusion.sample_ode": lambda: dict(
        velocity_fn=field, x=real(4, 2), times=torch.tensor([0.9, 0.5, 0.1], dtype=DTYPE)
    ),
    "diffusion.sample_sde": lambda: dict(
        velocity_fn=field,
        x=real(4, 2),
        times=torch.tensor([0.9, 0.5, 0.1], dtype=DTYPE),
        noise_level=0.7,
        generator=generator(),
    ),
    "diffusion.simplex_lattice": lambda: dict(objectives=3, partitions=4),
    "diffusion.transfer_schedule": lambda: dict(num_masked=7, steps=3),
    "diffusion.weight_neighbours": lambda: dict(weights=probs(5, 2), k=3),
}


def detections(scores=True):
    """One image with two masks."""
    found = dict(masks=torch.eye(4).bool().reshape(4, 2, 2)[:2], labels=integers(0, 1))
    return found | (dict(scores=unit(2)) if scores else {})


VISION = {
    "vision.balanced_draws": lambda: dict(
        pool_sizes=integers(1, 5, 9), count=6, generator=generator()
    ),
    "vision.corner_foreground": lambda: dict(image=100 * unit(3, 5, 6)),
    "vision.federated_classes": lambda: dict(
        present=integers(2, 2, 1), weights=positive(5), total=3, generator=generator()
    ),
    "vision.federated_weights": lambda: dict(image_counts=integers(1, 5, 9)),
    "vision.free_energy": lambda: dict(logits=real(4, 3)),
    "vision.grouped_average": lambda: dict(ap=unit(3), groups=["rare", "rare", "common"]),
    "vision.inter_similarity": lambda: dict(
        real=real(4, 3), generated=real(5, 3, shift=1), top_k=2
    ),
    "vision.largest_component": lambda: dict(mask=classes(5, 6).bool()),
    "vision.mask_average_precision": lambda: dict(
        predictions=[detections()], targets=[detections(scores=False)], num_classes=2
    ),
    "vision.mask_boxes": lambda: dict(masks=detections()["masks"]),
    "vision.mask_iou": lambda: dict(a=classes(2, 3, 4).bool(), b=classes(3, 3, 4, of=3).bool()),
    "vision.paste_instance": lambda: dict(
        image=unit(3, 6, 7),
        masks=classes(2, 6, 7).bool(),
        labels=classes(2),
        source=unit(3, 6, 7, shift=1),
        alpha=unit(6, 7),
        label=1,
    ),
    "vision.paste_size": lambda: dict(area=0.3, ratio=1.5, height=20, width=30),
    "vision.place_cutout": lambda: dict(
        cutout=unit(3, 4, 4),
        alpha=unit(4, 4),
        height=6,
        width=7,
        size=(3, 3),
        centre=(3.0, 2.0),
    ),
    "vision.repeat_factors": lambda: dict(image_categories=[[0, 1], [1]], num_categories=2),
    "vision.repeat_range": lambda: dict(values=unit(5)),
    "vision.train_validation_gap": lambda: dict(
        train={"rare": 0.5, "all": 0.6}, validation={"rare": 0.4, "all": 0.5}
    ),
}

CASES = {**DIFFUSION, **VISION}
SLOW: set[str] = set()
