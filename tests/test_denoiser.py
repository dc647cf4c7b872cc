"""diffusers' UNets in this package's loop: the runs of diffusers' own schedulers, keys and values made once."""

from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection, MultiIPAdapterImageProjection
from torch import Tensor, nn

import semantica
from semantica import Sampling, UserError
from semantica.condition import Stream
from semantica.discrete import DiscreteSchedule
from semantica.fused.denoiser import UNetDenoiser
from semantica.sampling.compiled import CompiledDenoiser
from semantica.sampling.guidance import Guided
from semantica.sampling.loop import sample
from semantica.weak import Weak

TEXT, PICTURE, SIZE = 32, 24, 8
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
SD = {
    "sample_size": SIZE, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": TEXT,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": (2, 2),
}  # fmt: skip
XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2), "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 8 * 6 + 16,
}  # fmt: skip
FLAT = {
    "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "mid_block_type": "UNetMidBlock2D",
}  # fmt: skip
SD_CONFIG = BETAS | {"steps_offset": 1, "set_alpha_to_one": False}
V_CONFIG = BETAS | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
LOOPS = {"ddim": DDIMScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}


def unet(**changes) -> UNet2DConditionModel:
    torch.manual_seed(0)
    made = UNet2DConditionModel(**SD | changes).eval().requires_grad_(False)
    for module in made.modules():
        # fresh weights hardly look at the condition
        if isinstance(module, Attention) and module.is_cross_attention:
            for part in (module.to_q, module.to_k, module.to_v):
                part.weight.mul_(4)
    return made


def adapted(made: UNet2DConditionModel, scales: tuple[float, ...] = (0.7, 0.4)) -> UNet2DConditionModel:
    """With an IP-Adapter of pooled pictures, and one of a picture's tokens ("plus") if there are two scales."""
    projections = [
        ImageProjection(PICTURE, TEXT, 4),
        IPAdapterPlusImageProjection(PICTURE, TEXT, hidden_dims=32, depth=1, dim_head=16, heads=2, num_queries=3),
    ][: len(scales)]
    tokens = (4, 3)[: len(scales)]
    for module in list(made.modules()):
        if isinstance(module, Attention) and module.is_cross_attention:
            processor = IPAdapterAttnProcessor2_0(module.inner_dim, TEXT, num_tokens=tokens, scale=list(scales))
            module.set_processor(processor.requires_grad_(False))
    made.encoder_hid_proj = MultiIPAdapterImageProjection(projections).eval().requires_grad_(False)
    for parameter in made.encoder_hid_proj.parameters():
        nn.init.normal_(parameter, std=0.3)
    made.config.encoder_hid_dim_type = "ip_image_proj"
    return made


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(batch: int, seed: int, length: int = 7) -> Stream:
    return Stream(randn(batch, length, TEXT, seed=seed), randn(batch, 16, seed=seed + 1))


def zeros(stream: Stream) -> Stream:
    return stream.map(lambda array: torch.zeros_like(array[:1]))


class Model:
    """A UNet, its scheduler's configuration, and both branches' streams as we and as diffusers name them."""

    def __init__(self, made, config, streams, null, names=None):
        self.unet, self.config, self.streams, self.null, self.names = made, config, streams, null, names

    def denoiser(self, solver="ddim"):
        return UNetDenoiser(
            self.unet, DiscreteSchedule.from_scheduler(self.config, SIZE, solver), self.null, self.names
        )

    def arguments(self, streams, batch=2):
        first, *pictures = (s.map(lambda a: a.expand(batch, *a.shape[1:])) for s in streams.values())
        added = {}
        if self.unet.config.addition_embed_type:
            side = 8.0 * SIZE
            added = {"text_embeds": first.pooled, "time_ids": torch.tensor([[side, side, 0, 0, side, side]] * batch)}
        if pictures:
            # pooled: a token for each picture; plus: the tokens of one picture
            added["image_embeds"] = [p.tokens if i == 0 else p.tokens[:, None] for i, p in enumerate(pictures)]
        return {"encoder_hidden_states": first.tokens, "added_cond_kwargs": added or None}


