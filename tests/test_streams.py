"""Several conditions at once: fusion in one call, streams added to trained networks, guidance for each, adapters."""

import contextlib
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from semantica import Conditioner, SemanticaScheduler, Stream, UserError, UViT, ViTEncoder, WordEncoder
from semantica.model import layers
from semantica.model.grow import grow
from semantica.pipelines.networks import NetworkPipeline
from semantica.sampling.guiders import StreamsApart
from semantica.train.adapters import adapt, merged
from semantica.train.build import picture_encoder
from semantica.train.config import TrainConfig
from semantica.train.state import TrainState

SIZES = {"image": 9, "text": 5, "text_2": 7}
WIDTHS = {"image": 32, "text": 24, "text_2": 16}
SMALL = dict(image_size=16, channels=(32,), depths=(1,), width=32, depth=2, heads=2, emb_dim=32)


def network(*names, seed=0, **options):
    torch.manual_seed(seed)
    unet = UViT(**SMALL, streams={name: WIDTHS[name] for name in names}, **options)
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return unet.eval()


def streams(*names, lengths=(), batch=2):
    drawn = torch.Generator().manual_seed(3)

    def one(name):
        tokens = torch.randn(batch, SIZES[name], WIDTHS[name], generator=drawn)
        pooled = torch.randn(batch, WIDTHS[name], generator=drawn)
        return Stream(tokens, pooled, torch.tensor([2, SIZES[name]]) if name in lengths else None)

    made = {name: one(name) for name in SIZES}
    return {name: made[name] for name in names}


def noised(batch=2):
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(4)), torch.tensor([-1.0, 2.0])[:batch]


