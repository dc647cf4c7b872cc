"""What guidance leads away from: each guider against its formula, on every kind of denoiser, and its bad input."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from PIL import Image
from safetensors.torch import save_file

from semantica import SemanticaPipeline, SemanticaScheduler, Stream, UserError, UViT, ViTEncoder
from semantica.cli import main
from semantica.condition import Condition
from semantica.pipelines.sample import unconditional
from semantica.sampling.guidance import Guided, IndependentConditionGuidance, TimeStepGuidance
from semantica.sampling.guiders import Call, IndependentCondition, TimeStep, WeakModel, choices, turbulence
from semantica.sampling.loop import sample
from semantica.sampling.settings import Sampling
from semantica.solvers import Schedule
from semantica.weak import Weak

STEPS = 3


def make(seed=0, conditioning="both"):
    torch.manual_seed(seed)
    encoder = ViTEncoder(image_size=16, patch_size=4, width=32, depth=1, heads=1)
    unet = UViT(
        image_size=16, channels=(32,), depths=(1,), width=64, depth=2, heads=2, emb_dim=32,
        streams={"image": 32}, conditioning=conditioning,
    )  # fmt: skip
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    pipeline = SemanticaPipeline(unet.eval(), encoder.eval(), SemanticaScheduler(image_size=16))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipe():
    return make()


def pictures(count, seed=0):
    arrays = np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in arrays]


def call(pipe, image, **options):
    settings = dict(num_inference_steps=STEPS, guidance_scale=2.5, output_type="pt", seed=0)
    return pipe(image, **settings | options).images


class Toy:
    """v of one number for each sample, in float64; calls are kept."""

    array, device, dtype, max_batch, refuses = "torch", "cpu", torch.float64, None, {}

    def __init__(self, joins):
        self.joins, self.called = joins, 0

    def __call__(self, z, logsnr, condition):
        self.called += 1
        return torch.tanh(z + condition.emb[:, :1, None, None] * torch.cos(logsnr.double())[:, None, None, None])

    def embedding(self, logsnr):
        return logsnr.double()[:, None] * torch.arange(1.0, 5.0, dtype=torch.float64)


def toy_call(denoiser, count, **changes):
    settings = Sampling(STEPS, "ddim", 2.5, thresholding="none", **changes)
    samples = {"image": torch.arange(count * 4.0, dtype=torch.float64).reshape(count, 4).sin()}

    def condition(given):
        return Condition((), (), given["image"], None, ())

    levels = Schedule(16).grid(STEPS)[1][:STEPS].astype(np.float32)
    pipeline = SimpleNamespace(denoiser=denoiser, condition=condition, prepare=lambda values: {"image": values})
    return Call(pipeline, None, samples, 1, settings, levels), condition(samples)


@pytest.mark.parametrize("joins", [True, False])
@pytest.mark.parametrize("name", ["icg", "icg others", "tsg", "auto"])
def test_guiders_are_their_formulas(name, joins):
    """A whole run, step by step in float64, with the paper's expressions for the weak branch."""
    denoiser, count = Toy(joins), 3
    made, condition = toy_call(denoiser, count, interval=(0.0, 0.7))
    others = torch.linspace(-2, 2, 20, dtype=torch.float64).reshape(5, 4)
    other = SimpleNamespace(**vars(made.pipeline) | {"denoiser": lambda z, logsnr, c: -z * c.emb[:, :1, None, None]})
    other.denoiser.array, other.sample_shape, made.pipeline.sample_shape = "torch", (1, 4, 4), (1, 4, 4)
    other.prepare = lambda values: made.samples
    guider = {
        "icg": IndependentCondition(), "icg others": IndependentCondition(others), "tsg": TimeStep(1.5, 0.5),
        "auto": WeakModel(other),
    }[name]  # fmt: skip
    z = torch.randn(count, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weak = guider.begin(made)(range(count), condition)
    actual = sample(denoiser, z, condition, None, Schedule(16), made.settings, weak=weak)
    emb, plan = condition.emb, made.settings.plan(Schedule(16))
    for i in range(STEPS):
        logsnr = torch.full((count,), float(made.levels[i]))
        v = denoiser(z, logsnr, condition)
        if i < 2:
            if name == "auto":
                weaker = other.denoiser(z, logsnr, condition)
            else:
                given = emb.clone()
                for b in range(count):
                    if name == "icg":
                        given[b] = emb[choices(0, b, 0, STEPS, count, b)[i]]
                    elif name == "icg others":
                        given[b] = others[choices(0, b, 0, STEPS, 5)[i]]
                    else:
                        temb, t = denoiser.embedding(logsnr[:1])[0], 1 - i / STEPS
                        n = torch.from_numpy(turbulence(0, b, 0, STEPS, 4)[i]).double()
                        given[b] += 1.5 * t**0.5 * temb.std(correction=0) * n
                weaker = denoiser(z, logsnr, Condition((), (), given, None, ()))
            v = weaker + 2.5 * (v - weaker)
        x = float(plan.alpha[i]) * z - float(plan.sigma[i]) * v
        z = float(plan.z_scale[i]) * z + float(plan.x_scale[i]) * x
    torch.testing.assert_close(actual, z, rtol=1e-6, atol=1e-6)


def test_draws_are_of_the_seed_the_sample_and_the_step_alone():
    found = choices(3, 1, 2, 1000, 4, own=1)
    assert set(found) == {0, 2, 3} and np.array_equal(found[:7], choices(3, 1, 2, 7, 4, own=1))
    assert set(choices(3, 1, 2, 1000, 4)) == {0, 1, 2, 3}
    assert all(abs(np.mean(found == k) - 1 / 3) < 0.05 for k in (0, 2, 3))
    assert not np.array_equal(found, choices(3, 1, 3, 1000, 4, own=1))
    n = turbulence(3, 1, 2, 400, 16)
    assert abs(n.mean()) < 0.05 and abs(n.std() - 1) < 0.05 and np.array_equal(n[:7], turbulence(3, 1, 2, 7, 16))


def test_with_the_null_condition_in_its_place_it_is_diffusers_classifier_free_guidance(pipe):
    given = pipe.encode(pictures(3))
    with torch.no_grad():
        condition, null = pipe.unet.condition({"image": given}), pipe.unet.null(3)
        arguments = (torch.randn(3, 3, 16, 16), condition, null, Schedule(16), Sampling(STEPS, guidance=2.5))
        guider = Guided(ClassifierFreeGuidance(guidance_scale=2.5, start=0.34))
        expected = sample(pipe.unet, *arguments, guidance=guider)
        late = dataclasses.replace(arguments[-1], interval=(0.34, 1.0))
        # a set of one other condition, drawn in every step
        weak = Weak(null.map(lambda a: a[:1]), rows=torch.zeros(STEPS, 3, dtype=torch.int64))
        actual = sample(pipe.unet, *arguments[:4], late, weak=weak)
    assert torch.equal(actual, expected)


GUIDERS = {
    "icg": lambda: IndependentCondition(),
    "icg others": lambda: IndependentCondition(pictures(4, seed=9)),
    "icg noise": lambda: IndependentCondition(noise=True),
    "tsg": lambda: TimeStep(),
    "tsg blocks": lambda: TimeStep(1.0, 0.0, blocks=1),
    "auto": lambda: WeakModel(make(seed=1)),
}


@pytest.mark.parametrize("name", GUIDERS)
def test_runs_are_repeatable_and_the_same_on_the_accelerated_copy(pipe, name, monkeypatch):
    # models that were trained without dropped conditions know no null one
    monkeypatch.setattr(type(pipe.unet), "null", lambda *_: pytest.fail("asked for the null condition"))
    given, guider, options = pictures(3), GUIDERS[name](), dict(num_images_per_prompt=2)
    first = call(pipe, given, guider=guider, **options)
    assert torch.equal(first, call(pipe, given, guider=guider, **options))
    unguided = call(pipe, given, guidance_scale=1.0, guider=guider, **options)
    assert (first - unguided).abs().max() > 0.02
    assert (first - call(pipe, given, guider=guider, interval=(0.0, 0.4), **options)).abs().max() > 1e-3
    # what is drawn depends on no batch
    pipe.max_samples = 2
    torch.testing.assert_close(call(pipe, given, guider=guider, **options), first, rtol=0, atol=1e-5)
    pipe.max_samples = None
    try:
        for dtype, worst in ((torch.float32, 1e-4), (torch.bfloat16, 0.15)):
            if name == "auto":
                guider.pipeline.accelerate(dtype, "none")
            made = call(pipe.accelerate(dtype, "none"), given, guider=guider, **options)
            torch.testing.assert_close(made, first, rtol=0, atol=worst)
    finally:
        pipe.restore()


def test_other_draws_come_with_the_seed_and_no_noise_of_the_run_is_theirs(pipe):
    given, latents = pictures(3), torch.randn(3, 3, 16, 16)
    for guider in (IndependentCondition(), TimeStep(1.0)):
        a, b = (call(pipe, given, guider=guider, latents=latents, seed=seed) for seed in (0, 1))
        assert (a - b).abs().max() > 1e-3
    levels, made = np.zeros(STEPS, np.float32), []
    for _ in range(2):
        asked = Call(pipe, given, pipe.prepare(given), 1, Sampling(STEPS, seed=5), levels)
        made.append(IndependentCondition().begin(asked)(range(3), pipe.condition(asked.samples)).rows)
    assert torch.equal(*made) and made[0].shape == (STEPS, 3)
    assert not (made[0] == torch.arange(3)).any(), "its own condition is no other"


def test_gaussian_tokens_have_the_scale_of_the_samples_own(pipe):
    given, seen = pictures(2), {}
    asked = Call(pipe, given, pipe.prepare(given), 1, Sampling(STEPS), np.zeros(STEPS, np.float32))
    stub = SimpleNamespace(
        encodings=pipe.encodings,
        condition=pipe.condition,
        conditioned=lambda made: seen.update(made) or pipe.conditioned(made),
    )
    IndependentCondition(noise=True).begin(dataclasses.replace(asked, pipeline=stub))
    own, drawn = pipe.encode(given).tokens, seen["image"].tokens.unflatten(0, (2, -1))
    for b in range(2):
        assert abs(drawn[b].mean() - own[b].mean()) < 0.05 * own[b].std()
        torch.testing.assert_close(drawn[b].std(), own[b].std(), rtol=0.05, atol=0)


def test_as_guiders_of_diffusers_they_are_the_same(pipe):
    """In this package's pipelines they run as those; by diffusers' protocol alone they do what their tensors allow."""
    given = pictures(3)
    for native, guider in (
        (IndependentCondition(), IndependentConditionGuidance(2.5, stop=0.7)),
        (TimeStep(1.0, 0.5), TimeStepGuidance(2.5, 1.0, 0.5, stop=0.7)),
    ):
        expected = call(pipe, given, guider=native, interval=(0.0, 0.7))
        assert torch.equal(call(pipe, given, guider=guider, guidance_scale=9.0), expected)
        condition = pipe.condition(pipe.prepare(given))
        settings, z = Sampling(STEPS, guidance=2.5), torch.randn(3, 3, 16, 16)
        with torch.no_grad():
            by_protocol = sample(pipe.unet, z, condition, None, Schedule(16), settings, guidance=Guided(guider))
            levels = Schedule(16).grid(STEPS)[1][:STEPS].astype(np.float32)
            weak = native.begin(Call(pipe, given, pipe.prepare(given), 1, settings, levels))(range(3), condition)
            inside = dataclasses.replace(settings, interval=(0.0, 0.7))
            ours = sample(pipe.unet, z, condition, None, Schedule(16), inside, weak=weak)
        torch.testing.assert_close(by_protocol, ours, rtol=0, atol=1e-5)
        again = type(guider).from_config(guider.config)
        assert torch.equal(call(pipe, given, guider=again), expected)
    tokens = torch.randn(1, 400, 32) * 3 + 1
    guider = IndependentConditionGuidance(noise=True)
    guider.set_state(0, STEPS, torch.tensor(1.0))
    # as diffusers' modular pipelines do: by names of what a block has
    state, mask = (
        SimpleNamespace(prompt=tokens, negative=None, mask=torch.ones(1, 400, dtype=torch.bool)),
        ("mask", "mask"),
    )
    branches = guider.prepare_inputs_from_block_state(state, {"tokens": ("prompt", "negative"), "mask": mask})
    own, other = (branch.tokens for branch in branches)
    assert all(branch.mask is state.mask for branch in branches)
    assert own is tokens and abs(other.mean() - tokens.mean()) < 0.2 and abs(other.std() / tokens.std() - 1) < 0.05


def test_a_model_that_weakens_itself_is_not_guided(pipe):
    given = pictures(2)
    alone = call(pipe, given, guidance_scale=1.0)
    torch.testing.assert_close(call(pipe, given, guider=WeakModel(pipe)), alone, rtol=0, atol=1e-5)
    # sizes of another kind of model
    small = SimpleNamespace(sample_shape=(3, 8, 8), denoiser=pipe.denoiser)
    with pytest.raises(UserError, match=r"the weak model makes \(3, 8, 8\), this one \(3, 16, 16\)"):
        call(pipe, given, guider=WeakModel(small))


def test_time_step_guidance_of_unconditional_samples(pipe):
    settings = Sampling(STEPS, guidance=3.0, seed=2)
    plain, guided, again = (unconditional(pipe, 2, settings, guider) for guider in (None, TimeStep(1.0), TimeStep(1.0)))
    assert np.array_equal(guided, again) and not np.array_equal(guided, plain)
    assert np.array_equal(unconditional(pipe, 2, dataclasses.replace(settings, guidance=1.0), TimeStep(1.0)), plain)


@pytest.mark.parametrize("lengths", [(None, [1, 3]), ([2, 0], None), ([2, 0], [1, 3])])
def test_conditions_of_other_lengths_join(pipe, lengths):
    """Both branches in one batch attend to what each has: lengths of the other one were taken for whole before."""
    z, logsnr = torch.randn(2, 3, 16, 16), torch.zeros(2)
    made = []
    for seed, length in enumerate(lengths):
        tokens = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(seed))
        made.append(Stream(tokens, tokens.mean(1), length and torch.tensor(length)))
    with torch.no_grad():
        own, other = (pipe.unet.condition({"image": stream}) for stream in made)
        both = pipe.unet(torch.cat((z, z)), torch.cat((logsnr, logsnr)), own.join(other))
        apart = torch.cat([pipe.unet(z, logsnr, c) for c in (own, other)])
    torch.testing.assert_close(both, apart, rtol=0, atol=1e-5)


