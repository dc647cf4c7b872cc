"""The Triton kernels of group_norm: run in the interpreter, and compiled to machine code. Neither needs a GPU."""

from collections import Counter

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("triton", reason="Triton is not installed")

from semantica.benchmarks.kernels.compile_only import INSTRUCTION, compile_launch, disassemble, variant  # noqa: E402
from semantica.kernels import launch as launching  # noqa: E402
from semantica.kernels.group_norm import backward, forward, specimens, tiles  # noqa: E402

# kernels that move x or y: by how many tensors they read of its size
READS = {"resident": 1, "partial": 1, "apply": 1, "resident_backward": 2, "partial_backward": 2, "apply_backward": 2}


def test_the_interpreted_kernels_are_right(interpreted):
    assert interpreted("interpreted/group_norm.py") > 0


def name_of(launch):
    return launch.kernel.__name__.removesuffix("_kernel")


def assert_fast(label, launch, architecture):
    """No register is spilled; what is as large as x moves 16 bytes at a time, asynchronously in loops."""
    cubin = compile_launch(launch, f"sm_{architecture}").asm["cubin"]
    found = INSTRUCTION.findall(disassemble(cubin, "--dump-sass"))
    moves = Counter(name for name in found if name.split(".")[0] in ("LDL", "STL", "LDG", "LDGSTS", "STG"))
    where = f"{name_of(launch)} of {label} for sm_{architecture}: {dict(moves)}"
    wide = Counter(name.split(".")[0] for name in found if ".128" in name)
    assert not any(name.startswith(("LDL", "STL")) for name in found), f"spills in {where}"
    if name_of(launch) not in READS or not aligned(launch):
        return
    reads, x = READS[name_of(launch)], launch.arguments["x"]
    # lanes beyond the width hold no channel, and the compiler may know it; a smaller tile has no 16 bytes per thread
    per_thread = launch.constants["WIDTH"] * launch.constants["SPAN"] * x.element_size() // (16 * 32 * launch.warps)
    loads = wide["LDGSTS"] if launch.constants.get("STAGES", 0) > 1 else wide["LDG"]
    assert loads >= reads * per_thread, f"loads in pieces in {where}"
    if {"y", "dx"} & set(launch.arguments):
        assert wide["STG"] >= per_thread, f"stores in pieces in {where}"


def aligned(launch):
    """Whether every run of values in memory is made of whole 16 bytes."""
    x, c = launch.arguments["x"], launch.constants
    vector = 16 // x.element_size()
    run = [c["CHANNELS"], c["WIDTH"], c["UNIT"]] if c["LAST"] else [c["STEP"]]
    blocks = -(-c["CHANNELS"] // c["UNIT"]) * -(-c["UNIT"] // c["WIDTH"])
    return all(n % vector == 0 for n in (run if blocks > 1 else run[:1]))


def planned(wanted):
    """Label and launch of the specimens whose labels contain the given words, each program once."""
    seen = set()
    for label, launches in specimens.specimens():
        for launch in launches if wanted in label else ():
            key = variant(launch)
            if key not in seen:
                seen.add(key)
                yield label, launch


LAST = "[1, 128, 20, 256, 256] groups 32 channels-last bfloat16 FiLM"
FIRST = "[8, 192, 64, 64] groups 32 contiguous bfloat16 FiLM"
SMALL = "[8, 96, 16, 16] groups 32 channels-last float16 FiLM"
ONE = "forward [3, 32, 1, 1] groups 4 contiguous bfloat16"
COMPILED = [
    (90, LAST),
    (90, FIRST),
    (90, SMALL),
    (90, ONE),
    (80, LAST),
    (100, f"forward {SMALL}"),
    (120, f"forward {LAST}"),
]


@pytest.mark.parametrize("architecture, label", COMPILED)
def test_no_register_is_spilled_and_access_is_wide(architecture, label):
    for name, launch in planned(label):
        assert_fast(name, launch, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
def test_every_specimen_in_bf16_is_fast(architecture):
    with launching.target(f"sm_{architecture}"):
        chosen = list(planned("bfloat16 FiLM"))
    assert len(chosen) > 150
    for name, launch in chosen:
        assert_fast(name, launch, architecture)


def test_specimens_cover_every_ladder_row(monkeypatch):
    used = set()

    def settings(operator, kernel, width, device):
        row = launching.settings(operator, kernel, width, device)
        used.add((kernel, row["width"]))
        return row

    launching.forget_plans()
    for module in (forward, backward, tiles):
        monkeypatch.setattr(module, "settings", settings)
    names = {name_of(planned) for _, launches in specimens.specimens() for planned in launches}
    ladders = launching.table("group_norm")
    assert names == set(ladders)
    assert used == {(kernel, row["width"]) for kernel in ladders for row in ladders[kernel]["default"]}


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_a_tracer_sees_every_kernel(mode):
    def both(x, weight, scale):
        y, mean, rstd = forward.forward(x, 4, weight, weight, scale, None, "silu", 1e-5)
        return y, *backward.backward(y, x, mean, rstd, 4, weight, weight, scale, None, "silu")

    inputs = torch.randn(2, 8, 128, 128), torch.randn(8), torch.randn(2, 8)
    nodes = make_fx(both, tracing_mode=mode)(*inputs).graph.nodes
    # partial statistics, apply; partial sums, merge, apply
    assert sum("triton_kernel_wrapper" in node.name for node in nodes) == 5


def test_any_number_of_groups_fits_a_grid():
    x = torch.empty(2, 70000, 3, device="meta", dtype=torch.bfloat16)
    weight, mean = torch.empty(70000, device="meta"), torch.empty(2, 70000, device="meta")
    planned = backward.plan_backward(x, x, mean, mean, 70000, weight, weight, None, None, "silu")[0]
    planned += forward.plan_forward(x, 70000, weight, weight, None, None, "silu", 1e-5)[0]
    assert len(planned) >= 3 and all(max(launch.grid[1:], default=1) <= 65535 for launch in planned)
