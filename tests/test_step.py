"""A training step on a device that runs behind the host: what it waits for, how it is timed, what is claimed of it."""

import dataclasses
import json
import os
import signal
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from semantica import UserError
from semantica.device import sent
from semantica.errors import first_line
from semantica.model.compile import compile_in_place
from semantica.model.cost import peak_flops
from semantica.model.peaks import FP16_ONLY, HALF, card_peak
from semantica.solvers import Schedule
from semantica.train import loop, setup
from semantica.train.build import build
from semantica.train.config import TrainConfig
from semantica.train.data.pairs import Pairs
from semantica.train.heads import PairHead
from semantica.train.loop import backward, device_faults, inputs, train
from semantica.train.objective import Objective, held_out_loss
from semantica.train.preemption import Stop
from semantica.train.processes import LostProcess, World, joined
from semantica.train.repeatable import WORKSPACE, repeatable
from semantica.train.run.folder import Run
from semantica.train.run.measure import Mark, Measure
from semantica.train.setup import prepare
from semantica.train.sharding import Whole
from semantica.train.state import TrainState

CPU = torch.device("cpu")


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"data": "data", "out": Path("out"), "batch": 4, "log_every": 2, **changes})


class Behind:
    """A device that takes 3 s for a step which the host hands over in 1 s, and the clock of both."""

    def __init__(self):
        self.now = self.busy_until = 0.0

    def step(self) -> None:
        self.now += 1
        self.busy_until = max(self.busy_until, self.now) + 3

    def drain(self, device: torch.device) -> None:
        self.now = max(self.now, self.busy_until)


def test_speed_is_that_of_the_device_and_not_of_the_host():
    behind = Behind()
    measure = Measure(
        config(), torch.device("cpu"), torch.float32, 10**9, World(), clock=lambda: behind.now, drain=behind.drain
    )
    rates = []
    for _ in range(2):
        measure.start()
        for _ in range(4):
            behind.step()
            measure.step(torch.ones(()), torch.ones(()))
        measure.stop()
        # what comes between is not training
        behind.now += 100
        rates.append(measure.row(2, 1e-4)["images_per_s"])
    # 1 s until the device has work, then 3 s for each of four steps of four pictures
    assert rates == [pytest.approx(16 / 13)] * 2


def test_what_comes_between_steps_neither_counts_nor_hides_them(photos, tmp_path, monkeypatch):
    """Held-out figures, saves and grids wait for the device: the steps before them are on the clock all the same."""
    behind = Behind()

    def held_out(*_) -> dict:
        behind.drain(CPU)
        behind.now += 100
        return {"right": 1.0, "shuffled": 1.0}

    monkeypatch.setattr(loop, "held_out_loss", held_out)
    settings = config(
        data=str(photos), out=tmp_path / "run", steps=4, eval_every=1, log_every=4, held_out=0.2, precision="fp32",
        workers=0, device="cpu", sample_every=100,
    )  # fmt: skip
    with joined(settings) as world, ExitStack() as opened:
        t = prepare(settings, world, opened)
        t.objective.register_forward_hook(lambda *_: behind.step())
        clocked = Measure(settings, CPU, torch.float32, 1, world, clock=lambda: behind.now, drain=behind.drain)
        loop.run_steps(dataclasses.replace(t, measure=clocked), loop.NEVER)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # four steps of 1 s on the host and then 3 s on the device, each waited for; four pictures in each
    assert [row["images_per_s"] for row in rows if "images_per_s" in row] == [pytest.approx(16 / 16)]


def test_a_wait_for_data_counts_where_the_device_waits_too():
    """A host that is steps ahead of its device waits for the loader, and nothing is lost by it."""
    behind = Behind()

    class Device(Mark):
        def set(self) -> None:
            self.end = behind.busy_until

        def reached(self) -> bool:
            return behind.now >= self.end

    def feed():
        while True:
            # a batch takes 2 s to load
            behind.now += 2
            yield {}

    measure = Measure(config(), CPU, torch.float32, 1, World(), clock=lambda: behind.now, mark=Device(CPU))
    batches, waits = feed(), []
    for steps in (1, 0, 0):
        for _ in range(steps):
            behind.step()
        measure.waiting(batches)
        waits.append(measure.waited)
    # 1 s for the host, 3 s for the device: it is done within the second wait
    assert waits == [0, 2, 4]
    plain = Measure(config(), CPU, torch.float32, 1, World(), clock=lambda: behind.now)
    plain.waiting(batches)
    assert plain.waited == 2


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("A100-SXM4-40GB", 312e12),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181.05e12),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", 147.1e12),
        ("NVIDIA RTX 4000 SFF Ada Generation", None),
    ],
)
def test_cards_are_known_by_their_whole_name(name, rate):
    assert card_peak(name, torch.bfloat16) == rate
    assert card_peak(name, torch.float32) is None


