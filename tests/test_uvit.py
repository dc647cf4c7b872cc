"""The denoiser and its condition."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from semantica import Condition, Stream, UserError, UViT, ViTEncoder
from semantica.model.cost import cost, count_parameters, preset_table, step_flops
from semantica.model.layers import rotary_grid, rotate
from semantica.model.presets import PRESETS, encoder_preset, preset

SMALL = dict(image_size=16, patch_size=2, channels=(32,), depths=(1,), width=64, depth=2, heads=2, emb_dim=32)


def randomised(model):
    """Zero-initialised layers hide mistakes: give every parameter a value."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.05)
    return model.double().eval()


def make(conditioning="tokens", streams=None, **changes):
    torch.manual_seed(0)
    return randomised(UViT(**{**SMALL, **changes}, streams=streams or {"image": 24}, conditioning=conditioning))


def inputs(batch=3, tokens=5, dim=24, size=16):
    g = torch.Generator().manual_seed(1)
    z, t, p = (
        torch.randn(s, generator=g, dtype=torch.float64)
        for s in ((batch, 3, size, size), (batch, tokens, dim), (batch, dim))
    )
    return z, torch.linspace(-3, 3, batch, dtype=torch.float64), {"image": Stream(t, p)}


@pytest.mark.parametrize("conditioning", ["tokens", "global", "both", "none"])
def test_each_conditioning_reaches_the_output_and_every_parameter(conditioning):
    model = make(conditioning)
    z, logsnr, streams = inputs()
    streams = {} if conditioning == "none" else streams
    v = model(z, logsnr, model.condition(streams))
    assert v.shape == z.shape
    drop = torch.tensor([True, False, False])
    (v.square().sum() + model(z, logsnr, model.condition(streams, drop if streams else None)).sum()).backward()
    unused = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert unused == set()
    if conditioning != "none":
        other = {"image": Stream(streams["image"].tokens.flip(0), streams["image"].pooled.flip(0))}
        changed = (model(z, logsnr, model.condition(other)) - v).abs().amax((1, 2, 3))
        assert changed[0] > 1e-4 and changed[2] > 1e-4 and changed[1] < 1e-12


def test_a_condition_is_a_value_per_sample():
    model = make("both")
    z, logsnr, streams = inputs()
    condition = model.condition(streams)
    together = model(z, logsnr, condition)
    ones = [condition.map(lambda t, i=i: t[i : i + 1]) for i in range(3)]
    apart = torch.cat([model(z[i : i + 1], logsnr[i : i + 1], one) for i, one in enumerate(ones)])
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-12)
    twice = model(z.repeat_interleave(2, 0), logsnr.repeat_interleave(2), condition.repeat(2))
    torch.testing.assert_close(twice[::2], together, rtol=0, atol=1e-12)


def test_dropping_gives_exactly_the_null_condition():
    model = make("both")
    z, logsnr, streams = inputs()
    dropped = model(z, logsnr, model.condition(streams, torch.ones(3, dtype=torch.bool)))
    null = model.null(3)
    assert null.sizes == (1,) and all(k.shape[1] == 1 for k in null.keys)
    # M copies of the null token have the same softmax as one
    torch.testing.assert_close(dropped, model(z, logsnr, null), rtol=0, atol=1e-12)


