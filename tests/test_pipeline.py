"""The pipeline as a user calls it, and what it refuses to read."""

import json

import numpy as np
import pytest
import torch
from diffusers.guiders import AutoGuidance, ClassifierFreeGuidance
from diffusers.hooks import LayerSkipConfig
from PIL import Image
from safetensors.torch import load_file, save_file

from semantica import Conditioner, SemanticaPipeline, SemanticaScheduler, UserError, UViT, ViTEncoder
from semantica.pipelines.networks import NetworkPipeline
from semantica.pipelines.runfolder import check_run
from semantica.sampling.guidance import Guided
from semantica.sampling.loop import sample
from semantica.sampling.settings import Sampling
from semantica.solvers import Schedule


def make(conditioning="tokens"):
    torch.manual_seed(0)
    encoder = ViTEncoder(image_size=16, patch_size=4, width=32, depth=1, heads=1)
    unet = UViT(
        image_size=16, channels=(32,), depths=(1,), width=64, depth=3, heads=2, emb_dim=32,
        streams={"image": 32}, conditioning=conditioning,
    )  # fmt: skip
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    pipeline = SemanticaPipeline(unet.eval(), encoder.eval(), SemanticaScheduler(image_size=16))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(seed, size=(20, 24)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def pipe():
    return make()


@pytest.fixture
def run(tmp_path, pipe):
    pipe.save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def call(pipe, image, seed=0, **options):
    options = {
        "num_inference_steps": 3,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(seed),
        **options,
    }
    return pipe(image, **options).images


def test_same_seed_same_images_and_other_seeds_or_conditions_differ(pipe):
    first = call(pipe, picture(0))
    assert first.shape == (1, 3, 16, 16) and first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, call(pipe, picture(0)))
    assert not torch.equal(first, call(pipe, picture(0), seed=1))
    assert not torch.equal(first, call(pipe, picture(1)))


def test_one_or_several_conditions_and_images_per_prompt(pipe):
    noise = torch.randn(4, 3, 16, 16)
    many = call(pipe, [picture(0), picture(1)], num_images_per_prompt=2, latents=noise)
    one = call(pipe, picture(1), latents=noise[2:3])
    torch.testing.assert_close(many[2:3], one, rtol=0, atol=1e-5)
    images = pipe([picture(0), picture(1)], num_inference_steps=2).images
    assert [i.size for i in images] == [(16, 16)] * 2
    assert call(pipe, picture(0), output_type="np").shape == (1, 16, 16, 3)


def test_several_pictures_condition_one_sample_together(pipe):
    noise = torch.randn(2, 3, 16, 16)
    both = call(pipe, [[picture(0), picture(1)], [picture(2)]], latents=noise)
    # the shorter sample is filled up and masked: the same as alone
    torch.testing.assert_close(both[1:], call(pipe, picture(2), latents=noise[1:]), rtol=0, atol=1e-5)
    swapped = call(pipe, [[picture(1), picture(0)], [picture(2)]], latents=noise)
    torch.testing.assert_close(both, swapped, rtol=0, atol=1e-5)
    assert (both[:1] - call(pipe, picture(0), latents=noise[:1])).abs().max() > 1e-4


def test_guidance_is_the_formula(pipe):
    noise = torch.randn(1, 3, 16, 16)
    seen = {}

    def keep(name):
        def callback(_, step, timestep, values):
            seen.setdefault(name, values["latents"].clone())
            return {}

        return callback

    for scale in (1.0, 3.0):
        call(pipe, picture(0), latents=noise, guidance_scale=scale, callback_on_step_end=keep(scale))
    condition = pipe.unet.condition({"image": pipe.encode(picture(0))})
    pipe.scheduler.set_timesteps(3)
    with torch.no_grad():
        logsnr = pipe.scheduler.logsnrs[:1]
        v = [pipe.unet(noise, logsnr, c) for c in (condition, pipe.unet.null(1))]
    for scale in (1.0, 3.0):
        pipe.scheduler.set_timesteps(3)
        expected = pipe.scheduler.step(v[1] + scale * (v[0] - v[1]), pipe.scheduler.timesteps[0], noise).prev_sample
        torch.testing.assert_close(seen[scale], expected, rtol=0, atol=1e-5)


