"""Tuning of launch tables, with a clock that is a formula: what it finds is known beforehand."""

import json
import math
import time

import pytest
import torch

from semantica.benchmarks.kernels import tune
from semantica.benchmarks.kernels.problems import problems
from semantica.cli import main
from semantica.errors import UserError
from semantica.kernels import launch

pytest.importorskip("triton")
from semantica.kernels.group_norm.forward import plan_forward  # noqa: E402

FOREVER = float("inf")


def plan(shape, groups=32):
    """The forward's launches, of meta tensors."""
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
    weight = torch.empty(shape[1], device="meta")
    return lambda: plan_forward(x, groups, weight, weight, None, None, "silu", 1e-5)[0]


def clock(cost):
    """A timer that adds up what each launch costs."""
    return lambda plans: [math.prod(cost(one) for one in launches) for launches in plans]


def away_from_8_warps(one):
    return 1 + abs(math.log2(one.warps) - 3)


@pytest.mark.parametrize("op", launch.LADDERS)
def test_a_table_is_written_as_it_lies_in_the_package(op):
    path = launch.LADDERS[op]
    assert tune.dump(json.loads(path.read_text())) == path.read_text()


def test_neighbours_differ_by_one_notch_within_bounds():
    row = {"width": 64, "block": 16, "programs": [264, 300], "warps": 16, "stages": 1}
    assert list(tune.neighbours(row)) == [
        {**row, "block": 32},
        {**row, "programs": [132, 300]},
        {**row, "programs": [264, 600]},
        {**row, "warps": 8},
        {**row, "stages": 2},
    ]


def test_a_trial_plans_with_its_table_and_leaves_the_shipped_one():
    forward, shipped = plan((8, 96, 16, 16)), json.dumps(launch.table("group_norm"))
    (before,) = forward()
    table = json.loads(shipped)
    for row in table["resident"]["default"]:
        row["warps"] = 2 * before.warps
    with launch.trial("group_norm", table):
        (during,) = forward()
    (after,) = forward()
    assert (during.warps, after.warps) == (2 * before.warps, before.warps)
    assert json.dumps(launch.table("group_norm")) == shipped


def test_the_fastest_rows_are_found_and_unused_ones_stay():
    plans = [plan((8, 96, 16, 16)), plan((8, 128, 128, 128))]
    shipped = json.dumps(launch.table("group_norm"))
    table, changes = tune.search("group_norm", "sm_90", plans, clock(away_from_8_warps), (), 0.02, FOREVER)
    # no GPU is asked for: meta tensors plan with the default ladders, so nothing that sm_90 gets can matter
    assert not changes and "sm_90" not in json.dumps(table)

    table, changes = tune.search("group_norm", "default", plans, clock(away_from_8_warps), (), 0.02, FOREVER)
    assert json.dumps(launch.table("group_norm")) == shipped
    with launch.trial("group_norm", table):
        assert {one.warps for forward in plans for one in forward()} == {8}
    before, after = json.loads(shipped), table
    moved = {
        (kernel, row["width"]): (row, new)
        for kernel in before
        for row, new in zip(before[kernel]["default"], after[kernel]["default"])
        if row != new
    }
    # only rows of kernels that these two problems launch; the one of the single-launch problem by its warps alone
    assert {name for name, _ in moved} <= {"resident", "partial", "merge", "apply"}
    assert [new for (name, _), (old, new) in moved.items() if name == "resident"] == [
        {**old, "warps": 8} for (name, _), (old, _) in moved.items() if name == "resident"
    ]
    assert len(changes) >= len(moved) >= 2 and all(c.ratio < 0.98 and c.problems >= 1 for c in changes)


def test_no_row_is_replaced_by_one_that_fails_or_is_hardly_faster_or_too_late():
    plans = [plan((8, 96, 16, 16))]

    def fails_beyond(one):
        return math.inf if one.warps > 4 else away_from_8_warps(one)

    table, _ = tune.search("group_norm", "default", plans, clock(fails_beyond), ["resident"], 0.02, FOREVER)
    with launch.trial("group_norm", table):
        assert plans[0]()[0].warps == 4
    for cost, margin, deadline in (
        (lambda one: 1 + 0.015 * away_from_8_warps(one), 0.02, FOREVER),
        (away_from_8_warps, 0.02, time.monotonic()),
    ):
        table, changes = tune.search("group_norm", "default", plans, clock(cost), (), margin, deadline)
        assert not changes and table == launch.table("group_norm")


def test_the_verb_refuses_in_one_line_what_it_cannot_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "tune", "--op", "group_norm", "--kernel", "nothing"]) == 2
    assert main(["bench", "tune", "--op", "group_norm", "--margin", "1.5"]) == 2
    assert main(["bench", "tune", "--op", "group_norm"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    words = ("resident, partial", "1.5", "NVIDIA GPU")
    assert len(lines) == 3 and all(word in line for word, line in zip(words, lines))


def test_tuning_goes_on_from_its_own_file_and_refuses_others_first(tmp_path):
    shipped = launch.table("group_norm")
    path = tmp_path / "new" / "group_norm.json"
    assert tune.begun_table(path, "group_norm") == shipped
    begun = json.loads(json.dumps(shipped))
    begun["resident"]["sm_90"] = [{"width": 512, "warps": 2}]
    path.write_text(tune.dump(begun))
    assert tune.begun_table(path, "group_norm") == begun
    for content, word in (("[]", "not a launch table"), ("{", "no launch table")):
        path.write_text(content)
        with pytest.raises(UserError, match=word):
            tune.begun_table(path, "group_norm")
    with pytest.raises(UserError, match="cannot be written"):
        tune.begun_table(path / "below" / "file.json", "group_norm")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_ladder_is_tuned_on_the_gpu_and_written_aside(tmp_path, monkeypatch):
    # drawing and checking the large ones takes longer than all other tests
    monkeypatch.setattr(tune, "problems", lambda device, quick: problems(device, True))
    out = tmp_path / "group_norm.json"
    options = ["--op", "group_norm", "--kernel", "resident", "--seconds", "10", "--out", str(out)]
    assert main(["bench", "tune", *options]) == 0
    table, arch = json.loads(out.read_text()), launch.architecture(torch.device("cuda"))
    shipped = launch.table("group_norm")
    assert [r["width"] for r in table["resident"].get(arch, table["resident"]["default"])] == [
        r["width"] for r in shipped["resident"]["default"]
    ]
    assert {name: table[name] for name in shipped if name != "resident"} == {
        name: shipped[name] for name in shipped if name != "resident"
    }
