"""Noising, targets, loss weights and the multi-scale loss against their definitions, in float64."""

import numpy as np
import pytest
import torch

from semantica import diffusion, solvers
from semantica.errors import UserError
from semantica.solvers import Schedule

LOGSNR = torch.tensor([-15.0, -4.0, 0.0, 3.0, 15.0], dtype=torch.float64)


def images(seed, size=16):
    return torch.from_numpy(solvers.noise(seed, (len(LOGSNR), 3, size, size))).double()


def plain_loss(prediction, target, weight):
    return weight * (prediction - target).square().flatten(1).mean(1)


def test_noised_images_have_the_signal_to_noise_ratio_of_their_own_sample():
    x, noise = images(0), images(1)
    z = diffusion.add_noise(x, noise, LOGSNR)
    # alpha and sigma of each sample by least squares on its pixels, independent of the formula
    for sample in range(len(LOGSNR)):
        design = torch.stack([x[sample].flatten(), noise[sample].flatten()], 1)
        alpha, sigma = torch.linalg.lstsq(design, z[sample].flatten()).solution
        assert abs(alpha**2 + sigma**2 - 1) < 1e-12
        assert abs(2 * torch.log(alpha / sigma) - LOGSNR[sample]) < 1e-9


def test_velocity_and_noised_image_determine_image_and_noise():
    x, noise = images(0), images(1)
    z, v = diffusion.add_noise(x, noise, LOGSNR), diffusion.v_target(x, noise, LOGSNR)
    scales = diffusion.per_sample(LOGSNR, z)
    torch.testing.assert_close(solvers.x_from_v(z, v, *scales), x, rtol=0, atol=1e-13)
    torch.testing.assert_close(solvers.eps_from_v(z, v, *scales), noise, rtol=0, atol=1e-13)


def test_velocity_is_the_derivative_of_the_noised_image_along_the_angle():
    # z = cos(phi) x + sin(phi) eps, so dz/dphi = v; tan(phi) = exp(-logsnr / 2)
    x, noise = images(0), images(1)
    phi = torch.linspace(0.2, 1.4, len(LOGSNR), dtype=torch.float64)
    z = [diffusion.add_noise(x, noise, -2 * torch.log(torch.tan(phi + h))) for h in (-1e-5, 1e-5)]
    v = diffusion.v_target(x, noise, -2 * torch.log(torch.tan(phi)))
    torch.testing.assert_close((z[1] - z[0]) / 2e-5, v, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", diffusion.LOSS_WEIGHTS)
def test_weights_turn_the_velocity_loss_into_the_loss_they_are_named_after(kind):
    x, noise, v_hat = images(0), images(1), images(2)
    z, v = diffusion.add_noise(x, noise, LOGSNR), diffusion.v_target(x, noise, LOGSNR)
    eps_hat = solvers.eps_from_v(z, v_hat, *diffusion.per_sample(LOGSNR, z))
    x_hat = solvers.x_from_v(z, v_hat, *diffusion.per_sample(LOGSNR, z))
    eps_loss = (eps_hat - noise).square().mean((1, 2, 3))
    x_loss = (x_hat - x).square().mean((1, 2, 3))
    expected = {
        "eps": eps_loss,
        "x": x_loss,
        # SiD2 states it on the x-loss, exp(b) sigmoid(logsnr - b); the same thing
        "sigmoid": np.exp(-3.0) * torch.sigmoid(LOGSNR + 3.0) * x_loss,
        "v": (1 + LOGSNR.exp()) * x_loss,
    }[kind]
    weight = diffusion.loss_weight(LOGSNR, kind, bias=-3.0)
    torch.testing.assert_close(plain_loss(v_hat, v, weight), expected, rtol=1e-9, atol=0)


def test_a_single_full_scale_is_the_plain_loss_exactly():
    weight = diffusion.loss_weight(LOGSNR)
    prediction, target = images(3), images(4)
    loss = diffusion.multiscale_loss(prediction, target, weight, (16,))
    assert loss.shape == (len(LOGSNR),)
    assert torch.equal(loss, plain_loss(prediction, target, weight))


def test_multiscale_loss_is_the_weighted_mean_over_pooled_images():
    prediction, target, weight = images(3), images(4), diffusion.loss_weight(LOGSNR, "sigmoid")
    pooled = {
        s: [a.unflatten(3, (s, -1)).unflatten(2, (s, -1)).mean((3, 5)) for a in (prediction, target)] for s in (4, 8)
    }
    terms = {s: plain_loss(*pair, weight) for s, pair in pooled.items()} | {16: plain_loss(prediction, target, weight)}
    # 1/4 : 1/8 : 1/16 = 4 : 2 : 1
    expected = (4 * terms[4] + 2 * terms[8] + terms[16]) / 7
    torch.testing.assert_close(diffusion.multiscale_loss(prediction, target, weight, (4, 8, 16)), expected)
    # an error without detail weighs the same at every scale, pure detail only at the finest one
    flat = target + 0.5
    torch.testing.assert_close(
        diffusion.multiscale_loss(flat, target, weight, (4, 8, 16)),
        diffusion.multiscale_loss(flat, target, weight, (16,)),
    )
    checkers = target + 1.0 - 2.0 * (torch.arange(16)[:, None] + torch.arange(16)).remainder(2)
    torch.testing.assert_close(diffusion.multiscale_loss(checkers, target, weight, (4, 8, 16)), weight / 7)


def test_half_precision_predictions_give_a_full_precision_loss():
    target = images(4).float()
    loss = diffusion.multiscale_loss(target.bfloat16(), target, diffusion.loss_weight(LOGSNR.float()), (8, 16))
    assert loss.dtype == torch.float32
    assert 0 < loss.max() < 1e-4


def test_gradient_reaches_the_prediction_with_the_weight_of_its_sample():
    prediction, target, weight = images(3).requires_grad_(), images(4), diffusion.loss_weight(LOGSNR)
    diffusion.multiscale_loss(prediction, target, weight, (16,)).sum().backward()
    expected = 2 * weight.view(-1, 1, 1, 1) * (prediction.detach() - target) / (3 * 16 * 16)
    torch.testing.assert_close(prediction.grad, expected)


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
def test_noise_levels_follow_the_schedule_in_single_precision(convert):
    u, schedule = np.linspace(0, 1, 101), Schedule(128)
    logsnr = diffusion.noise_levels(convert(u), schedule)
    assert logsnr.dtype == torch.float32
    np.testing.assert_allclose(logsnr, schedule.logsnr(u), rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize("scales", [(), (3,), (32,), (0, 16)])
def test_scales_must_divide_the_image(scales):
    with pytest.raises(UserError, match="image size 16"):
        diffusion.multiscale_loss(images(0), images(1), LOGSNR, scales)


def test_unknown_weight_is_named():
    with pytest.raises(UserError, match="unknown loss weight 'snr'"):
        diffusion.loss_weight(LOGSNR, "snr")