def test_lengths_hide_tokens_and_order_does_not_matter():
    model = make("tokens")
    z, logsnr, streams = inputs(tokens=6)
    tokens = streams["image"].tokens
    short = model(z, logsnr, model.condition({"image": Stream(tokens[:, :4])}))
    filled = Stream(tokens, lengths=torch.tensor([4, 4, 4]))
    torch.testing.assert_close(model(z, logsnr, model.condition({"image": filled})), short, rtol=0, atol=1e-12)
    shuffled = model(z, logsnr, model.condition({"image": Stream(tokens[:, torch.randperm(6)])}))
    torch.testing.assert_close(
        shuffled, model(z, logsnr, model.condition({"image": Stream(tokens)})), rtol=0, atol=1e-12
    )
    null = model(z, logsnr, model.null(3))
    dropped = model.condition({"image": filled}, torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(model(z, logsnr, dropped), null, rtol=0, atol=1e-12)


def test_several_streams_have_projections_and_softmaxes_of_their_own():
    model = make("tokens", {"image": 24, "text": 10})
    z, logsnr, streams = inputs()
    text = torch.randn(3, 7, 10, dtype=torch.float64)
    condition = model.condition({**streams, "text": Stream(text, lengths=torch.tensor([7, 0, 3]))})
    assert condition.sizes == (5, 7) and condition.lengths.tolist() == [[5, 7], [5, 0], [5, 3]]
    base = model(z, logsnr, condition)
    changed = model.condition({**streams, "text": Stream(text.flip(2), lengths=torch.tensor([7, 0, 3]))})
    moved = (model(z, logsnr, changed) - base).abs().amax((1, 2, 3))
    assert moved[0] > 1e-6 and moved[2] > 1e-6 and moved[1] == 0


def test_wrong_sizes_and_streams_are_refused_by_name():
    for wrong, message in (
        (dict(image_size=18), "image_size=18 is not divisible by 4"),
        (dict(channels=(32, 32)), "same length"),
        (dict(heads=5), "width=64 must split into 5 heads"),
        (dict(conditioning="text"), "conditioning='text'"),
        (dict(streams={}), "needs at least one stream"),
    ):
        with pytest.raises(UserError, match=message):
            UViT(**{**SMALL, "streams": {"image": 24}, **wrong})
    model = make("both")
    _, _, streams = inputs()
    with pytest.raises(UserError, match="expected \\['image'\\]"):
        model.condition({"text": streams["image"]})
    with pytest.raises(UserError, match=r"expected \[B, M, 24\]"):
        model.condition({"image": Stream(streams["image"].tokens[..., :9])})
    with pytest.raises(UserError, match="no pooled vector"):
        model.condition({"image": Stream(streams["image"].tokens)})


def test_rotary_scores_depend_on_the_offset_alone():
    angles = rotary_grid(6, 6, 32).double()
    q, k = torch.randn(2, 32, dtype=torch.float64)
    place = lambda row, column: row * 6 + column  # noqa: E731

    def score(a, b):
        turned = [
            rotate(x[None, None, None], angles[i : i + 1].cos(), angles[i : i + 1].sin()) for x, i in ((q, a), (k, b))
        ]
        return (turned[0] * turned[1]).sum()

    reference = score(place(1, 2), place(3, 1))
    for row, column in itertools.product(range(3), range(3)):
        torch.testing.assert_close(
            score(place(1 + row, 2 + column), place(3 + row, 1 + column)), reference, rtol=0, atol=1e-5
        )
    assert (score(place(1, 2), place(1, 3)) - reference).abs() > 1e-3


def test_stable_names_of_what_later_work_reads():
    names = {name for name, _ in make().named_modules()}
    expected = {
        "transformer_blocks.1.attn.to_out",
        "up_blocks.0.0",
        "down_blocks.0.0",
        "transformer_blocks.0.cross.to_out",
    }
    assert expected <= names


def test_saved_and_loaded_is_bit_equal(tmp_path):
    model = make("both").float()
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    again = UViT.from_pretrained(tmp_path)
    z, logsnr, streams = inputs()
    streams = {"image": Stream(*(t.float() for t in (streams["image"].tokens, streams["image"].pooled)))}
    outs = [m(z.float(), logsnr.float(), m.condition(streams)) for m in (model, again)]
    assert torch.equal(*outs)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("tiny", 3e6, 8e6), ("small", 50e6, 70e6), ("base", 300e6, 400e6), ("large", 1.7e9, 2.3e9)],
)
def test_presets_have_the_size_they_claim(name, low, high):
    row = next(r for r in preset_table() if r["preset"] == name)
    assert low <= row["parameters"] <= high
    # a training step costs about three forward passes, and activations at least the input's bytes per block
    assert 2.5 < row["flops_step"] / row["flops_forward"] < 3.5
    assert row["activation_bytes"] > 1e6


def test_counted_operations_match_the_formula_and_what_runs():
    config = dict(SMALL, channels=(32,), depths=(0,), depth=1)
    model = UViT(**config, streams={"image": 24})
    tokens, grid, width = 5, 16, 64
    attention = 4 * grid * grid * width + 4 * grid * tokens * width
    linears = 2 * grid * width * (3 * width + width + width + width + 8 * width) + 2 * tokens * 24 * 2 * width
    adaln = 2 * 32 * 6 * width + 2 * 2 * 32 * 32
    convs = 2 * 64 * 12 * 32 + 2 * 16 * 9 * 32 * 64 + 2 * 16 * 9 * 64 * 32 + 2 * 64 * 9 * 32 * 12
    counted = cost(model, tokens)
    assert counted["flops_forward"] == attention + linears + adaln + convs
    assert counted["parameters"] == count_parameters(model)
    # the fused CPU attention is one the counter has no formula for
    model.set_attention_backend("_native_math")
    with FlopCounterMode(display=False) as real:
        model(torch.zeros(1, 3, 16, 16), torch.zeros(1), model.condition({"image": Stream(torch.zeros(1, tokens, 24))}))
    assert real.get_total_flops() == counted["flops_forward"]
    encoder = ViTEncoder(image_size=16, patch_size=4, width=24 * 4, depth=1, heads=3)
    frozen_part = (
        step_flops(UViT(**config, streams={"image": 96}), encoder)
        - cost(UViT(**config, streams={"image": 96}), 16)["flops_step"]
    )
    assert frozen_part > 0


def test_presets_follow_the_image_size():
    assert preset("tiny", 64)["patch_size"] == 4 and preset("small")["patch_size"] == 1
    for name in PRESETS:
        assert PRESETS[name]["image_size"] % encoder_preset(name, PRESETS[name]["image_size"])["patch_size"] == 0
    with pytest.raises(UserError, match="image size 40 does not fit preset 'tiny'"):
        preset("tiny", 40)
    with pytest.raises(UserError, match="preset 'huge' is unknown"):
        preset("huge")


def test_condition_passes_through_pytrees():
    condition = make().condition(inputs()[2])
    leaves, spec = torch.utils._pytree.tree_flatten(condition)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, Condition) and again.sizes == condition.sizes
    assert all(torch.equal(a, b) for a, b in zip(again.keys, condition.keys, strict=True))