def test_cards_without_bf16_have_a_rate_in_fp16_only():
    assert [card_peak("Tesla T4", dtype) for dtype in (torch.bfloat16, torch.float16)] == [None, 65e12]
    assert not HALF.keys() & FP16_ONLY.keys()


# tensor cores and boost clock in MHz, from the papers that `peaks` names: 128 operations a clock and core
GEFORCE = {
    "3060": (112, 1777), "3060 Ti": (152, 1665), "3070": (184, 1725), "3070 Ti": (192, 1770), "3080": (272, 1710),
    "3080 Ti": (320, 1665), "3090": (328, 1695), "3090 Ti": (336, 1860), "4060": (96, 2460), "4060 Ti": (136, 2535),
    "4070": (184, 2475), "4070 SUPER": (224, 2475), "4070 Ti": (240, 2610), "4070 Ti SUPER": (264, 2610),
    "4080": (304, 2505), "4080 SUPER": (320, 2550), "4090": (512, 2520), "4090 D": (456, 2520), "5060": (120, 2497),
    "5060 Ti": (144, 2572), "5070": (192, 2512), "5070 Ti": (280, 2452), "5080": (336, 2617), "5090": (680, 2407),
}  # fmt: skip


def test_rates_of_geforce_are_cores_times_clock():
    named = {name.removeprefix("GeForce RTX "): rate for name, rate in HALF.items() if name.startswith("GeForce")}
    expected = {name: cores * 128 * clock / 1e6 for name, (cores, clock) in GEFORCE.items()}
    assert named == pytest.approx(expected, rel=5e-3)


def test_an_unknown_card_has_no_mfu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Abacus 9000")
    rate, why = peak_flops(torch.device("cuda"), torch.bfloat16)
    assert rate is None and why == "no data sheet's rate is known here for bfloat16 on 'NVIDIA Abacus 9000'"
    monkeypatch.setattr("semantica.train.run.measure.peak_flops", lambda *_: (rate, why))
    measure = Measure(config(), torch.device("cpu"), torch.float32, 10**9, World())
    measure.start()
    measure.step(torch.ones(()), torch.ones(()))
    measure.stop()
    row = measure.row(1, 1e-4)
    assert row["mfu"] is None and row["peak_flops"] is None and row["images_per_s"] > 0


class Transfers(TorchDispatchMode):
    """Copies between host and device, and whether each waits; scalars that are read from tensors."""

    def __init__(self):
        super().__init__()
        self.copies, self.reads = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        places = {a.device.type for a in args if isinstance(a, torch.Tensor)}
        goes = kwargs["device"].type if name == "_to_copy" and kwargs.get("device") is not None else None
        if goes is not None and places != {goes}:
            self.copies.append(kwargs.get("non_blocking", False))
        if name == "copy_" and len(places) > 1:
            self.copies.append((*args, False)[2])
        if name in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select"):
            self.reads.append(name)
        return function(*args, **kwargs)


def training(device: str, **changes) -> SimpleNamespace:
    """What `backward` and an update take of a run, on a device."""
    settings = config(**changes)
    unet, encoder, scheduler = build(settings, torch.device("cpu"))
    head = PairHead(encoder.token_dim) if settings.align else None
    state = TrainState(settings, {"unet": unet, "encoder": encoder})
    objective = Objective(unet, encoder, head=head).train().to(device)
    return SimpleNamespace(
        config=settings, device=torch.device(device), scheduler=scheduler, objective=objective, state=state,
        parallel=Whole(World(), torch.device(device), torch.float32),
        autocast=lambda: torch.autocast("cpu", torch.bfloat16),
    )  # fmt: skip


def batch(device: str) -> dict:
    images = {name: torch.zeros(4, 3, 32, 32, device=device) for name in ("condition", "target", "noise")}
    u = (torch.arange(4, dtype=torch.float64) + 0.5) / 4
    return {**images, "u": u, "drop": torch.zeros(4, dtype=torch.bool, device=device), "bad": []}


