"""Signs of life of long work where there is no terminal, and the demo's estimate of its time."""

import sys
import time
from pathlib import Path

import pytest

from semantica import UserError
from semantica.benchmarks.quality import pace
from semantica.benchmarks.quality.demo import DemoConfig, demo
from semantica.progress import phase, so_far

# a run of six steps
STORED = Path(__file__).parent / "stored" / "run"


class Heard:
    """A stream that is no terminal."""

    def __init__(self):
        self.lines = []

    def isatty(self):
        return False

    def write(self, text):
        self.lines += text.split("\n")

    def flush(self):
        pass


def until(true):
    end = time.monotonic() + 60
    while not true() and time.monotonic() < end:
        time.sleep(0.001)
    return true()


def test_what_lasts_says_so_without_a_terminal(monkeypatch):
    heard = Heard()
    monkeypatch.setattr(sys, "__stderr__", heard)
    with phase("race: rounds", 4, every=0.001) as done:
        assert heard.lines[0] == "race: rounds"
        done.update()
        assert until(lambda: any(line.startswith("race: rounds: 1 of 4 after 0 s, about ") for line in heard.lines))
    with phase("export", every=0.001):
        assert until(lambda: "export: at it after 0 s" in heard.lines)
    count = len(heard.lines)
    with phase("nothing", 0, every=0.001):
        time.sleep(0.02)
    assert len(heard.lines) == count


def test_how_far_it_is():
    assert so_far(3, 12, 60.0) == "3 of 12 after 60 s, about 3 min left"
    assert so_far(0, 12, 95.0) == "0 of 12 after 2 min" and so_far(5, None, 30.0) == "at it after 30 s"


class Clock:
    """Steps of a given time each."""

    def __init__(self, monkeypatch, first, each):
        self.now, self.first, self.each = 0.0, first, each
        monkeypatch.setattr(pace.time, "perf_counter", lambda: self.now)

    def train(self, config, stop):
        self.now += self.first
        self.config, self.steps = config, 0
        (config.out / "checkpoints").mkdir(parents=True)
        while True:
            self.now += self.each
            self.steps += 1
            if stop() or self.steps == config.steps:
                return


def test_the_steps_that_fit_follow_from_the_measured_speed(monkeypatch, tmp_path, capsys):
    clock = Clock(monkeypatch, first=30.0, each=0.25)
    monkeypatch.setattr(pace, "train", clock.train)
    rehearsed = pace.TrainConfig(data=tmp_path, val=tmp_path, out=tmp_path / "run")
    steps = pace.steps_within(10.0, rehearsed, spent=5.0)
    # 600 s, less 5 s, 30 s and 36 steps of rehearsal, and half of what its start took (30 s and 12 steps)
    wanted = int((600 - 5 - 30 - 36 * 0.25 - (30 + 12 * 0.25) / 2) / 0.25) - pace.REST
    assert steps == wanted // 50 * 50 and clock.steps == 36 and clock.config.val is None
    assert f"{steps} steps fit, the same as with --steps {steps}" in capsys.readouterr().out
    assert not (tmp_path / ".pace").exists() and not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"--minutes 2 is too short for this machine, which makes 4.0 steps a second"):
        pace.steps_within(2.0, rehearsed, spent=5.0)


def test_the_first_steps_tell_how_long_it_takes(monkeypatch, tmp_path, capsys):
    clock = Clock(monkeypatch, first=30.0, each=0.5)
    config = pace.TrainConfig(data=tmp_path, out=tmp_path / "run", steps=1200)
    clock.train(config, pace.announced(1200))
    assert clock.steps == 1200
    # 1164 steps and the rest
    assert capsys.readouterr().out.strip() == (
        "2.0 steps a second on this machine: about 12 min to go, training and the rest"
    )
    (config.out / "checkpoints" / "step-00001000").mkdir()
    clock = Clock(monkeypatch, first=30.0, each=0.5)
    config = pace.TrainConfig(data=tmp_path, out=tmp_path / "again", steps=200)
    clock.train(config, pace.announced(1200, pace.steps_made(tmp_path / "run")))
    # 164 steps and the rest
    assert "about 3 min to go" in capsys.readouterr().out


def test_a_run_that_was_begun_goes_on_with_its_own_steps(tmp_path):
    assert pace.steps_before(STORED) == 6 and pace.steps_before(tmp_path) is None


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"minutes": 5.0, "steps": 3}, "give a time above 0, and no --steps beside it"),
        ({"minutes": 0.0}, "give a time above 0"),
        ({"minutes": 5.0, "controls": True}, "give --steps with --controls"),
    ],
)
def test_impossible_times_are_refused(tmp_path, options, line):
    with pytest.raises(UserError, match=line):
        demo(DemoConfig(out=tmp_path / "demo", **options))
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_a_demo_of_some_minutes_is_that_of_as_many_steps(tmp_path, monkeypatch):
    module = "semantica.benchmarks.quality.demo."
    for name, value in {"CONDITIONS_PER_GROUP": 1, "VARIATIONS": 2, "SAMPLING_STEPS": 2, "LEVELS": 2}.items():
        monkeypatch.setattr(module + name, value)
    monkeypatch.setattr(module + "export_bundle", lambda *_: None)
    monkeypatch.setattr(module + "engines_beside_torch", lambda *_: [])
    monkeypatch.setattr(module + "write_web_page", lambda *_: "")
    monkeypatch.setattr(module + "report", lambda *_: None)
    found = iter([3])
    monkeypatch.setattr(pace, "steps_within", lambda *_: next(found))
    options = dict(groups=8, compile=False)
    timed = demo(DemoConfig(out=tmp_path / "a", minutes=5.0, **options))
    counted = demo(DemoConfig(out=tmp_path / "b", steps=3, **options))
    assert timed["figures"] == counted["figures"] and timed["loss"] == counted["loss"]
    assert demo(DemoConfig(out=tmp_path / "a", minutes=50.0, **options))["figures"] == counted["figures"]
