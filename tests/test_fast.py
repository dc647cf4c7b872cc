"""The network rearranged for sampling computes what the network does; graphs keep their promises on any device."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from semantica import Stream, UViT
from semantica.cli import main
from semantica.model.fast import FastDenoiser
from semantica.sampling.compiled import BUCKETS, CompiledDenoiser, GraphCache
from semantica.sampling.loop import classifier_free, sample
from semantica.sampling.settings import Sampling
from semantica.solvers import Schedule

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
        fast(noise(), fast.modulations(torch.zeros(1), condition, null)[0], torch.ones(3), branches)
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


class Recorded:
    """A graph for the CPU: it replays on buffers of its own and overwrites its output, as CUDA graphs do."""

    def __init__(self, function, inputs):
        self.function, self.inputs = function, [t.clone() for t in inputs]
        self.output, self.replays = function(*self.inputs), 0

    def __call__(self, *inputs):
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.output.copy_(self.function(*self.inputs))
        self.replays += 1
        return self.output.clone()


def graphs(faster=True):
    made, times = [], iter(range(1000))

    def record(*arguments):
        made.append(Recorded(*arguments))
        return made[-1]

    # the call is measured first, the replay second
    return GraphCache(record, lambda call: -next(times) if faster else next(times)), made


def test_a_graph_is_recorded_once_for_each_kind_of_call():
    found, made = graphs()
    x, y = torch.ones(2), torch.full((2,), 3.0)
    first = found(("a",), lambda t: t * 2, x)
    second = found(("a",), lambda t: t * 2, y)
    assert first.tolist() == [2, 2] and second.tolist() == [6, 6], "results are copied out"
    assert len(made) == 1
    found(("b",), lambda t: t * 3, x)
    found(("a",), lambda t: t * 2, torch.ones(3))
    found(("a",), lambda t: t * 2, x.double())
    assert len(made) == 4


def test_a_graph_that_is_no_faster_is_not_used():
    found, made = graphs(faster=False)
    for value in (1.0, 2.0):
        assert found(("a",), lambda t: t + 1, torch.tensor([value])).tolist() == [value + 1]
    assert len(made) == 1 and made[0].replays == 0 and list(found.kept.values()) == [None]


def test_old_graphs_make_room():
    found, made = graphs()
    for i in range(BUCKETS + 2):
        found((i,), torch.neg, torch.ones(1))
    assert len(found.kept) == len(found.times) == BUCKETS and len(made) == BUCKETS + 2
    found((0,), torch.neg, torch.ones(1))
    assert len(made) == BUCKETS + 3


def test_runs_that_differ_in_what_a_graph_bakes_in_have_graphs_of_their_own():
    unet = network()
    denoiser = CompiledDenoiser(unet, torch.float32, "none")
    denoiser.graphs, made = graphs()
    condition, null = conditions(unet)
    few = [c.map(lambda t: t[:2]) for c in (condition, null)]
    runs = {
        "first": (noise(), condition, null, *settings(2.0, 3)),
        "same kind, other values": (noise(8), condition.map(lambda t: t * 0.9), null, *settings(2.0, 3)),
        "seed": (noise(), condition, null, *settings(2.0, 3, seed=1)),
        "guidance": (noise(), condition, null, *settings(3.0, 3)),
        "steps": (noise(), condition, null, *settings(2.0, 4)),
        "interval": (noise(), condition, null, *settings(2.0, 3, interval=(0.0, 0.5))),
        "schedule": (noise(), condition, null, Schedule(16, logsnr_min=-9.0), settings(2.0, 3)[1]),
        "batch": (noise(7, 2), *few, *settings(2.0, 3)),
    }
    for name, arguments in runs.items():
        expected = fast(unet, torch.float32, *arguments)
        torch.testing.assert_close(sample(denoiser, *arguments), expected, rtol=0, atol=1e-6, msg=name)
    assert len(made) == len(runs) - 2
    # neither fresh noise in every step nor somebody's guidance is part of a graph
    sample(denoiser, noise(), condition, null, *settings(2.0, 3, solver="ddpm"), noise)
    own = SimpleNamespace(needs=(), predictor=classifier_free)
    actual = sample(denoiser, *runs["first"], guidance=own)
    with torch.no_grad():
        torch.testing.assert_close(actual, sample(unet, *runs["first"]), rtol=0, atol=1e-4)
    assert len(made) == len(runs) - 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("compile", ["none", "network"])
def test_on_a_gpu_nothing_waits_and_replay_equals_eager(compile):
    unet = network().cuda()
    condition, null = (c.map(lambda t: t.cuda()) for c in conditions(network()))
    arguments = (condition, null, *settings(2.0))
    eager = CompiledDenoiser(unet, torch.bfloat16, compile, graphs=False)
    graphed = CompiledDenoiser(unet, torch.bfloat16, compile)
    # the graph is to be used here whatever the clock says
    times = iter((2.0, 1.0))
    graphed.graphs.measure = lambda call: next(times)
    for seed in (7, 8):
        z = noise(seed).cuda()
        expected = sample(eager, z, *arguments)
        actual = sample(graphed, z, *arguments)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample(eager, z, *arguments)
        sample(graphed, z, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