def test_nothing_in_a_step_waits_for_the_device():
    """On the meta device, where any value that is asked for is an error, and on the CPU with all reads counted."""
    t = training("meta")
    with Transfers() as seen:
        backward(t, *inputs(t, batch("meta")))
    assert seen.copies == [True] and not seen.reads
    t = training("cpu", align=0.1)
    measure = Measure(t.config, t.device, torch.bfloat16, 1, World())
    with Transfers() as seen:
        measure.start()
        measure.step(backward(t, *inputs(t, batch("cpu")))[0], t.state.update())
    assert not seen.reads
    # the seam sees what it is to see
    with Transfers() as seen:
        torch.ones(()).item()
        torch.ones(1).to("meta")
    assert seen.reads == ["_local_scalar_dense"] and seen.copies == [False]


class Recorded(torch.Tensor):
    """Notes how it is moved."""

    calls: list

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.pin_memory, torch.Tensor.to):
            args[0].calls.append((function.__name__, [str(a) for a in args[1:]], kwargs or {}))
            return args[0]
        return super().__torch_function__(function, types, args, kwargs or {})


def test_what_goes_to_a_gpu_is_pinned_and_does_not_wait():
    values = torch.zeros(2).as_subclass(Recorded)
    values.calls = []
    sent(values, torch.device("cuda:1"))
    assert values.calls == [("pin_memory", [], {}), ("to", ["cuda:1"], {"non_blocking": True})]
    here = torch.zeros(2)
    assert sent(here, torch.device("cpu")) is here


def test_a_contrastive_loss_is_not_rounded_by_autocast():
    head = PairHead(16)
    g = torch.Generator().manual_seed(0)
    codes = [torch.randn(8, 16, generator=g) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        actual = head(*codes)
        a, b = (torch.nn.functional.normalize(head.project(code).double(), dim=-1) for code in codes)
    expected = torch.nn.functional.cross_entropy(a @ b.T / head.temperature, torch.arange(8), reduction="none")
    # as product in bf16 the logits, up to 10, are off by 0.02
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)


def test_figures_and_grids_take_no_more_samples_at_a_time_than_a_step(tmp_path):
    """On a GPU: a run whose batch fills it would end at its first figure, hundreds of steps after its start."""
    t = SimpleNamespace(config=config(batch=64, accumulate=4), world=SimpleNamespace(size=2))
    found = [loop.at_once(SimpleNamespace(**vars(t), device=torch.device(name))) for name in ("cuda:0", "cpu")]
    assert found == [8, None]
    g = torch.Generator().manual_seed(0)
    batch = {name: torch.randn(7, 3, 8, 8, generator=g) for name in ("condition", "target", "noise")}
    batch |= {"u": torch.rand(7, generator=g).double(), "drop": torch.ones(7, dtype=torch.bool)}
    batch["other"] = torch.arange(7).roll(1)
    sizes = []

    class Given:
        def __init__(self, device):
            self.unet = SimpleNamespace(device=torch.device(device))

        def __call__(self, condition, target, noise, logsnr, drop):
            sizes.append(len(logsnr))
            given = (condition, target, noise, logsnr, drop)
            # what waits on the host comes to the network's device, some samples at a time
            assert {len(a) for a in given} == {len(logsnr)} and {a.device for a in given} == {self.unet.device}
            if self.unet.device.type == "meta":
                return torch.zeros(len(logsnr)), None, None
            assert not drop.any()
            return (condition * target).flatten(1).mean(1) + logsnr, None, None

    def figures(most, device="cpu"):
        return held_out_loss(Given(device), [batch], Schedule(8), nullcontext, most)

    whole, parts = figures(None), figures(3)
    assert sizes == [7, 7, 3, 3, 1, 3, 3, 1]
    assert whole == pytest.approx(parts) and whole["right"] != whole["shuffled"]
    assert figures(3, "meta") == {"right": 0.0, "shuffled": 0.0}
    run, sizes = Run(config(out=tmp_path / "run"), "", World()), []

    def pipeline(conditions, num_images_per_prompt, **_):
        sizes.append(len(conditions))
        return SimpleNamespace(images=torch.rand(len(conditions) * num_images_per_prompt, 3, 8, 8))

    for most in (None, 16, 3):
        run.sample(pipeline, batch, 1, most)
    run.close()
    # four variations of each condition, with it and without
    assert sizes == [6, 2, 2, 2, 1, 1, 1, 1, 1, 1] and (tmp_path / "run" / "samples" / "step-00000001.png").is_file()


