"""A recorded training step: the same training as by calls, on the CPU with a recording that runs the function again."""

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import nn

from semantica import UserError
from semantica.condition import Stream
from semantica.errors import ArtifactError
from semantica.train.config import TrainConfig
from semantica.train.graph import StepGraph
from semantica.train.loop import NEVER, device_faults, run_steps, train
from semantica.train.processes import LostProcess, World, joined
from semantica.train.setup import prepare

CPU = torch.device("cpu")


class Recording:
    """What a CUDA graph is: the same work on the same memory. `spoils` changes what a replay computes."""

    def __init__(self, spoils: Callable | None = None):
        self.made, self.spoils = 0, spoils

    def __call__(self, run: Callable) -> tuple:
        self.made += 1
        results = tuple(result.clone() for result in run())

        def replay() -> None:
            for kept, now in zip(results, run(), strict=True):
                kept.copy_(now)
            if self.spoils:
                self.spoils(results)

        return results, replay


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.SiLU(), nn.Linear(16, 1))
    net.unused = nn.Parameter(torch.ones(3))
    return net


def passes(net: nn.Module) -> Callable:
    def backward(stream: Stream, weight: torch.Tensor, absent: None):
        assert absent is None
        losses = net(torch.cat((stream.tokens.mean(1), stream.pooled), -1))[:, 0].square() * weight
        losses.mean().backward()
        return losses.mean().detach(), losses.detach()

    return backward


def given(step: int) -> tuple:
    g = torch.Generator().manual_seed(step)
    return Stream(torch.randn(5, 2, 3, generator=g), torch.randn(5, 3, generator=g)), torch.rand(5, generator=g), None


def trained(wrap: Callable, keeps: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Six updates of two parts each, with weight decay, dropout as drawn by each step's seed."""
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    backward, found = wrap(net), []
    for step in range(6):
        torch.manual_seed(step)
        results = [backward(*given(2 * step + part)) for part in range(2)]
        found += [loss.item() for loss, _ in results]
        assert len({id(r) for _, r in results}) == 2 and not torch.equal(results[0][1], results[1][1])
        optimizer.step()
        optimizer.zero_grad(set_to_none=not keeps)
    return found, net.state_dict()


def test_a_recorded_step_trains_to_the_same_bits():
    """Also the first one, whose parts come before and after recording; and what gets no gradient does not decay."""
    record = Recording()
    losses, weights = trained(passes, keeps=False)
    again, same = trained(lambda net: StepGraph(passes(net), net.parameters(), CPU, record), keeps=True)
    assert record.made == 1 and again == losses
    assert all(torch.equal(same[name], value) for name, value in weights.items())
    assert torch.equal(same["unused"], torch.ones(3))


def test_gradients_that_were_there_before_recording_count():
    net = network().eval()
    passes(net)(*given(0))
    passes(net)(*given(1))
    expected = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    passes(net)(*given(0))
    StepGraph(passes(net), net.parameters(), CPU, Recording())(*given(1))
    actual = [p.grad for p in net.parameters() if p.grad is not None]
    assert len(expected) == 4
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("spoils", [lambda r: r[0].mul_(1.1), lambda r: r[0].fill_(torch.nan)])
def test_a_replay_that_computes_something_else_is_not_kept(spoils):
    """As of a graph that was recorded on another device: it is empty, and its results never change."""
    net = network()
    graph = StepGraph(passes(net), net.parameters(), CPU, Recording(spoils))
    with pytest.raises(ArtifactError, match="the recorded step's loss is .* leave out --graph"):
        graph(*given(0))
    assert graph.replay is None
    net.eval()
    empty = StepGraph(passes(net), net.parameters(), CPU, lambda run: (run(), lambda: None))
    with pytest.raises(ArtifactError, match="gradient norm is 0, "):
        empty(*given(0))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gradients_that_overflow_in_both_ways_are_alike(value):
    """As those of a loss scaled for fp16 do in the first steps: the update is skipped, and the scale falls."""
    net = network().eval()

    def overflows(x: torch.Tensor) -> tuple[torch.Tensor]:
        loss = net(x).mean()
        (loss + 0 * (x * value * net.unused.sum()).sum()).backward()
        return (loss.detach(),)

    graph, x = StepGraph(overflows, net.parameters(), CPU, Recording()), torch.ones(2, 6)
    assert graph(x)[0] == net(x).mean() and not net.unused.grad.isfinite().any()
    # but not where the call is finite
    spoilt = StepGraph(overflows, net.parameters(), CPU, Recording(lambda r: r[0].fill_(value)))
    with pytest.raises(ArtifactError, match="the recorded step's loss is"):
        spoilt(x)


@pytest.mark.parametrize("kind", [RuntimeError, torch.AcceleratorError])
def test_what_cannot_be_recorded_is_one_line_and_no_lost_gpu(kind):
    """A recording's refusals come as errors of the device: to go on from the checkpoint would end the same way."""

    def refuse(run):
        try:
            raise kind("CUDA error: operation not permitted when stream is capturing\nmore of it")
        finally:
            raise kind("CUDA error: operation failed due to a previous error during capture")

    net = network()
    graph = StepGraph(passes(net), net.parameters(), CPU, refuse)
    with pytest.raises(ArtifactError) as caught, device_faults(World()):
        graph(*given(1))
    said = str(caught.value)
    assert said.startswith("the step cannot be recorded (CUDA error: operation not permitted") and "\n" not in said
    assert said.endswith("leave out --graph") and not isinstance(caught.value, LostProcess)

    def full(run):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="memory is full"), device_faults(World()):
        StepGraph(passes(net), net.parameters(), CPU, full)(*given(1))


def test_the_trainer_records_its_step_and_trains_the_same(photos, tmp_path, monkeypatch):
    """Two parts to a batch; the encoder trained along, REPA and stored tokens are trees of tensors like these."""
    record = Recording()
    monkeypatch.setattr("semantica.train.graph.cuda_graph", record)
    ends = []
    for name, graph in (("called", False), ("recorded", True)):
        settings = TrainConfig(
            str(photos), tmp_path / name, steps=3, batch=4, accumulate=2, warmup=0, precision="fp32", held_out=0.0,
            align=0.1, workers=0, device="cpu",
        )  # fmt: skip
        with joined(settings) as world, ExitStack() as opened:
            t = prepare(settings, world, opened)
            # what only a GPU may ask for
            t.state.config = dataclasses.replace(settings, graph=graph)
            run_steps(dataclasses.replace(t, config=t.state.config), NEVER)
        ends.append(t.state.tensors())
    called, recorded = ends
    assert record.made == 1 and called.keys() == recorded.keys() and len(called) > 500
    assert all(torch.equal(called[key], value) for key, value in recorded.items())


def test_a_graph_is_for_one_process_on_a_gpu(photos, tmp_path):
    settings = TrainConfig(str(photos), tmp_path / "run", graph=True, device="cpu")
    with pytest.raises(UserError, match="--graph records what a GPU does, and the device is cpu"):
        train(settings)
    assert not (tmp_path / "run").exists()
    for parallel, processes in (("ddp", 2), ("auto", 2), ("fsdp", 1)):
        with pytest.raises(UserError, match="--graph is for one process"):
            TrainConfig("x", Path("y"), graph=True, batch=8, parallel=parallel).check(processes)