def test_the_command_guides_by_name(small_run, picture, tmp_path, make_run):
    others = [tmp_path / f"{i}.png" for i in range(2)]
    for path, image in zip(others, pictures(2, seed=4)):
        image.save(path)
    weak = make_run(tmp_path / "weak")
    with torch.no_grad():
        unet = UViT.from_pretrained(weak / "unet")
        for p in unet.parameters():
            p.mul_(0.9)
    save_file(unet.state_dict(), weak / "unet" / "diffusion_pytorch_model.safetensors")
    made = {}
    for name, options in (
        ("cfg", []),
        ("icg", ["--icg-images", *map(str, others)]),
        ("icg-noise", ["--icg-noise"]),
        ("tsg", ["--tsg-scale", "1", "--tsg-blocks", "1", "--interval", "0", "0.6"]),
        ("auto", ["--weak", str(weak)]),
    ):
        out = tmp_path / f"{name}-made.png"
        arguments = ["--image", str(picture), "--steps", "3", "-n", "1", "--guidance", "4", "--out", str(out)]
        guider = ["--guider", name.partition("-")[0], *options]
        assert main(["sample", "--model", str(small_run), *arguments, *guider]) == 0
        made[name] = np.asarray(Image.open(out))
    assert len({array.tobytes() for array in made.values()}) == len(made)