def test_guidance_interval_and_autoguidance(pipe):
    noise = torch.randn(1, 3, 16, 16)
    off = call(pipe, picture(0), latents=noise, guidance_scale=1.0)
    late = call(pipe, picture(0), latents=noise, guider=ClassifierFreeGuidance(guidance_scale=3.0, start=0.67))
    assert not torch.equal(off, late)
    calls = []
    hook = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    call(pipe, picture(0), latents=noise, guider=ClassifierFreeGuidance(guidance_scale=3.0, stop=0.34))
    # 3 steps, of which only the first has a second branch
    assert len(calls) == 4
    weak = AutoGuidance(guidance_scale=2.0, auto_guidance_config=LayerSkipConfig([0, 2], fqn="transformer_blocks"))
    guided = call(pipe, picture(0), latents=noise, guider=weak)
    hook.remove()
    assert not torch.equal(guided, off)
    # the hooks that skipped the blocks are gone
    assert torch.equal(call(pipe, picture(0), latents=noise, guidance_scale=1.0), off)


def test_any_callable_denoises(pipe):
    target = torch.rand(2, 3, 16, 16) * 2 - 1
    guider = Guided(ClassifierFreeGuidance(guidance_scale=1.0))

    def denoiser(z, logsnr, condition):
        alpha, sigma = torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()
        # always sure of the same images
        return (alpha[:, None, None, None] * z - target) / sigma[:, None, None, None]

    null = pipe.unet.null(2)
    out = sample(denoiser, torch.randn(2, 3, 16, 16), null, null, Schedule(16), Sampling(6), guidance=guider)
    torch.testing.assert_close(out, target, rtol=0, atol=1e-4)


def test_callback_may_replace_the_latents(pipe):
    blank = call(pipe, picture(0), callback_on_step_end=lambda p, i, t, values: {"latents": torch.zeros(1, 3, 16, 16)})
    assert torch.equal(blank, torch.full_like(blank, 0.5))


def test_round_trip_is_bit_equal_and_safetensors_only(pipe, run):
    again = SemanticaPipeline.from_pretrained(run)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(call(pipe, picture(0)), call(again, picture(0)))
    assert not [p for p in run.rglob("*") if p.suffix == ".bin"]
    assert type(again.scheduler) is SemanticaScheduler and type(again.encoder) is ViTEncoder


def test_wrong_arguments_are_one_line(pipe):
    for options, message in (
        (dict(output_type="jpg"), "output_type='jpg'"),
        (dict(num_images_per_prompt=0), "num_images_per_prompt=0"),
        (dict(num_inference_steps=0), "0 must be at least 1"),
        (dict(latents=torch.zeros(1, 3, 8, 8)), "latents have shape"),
    ):
        with pytest.raises(UserError, match=message):
            call(pipe, picture(0), **options)
    with pytest.raises(UserError, match="image is empty"):
        call(pipe, [])


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"x"), "is refused: only safetensors"),
        (lambda run: (run / "weights.pkl").write_bytes(b"x"), "is refused: only safetensors"),
        (lambda run: (run / "encoder" / "evil.py").write_text("boom"), "is refused: only safetensors"),
        (lambda run: (run / "model_index.json").unlink(), "has no model_index.json"),
        (lambda run: (run / "model_index.json").write_text("{"), "cannot be read as JSON"),
        (
            lambda run: edit(run / "model_index.json", _class_name="StableDiffusionPipeline"),
            "holds a 'StableDiffusionPipeline'",
        ),
        (lambda run: edit(run / "model_index.json", unet=["os", "system"]), "other code is never loaded"),
        (lambda run: edit(run / "model_index.json", extra=["os", "system"]), "names .*extra"),
        (lambda run: edit(run / "unet" / "config.json", auto_map={"AutoModel": "evil.Model"}), "names code to run"),
        (lambda run: edit(run / "unet" / "config.json", _class_name="ViTEncoder"), "is a 'ViTEncoder'"),
        (lambda run: edit(run / "unet" / "config.json", width=128), "cannot be loaded"),
        (lambda run: edit(run / "unet" / "config.json", image_size=18), "cannot be loaded: image_size=18"),
        (lambda run: (run / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "half written"),
        (
            lambda run: (run / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 100),
            "cannot be loaded",
        ),
    ],
)
def test_what_is_no_safe_whole_run_is_refused(run, spoil, message):
    spoil(run)
    with pytest.raises(UserError, match=message) as caught:
        SemanticaPipeline.from_pretrained(run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [NetworkPipeline.load, SemanticaPipeline.from_pretrained])