def flags() -> tuple:
    cudnn, fill = torch.backends.cudnn, torch.utils.deterministic.fill_uninitialized_memory
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark, fill


def test_deterministic_is_for_the_run_alone_and_is_written_down(photos, tmp_path, monkeypatch):
    monkeypatch.delenv(WORKSPACE, raising=False)
    before, seen = flags(), []

    class Looking(Stop):
        def __call__(self) -> bool:
            seen.append((*flags(), os.environ.get(WORKSPACE)))
            return False

    settings = config(
        data=str(photos), out=tmp_path / "run", steps=1, deterministic=True, workers=0, device="cpu", held_out=0.0,
    )  # fmt: skip
    train(settings, Looking())
    assert seen == [(True, True, False, False, ":4096:8")] and flags() == before
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["deterministic"] is True


def test_deterministic_says_what_stands_in_its_way(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for given in (None, ":0:0"):
        monkeypatch.setenv(WORKSPACE, given) if given else monkeypatch.delenv(WORKSPACE, raising=False)
        with pytest.raises(UserError, match=f"before CUDA starts: it is {given}"), repeatable(True):
            pass
    monkeypatch.setenv(WORKSPACE, ":16:8")
    problem = "put_ does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms'."
    with pytest.raises(UserError, match="put_ does not have") as caught, repeatable(True):
        raise RuntimeError(problem + " You can turn off")
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="else"), repeatable(True):
        raise RuntimeError("something else")
    with repeatable(True, compiles=True):
        assert torch._inductor.config.deterministic
    assert not torch._inductor.config.deterministic and not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), UserError, "--accumulate"),
        (torch.AcceleratorError("CUDA error: device unavailable\nmore"), LostProcess, "newest checkpoint"),
        (RuntimeError("[alloc_cpu.cpp:127] can't allocate memory: 307 bytes"), UserError, "the machine's memory is f"),
    ],
)
def test_a_gpu_or_machine_that_is_full_or_gone_is_one_line(fault, kind, words):
    with pytest.raises(kind, match=words) as caught, device_faults(World()):
        raise fault
    assert "\n" not in str(caught.value) and first_line(fault) in str(caught.value)
    with pytest.raises(RuntimeError, match="^another$"), device_faults(World()):
        raise RuntimeError("another")


def test_a_loader_that_was_killed_is_one_line(photos, tmp_path, monkeypatch):
    """By the system, where memory is short: torch hears of it in the middle of a step."""
    get = Pairs.__getitem__

    def killed(pairs, index):
        if index >= 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return get(pairs, index)

    monkeypatch.setattr(Pairs, "__getitem__", killed)
    settings = config(
        data=str(photos), out=tmp_path / "run", steps=9, held_out=0.0, precision="fp32", workers=1, device="cpu"
    )  # fmt: skip
    said = "DataLoader worker .*: the same command continues .*; where memory was short, with fewer --workers"
    with pytest.raises(LostProcess, match=said) as caught:
        train(settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "current"), [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_the_chosen_gpu_is_the_current_one(name, current, monkeypatch):
    """Kernels are launched on the current device, whatever device their tensors are on."""
    made = []
    monkeypatch.setattr(setup, "pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made.append(str(device)))
    assert setup.run_device(config(device=name), World()) == torch.device(name) and made == current


def test_compiled_blocks_have_the_shapes_of_the_run(photos, tmp_path, monkeypatch):
    """Also those of the second level, whose height and width are others."""
    graphs = []

    def compiler(graph, inputs, **_):
        graphs.append([node.meta.get("example_value") for node in graph.graph.nodes if node.op == "placeholder"])
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compiler)
    t = training("cpu")
    compile_in_place(t.objective)
    for _ in range(2):
        backward(t, *inputs(t, batch("cpu")))
    # two kinds of block on the way down, two on the way up, the transformer's and the encoder's
    assert len(graphs) == 6 and not [value for graph in graphs for value in graph if isinstance(value, torch.SymInt)]
    torch._dynamo.reset()
