"""The diffusers scheduler: agreement with diffusers' own, its interface, and no read from the device."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from semantica import solvers
from semantica.errors import UserError
from semantica.sampling.scheduler import SemanticaScheduler

SHAPE = (2, 3, 8, 8)


def velocity(z, logsnr, spread=0.6):
    """Exact velocity for pixels drawn from two Gaussians at +-spread: smooth but far from linear in z."""
    alpha, sigma = (float(a) for a in solvers.alpha_sigma(np.float64(logsnr)))
    variance = (0.2 * alpha) ** 2 + sigma**2
    centre = spread * torch.tanh(alpha * spread * z / variance)
    x = centre + 0.2**2 * alpha / variance * (z - alpha * centre)
    return solvers.v_from_x(z, x, alpha, sigma)


def start(dtype=torch.float64):
    return torch.from_numpy(solvers.noise(3, SHAPE)).to(dtype)


def ours(steps, spread=0.6, seed=0, **config):
    scheduler = SemanticaScheduler(**{"image_size": 64, "thresholding": "none", **config})
    scheduler.set_timesteps(steps)
    z, generator = start(), torch.Generator().manual_seed(seed)
    for i, t in enumerate(scheduler.timesteps):
        z = scheduler.step(velocity(z, scheduler.plan.logsnr[i], spread), t, z, generator=generator).prev_sample
    return z


def theirs(cls, steps, spread=0.6, seed=0, step_options=None, **config):
    """The same run by a discrete scheduler of diffusers, whose level k of N has our log-SNR at t = (k + 1) / N."""
    levels = 40 * steps
    logsnr = solvers.Schedule(64).logsnr(np.arange(1, levels + 1) / levels)
    signal = solvers.alpha_sigma(logsnr)[0] ** 2
    betas = 1 - signal / np.append(1.0, signal[:-1])
    options = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", **config}
    scheduler = cls(num_train_timesteps=levels, trained_betas=betas, **options)
    # diffusers multiplies the levels up from single precision betas; compare the solvers, not that rounding
    np.testing.assert_allclose(scheduler.alphas_cumprod, signal, rtol=1e-3)
    scheduler.alphas_cumprod = torch.from_numpy(signal)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == list(range(levels - 1, 0, -40))
    z, generator = start(), torch.Generator().manual_seed(seed)
    for k in scheduler.timesteps:
        v = velocity(z, logsnr[k], spread)
        z = scheduler.step(v, k, z, generator=generator, **(step_options or {})).prev_sample
    return z.double()


@pytest.mark.parametrize("steps", [1, 5, 25])
def test_ddim_agrees_with_diffusers(steps):
    expected = theirs(DDIMScheduler, steps, clip_sample=False)
    torch.testing.assert_close(ours(steps, solver="ddim"), expected, rtol=0, atol=1e-10)


def test_clipped_ddim_agrees_with_diffusers():
    # data at +-1.5 so that clipping is felt at every step
    clipped = {"clip_sample": True, "step_options": {"use_clipped_model_output": True}}
    expected = theirs(DDIMScheduler, 10, spread=1.5, **clipped)
    result = ours(10, spread=1.5, solver="ddim", thresholding="clip")
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)
    assert (result - ours(10, spread=1.5, solver="ddim")).abs().max() > 0.1


@pytest.mark.parametrize("steps", [2, 3, 10, 25])
def test_dpm_solver_agrees_with_diffusers(steps):
    expected = theirs(DPMSolverMultistepScheduler, steps, algorithm_type="dpmsolver++", solver_order=2)
    # diffusers computes this one in single precision throughout
    torch.testing.assert_close(ours(steps), expected, rtol=0, atol=1e-5)
    if steps > 2:
        assert (ours(steps) - ours(steps, solver="ddim")).abs().max() > 1e-3


def test_dynamic_thresholding_agrees_with_diffusers():
    dynamic = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 100.0}
    expected = theirs(DPMSolverMultistepScheduler, 10, spread=1.5, solver_order=2, **dynamic)
    result = ours(10, spread=1.5, thresholding="dynamic", dynamic_thresholding_ratio=0.9)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_ancestral_sampling_agrees_with_diffusers():
    expected = theirs(DDPMScheduler, 20, seed=4, clip_sample=False, variance_type="fixed_small")
    # the floor that diffusers puts under the last variance is 1e-20
    torch.testing.assert_close(ours(20, seed=4, solver="ddpm"), expected, rtol=0, atol=1e-8)


def test_timesteps_and_levels_of_a_run():
    scheduler = SemanticaScheduler(image_size=128)
    assert scheduler.num_inference_steps is None and len(scheduler) == 0 and scheduler
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [1, 0.75, 0.5, 0.25]
    assert scheduler.timesteps.dtype == scheduler.logsnrs.dtype == torch.float32
    np.testing.assert_allclose(scheduler.logsnrs, solvers.Schedule(128).logsnr(scheduler.timesteps.numpy()), rtol=1e-6)
    assert (len(scheduler), scheduler.num_inference_steps, scheduler.order, scheduler.init_noise_sigma) == (4, 4, 1, 1)
    z = start()
    assert scheduler.scale_model_input(z, 1.0) is z


def test_last_step_returns_the_prediction_and_both_output_forms_agree():
    scheduler = SemanticaScheduler(image_size=64)
    results = []
    for return_dict in (True, False):
        scheduler.set_timesteps(3)
        z = start(torch.float32)
        for t in scheduler.timesteps:
            out = scheduler.step(0.1 * z, t, z, return_dict=return_dict)
            z, x = (out.prev_sample, out.pred_original_sample) if return_dict else out
        assert torch.equal(z, x)
        results.append(z)
    assert torch.equal(*results)


def test_a_new_run_forgets_the_one_before():
    scheduler = SemanticaScheduler(image_size=64, thresholding="none")
    scheduler.set_timesteps(10)
    # an abandoned run leaves a previous prediction behind
    for t in scheduler.timesteps[:4]:
        scheduler.step(start() + 5, t, start())
    scheduler.set_timesteps(10)
    z = start()
    for i, t in enumerate(scheduler.timesteps):
        z = scheduler.step(velocity(z, scheduler.plan.logsnr[i]), t, z).prev_sample
    assert torch.equal(z, ours(10))


def test_half_precision_samples_are_stepped_in_single_precision():
    scheduler = SemanticaScheduler(image_size=64)
    scheduler.set_timesteps(2)
    z, v = start(torch.bfloat16), start(torch.bfloat16).flip(0)
    out = scheduler.step(v, 1.0, z)
    assert out.prev_sample.dtype == out.pred_original_sample.dtype == torch.bfloat16
    scheduler.set_timesteps(2)
    exact = scheduler.step(v.double(), 1.0, z.double())
    assert torch.equal(out.prev_sample, exact.prev_sample.float().bfloat16())


@pytest.mark.parametrize("solver", solvers.SOLVERS)
@pytest.mark.parametrize("thresholding", solvers.THRESHOLDS)
def test_step_reads_nothing_from_the_device(solver, thresholding):
    # tensors on the meta device hold no values: any read, on a GPU a wait for it, raises
    scheduler = SemanticaScheduler(image_size=64, solver=solver, thresholding=thresholding)
    scheduler.set_timesteps(5, device="meta")
    assert scheduler.timesteps.device.type == scheduler.logsnrs.device.type == "meta"
    z = torch.empty(SHAPE, device="meta")
    for t in scheduler.timesteps:
        z = scheduler.step(z, t, z).prev_sample
    assert z.shape == SHAPE


def test_same_generator_same_samples():
    assert torch.equal(ours(6, solver="ddpm", seed=1), ours(6, solver="ddpm", seed=1))
    assert not torch.equal(ours(6, solver="ddpm", seed=1), ours(6, solver="ddpm", seed=2))


def test_add_noise_uses_each_sample_s_time():
    scheduler = SemanticaScheduler(image_size=128)
    x, noise, t = start(), start().flip(0), torch.tensor([0.2, 0.7])
    alpha, sigma = solvers.alpha_sigma(solvers.Schedule(128).logsnr(t.numpy()))
    z = scheduler.add_noise(x, noise, t)
    for sample in range(2):
        expected = alpha[sample] * x[sample] + sigma[sample] * noise[sample]
        torch.testing.assert_close(z[sample], expected, rtol=0, atol=1e-6)
    assert scheduler.add_noise(x.bfloat16(), noise.bfloat16(), t).dtype == torch.bfloat16
    # almost clean at t = 0, almost pure noise at t = 1
    torch.testing.assert_close(scheduler.add_noise(x, noise, torch.tensor([0.0, 0.0])), x, rtol=0, atol=3e-3)
    torch.testing.assert_close(scheduler.add_noise(x, noise, torch.tensor([1.0, 1.0])), noise, rtol=0, atol=3e-3)


def test_configuration_survives_saving(tmp_path):
    config = {
        "image_size": 96,
        "reference": 32,
        "logsnr_min": -12.0,
        "logsnr_max": 14.0,
        "solver": "ddim",
        "thresholding": "dynamic",
        "clip_range": 1.5,
        "dynamic_thresholding_ratio": 0.97,
    }
    SemanticaScheduler(**config).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["scheduler_config.json"]
    loaded = SemanticaScheduler.from_pretrained(tmp_path)
    assert {key: loaded.config[key] for key in config} == config
    assert loaded.schedule == solvers.Schedule(96, 32, -12.0, 14.0)
    changed = SemanticaScheduler.from_config(loaded.config, solver="ddpm")
    assert (changed.config.solver, changed.config.clip_range) == ("ddpm", 1.5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"solver": "euler"}, "unknown solver 'euler'"),
        ({"thresholding": "hard"}, "unknown thresholding 'hard'"),
        ({"image_size": -1}, "image size -1"),
        ({"logsnr_min": 20.0}, "logsnr_min 20.0"),
    ],
)
def test_impossible_configurations_are_named(config, message):
    with pytest.raises(UserError, match=message):
        SemanticaScheduler(**{"image_size": 64, **config})


def test_runs_out_of_order_are_refused():
    scheduler, z = SemanticaScheduler(image_size=64), start()
    with pytest.raises(UserError, match="call set_timesteps"):
        scheduler.step(z, 1.0, z)
    with pytest.raises(UserError, match="steps 0"):
        scheduler.set_timesteps(0)
    scheduler.set_timesteps(2)
    with pytest.raises(UserError, match="step 0 starts at timestep 1, got 0.5"):
        scheduler.step(z, 0.5, z)
    for t in scheduler.timesteps:
        scheduler.step(z, t, z)
    with pytest.raises(UserError, match="no step left of 2"):
        scheduler.step(z, 0.5, z)