@pytest.mark.parametrize("lengths", [(), ("text", "text_2")])
def test_parallel_attention_is_the_sum_of_separate_ones(lengths):
    unet, given = network(*SIZES), streams(*SIZES, lengths=lengths)
    cross, x = unet.transformer_blocks[0].cross, torch.randn(2, 6, 32)
    condition = unet.condition(given)
    made = cross(x, condition.keys[0], condition.values[0], condition.sizes, condition.lengths)
    q = F.rms_norm(cross.to_q(x).unflatten(-1, (2, 16)), (16,), cross.norm_q.weight, 1e-6).transpose(1, 2)
    total = 0
    for i, (name, stream) in enumerate(given.items()):
        tokens = F.layer_norm(stream.tokens, (WIDTHS[name],), *unet.norm_tokens[name].parameters())
        k, v = (a.unflatten(-1, (2, 16)) for a in cross.to_kv[i](tokens).chunk(2, -1))
        k = F.rms_norm(k, (16,), cross.norm_k[i].weight, 1e-6)
        count = torch.full((2,), SIZES[name]) if stream.lengths is None else stream.lengths
        mask = (torch.arange(SIZES[name]) < count[:, None])[:, None, None]
        scores = (q @ k.permute(0, 2, 3, 1) / 4).masked_fill(~mask, -torch.inf)
        total = total + scores.softmax(-1) @ v.transpose(1, 2)
    torch.testing.assert_close(made, cross.to_out(total.transpose(1, 2).flatten(2)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("fusion", ["parallel", "concatenated"])
def test_three_streams_are_one_call_in_each_block(fusion, monkeypatch):
    unet, called, own = network(*SIZES, fusion=fusion), [], layers.cross_attention
    monkeypatch.setattr(layers, "cross_attention", lambda *a, **b: called.append(a[3]) or own(*a, **b))
    unet(*noised(), unet.condition(streams(*SIZES)))
    assert called == [(9, 5, 7) if fusion == "parallel" else (21,)] * len(unet.transformer_blocks)


@pytest.mark.parametrize("conditioning", ["tokens", "both"])
@pytest.mark.parametrize(("before", "after"), [
    (("text",), ("image", "text")), (("image",), ("image", "text", "text_2")), (("image", "text_2"), tuple(SIZES)),
])  # fmt: skip
def test_a_new_stream_changes_no_bit_until_it_is_trained(before, after, conditioning):
    old, unet = network(*before, conditioning=conditioning), network(*after, seed=1, conditioning=conditioning)
    z, logsnr = noised()
    assert not torch.equal(unet(z, logsnr, unet.condition(streams(*after))), (expected := old(
        z, logsnr, old.condition(streams(*before)))))  # fmt: skip
    assert grow(unet, old) == tuple(name for name in after if name not in before)
    assert torch.equal(unet(z, logsnr, unet.condition(streams(*after))), expected)
    assert torch.equal(unet(z, logsnr, unet.null(2)), old(z, logsnr, old.null(2)))
    # it can be trained: its values have gradients
    unet(z, logsnr, unet.condition(streams(*after))).square().sum().backward()
    place = unet.stream_names.index(next(name for name in after if name not in before))
    assert unet.transformer_blocks[0].cross.to_kv[place].weight.grad[32:].any()


def test_streams_are_neither_taken_away_nor_put_under_one_softmax():
    with pytest.raises(UserError, match="conditioned on text, this run is not"):
        grow(network("image"), network("image", "text"))
    with pytest.raises(UserError, match="concatenated streams share one softmax"):
        grow(network("image", "text", fusion="concatenated"), network("image", fusion="concatenated"))
    with pytest.raises(UserError, match="fusion='added': expected one of parallel, concatenated"):
        network("image", fusion="added")


def test_concatenated_streams_share_one_softmax_over_what_is_there():
    unet, given = network(*SIZES, fusion="concatenated"), streams(*SIZES, lengths=("text",))
    drop = torch.tensor([[False, False, True], [False, False, False]])
    condition = unet.condition(given, drop)
    # 9 pictures' tokens, 2 of 5 words, one token for what is dropped; then all
    assert condition.sizes == (21,) and condition.lengths.tolist() == [[12], [21]]
    apart = network(*SIZES).condition(given, drop)
    cross, x = unet.transformer_blocks[1].cross, torch.randn(2, 6, 32)
    made = cross(x, condition.keys[1], condition.values[1], condition.sizes, condition.lengths)[:1]
    rows = [*range(9), 9, 10, 14]
    k, v = (a[1][:1, rows].transpose(1, 2) for a in (apart.keys, apart.values))
    q = cross.norm_q(cross.to_q(x[:1]).unflatten(-1, (2, 16))).transpose(1, 2)
    expected = cross.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-6)
    # without anything it is the null condition, whatever the sizes were
    z, logsnr = noised()
    gone = unet.condition(given, torch.ones(2, dtype=torch.bool))
    torch.testing.assert_close(unet(z, logsnr, gone), unet(z, logsnr, unet.null(2)), rtol=0, atol=5e-6)
    with pytest.raises(UserError, match="concatenated streams are for comparisons, in eager torch only"):
        NetworkPipeline(unet, ViTEncoder(16, 4, 32, 1, 1), SemanticaScheduler(image_size=16)).accelerate()


@pytest.fixture(scope="module")
def pipe():
    words = WordEncoder(("blue", "red", "ring"), 3, 24)
    torch.manual_seed(1)
    encoder = Conditioner({"image": ViTEncoder(16, 4, 32, 1, 1), "text": words})
    return NetworkPipeline(network("image", "text"), encoder.eval(), SemanticaScheduler(image_size=16))


def made(pipe, guidance, guider=None, **options):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    settings = dict(num_inference_steps=1, seed=0, output_type="pt", solver="ddim", num_images_per_prompt=2)
    given = {"image": [picture] * 2, "text": ["red ring", "blue ring"]} | options
    return pipe(given, guidance_scale=guidance, guider=guider, **settings).images


def test_pictures_and_texts_have_scales_of_their_own(pipe, monkeypatch):
    calls, forward = [], UViT.forward
    with monkeypatch.context() as patched:
        patched.setattr(UViT, "forward", lambda self, z, *a: calls.append(len(z)) or forward(self, z, *a))
        apart = made(pipe, 3.0, StreamsApart(1.5))
    # one step of four images: with both, with pictures alone, with nothing
    assert calls == [4, 4, 4]
    # in one step from noise the image is linear in v, as long as nothing is clipped
    pipe.scheduler.register_to_config(thresholding="none")
    apart, both, null = made(pipe, 3.0, StreamsApart(1.5)), made(pipe, 1.0), made(pipe, 0.0)
    part = made(pipe, 1.0, text=None)
    expected = null + 1.5 * (part - null) + 3.0 * (both - part)
    inside = (expected > 0.01) & (expected < 0.99)
    for array in (apart, both, null, part):
        inside &= (array > 0.001) & (array < 0.999)
    assert inside.float().mean() > 0.3
    torch.testing.assert_close(apart[inside], expected[inside], rtol=0, atol=1e-5)
    # one scale for both is guidance as ever
    torch.testing.assert_close(made(pipe, 2.0, StreamsApart(2.0)), made(pipe, 2.0), rtol=0, atol=1e-5)
    fast = NetworkPipeline(pipe.unet, pipe.encoder, pipe.scheduler).accelerate(torch.float32, "none")
    torch.testing.assert_close(made(fast, 3.0, StreamsApart(1.5)), apart, rtol=0, atol=1e-4)


def test_scales_for_streams_that_are_not_there_are_one_line(pipe):
    with pytest.raises(UserError, match="leads pictures and texts, here is image: give both"):
        made(pipe, 3.0, StreamsApart(), text=None)
    with pytest.raises(UserError, match="scale nan of pictures must be a number"):
        StreamsApart(float("nan"))


def test_adapters_leave_the_base_as_it_is_and_go_into_its_matrices():
    unet = network("image", "text")
    base, whole = copy.deepcopy(unet.state_dict()), copy.deepcopy(unet)
    adapt(unet, 4, ("image",))
    z, logsnr = noised()
    given = streams("image", "text")
    assert torch.equal(unet(z, logsnr, unet.condition(given)), whole(z, logsnr, whole.condition(given)))
    trained = {key: p for key, p in unet.named_parameters() if p.requires_grad}
    assert {key.split(".lora_")[0].split(".", 2)[2] for key in trained if "lora_" in key} == {
        "attn.to_qkv", "attn.to_out", "cross.to_q", "cross.to_out", "cross.to_kv.1",
    }  # fmt: skip
    assert {"null_tokens.image", "transformer_blocks.0.cross.to_kv.0.weight"} <= trained.keys()
    assert "null_tokens.text" not in trained and not any("mlp" in key for key in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(2):
        unet(z, logsnr, unet.condition(given)).square().sum().backward()
        optimizer.step()
    one = merged(unet)
    assert one.state_dict().keys() == base.keys() and type(one.transformer_blocks[0].attn.to_qkv) is torch.nn.Linear
    expected = unet(z, logsnr, unet.condition(given))
    torch.testing.assert_close(one(z, logsnr, one.condition(given)), expected, rtol=0, atol=1e-5)
    changed = {key for key, value in one.state_dict().items() if not torch.equal(value, base[key])}
    assert changed and all(
        any(part in key for part in ("attn.to_", "cross.to_", "image", "norm_k.0")) for key in changed
    )
    assert merged(whole) is whole


def test_an_encoder_has_a_rate_of_its_own():
    config = TrainConfig(data="", out="", lr=1e-3, encoder_lr=0.1, warmup=0, weight_decay=0.0, clip=1e9)
    modules = {"unet": torch.nn.Linear(2, 2), "encoder": torch.nn.Linear(2, 2)}
    before = {name: copy.deepcopy(module.state_dict()) for name, module in modules.items()}
    state = TrainState(config, modules)
    for module in modules.values():
        for p in module.parameters():
            p.grad = torch.ones_like(p)
    state.update()
    # adam's first step is the rate itself
    for name, rate in (("unet", 1e-3), ("encoder", 0.1)):
        for key, value in modules[name].state_dict().items():
            torch.testing.assert_close(before[name][key] - value, torch.full_like(value, rate), rtol=1e-4, atol=1e-6)


def test_a_frozen_tower_is_trained_where_its_rate_is_given(tmp_path, save_tower):
    save_tower(tmp_path, "dinov2")
    options = dict(data="", out="", encoder=str(tmp_path), encoder_size=28)
    for rate in (None, 1e-5):
        encoder = picture_encoder(TrainConfig(**options, encoder_lr=rate), 16, contextlib.nullcontext)
        stream = encoder(torch.zeros(1, 3, 28, 28))
        assert encoder.trainable is stream.tokens.requires_grad is (rate is not None)