@pytest.mark.parametrize("part", ["unet", "encoder", "encoder/image"])
def test_a_weight_that_is_missing_is_not_drawn_at_random(pipe, tmp_path, load, part, caplog, capsys):
    encoder = Conditioner({"image": pipe.encoder}) if "/" in part else pipe.encoder
    SemanticaPipeline(pipe.unet, encoder, pipe.scheduler).save_pretrained(tmp_path / "run")
    assert load(tmp_path / "run")
    path = tmp_path / "run" / part / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    gone = sorted(weights)[:2]
    save_file({key: value for key, value in weights.items() if key not in gone}, path, {"format": "pt"})
    capsys.readouterr()
    with pytest.raises(UserError, match=f"/{part} has no {gone[0]}, one of 2 missing weights: copy it whole") as caught:
        load(tmp_path / "run")
    assert "\n" not in str(caught.value) and not caplog.records and capsys.readouterr().err == ""
    if load != NetworkPipeline.load:
        # a network that is given is not the folder's
        given = {part.partition("/")[0]: encoder if part != "unet" else pipe.unet}
        assert SemanticaPipeline.from_pretrained(tmp_path / "run", **given)


def test_a_link_out_of_the_folder_is_refused(run, tmp_path):
    outside = tmp_path / "outside.safetensors"
    save_file({"x": torch.zeros(1)}, outside)
    (run / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (run / "unet" / "diffusion_pytorch_model.safetensors").symlink_to(outside)
    with pytest.raises(UserError, match="leads outside the run folder"):
        check_run(run)


def test_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        SemanticaPipeline.from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize("solver", ["dpmpp_2m", "ddim", "ddpm"])
@pytest.mark.parametrize("conditioning", ["tokens", "both"])
def test_an_accelerated_pipeline_makes_the_same_images(conditioning, solver):
    plain = make(conditioning)
    plain.scheduler = SemanticaScheduler(image_size=16, solver=solver)
    # two samples, the first of two pictures: lengths differ
    options = dict(num_images_per_prompt=2, guidance_scale=2.5, latents=torch.randn(4, 3, 16, 16))
    pictures = [[picture(0), picture(1)], [picture(2)]]
    expected = call(plain, pictures, **options)
    without = call(plain, pictures, **options | {"guidance_scale": 1.0})
    assert (expected - without).abs().max() > 0.02, "guidance must matter for this test to mean anything"
    fast = plain.accelerate(torch.float32, "none")
    torch.testing.assert_close(call(fast, pictures, **options), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(call(fast, pictures, **options | {"guidance_scale": 1.0}), without, rtol=0, atol=1e-4)


def test_an_accelerated_pipeline_keeps_its_networks_and_takes_no_callback(tmp_path):
    fast = make().accelerate(torch.bfloat16, "none")
    exact = call(make(), picture(0))
    images = call(fast, picture(0))
    # rounded to bf16, and not further
    assert 1e-4 < (images - exact).abs().max() < 0.05 and images.dtype == torch.float32
    assert {p.dtype for p in (*fast.unet.parameters(), *fast.encoder.parameters())} == {torch.float32}
    weak = AutoGuidance(guidance_scale=2.0, auto_guidance_config=LayerSkipConfig([0, 2], fqn="transformer_blocks"))
    for option, said in (
        ({"guider": weak}, "guider that changes the network"),
        ({"callback_on_step_end": lambda *_: {}}, "callback"),
    ):
        with pytest.raises(UserError, match=f"an accelerated pipeline takes no {said}: load it again without"):
            call(fast, picture(0), **option)
    fast.save_pretrained(tmp_path / "run")
    torch.testing.assert_close(
        call(SemanticaPipeline.from_pretrained(tmp_path / "run"), picture(0)), exact, rtol=0, atol=1e-5
    )