def test_bad_input_is_one_line(small_run, picture, tmp_path, capsys):
    def said(*options):
        out = tmp_path / "out.png"
        given = ["--model", str(small_run), "--image", str(picture), "--out", str(out), "--steps", "2", "-n", "1"]
        assert main(["sample", *given, *map(str, options)]) == 2 and not out.exists()
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "invalid choice 'foo'" in said("--guider", "foo")
    assert "--guider auto needs --weak" in said("--guider", "auto")
    assert "is not a folder" in said("--guider", "auto", "--weak", tmp_path / "nothing")
    assert "guidance of one sample needs others" in said("--guider", "icg")
    assert "--icg-noise beside --icg-images" in said("--guider", "icg", "--icg-noise", "--icg-images", picture)
    assert "--tsg-scale says nothing to --guider icg: give --guider tsg" in said("--guider", "icg", "--tsg-scale", 1)
    assert "--weak says nothing to --guider cfg" in said("--weak", small_run)
    for interval in (("0.5", "0.2"), ("0", "1.5"), ("-0.1", "1"), ("nan", "1")):
        assert "--interval is" in said("--interval", *interval)
    for name, value in (("scale", "nan"), ("scale", 0), ("power", "inf"), ("power", -1), ("blocks", 0)):
        assert "time-step guidance: " in said("--guider", "tsg", f"--tsg-{name}", value)
    assert "--guidance is nan" in said("--guider", "tsg", "--guidance", "nan")
    with pytest.raises(UserError, match="guidance scale nan must be a number"):
        Sampling(guidance=float("nan"))