def sd(**changes):
    return Model(unet(), SD_CONFIG | changes, {"text": text(2, 1)}, {"text": text(1, 3)})


def xl():
    return Model(unet(**XL), BETAS | {"steps_offset": 1}, {"text": text(2, 1)}, {"text": zeros(text(1, 3))})


def variations():
    tokens = {"image": Stream(randn(2, 1, TEXT, seed=1))}
    return Model(unet(), SD_CONFIG, tokens, {"image": zeros(tokens["image"])})


def adapter():
    pooled, plus = Stream(randn(2, 2, PICTURE, seed=5)), Stream(randn(2, 9, PICTURE, seed=6))
    streams = {"text": text(2, 1), "image_0": pooled, "image_1": plus}
    null = {"text": text(1, 3), "image_0": zeros(pooled), "image_1": Stream(randn(1, 9, PICTURE, seed=7))}
    return Model(adapted(unet()), SD_CONFIG, streams, null)


MODELS = {
    "SD": sd,
    "SD 2, v": lambda: sd(prediction_type="v_prediction"),
    "v, no signal at the end": lambda: sd(**V_CONFIG),
    "SDXL": xl,
    "image variations": variations,
    "IP-Adapters": adapter,
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


def stock(model: Model, solver: str, z: Tensor, steps: int, scale: float) -> Tensor:
    """The loop of diffusers' pipelines."""
    scheduler = LOOPS[solver].from_config(model.config)
    scheduler.set_timesteps(steps)
    z = z * scheduler.init_noise_sigma
    branches = model.arguments(model.streams), model.arguments(model.null)
    for t in scheduler.timesteps:
        own, other = (model.unet(scheduler.scale_model_input(z, t), t, **given).sample for given in branches)
        z = scheduler.step(other + scale * (own - other), t, z).prev_sample
    return z


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("solver", LOOPS)
def test_runs_are_those_of_diffusers_schedulers(model, solver):
    denoiser, z = model.denoiser(solver), randn(2, 4, SIZE, SIZE, seed=9)
    expected = stock(model, solver, z, 10, 3.0)
    settings = Sampling(10, solver, guidance=3.0, thresholding="none")
    made = sample(denoiser, z, denoiser.condition(model.streams), None, denoiser.schedule, settings)
    assert relative(made, expected) < 1e-4
    # the condition matters to what was compared
    other = sample(denoiser, z, denoiser.null(2), None, denoiser.schedule, settings)
    assert relative(other, expected) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("guider", ["tsg", "icg"])
def test_guiders_are_those_of_a_loop_that_hooks_the_timesteps_embedding(model, guider):
    """Ours puts the noise where SDXL's embedding is added, and another prompt's keys in place of the empty one's."""
    steps, scale, strength, denoiser = 5, 3.0, 1.5, model.denoiser("ddim")
    z = start = randn(2, 4, SIZE, SIZE, seed=9)
    n, arguments = (
        randn(steps, 2, denoiser.unet.time_embedding.linear_2.out_features, seed=4),
        model.arguments(model.streams),
    )
    other = model.arguments({name: stream.map(lambda a: a.flip(0)) for name, stream in model.streams.items()})
    scheduler = DDIMScheduler.from_config(model.config)
    scheduler.set_timesteps(steps)
    shift = []
    for i, t in enumerate(scheduler.timesteps):
        own = model.unet(z, t, **arguments).sample

        def perturb(module, inputs, temb, n=n[i]):
            shift.append(strength * temb.std(-1, correction=0, keepdim=True) * n)
            return temb + shift[-1]

        hook = model.unet.time_embedding.register_forward_hook(perturb)
        perturbed = model.unet(z, t, **arguments).sample
        hook.remove()
        weaker = perturbed if guider == "tsg" else model.unet(z, t, **other).sample
        z = scheduler.step(weaker + scale * (own - weaker), t, z).prev_sample
    settings = Sampling(steps, "ddim", guidance=scale, thresholding="none")
    condition = denoiser.condition(model.streams)
    if guider == "tsg":
        temb = denoiser.embedding(torch.from_numpy(denoiser.schedule.grid(steps)[1][:steps]).float())
        ours = strength * temb.std(-1, correction=0)[:, None, None] * n
        torch.testing.assert_close(ours, torch.stack(shift), rtol=1e-3, atol=1e-4)
        weak = Weak(condition, shift=ours)
    else:
        weak = Weak(condition, rows=torch.tensor([[1, 0]]).expand(steps, 2))
    for net in (denoiser, CompiledDenoiser(denoiser, torch.float32, "none")):
        made = sample(net, start, condition, None, denoiser.schedule, settings, weak=weak)
        assert relative(made, z) < 1e-4


@torch.no_grad()
def test_one_call_is_the_network_at_its_timestep(model):
    denoiser, z = model.denoiser(), randn(2, 4, SIZE, SIZE, seed=9)
    at = torch.tensor([3, 700])
    levels = torch.from_numpy(denoiser.schedule.levels)[at]
    v = denoiser(z, levels.float(), denoiser.condition(model.streams))
    predicted = model.unet(z, at, **model.arguments(model.streams)).sample
    alpha, sigma = (a[:, None, None, None].float() for a in (levels.sigmoid().sqrt(), (-levels).sigmoid().sqrt()))
    eps = predicted if model.config.get("prediction_type") != "v_prediction" else sigma * z + alpha * predicted
    assert relative(sigma * z + alpha * v, eps) < 1e-4


@torch.no_grad()
def test_keys_and_values_are_made_once_for_each_prompt(model):
    denoiser, calls = model.denoiser(), []
    for attn in denoiser.unet.crossings:
        own = [*attn.processor.to_k_ip, *attn.processor.to_v_ip]
        for projection in (attn.to_k, attn.to_v, *own):
            projection.register_forward_hook(lambda module, *_: calls.append(module))
    z, settings = randn(2, 4, SIZE, SIZE, seed=9), Sampling(8, "ddim", guidance=3.0, thresholding="none")
    condition, null = denoiser.condition(model.streams), denoiser.null(2)
    for _ in range(2):
        sample(denoiser, z, condition, null, denoiser.schedule, settings)
    # two prompts: the sample's and the empty one
    assert calls and all(calls.count(module) == 2 for module in set(calls))
    assert len(set(calls)) == 2 * len(denoiser.unet.crossings) * len(denoiser.stream_names)


@torch.no_grad()
def test_the_compiled_copy_and_guiders_take_it(model):
    denoiser, z = model.denoiser(), randn(2, 4, SIZE, SIZE, seed=9)
    condition, settings = denoiser.condition(model.streams), Sampling(5, "ddim", 3.0, thresholding="none")
    run = partial(sample, z=z, condition=condition, null=None, schedule=denoiser.schedule, settings=settings)
    expected = run(denoiser)
    fast = CompiledDenoiser(denoiser, torch.float32, compile="none")
    assert relative(run(fast), expected) < 2e-5
    guided = run(denoiser, null=denoiser.null(2), guidance=Guided(ClassifierFreeGuidance(3.0)))
    assert relative(guided, expected) < 1e-5
    # without guidance one branch, in both
    alone = Sampling(5, "ddim", 1.0, thresholding="none")
    assert relative(run(fast, settings=alone), run(denoiser, settings=alone)) < 1e-5


# convolutions before the first cross-attention but the first: two in a residual block, one more where its width
# changes, one into the transformer or between levels
SHARED = {
    "SD": (unet, 3),
    "no self-attention": (lambda: unet(only_cross_attention=True), 3),
    "a level later": (lambda: unet(**XL | {"addition_embed_type": None}), 3 + 3),
    "IP-Adapters": (lambda: adapted(unet()), 3),
    "SDXL": (lambda: unet(**XL), 0),
}


@torch.no_grad()
@pytest.mark.parametrize("make, shared", SHARED.values(), ids=SHARED)
def test_branches_share_what_comes_before_the_first_cross_attention(make, shared):
    made, rows = make(), []
    model = adapter() if made.encoder_hid_proj else Model(made, SD_CONFIG, {"text": text(2, 1)}, {"text": text(1, 3)})
    denoiser = model.denoiser()
    both, joined = denoiser.condition(model.streams).join(denoiser.null(2)), denoiser.joined
    z, levels = randn(2, 4, SIZE, SIZE, seed=9).repeat(2, 1, 1, 1), torch.tensor([1.0, -2.0]).repeat(2)
    expected = denoiser(z, levels, both)
    for module in denoiser.modules():
        # both have the same ones
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    found = joined(z, levels, both)
    # convolutions of two rows add up in another order than those of four
    assert relative(found, expected) < 4e-6 and not torch.equal(found[:2], found[2:])
    assert rows[: shared + 2] == [4] + [2] * shared + [4] and rows.count(2) == shared
    assert {id(p) for p in joined.parameters()} == {id(p) for p in denoiser.parameters()}


@torch.no_grad()
def test_the_given_unet_stays_and_shares_its_weights(model):
    kinds = [type(m) for m in model.unet.modules()]
    denoiser = model.denoiser()
    assert [type(m) for m in model.unet.modules()] == kinds and type(model.unet) is UNet2DConditionModel
    own = dict(model.unet.named_parameters())
    assert all(own[name] is parameter for name, parameter in denoiser.unet.named_parameters())
    half = denoiser.in_precision(torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.levels.dtype == torch.float32 and denoiser.dtype == torch.float32
    z, level = randn(2, 4, SIZE, SIZE, seed=9), torch.tensor([0.0, 0.0])
    exact = denoiser(z, level, denoiser.condition(model.streams))
    found = half(z, level, half.condition(model.streams))
    assert found.dtype == torch.float32 and relative(found, exact) < 0.1


@torch.no_grad()
def test_an_accelerated_unet_gives_the_same():
    model, z, level = sd(), randn(2, 4, SIZE, SIZE, seed=9), torch.tensor([0.0, 2.0])
    plain = model.denoiser()
    expected = plain(z, level, plain.condition(model.streams))
    semantica.accelerate(model.unet)
    fused = model.denoiser()
    assert any(type(m).__name__ == "FusedGroupNormSiLU" for m in fused.modules())
    assert relative(fused(z, level, fused.condition(model.streams)), expected) < 1e-5


@torch.no_grad()
def test_timesteps_come_back_from_their_log_snr_and_lie_between_for_others():
    for changes in ({}, V_CONFIG):
        denoiser = sd(**changes).denoiser()
        levels = torch.from_numpy(denoiser.schedule.levels)
        assert torch.equal(denoiser.timesteps(levels.float()), torch.arange(1000.0))
        middle = denoiser.timesteps(((levels[:-2] + levels[1:-1]) / 2).float())
        assert torch.allclose(middle, torch.arange(998) + 0.5, atol=1e-3)
        assert torch.equal(denoiser.timesteps(torch.tensor([99.0, -99.0])), torch.tensor([0.0, 999.0]))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_levels_and_timesteps_are_those_of_diffusers(spacing):
    config = SD_CONFIG | {"timestep_spacing": spacing}
    for solver, kind in LOOPS.items():
        scheduler, schedule = kind.from_config(config), DiscreteSchedule.from_scheduler(config, SIZE, solver)
        for steps in (1, 4, 25, 30, 50):
            scheduler.set_timesteps(steps)
            assert schedule.timesteps(steps).tolist() == scheduler.timesteps.tolist()
        signal = scheduler.alphas_cumprod.double().numpy()
        assert np.abs(schedule.levels - np.log(signal / (1 - signal))).max() < 1e-3
        assert np.isinf(schedule.grid(4)[1][-1]) == (solver == "dpmpp_2m" or spacing == "linspace")


def test_sizes_of_sdxl_are_of_the_latents_unless_told(model):
    if not model.unet.config.addition_embed_type:
        return
    denoiser = model.denoiser()
    side = 8.0 * SIZE
    same = denoiser.condition(model.streams, torch.tensor([[side, side, 0, 0, side, side]] * 2))
    assert torch.equal(same.emb, denoiser.condition(model.streams).emb)
    other = denoiser.condition(model.streams, torch.tensor([[side, side, 4, 4, side, side]] * 2))
    assert not torch.equal(other.emb, same.emb)


@pytest.mark.parametrize("wrong, message", [
    (lambda: UNetDenoiser(nn.Linear(2, 2), None), "Linear is no UNet2DConditionModel"),
    (lambda: UNetDenoiser(unet(in_channels=9), None), "9 channels in and 4 out, as those that inpaint"),
    (lambda: UNetDenoiser(unet(num_class_embeds=3), None), "class labels"),
    (lambda: sd().denoiser().condition({"image": text(1, 1)}), r"streams are \['image'\]: expected \['text'\]"),
    (lambda: sd().denoiser().condition({"text": Stream(torch.zeros(1, 3, 5))}), r"expected \[B, M, 32\]"),
    (lambda: xl().denoiser().condition({"text": Stream(torch.zeros(1, 3, TEXT))}), r"None: expected \(1, 16\)"),
    (lambda: xl().denoiser().condition({"text": Stream(torch.zeros(1, 3, TEXT), torch.zeros(1, 5))}), r"\(1, 5\)"),
    (lambda: xl().denoiser().condition({"text": text(2, 1)}, torch.zeros(2, 5)), r"time_ids have shape \(2, 5\)"),
    (lambda: UNetDenoiser(unet(**FLAT), None), "this UNet has no cross-attention"),
    (lambda: sd(steps_offset=1000).denoiser(), "offset 1000 of 1000 timesteps"),
    (lambda: sd(beta_start="x").denoiser(), r"offset are \('x', .*give numbers"),
    (lambda: Model(unet(), SD_CONFIG, {}, None).denoiser().null(1), "guidance needs the empty prompt"),
    (lambda: sd(use_karras_sigmas=True).denoiser(), "use_karras_sigmas set.* set it to false there"),
    (lambda: sd(prediction_type="sample").denoiser(), "prediction 'sample' is none of epsilon, v_prediction"),
    (lambda: sd(rescale_betas_zero_snr=True).denoiser(), "it needs v_prediction"),
    (lambda: sd().denoiser().schedule.grid(0), "0 sampling steps"),
    (lambda: UNetDenoiser(unet(time_cond_proj_dim=8), None), "an embedding of the guidance scale"),
    (lambda: DiscreteSchedule.from_scheduler(EDMEulerScheduler().config, SIZE), "sigma_min set"),
    (lambda: DiscreteSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler().config, SIZE), "shift set"),
])  # fmt: skip
def test_what_it_does_not_know_is_one_line(wrong, message):
    with pytest.raises(UserError, match=message):
        wrong()


@pytest.mark.slow
@torch.no_grad()
def test_it_compiles_without_a_break():
    model, z = adapter(), randn(2, 4, SIZE, SIZE, seed=9)
    denoiser, settings = model.denoiser(), Sampling(3, "ddim", 3.0, thresholding="none")
    given = z, denoiser.condition(model.streams), None, denoiser.schedule, settings
    fast = CompiledDenoiser(denoiser, torch.float32, "network")
    assert relative(sample(fast, *given), sample(denoiser, *given)) < 1e-4
