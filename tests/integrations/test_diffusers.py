"""The adapter against the schedulers and models of Diffusers themselves."""

import math

import pytest
import torch

from steelyard.diffusion import awm_log_likelihood, awm_loss, prompt_advantages
from steelyard.divergences import KL, REVERSE_KL
from steelyard.integrations.diffusers import (
    awm_step,
    awm_timesteps,
    clean_prediction,
    denoising_step,
    f_distill_step,
    noised_samples,
)

diffusers = pytest.importorskip("diffusers")

PREDICTIONS = ("epsilon", "sample", "v_prediction")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(seed: int, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=seeded(seed))


def flow(steps: int = 8):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler


def ddim(prediction: str = "epsilon", steps: int = 10):
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(steps)
    return scheduler


def unet(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
    )


def test_samples_are_noised_as_the_schedulers_do() -> None:
    x, noise = images(0), images(1)
    scheduler = flow()
    t = scheduler.timesteps[2].expand(3)
    assert torch.allclose(
        noised_samples(scheduler, x, noise, t), scheduler.scale_noise(x, t, noise), atol=1e-6
    )
    steps = torch.tensor([0, 500, 999])
    expected = ddim().add_noise(x, noise, steps)
    assert torch.allclose(noised_samples(ddim(), x, noise, steps), expected, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_clean_predictions_are_those_of_ddim(prediction: str) -> None:
    scheduler, x, output = ddim(prediction), images(0), images(1)
    expected = scheduler.step(output, 500, x).pred_original_sample
    found = clean_prediction(scheduler, output, x, torch.tensor(500))
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("timestep", [900, 500, 100])
def test_a_step_of_ddim_has_the_mean_and_noise_of_its_scheduler(prediction, timestep) -> None:
    scheduler, x, output, noise = ddim(prediction), images(0), images(1), images(2)
    given = scheduler.step(output, timestep, x, eta=0.8, variance_noise=noise).prev_sample
    found = denoising_step(scheduler, output, timestep, x, eta=0.8, prev_sample=given)
    std = found.std.reshape(-1, 1, 1, 1)
    assert torch.allclose((given - found.mean) / std, noise, atol=2e-3)
    squares = (given - found.mean).square().mean((1, 2, 3)) / found.std.square()
    expected = -squares / 2 - found.std.log() - math.log(2 * math.pi) / 2
    assert torch.allclose(found.logprob, expected, atol=1e-4)


def test_a_step_without_noise_is_eulers_also_the_last() -> None:
    scheduler, x, output = flow(), images(0), images(1)
    for timestep in scheduler.timesteps:
        found = denoising_step(scheduler, output, timestep, x, noise_level=0.0).x_prev
        assert torch.allclose(found, scheduler.step(output, timestep, x).prev_sample, atol=1e-5)


def test_the_last_step_of_ddim_ends_at_the_clean_sample() -> None:
    scheduler, x, output = ddim(), images(0), images(1)
    found = denoising_step(scheduler, output, 0, x, eta=0.0).x_prev
    assert torch.allclose(found, scheduler.step(output, 0, x).pred_original_sample, atol=1e-5)


def test_the_likelihood_of_a_flow_is_that_of_the_library() -> None:
    model, scheduler, x, noise = unet(), flow(), images(0), images(1)
    t = torch.tensor([900.0, 500.0, 100.0])
    advantages = torch.tensor([1.0, -0.5, 0.2])
    step = awm_step(model, scheduler, x, advantages, t, noise=noise)
    time = t / 1000
    velocity = model(noised_samples(scheduler, x, noise, t), t).sample
    score = awm_log_likelihood(velocity, x, noise, time)
    assert torch.allclose(step.log_likelihood, score, atol=1e-5)
    assert torch.allclose(step.loss, awm_loss(score, score, advantages), atol=1e-6)
    assert not step.log_likelihood.requires_grad


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_prediction_has_the_largest_likelihood(prediction: str) -> None:
    scheduler, x, noise = ddim(prediction), images(0), images(1)
    steps = torch.tensor([10, 500, 900])
    kept = scheduler.alphas_cumprod[steps].reshape(-1, 1, 1, 1)
    targets = {
        "epsilon": noise,
        "sample": x,
        "v_prediction": scheduler.get_velocity(x, noise, steps)
        if hasattr(scheduler, "get_velocity")
        else kept.sqrt() * noise - (1 - kept).sqrt() * x,
    }

    def model(noised, timestep, return_dict):
        return (targets[prediction],)

    step = awm_step(model, scheduler, x, torch.ones(3), steps, noise=noise)
    assert torch.allclose(step.log_likelihood, torch.zeros(3), atol=2e-3)


def test_a_second_step_on_the_same_noise_is_weighted_by_the_ratio() -> None:
    model, scheduler, x = unet(), flow(), images(0)
    advantages, t = torch.tensor([1.0, -1.0, 0.5]), torch.tensor(600.0)
    first = awm_step(model, scheduler, x, advantages, t, generator=seeded(2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    second = awm_step(
        model,
        scheduler,
        x,
        advantages,
        t,
        noise=first.noise,
        old_log_likelihood=first.log_likelihood,
        clip=1e-3,
        reduction="none",
    )
    expected = awm_loss(
        second.log_likelihood, first.log_likelihood, advantages, clip=1e-3, reduction="none"
    )
    assert torch.allclose(second.loss, expected)
    assert not torch.allclose(second.log_likelihood, first.log_likelihood)


def test_the_proximity_term_pulls_to_the_reference() -> None:
    model, reference, scheduler, x = unet(0), unet(1), flow(), images(0)
    zero, t = torch.zeros(3), torch.tensor(600.0)
    step = awm_step(model, scheduler, x, zero, t, ref_model=reference, proximity=0.5)
    noised = noised_samples(scheduler, x, step.noise, t)
    apart = model(noised, t).sample - reference(noised, t).sample
    assert torch.allclose(step.loss, 0.5 * apart.square().mean(), atol=1e-6)
    step.loss.backward()
    assert all(parameter.grad is None for parameter in reference.parameters())


def test_a_transformer_with_conditioning_is_called_as_its_pipeline_does() -> None:
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    latents = torch.randn(2, 4, 8, 8, generator=seeded())
    conditioning = {
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=seeded(1)),
        "pooled_projections": torch.randn(2, 16, generator=seeded(2)),
    }
    scheduler = flow()
    t = awm_timesteps(scheduler, 1, generator=seeded())[0]
    step = awm_step(
        model, scheduler, latents, torch.tensor([1.0, -1.0]), t, conditioning=conditioning
    )
    step.loss.backward()
    assert model.proj_out.weight.grad.abs().sum() > 0


def test_timesteps_are_of_the_schedule_without_its_noisiest_and_cleanest() -> None:
    scheduler = flow(20)
    drawn = {
        t
        for seed in range(200)
        for t in awm_timesteps(scheduler, 4, generator=seeded(seed)).tolist()
    }
    assert drawn == {*scheduler.timesteps[1:18].tolist()}
    one = awm_timesteps(scheduler, 4, generator=seeded())
    assert (one[:-1] > one[1:]).all()


def test_the_gradient_of_distillation_is_weighted_by_the_divergence() -> None:
    teacher, fake, scheduler = unet(0), unet(1), flow()
    t, ratio = torch.tensor([700.0, 400.0, 200.0]), torch.tensor([-1.0, 0.0, 1.0])
    gradients = []
    for divergence in (REVERSE_KL, KL):
        x = images(0).requires_grad_()
        f_distill_step(
            x, teacher, fake, scheduler, t, ratio, divergence, noise=images(1), normalize=False
        ).backward()
        gradients.append(x.grad)
    assert torch.allclose(gradients[1], gradients[0] * ratio.exp().reshape(-1, 1, 1, 1), rtol=1e-4)
    assert all(p.grad is None for net in (teacher, fake) for p in net.parameters())


@pytest.mark.slow
def test_a_small_unet_learns_to_make_brighter_images() -> None:
    model, scheduler, generator = unet(), flow(6), seeded(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def sample(count: int) -> torch.Tensor:
        x = torch.randn(count, 1, 8, 8, generator=generator)
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = denoising_step(scheduler, model(x, t).sample, t, x, noise_level=0.0).x_prev
        return x

    for _ in range(150):  # pretraining: grey images
        x = 0.3 * torch.randn(32, 1, 1, 1, generator=generator).expand(-1, 1, 8, 8)
        t = 1000 * torch.rand(32, generator=generator)
        score = awm_step(
            model, scheduler, x, torch.ones(32), t, generator=generator, weighting="uniform"
        )
        optimizer.zero_grad()
        score.loss.backward()
        optimizer.step()
    before = sample(256).mean()
    for _ in range(20):
        x = sample(64)
        advantages = prompt_advantages(x.mean((1, 2, 3)), ["grey"] * 64)
        optimizer.zero_grad()
        for t in awm_timesteps(scheduler, 2, generator=generator):
            (awm_step(model, scheduler, x, advantages, t, generator=generator).loss / 2).backward()
        optimizer.step()
    after = sample(256).mean()
    assert after > before + 0.05


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"scheduler": object()}, TypeError, "scheduler must be a flow-matching one"),
        ({"noise": torch.zeros(1, 1, 8, 8)}, ValueError, "noise"),
        ({"timesteps": torch.zeros(2)}, ValueError, "timesteps must have shape"),
        ({"timesteps": 500}, TypeError, "timesteps must be a torch.Tensor"),
        ({"proximity": 0.1}, ValueError, "ref_model must be given"),
        ({"proximity": -0.1}, ValueError, "proximity"),
        ({"samples": torch.zeros(3, 1, 8, 8, dtype=torch.long)}, TypeError, "samples"),
        ({"advantages": torch.zeros(2)}, ValueError, "advantages"),
        ({"model": None}, TypeError, "model must be callable"),
        (
            {"model": lambda x, timestep, return_dict: (x.repeat(1, 2, 1, 1),)},
            ValueError,
            "model must return the shape of the samples",
        ),
    ],
)
def test_errors_name_the_argument(change, error, match) -> None:
    arguments = {
        "model": unet(),
        "scheduler": flow(),
        "samples": images(0),
        "advantages": torch.ones(3),
        "timesteps": torch.tensor(500.0),
    }
    with pytest.raises(error, match=match):
        awm_step(**arguments | change)


def test_other_errors_name_what_is_wrong() -> None:
    x = images(0)
    with pytest.raises(ValueError, match="timestep must be one of"):
        denoising_step(flow(), x, 123.0, x)
    euler = diffusers.EulerDiscreteScheduler()
    euler.set_timesteps(4)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler scales the model's input"):
        denoising_step(euler, x, euler.timesteps[0], x)
    with pytest.raises(ValueError, match="count must be at most"):
        awm_timesteps(flow(4), 3)
    with pytest.raises(TypeError, match="set_timesteps"):
        awm_timesteps(object(), 3)
    odd = ddim()
    odd.register_to_config(prediction_type="momentum")
    with pytest.raises(ValueError, match="got momentum"):
        clean_prediction(odd, x, x, torch.tensor(5))
    solver = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True
    )
    with pytest.raises(ValueError, match="got flow_prediction"):  # its alphas are not a flow's
        noised_samples(solver, x, x, torch.tensor(5))
