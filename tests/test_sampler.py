"""The fast sampling loop: the pipeline's result, for numpy as for torch, with one call of the network a step."""

import numpy as np
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance

from semantica import Condition, SemanticaScheduler, Stream, UserError, UViT
from semantica.sampling.guided import denoise
from semantica.sampling.loop import guided_steps, sample
from semantica.solvers import SOLVERS, Schedule, make_plan

STREAMS = {"image": 24, "text": 12}
LENGTHS = (torch.tensor([5, 2, 0]), torch.tensor([3, 1, 3]))


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    unet = UViT(
        image_size=16, channels=(32,), depths=(1,), width=64, depth=2, heads=2, emb_dim=32,
        streams=STREAMS, conditioning="both",
    )  # fmt: skip
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return unet.double().eval()


def conditions(unet, lengths=(None, None)):
    g = torch.Generator().manual_seed(1)
    streams = {
        name: Stream(
            torch.randn(3, tokens, width, generator=g, dtype=torch.float64),
            torch.randn(3, width, generator=g, dtype=torch.float64),
            length,
        )
        for (name, width), tokens, length in zip(STREAMS.items(), (5, 3), lengths)
    }
    with torch.no_grad():
        return unet.condition(streams), unet.null(3)


def noise(step=0):
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(step + 7), dtype=torch.float64)


def plan_of(solver, steps=6):
    return make_plan(solver, Schedule(16).grid(steps)[1])


@pytest.mark.parametrize("lengths", [(None, None), LENGTHS], ids=["full", "lengths"])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.7)])
def test_equals_the_scheduler_with_diffusers_guider(unet, lengths, interval):
    condition, null = conditions(unet, lengths)
    scheduler = SemanticaScheduler(image_size=16)
    scheduler.set_timesteps(6)
    guider = ClassifierFreeGuidance(guidance_scale=2.5, start=interval[0], stop=interval[1])
    calls = []

    def counted(z, logsnr, condition):
        calls.append(len(z))
        return unet(z, logsnr, condition)

    with torch.no_grad():
        expected = denoise(unet, scheduler, guider, noise(), condition, null)
        actual = sample(counted, noise(), condition, null, plan_of("dpmpp_2m"), guidance=2.5, interval=interval)
    # the scheduler's noise levels are float32 as well; only the grouping into batches differs
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
    # 6 steps, and int(0.2 * 6) = 1 <= i < int(0.7 * 6) = 4
    assert calls == ([6] * 6 if interval == (0.0, 1.0) else [3, 6, 6, 6, 3, 3])


def test_no_guidance_calls_one_branch(unet):
    condition, _ = conditions(unet)
    with torch.no_grad():
        out = sample(unet, noise(), condition, None, plan_of("ddim"))
    assert out.shape == (3, 3, 16, 16) and out.isfinite().all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_numpy_equals_torch(unet, solver):
    condition, null = conditions(unet, LENGTHS)

    def through_torch(z, logsnr, condition):
        assert isinstance(z, np.ndarray) and logsnr.dtype == np.float32
        with torch.no_grad():
            return unet(torch.from_numpy(z), torch.from_numpy(logsnr), condition.map(torch.from_numpy)).numpy()

    plan = plan_of(solver)
    with torch.no_grad():
        expected = sample(unet, noise(), condition, null, plan, guidance=2.0, noise=noise)
    actual = sample(
        through_torch, noise().numpy(), condition.map(lambda t: t.numpy()), null.map(lambda t: t.numpy()), plan,
        guidance=2.0, noise=lambda i: noise(i).numpy(),
    )  # fmt: skip
    np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=1e-12)


def test_a_filled_null_condition_predicts_what_one_token_does(unet):
    condition, null = conditions(unet)
    filled = null.fill(condition.sizes)
    assert filled.sizes == (5, 3) and filled.keys[0].shape == condition.keys[0].shape
    with torch.no_grad():
        expected, actual = (unet(noise(), torch.zeros(3), c) for c in (null, filled))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)
    assert isinstance(null.map(lambda t: t.numpy()).fill((5, 3)).keys[0], np.ndarray)
    with pytest.raises(UserError, match=r"\(5, 3\) cannot be filled up to \(6, 3\)"):
        condition.fill((6, 3))


def test_repeat_is_the_same_for_both_kinds():
    array = np.arange(6.0).reshape(3, 2)
    for kind in (array, torch.from_numpy(array)):
        made = Condition((), (), kind, None, ()).repeat(2).emb
        np.testing.assert_array_equal(np.asarray(made), array[[0, 0, 1, 1, 2, 2]])


def test_refusals(unet):
    condition, null = conditions(unet)
    with pytest.raises(UserError, match="adds noise"):
        sample(unet, noise(), condition, null, plan_of("ddpm"))
    with pytest.raises(UserError, match="interval"):
        guided_steps(4, 2.0, (0.5, 0.2))
