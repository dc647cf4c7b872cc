"""The pretended CUDA devices find what is planted: what a GPU refuses, waits for, or silently gets wrong."""

import pytest
import torch


def on(device: str, *values: float) -> torch.Tensor:
    return torch.tensor(values).to(device)


def test_numbers_are_those_of_the_host_and_devices_do_not_mix(cuda):
    with cuda.mode(), torch.no_grad():
        x, weight = on("cuda:1", 1.0, 2.0, 3.0), torch.arange(6.0).view(2, 3)
        made = torch.nn.functional.linear(x, weight.to("cuda:1")).softmax(0)
        assert made.device == torch.device("cuda:1") and made.is_cuda
        torch.testing.assert_close(made.cpu(), (weight @ torch.tensor([1.0, 2.0, 3.0])).softmax(0))
        for other in (torch.ones(3), on("cuda:0", 1.0, 1.0, 1.0)):
            with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
                x + other
        # a number of the host is none of its tensors
        assert (x + torch.tensor(1.0)).cpu().tolist() == [2, 3, 4]


def test_what_the_host_waits_for_is_counted(cuda):
    with cuda.mode(), torch.no_grad():
        pinned, pageable = torch.ones(4).pin_memory(), torch.ones(4)
        x = pinned.to("cuda:0", non_blocking=True)
        (x * 2).sum()
        assert cuda.waits == []
        for wait in (
            lambda: pageable.to("cuda:0"),
            lambda: pageable.to("cuda:0", non_blocking=True),
            lambda: pinned.to("cuda:0"),
            lambda: x.copy_(pageable),
            lambda: x.cpu(),
            lambda: float(x.sum()),
            lambda: torch.cuda.synchronize(),
            lambda: torch.cuda.current_stream().synchronize(),
        ):
            cuda.waits.clear()
            wait()
            assert len(cuda.waits) == 1


@pytest.mark.parametrize("fault", ["read", "write over what is read", "graph's buffer", None])
def test_streams_that_do_not_wait_are_races(cuda, fault):
    with cuda.mode(), torch.no_grad():
        a, b = torch.cuda.Stream("cuda:0"), torch.cuda.Stream("cuda:0")
        with torch.cuda.stream(a):
            x = torch.full((2,), 1.0, device="cuda:0")
        if fault != "read":
            b.wait_stream(a)
        with torch.cuda.stream(b):
            y = x + 1
        if fault is None:
            a.wait_stream(b)
        if fault in ("write over what is read", None):
            with torch.cuda.stream(a):
                x.add_(1)
        if fault == "graph's buffer":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=a):
                x.mul_(2)
            with torch.cuda.stream(a):
                graph.replay()
    assert y.inner.tolist() == [2, 2] and len(cuda.races) == (fault is not None)


def test_an_event_orders_what_was_before_it_and_not_what_came_after(cuda):
    with cuda.mode(), torch.no_grad():
        a, b = torch.cuda.Stream("cuda:0"), torch.cuda.Stream("cuda:0")
        with torch.cuda.stream(a):
            x = torch.full((2,), 1.0, device="cuda:0")
            done = a.record_event()
            late = torch.full((2,), 1.0, device="cuda:0")
        b.wait_event(done)
        with torch.cuda.stream(b):
            x + 1
            assert cuda.races == []
            late + 1
        assert len(cuda.races) == 1


@pytest.mark.parametrize("current", [0, 1])
def test_a_graph_holds_what_its_own_device_was_given(cuda, current):
    """torch's capture takes a stream of the current device, and keeps it for every capture that follows."""
    with cuda.mode(), torch.no_grad(), torch.cuda.device(current):
        x = on("cuda:1", 1.0, 2.0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x * 2
        # nothing runs while a stream captures; on another device it does, and the graph is empty
        assert y.isnan().all().item() == (current == 1) and len(graph.log) == current
        x.copy_(on("cuda:1", 5.0, 6.0))
        graph.replay()
        assert y.inner.tolist() == ([10, 12] if current == 1 else [2, 4])


def test_what_runs_on_a_device_that_is_not_current_is_named(cuda):
    with cuda.mode(), torch.no_grad():
        x = on("cuda:1", 1.0)
        cuda.astray.clear()
        with torch.cuda.device(1):
            x + 1
        assert cuda.astray == []
        x + 1
        assert cuda.astray == ["aten.add.Tensor"]


def test_the_state_of_random_numbers_is_not_read_while_a_stream_captures(cuda):
    """As blocks that the backward pass computes again do."""
    with cuda.mode(), torch.no_grad():
        assert torch.cuda.get_rng_state() is not None
        with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="during CUDA graph capture"):
            torch.cuda.get_rng_state()
