"""The network rearranged for sampling computes what the network does."""

import numpy as np
import pytest
import torch
from PIL import Image

from semantica import Stream, UViT
from semantica.cli import main
from semantica.model.fast import FastDenoiser
from semantica.sampling.compiled import CompiledDenoiser
from semantica.sampling.loop import sample
from semantica.sampling.settings import Sampling
from semantica.solvers import Schedule
from semantica.weak import Weak

STREAMS = {"image": 24, "text": 12}


def network(conditioning="tokens", streams=STREAMS, **changes):
    torch.manual_seed(0)
    settings = dict(image_size=16, channels=(32, 64), depths=(1, 2), width=64, depth=2, heads=2, emb_dim=32)
    unet = UViT(**{**settings, **changes}, streams=streams, conditioning=conditioning).eval()
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return unet


def conditions(unet, batch=3, lengths=(None, None)):
    g = torch.Generator().manual_seed(1)
    streams = {}
    for (name, width), tokens, length in zip(STREAMS.items(), (5, 3), lengths):
        pooled = torch.randn(batch, width, generator=g)
        streams[name] = Stream(torch.randn(batch, tokens, width, generator=g), pooled, length)
    streams = {name: streams[name] for name in unet.stream_names}
    with torch.no_grad():
        return unet.condition(streams), unet.null(batch)


def noise(seed=7, batch=3):
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def settings(guidance=1.0, steps=5, **changes):
    """Schedule and settings of a run."""
    return Schedule(16), Sampling(steps, guidance=guidance, **changes)


def fast(unet, dtype, *arguments):
    """A whole run through the rearranged network, not compiled."""
    return sample(CompiledDenoiser(unet, dtype, "none"), *arguments)


LENGTHS = (torch.tensor([5, 2, 0]), torch.tensor([3, 1, 3]))


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.7)], ids=["all", "interval"])
@pytest.mark.parametrize(
    ("conditioning", "lengths"),
    [("tokens", (None, None)), ("tokens", LENGTHS), ("both", (None, None)), ("global", (None, None))],
    ids=["tokens", "lengths", "both", "global"],
)
def test_images_are_those_of_the_network(conditioning, lengths, interval):
    unet = network(conditioning)
    condition, null = conditions(unet, lengths=lengths)
    arguments = (noise(), condition, null, *settings(2.5, interval=interval))
    with torch.no_grad():
        expected = sample(unet, *arguments)
        other = sample(unet, *arguments[:3], *settings(1.0))
    actual = fast(unet, torch.float32, *arguments)
    assert (expected - other).abs().max() > 1e-2, "guidance must matter for this test to mean anything"
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_a_null_condition_that_is_no_single_token_attends():
    unet = network()
    condition, null = conditions(unet)
    with torch.no_grad():
        negative = unet.condition({n: Stream(torch.randn(3, 4, w) * 2) for n, w in STREAMS.items()})
        condition = unet.condition({n: Stream(torch.randn(3, 4, w)) for n, w in STREAMS.items()})
        expected = sample(unet, noise(), condition, negative, *settings(2.0))
    actual = fast(unet, torch.float32, noise(), condition, negative, *settings(2.0))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_no_condition_at_all_and_no_guidance():
    unet = network("none", {})
    null = unet.null(3)
    with torch.no_grad():
        expected = sample(unet, noise(), null, None, *settings())
    actual = fast(unet, torch.float32, noise(), null, None, *settings())
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_half_precision_is_close_and_the_network_stays_as_it_was():
    unet = network()
    before = {name: p.clone() for name, p in unet.state_dict().items()}
    condition, null = conditions(unet)
    with torch.no_grad():
        expected = sample(unet, noise(), condition, null, *settings(1.5))
    actual = fast(unet, torch.bfloat16, noise(), condition, null, *settings(1.5))
    assert actual.dtype == torch.float32
    assert 0 < (actual - expected).square().mean().sqrt() < 0.02
    assert all(torch.equal(p, before[name]) for name, p in unet.state_dict().items())


def test_both_branches_share_what_they_can():
    """With one embedding, the branches part at the first cross-attention; the null branch never attends."""
    unet = network()
    condition, null = conditions(unet)
    fast = FastDenoiser(unet, torch.float32)
    branches = fast.prepare(condition, null)
    assert branches.shared and len(branches.constants) == 2 and branches.keys[0].shape[0] == 3
    rows = {}

    def watch(name):
        return lambda module, inputs: rows.setdefault(name, []).append(inputs[0].shape[0])

    expected = {
        "down_blocks.0.0.conv1": [3],
        "transformer_blocks.0.attn.to_qkv": [3],
        "transformer_blocks.0.cross.to_q": [3],
        "transformer_blocks.1.attn.to_qkv": [6],
        "transformer_blocks.1.cross.to_q": [3],
        "up_blocks.1.0.conv1.own": [6],
        "up_blocks.1.0.conv1.skip": [3],
    }
    for name in expected:
        fast.net.get_submodule(name).register_forward_pre_hook(watch(name))
    with torch.no_grad():
        fast(noise(), fast.modulations(torch.zeros(1), condition, Weak(null))[0], torch.ones(3), branches)
    assert rows == expected
    # a pooled vector differs between the branches from the first block on
    unet = network("both")
    assert not FastDenoiser(unet, torch.float32).prepare(*conditions(unet)).shared


@pytest.mark.slow
@pytest.mark.parametrize("compile", ["blocks", "network"])
def test_compiled_equals_eager(compile):
    unet = network(depths=(1, 1), depth=1)
    condition, null = conditions(unet)
    arguments = (noise(), condition, null, *settings(2.0, 3))
    compiled = CompiledDenoiser(unet, torch.float32, compile)
    expected = fast(unet, torch.float32, *arguments)
    torch.testing.assert_close(sample(compiled, *arguments), expected, rtol=0, atol=1e-4)
    # another condition, another batch
    condition, null = conditions(unet, 2, (torch.tensor([5, 1]), None))
    arguments = (noise(8, 2), condition, null, *settings(2.0, 3))
    expected = fast(unet, torch.float32, *arguments)
    torch.testing.assert_close(sample(compiled, *arguments), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_run_folder_is_sampled_by_the_command_compiled(small_run, picture, tmp_path):
    made = {}
    for engine in ("torch", "torch-compile"):
        out = tmp_path / f"{engine}.png"
        arguments = ["--model", str(small_run), "--image", str(picture), "--steps", "4", "--guidance", "3", "-n", "2"]
        assert main(["sample", *arguments, "--engine", engine, "--out", str(out)]) == 0
        made[engine] = np.asarray(Image.open(out), np.float64)
    error = np.square(made["torch"] - made["torch-compile"]).mean()
    assert 0 < error < 255**2 / 10**3.5
