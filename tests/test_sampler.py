"""The sampling loop: the scheduler's result, for numpy as for torch, with whatever predicts v, and its hooks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance

from semantica import Condition, SemanticaScheduler, Stream, UserError, UViT
from semantica.sampling.guidance import Guided
from semantica.sampling.loop import sample
from semantica.sampling.settings import Sampling
from semantica.solvers import SOLVERS, Schedule, guide

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


SCHEDULE = Schedule(16)


def calls_of(unet):
    """A denoiser that is a mere function, with both branches in a call, and the batches that it was called with."""
    batches = []

    def denoiser(z, logsnr, condition):
        batches.append(len(z))
        return unet(z, logsnr, condition)

    return denoiser, batches


@pytest.mark.parametrize("lengths", [(None, None), LENGTHS], ids=["full", "lengths"])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.7)])
def test_equals_the_scheduler_with_diffusers_guider(unet, lengths, interval):
    condition, null = conditions(unet, lengths)
    guider = ClassifierFreeGuidance(guidance_scale=2.5, start=interval[0], stop=interval[1])
    scheduler, expected = SemanticaScheduler(image_size=16), noise()
    scheduler.set_timesteps(6)
    settings = Sampling(6, guidance=2.5, interval=interval)
    denoiser, batches = calls_of(unet)
    with torch.no_grad():
        for i, (t, guided) in enumerate(zip(scheduler.timesteps, settings.guided(), strict=True)):
            logsnr = scheduler.logsnrs[i].expand(3)
            v, other = (unet(expected, logsnr, c) for c in (condition, null))
            expected = scheduler.step(guide(v, other, 2.5) if guided else v, t, expected).prev_sample
        joined = sample(denoiser, noise(), condition, null, SCHEDULE, settings)
        # the network itself takes the branches one after the other
        apart = sample(unet, noise(), condition, null, SCHEDULE, settings)
        through_guider = sample(unet, noise(), condition, null, SCHEDULE, Sampling(6), guidance=Guided(guider))
    # only the grouping into batches differs
    torch.testing.assert_close(joined, expected, rtol=0, atol=1e-9)
    assert torch.equal(apart, expected) and torch.equal(through_guider, expected)
    # 6 steps, and int(0.2 * 6) = 1 <= i < int(0.7 * 6) = 4
    assert batches == ([6] * 6 if interval == (0.0, 1.0) else [3, 6, 6, 6, 3, 3])


def test_no_guidance_calls_one_branch(unet):
    condition, _ = conditions(unet)
    with torch.no_grad():
        denoiser, batches = calls_of(unet)
        out = sample(denoiser, noise(), condition, None, SCHEDULE, Sampling(6, "ddim", guidance=1))
    assert out.shape == (3, 3, 16, 16) and out.isfinite().all() and batches == [3] * 6


@pytest.mark.parametrize("solver", SOLVERS)
def test_numpy_equals_torch(unet, solver):
    condition, null = conditions(unet, LENGTHS)

    def through_torch(z, logsnr, condition):
        assert isinstance(z, np.ndarray) and logsnr.dtype == np.float32
        with torch.no_grad():
            return unet(torch.from_numpy(z), torch.from_numpy(logsnr), condition.map(torch.from_numpy)).numpy()

    arrays = (noise().numpy(), *(c.map(lambda t: t.numpy()) for c in (condition, null)))
    settings = SCHEDULE, Sampling(6, solver, guidance=2.0)
    with torch.no_grad():
        expected = sample(unet, noise(), condition, null, *settings, noise)
    actual = sample(through_torch, *arrays, *settings, lambda i: noise(i).numpy())
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


def test_a_step_hook_sees_every_step_and_may_change_it(unet):
    condition, null = conditions(unet)
    seen = []

    def on_step(i, z):
        seen.append(i)
        return z * 0 if i == 5 else z

    with torch.no_grad():
        out = sample(unet, noise(), condition, null, SCHEDULE, Sampling(6), on_step=on_step)
    assert seen == [*range(6)] and not out.any()


def test_a_condition_is_bound_once_for_all_steps(unet):
    class Bound:
        bound = []

        def bind(self, condition):
            self.bound.append(len(condition.emb))
            return lambda z, logsnr: unet(z, logsnr, condition)

    condition, null = conditions(unet)
    settings = Sampling(6, guidance=2.0, interval=(0.2, 0.7))
    with torch.no_grad():
        made, expected = (sample(d, noise(), condition, null, SCHEDULE, settings) for d in (Bound(), unet))
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-9)
    assert Bound.bound == [3, 6]


def test_refusals(unet):
    condition, null = conditions(unet)
    with pytest.raises(UserError, match="adds noise"):
        sample(unet, noise(), condition, null, SCHEDULE, Sampling(6, "ddpm"))

    def denoiser(z, logsnr, condition):
        raise AssertionError("called although it cannot do what is asked for")

    denoiser.refuses = {"steps": "no callback here", "module": "no guider here"}
    guider = SimpleNamespace(needs=("module",))
    for hooks, says in (({"on_step": lambda i, z: z}, "no callback"), ({"guidance": guider}, "no guider")):
        with pytest.raises(UserError, match=says):
            sample(denoiser, noise(), condition, null, SCHEDULE, Sampling(6), **hooks)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 0}, "steps 0 must be at least 1"),
        ({"solver": "euler"}, "unknown solver 'euler': choose one of dpmpp_2m, ddim, ddpm"),
        ({"thresholding": "hard"}, "unknown thresholding 'hard'"),
        ({"interval": (0.5, 0.2)}, "interval"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_impossible_settings_are_one_line(settings, says):
    with pytest.raises(UserError, match=says) as error:
        Sampling(**settings)
    assert "\n" not in str(error.value)


def test_settings_of_a_scheduler():
    config = SemanticaScheduler(image_size=16, solver="ddim", thresholding="dynamic", clip_range=2.0).config
    assert Sampling.of(config, steps=7) == Sampling(7, "ddim", thresholding="dynamic", clip_range=2.0)
    assert Sampling.of(config, solver="ddpm").solver == "ddpm" and Schedule.of(config) == SCHEDULE


@pytest.mark.parametrize("joins", [True, False])
def test_branches_apart_see_one_noise_level_for_all_samples(joins):
    seen = []

    def denoiser(z, logsnr, condition):
        seen.append((logsnr.shape[0], logsnr.stride(0), len(set(logsnr.tolist()))))
        return torch.zeros_like(z)

    denoiser.joins = joins
    condition = Condition((), (), torch.zeros(3, 4), None, ())
    settings = Sampling(steps=2, solver="ddim", guidance=2.0)
    sample(denoiser, torch.zeros(3, 1, 2, 2), condition, condition, Schedule(2), settings)
    # how kernels round may depend on the number of values: one value is rounded alike in every batch
    assert seen == ([(6, 1, 1)] * 2 if joins else [(3, 0, 1)] * 4)
