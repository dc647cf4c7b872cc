"""Schedule, conversions and samplers against closed forms: for Gaussian data the exact denoiser and flow are known."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from semantica import solvers
from semantica.errors import UserError
from semantica.sampling.settings import Sampling
from semantica.solvers import Schedule, alpha_sigma, make_plan

MEAN, STD = 0.3, 0.5
BOUNDED = np.linspace(-6.0, 6.0, 17)
FROZEN_NOISE = [-0.24822916090488434, -0.02676701545715332, -1.9444162845611572]


def denoise(z, logsnr):
    """Exact E[x | z] for x ~ N(MEAN, STD^2)."""
    alpha, sigma = (float(a) for a in alpha_sigma(np.float64(logsnr)))
    return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (z - alpha * MEAN)


def flow(z, start, end):
    """Exact solution of the probability-flow ODE from noise level `start` to `end` for x ~ N(MEAN, STD^2)."""
    (a, s), (b, r) = alpha_sigma(np.float64(start)), alpha_sigma(np.float64(end))
    return b * MEAN + np.sqrt((b * b * STD**2 + r * r) / (a * a * STD**2 + s * s)) * (z - a * MEAN)


def run(solver, logsnrs, z, seed=0):
    """A whole sampling run through the velocity, as a user of a velocity network does it."""
    plan, x_previous = make_plan(solver, logsnrs), None
    for i in range(len(plan)):
        v = solvers.v_from_x(z, denoise(z, plan.logsnr[i]), float(plan.alpha[i]), float(plan.sigma[i]))
        x = solvers.threshold(solvers.predict_x(plan, i, z, v), "clip", 4.0)
        noise = None
        if plan.noise_scale[i]:
            noise = solvers.noise(seed, tuple(z.shape), i)
            noise = noise if isinstance(z, np.ndarray) else torch.from_numpy(noise)
        z, x_previous = solvers.step(plan, i, z, x, x_previous, noise), x
    return z


def orders(errors):
    return np.log2(np.asarray(errors[:-1]) / np.asarray(errors[1:]))


@pytest.mark.parametrize("size", [16, 64, 256, 1024])
def test_schedule_keeps_its_end_points_and_is_shifted_between_them(size):
    schedule = Schedule(size)
    t = np.linspace(0, 1, 1001)
    logsnr = schedule.logsnr(t)
    np.testing.assert_allclose(logsnr[[0, -1]], [15, -15], atol=1e-9)
    assert (np.diff(logsnr) < 0).all()
    # with wide limits the ratio of the SNRs is (reference / size)^2 everywhere inside
    inner = t[1:-1]
    wide = [Schedule(s, logsnr_min=-60, logsnr_max=60).logsnr(inner) for s in (size, 64)]
    np.testing.assert_allclose(np.exp(wide[0] - wide[1]), (64 / size) ** 2, rtol=1e-8)
    # with the default limits it is, up to the share of the curve that the limits cut off
    middle = (t > 0.1) & (t < 0.9)
    np.testing.assert_allclose((logsnr - Schedule(64).logsnr(t))[middle], 2 * np.log(64 / size), atol=0.2)


def test_schedule_is_the_cosine_of_the_paper():
    t = np.linspace(0.05, 0.95, 19)
    alpha, sigma = alpha_sigma(Schedule(64, logsnr_min=-60, logsnr_max=60).logsnr(t))
    np.testing.assert_allclose(alpha, np.cos(np.pi * t / 2), atol=1e-12)
    np.testing.assert_allclose(sigma, np.sin(np.pi * t / 2), atol=1e-12)
    # the other reference size of the paper
    np.testing.assert_allclose(Schedule(64, reference=32).logsnr(t), Schedule(128).logsnr(t), atol=1e-12)


def test_scales_are_variance_preserving_and_give_the_logsnr_back():
    logsnr = np.linspace(-15, 15, 301)
    alpha, sigma = alpha_sigma(logsnr)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-15)
    np.testing.assert_allclose(2 * np.log(alpha / sigma), logsnr, atol=1e-12)
    single = alpha_sigma(torch.from_numpy(logsnr).float())
    assert single[0].dtype == torch.float32
    np.testing.assert_allclose(single, (alpha, sigma), rtol=1e-6)
    assert alpha_sigma(np.float64(np.inf)) == (1, 0)


def test_conversions_invert_each_other():
    rng = np.random.default_rng(0)
    x, eps = rng.standard_normal((2, 301))
    alpha, sigma = alpha_sigma(np.linspace(-15, 15, 301))
    z = alpha * x + sigma * eps
    v = solvers.v_from_x_eps(x, eps, alpha, sigma)
    np.testing.assert_allclose(solvers.x_from_v(z, v, alpha, sigma), x, atol=1e-14)
    np.testing.assert_allclose(solvers.eps_from_v(z, v, alpha, sigma), eps, atol=1e-14)
    np.testing.assert_allclose(solvers.v_from_x(z, x, alpha, sigma), v, atol=1e-11)


@pytest.mark.parametrize(("solver", "steps", "tolerance"), [("ddim", 1000, 2e-3), ("dpmpp_2m", 250, 5e-4)])
@pytest.mark.parametrize("size", [32, 64])
def test_deterministic_solvers_map_noise_to_the_data_distribution(solver, steps, tolerance, size):
    # with a Gaussian's denoiser a run is affine in z, so two points give mean and deviation with no sampling error
    low, high = run(solver, Schedule(size).grid(steps)[1], np.array([0.0, 1.0]))
    assert abs(low - MEAN) < tolerance
    assert abs((high - low) - STD) < tolerance


@pytest.mark.parametrize(("solver", "order"), [("ddim", 0.95), ("dpmpp_2m", 1.9)])
def test_order_of_convergence_to_the_probability_flow(solver, order):
    z = np.array([-2.0, -0.5, 1.0, 2.0])
    truth = flow(z, -6, 6)
    errors = [np.abs(run(solver, np.linspace(-6, 6, n + 1), z) - truth).max() for n in (40, 80, 160, 320)]
    assert orders(errors).min() > order, (errors, orders(errors))
    assert errors[-1] < {"ddim": 1e-2, "dpmpp_2m": 1e-4}[solver]


@pytest.mark.parametrize(("solver", "order"), [("ddim", 0.95), ("dpmpp_2m", 1.6)])
def test_order_of_convergence_on_the_sampling_grid(solver, order):
    # steps uniform in t stay long in lambda next to both ends however many they are, which costs 2M a logarithm
    z = np.array([-2.0, -0.5, 1.0, 2.0])
    errors = []
    for n in (128, 256, 512):
        logsnrs = Schedule(64).grid(n)[1]
        errors.append(np.abs(run(solver, logsnrs, z) - flow(z, logsnrs[0], logsnrs[-1])).max())
    assert orders(errors).min() > order, (errors, orders(errors))


def ddpm_moments(logsnrs):
    """Exact mean and variance at the end of an ancestral run from N(0, 1): every step is affine plus noise."""
    plan, mean, variance = make_plan("ddpm", logsnrs), 0.0, 1.0
    for i in range(len(plan)):
        low, high = (
            plan.z_scale[i] * z + plan.x_scale[i] * denoise(z, plan.logsnr[i]) for z in (np.float64(0), np.float64(1))
        )
        mean, variance = low + (high - low) * mean, (high - low) ** 2 * variance + plan.noise_scale[i] ** 2
    return mean, variance


def test_ancestral_sampling_converges_to_mean_and_variance_of_the_data():
    means, variances = np.transpose([ddpm_moments(Schedule(64).grid(n)[1]) for n in (100, 200, 400, 800)])
    # what is left of the mean comes from starting at N(0, 1) and not at the noisiest level's own distribution
    np.testing.assert_allclose(means, MEAN, atol=1e-3)
    assert orders(np.abs(variances - STD**2)).min() > 0.9, variances
    assert abs(2 * variances[-1] - variances[-2] - STD**2) < 2e-4


def test_ancestral_sampling_agrees_with_its_moments_within_statistical_error():
    count, logsnrs = 40_000, Schedule(64).grid(50)[1]
    mean, variance = ddpm_moments(logsnrs)
    samples = run("ddpm", logsnrs, solvers.noise(7, (count,)).astype(np.float64), seed=8)
    assert abs(samples.mean() - mean) < 4 * np.sqrt(variance / count)
    assert abs(samples.var() - variance) < 4 * variance * np.sqrt(2 / count)


def test_ancestral_step_is_the_posterior_of_the_forward_process():
    # q(z_s | z_t, x) by conditioning a joint Gaussian: z_t = (alpha_t / alpha_s) z_s + independent noise
    plan = make_plan("ddpm", BOUNDED)
    (alpha_s, sigma_s), (alpha, sigma) = alpha_sigma(BOUNDED[1:]), alpha_sigma(BOUNDED[:-1])
    ratio = alpha / alpha_s
    gain = ratio * sigma_s**2 / sigma**2
    np.testing.assert_allclose(plan.z_scale, gain, rtol=1e-12)
    np.testing.assert_allclose(plan.x_scale, alpha_s - gain * alpha, rtol=1e-11)
    np.testing.assert_allclose(plan.noise_scale**2, sigma_s**2 * (1 - gain * ratio), rtol=1e-11)


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_last_step_returns_the_clean_image_itself(solver):
    plan = make_plan(solver, Schedule(64).grid(5)[1])
    z, x, x_previous = solvers.noise(0, (3, 2, 4, 4))
    assert plan.noise_scale[-1] == plan.x_previous_scale[-1] == 0
    assert np.array_equal(solvers.step(plan, 4, z, x, x_previous), x)
    one_step = make_plan(solver, Schedule(64).grid(1)[1])
    assert np.array_equal(solvers.step(one_step, 0, z, x), x)


def test_second_order_solver_starts_and_ends_with_first_order_steps():
    first, second = make_plan("ddim", BOUNDED), make_plan("dpmpp_2m", BOUNDED)
    for i in (0, -1):
        assert (second.z_scale[i], second.x_scale[i], second.x_previous_scale[i]) == (
            first.z_scale[i],
            first.x_scale[i],
            0,
        )
    assert (second.x_previous_scale[1:-1] < 0).all()
    # extrapolating a constant changes nothing
    np.testing.assert_allclose(second.x_scale + second.x_previous_scale, first.x_scale, rtol=1e-12)


@pytest.mark.parametrize("solver", solvers.SOLVERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numpy_and_torch_agree_and_keep_the_dtype(solver, dtype):
    z = solvers.noise(1, (2, 3, 8, 8)).astype(dtype)
    logsnrs = Schedule(64).grid(12)[1]
    array, tensor = run(solver, logsnrs, z), run(solver, logsnrs, torch.from_numpy(z))
    assert str(array.dtype) == dtype and tensor.dtype == getattr(torch, dtype)
    np.testing.assert_allclose(tensor.numpy(), array, atol={"float32": 2e-6, "float64": 1e-14}[dtype])


@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.995, 1.0])
def test_dynamic_thresholding_uses_each_sample_s_own_quantile(ratio):
    x = 2 * solvers.noise(2, (4, 3, 9, 7)).astype(np.float64)
    x[3] *= 0.1
    limit = np.maximum(1, np.quantile(abs(x).reshape(4, -1), ratio, axis=1)).reshape(4, 1, 1, 1)
    expected = np.clip(x, -limit, limit) / limit
    np.testing.assert_allclose(solvers.threshold(x, "dynamic", ratio=ratio), expected, rtol=1e-14)
    np.testing.assert_allclose(solvers.threshold(torch.from_numpy(x), "dynamic", ratio=ratio), expected, rtol=1e-14)
    # an image whose quantile lies inside the range is clipped, not stretched
    np.testing.assert_array_equal(solvers.threshold(x, "dynamic", ratio=ratio)[3], np.clip(x[3], -1, 1))
    # another range is the same rule in other units
    np.testing.assert_allclose(solvers.threshold(3 * x, "dynamic", 3.0, ratio), 3 * expected, rtol=1e-14)


def test_static_thresholding():
    x = np.array([[-3.0, -0.5, 0.5, 2.0]])
    assert solvers.threshold(x, "none") is x
    np.testing.assert_array_equal(solvers.threshold(x, "clip"), [[-1, -0.5, 0.5, 1]])
    np.testing.assert_array_equal(solvers.threshold(torch.from_numpy(x), "clip", 2.0), [[-2, -0.5, 0.5, 2]])


def test_guidance_is_linear_in_its_scale():
    cond, uncond = solvers.noise(3, (2, 5)).astype(np.float64)
    np.testing.assert_allclose(solvers.guide(cond, uncond, 1.0), cond, atol=1e-15)
    np.testing.assert_array_equal(solvers.guide(cond, uncond, 0.0), uncond)
    # the form of Hoogeboom's papers, (1 + w) cond - w uncond, has w = scale - 1
    np.testing.assert_allclose(solvers.guide(cond, uncond, 1.5), 1.5 * cond - 0.5 * uncond, atol=1e-15)


def test_noise_is_a_pure_function_of_its_key():
    # frozen values: saved seeds must keep meaning the same picture
    np.testing.assert_array_equal(solvers.noise(0, (3,)), np.float32(FROZEN_NOISE))
    large = solvers.noise(5, (4, 3, 8, 8))
    assert large.dtype == np.float32
    np.testing.assert_array_equal(large[:2], solvers.noise(5, (2, 3, 8, 8)))
    draws = [
        solvers.noise(*key) for key in ((5, (999,)), (6, (999,)), (5, (999,), 0), (5, (999,), 1), (5, (999,), 0, 0))
    ]
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 5 / np.sqrt(999)
    many = solvers.noise(9, (100_000,))
    assert abs(many.mean()) < 4 / np.sqrt(1e5) and abs(many.var() - 1) < 4 * np.sqrt(2 / 1e5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Schedule(0), "image size 0"),
        (lambda: Schedule(64, logsnr_min=3, logsnr_max=3), "logsnr_min 3"),
        (lambda: Schedule(64).grid(0), "steps 0"),
        (lambda: make_plan("euler", BOUNDED), "unknown solver 'euler'"),
        (lambda: make_plan("ddim", BOUNDED[::-1]), "must increase"),
        (lambda: make_plan("ddim", [-np.inf, 0.0]), "finite"),
        (lambda: solvers.threshold(np.ones((1, 1)), "hard"), "unknown thresholding 'hard'"),
        (lambda: solvers.noise(-1, (2,)), "seed -1"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


WITHOUT_TORCH = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "diffusers", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import numpy as np
from semantica import solvers
plan = solvers.make_plan("dpmpp_2m", solvers.Schedule(64).grid(8)[1])
z, x_previous = solvers.noise(0, (2, 3, 4, 4)), None
for i in range(len(plan)):
    v = solvers.guide(0.5 * z, 0.25 * z, 1.5)
    x = solvers.threshold(solvers.predict_x(plan, i, z, v), "dynamic", 1.0, 0.9)
    z, x_previous = solvers.step(plan, i, z, x, x_previous), x
assert z.dtype == np.float32 and np.abs(z).max() <= 1 and z.std() > 0.1, z
assert not [m for m in sys.modules if m.split(".")[0] in ("torch", "diffusers", "transformers")]
print("sampled")
"""


def test_sampling_works_where_torch_is_not_installed():
    result = subprocess.run([sys.executable, "-P", "-c", WITHOUT_TORCH], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "sampled", result.stderr


def test_a_solver_from_outside(monkeypatch):
    """Euler in the probability flow's own variable, eps kept, which ddim is; under a name of its own."""
    monkeypatch.setattr(solvers, "SOLVERS", dict(solvers.SOLVERS))

    def euler(steps):
        ratio = steps.sigma_next / steps.sigma
        return {"z_scale": ratio, "x_scale": steps.alpha_next - ratio * steps.alpha}

    solvers.register_solver("euler", euler)
    plan, twin = (make_plan(name, BOUNDED) for name in ("euler", "ddim"))
    np.testing.assert_allclose(plan.x_scale, twin.x_scale, rtol=1e-9)
    assert not plan.noise_scale.any() and not plan.x_previous_scale.any()
    assert Sampling(solver="euler").plan(Schedule(64)).z_scale.shape == (20,)
