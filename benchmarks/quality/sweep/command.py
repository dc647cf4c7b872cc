"""`semantica sweep`: cells that are not there yet, each in a process of its own; their table and their page."""

import functools
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

import semantica
from semantica.benchmarks.harness.table import show
from semantica.benchmarks.harness.verb import need
from semantica.benchmarks.quality.sweep import kept
from semantica.benchmarks.quality.sweep.description import Sweep, read_sweep
from semantica.benchmarks.quality.sweep.page import page, table
from semantica.benchmarks.quality.sweep.progress import Estimate, Work
from semantica.benchmarks.quality.sweep.results import FORMAT, all_names, baselines, groups, row_of, shared
from semantica.benchmarks.quality.sweep.runners import Local, Ray, Runner, Running
from semantica.errors import UserError
from semantica.files import read_json, remove, write_json
from semantica.lock import locked
from semantica.progress import phase

LOCK, TABLE, PAGE = ".lock", "sweep.json", "sweep.html"
# seconds between looks at the processes, between estimates, and between pages of a sweep that goes on
LOOK, ESTIMATE, REDRAW = 0.2, 2.0, 60.0
# seconds between lines where there is no terminal for a bar
SAY = 300.0


@dataclass(frozen=True)
class SweepConfig:
    """Ablations: train and evaluate every cell of a grid of settings, each in a process of its own, and write the table
    sweep.json and the page sweep.html. The same command continues a sweep, and keeps what is done.

    SWEEP.json holds {"train": {options of 'semantica train'}, "axes": {OPTION: [values], or NAME: {POINT: {options}}},
    "seeds": [...], "evaluate": {options of 'semantica evaluate', "guidance": [...]}}, with the names of options in
    Python, such as "image_size". Paths in it are relative to the working folder.
    """

    sweep: Annotated[Path, tyro.conf.Positional]
    """File that describes the sweep."""
    out: Path
    """Folder to write: runs/NAME is the run folder of each cell."""
    jobs: int = 1
    """Cells at a time on this machine, which share its threads; of several GPUs each has one, in turn."""
    ray: bool = False
    """Make each cell a task of the Ray cluster that RAY_ADDRESS names; all its nodes must see --out and the data."""
    ray_cpus: int = 4
    """Threads of a cell with --ray, which Ray reserves for it."""

    def check(self) -> "SweepConfig":
        """Raises `UserError` for impossible options."""
        for name in ("jobs", "ray_cpus"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give at least 1")
        if self.ray and self.jobs != 1:
            raise UserError(f"--jobs {self.jobs} is for this machine: leave it out with --ray, which fills the cluster")
        if not self.ray and self.ray_cpus != 4:
            raise UserError(f"--ray-cpus {self.ray_cpus} is nothing without --ray: leave it out")
        need("jinja2", "matplotlib")
        return self


def sweep(config: SweepConfig, runner: Runner | None = None) -> int:
    """Run what is left of a sweep; the exit code, 1 where a cell failed.

    Args:
        runner: starts the cells, in place of what the options ask for.

    Raises:
        UserError: impossible options or a description that is none, a folder of something else, cells that were made
            with other settings, another sweep at work there. Nothing was started.
    """
    config.check()
    kept.content.cache_clear()
    # paths of a cell must not depend on where its process runs
    out = config.out.absolute()
    found = read_sweep(config.sweep, out)
    with ExitStack() as opened:
        claim(out, opened)
        works = [work_of(found, out, i) for i in range(len(found.cells))]
        for work in works:
            kept.check(work.place, work.request)
        state = State(found, out, works)
        todo = [work for work in works if not kept.complete(work.place, work.request)]
        one, several = len(works), len(found.guidance)
        print(f"{one} cells, evaluated at {several} guidances each; {one - len(todo)} are done", flush=True)
        state.write()
        if todo:
            runner = runner or runner_of(config, found, len(todo))
            opened.callback(runner.close)
            run_all(state, runner, todo)
        state.write(drawn=True)
    return finish(state)


def claim(out: Path, opened: ExitStack) -> None:
    """The folder for this sweep alone. Raises `UserError` for a folder of something else."""
    if out.exists() and not (out / TABLE).exists():
        if not out.is_dir() or any(path.name != LOCK for path in out.iterdir()):
            raise UserError(f"{out} exists and is no sweep: choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        taken = f"another sweep writes into {out}: wait for it, or choose another --out"
        opened.enter_context(locked(out / LOCK, taken))
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}): choose another folder") from error
    if (out / TABLE).exists() and read_json(out / TABLE).get("format") != FORMAT:
        raise UserError(f"{out / TABLE} is of another version's sweep: choose another --out")


def work_of(found: Sweep, out: Path, i: int) -> Work:
    cell = found.cells[i]
    kind = "_".join(f"{axis}-{point}" for axis, point in cell.settings.items())
    return Work(kind, kept.place_of(out, cell.name), kept.asked(found, cell))


def runner_of(config: SweepConfig, found: Sweep, cells: int) -> Runner:
    if not config.ray:
        return Local(min(config.jobs, cells))
    devices = {cell.train["device"] for cell in found.cells} | {found.evaluate.get("device", "auto")}
    return Ray(config.ray_cpus, devices != {"cpu"}, cells)


class State:
    """What is known of all cells, written as it comes.

    Attributes:
        failed: reasons, by cell.
    """

    def __init__(self, found: Sweep, out: Path, works: list[Work]):
        self.sweep, self.out, self.works = found, out, works
        self.failed: dict[str, str] = {}
        self.drawn = time.monotonic()

    @functools.cached_property
    def axes(self) -> dict:
        return {axis: dict(points) for axis, points in self.sweep.axes.items()}

    def content(self) -> dict:
        """As sweep.json has it. Rows are in the order of the cells, of what is still as it was asked for."""
        rows, cells = [], {}
        for cell, work in zip(self.sweep.cells, self.works):
            files, own = kept.trained(work.place, work.request), []
            for guidance in self.sweep.guidance if files is not None else ():
                made = kept.evaluated(work.place, work.request, guidance, files)
                if made is not None:
                    own.append(row_of(cell.name, cell.settings, cell.seed, guidance, made))
            rows += own
            done = len(own) == len(self.sweep.guidance)
            state = {"state": "finished" if done else "trained" if files is not None else "waiting"}
            if cell.name in self.failed:
                state = {"state": "failed", "reason": self.failed[cell.name]}
            cells[cell.name] = state
        same, rows = shared(rows)
        return {
            "format": FORMAT,
            "semantica": semantica.__version__,
            "description": self.sweep.description,
            "axes": self.axes,
            "evaluate": self.sweep.evaluate | {"guidance": list(self.sweep.guidance)},
            "cells": cells,
            "baselines": same,
            "rows": rows,
        }

    def write(self, drawn: bool = False) -> None:
        """The table; and the page, at the end or where the last one is old."""
        content = self.content()
        write_json(self.out / TABLE, content)
        if drawn or time.monotonic() - self.drawn > REDRAW:
            page(self.out / PAGE, content)
            self.drawn = time.monotonic()


def begin(work: Work) -> None:
    """Write down what is asked of a cell; evaluations of something else are gone, so that what is there counts."""
    work.place.mkdir(parents=True, exist_ok=True)
    files = kept.trained(work.place, work.request)
    for path in work.place.glob("guidance-*.json"):
        known = files and any(
            path == kept.evaluation_at(work.place, g) and kept.evaluated(work.place, work.request, g, files)
            for g in work.request["guidance"]
        )
        if not known:
            remove(path)
    write_json(work.place / "cell.json", work.request)
    work.begin()


def run_all(state: State, runner: Runner, todo: list[Work]) -> None:
    """Run cells until none is left; those that fail are named, and the others go on."""
    estimate, waiting, running = Estimate(runner.room), list(todo), {}
    for work in state.works:
        if work not in todo:
            estimate.learn(work)
    shown, said = 0.0, time.monotonic()
    with phase("sweep", sum(work.steps for work in todo)) as bar:
        bar.bar_format = "{desc} {percentage:3.0f}%|{bar}| {n_fmt} of {total_fmt} steps{postfix}"
        try:
            while waiting or running:
                while waiting and len(running) < runner.room:
                    work = waiting.pop(0)
                    begin(work)
                    running[work] = runner.start(work.place)
                for work, process in [*running.items()]:
                    if (reason := process.poll()) is not None:
                        del running[work]
                        reason = ended(state, work, reason)
                        estimate.learn(work)
                        name, left = work.place.name, estimate.left([*running, *waiting])
                        count = f"{len(todo) - len(waiting) - len(running)}/{len(todo)}"
                        outcome = f"FAILED ({reason})" if reason else "done"
                        bar.write(f"{count} {name}: {outcome}{'; ' * bool(left)}{left}", file=sys.stdout)
                        state.write()
                if time.monotonic() - shown > ESTIMATE:
                    bar.n, shown = sum(work.done()[0] for work in todo), time.monotonic()
                    left = estimate.left([*running, *waiting])
                    bar.set_postfix_str(left)
                    if bar.disable and left and shown - said > SAY:
                        print(f"{bar.n} of {bar.total} steps; {left}", flush=True)
                        said = shown
                if running:
                    time.sleep(LOOK)
        except BaseException:
            stop(running.values())
            raise


def ended(state: State, work: Work, reason: str) -> str:
    """Keep in mind what became of a cell; why it failed, or ""."""
    if not reason and not kept.complete(work.place, work.request):
        reason = "its process ended well and left no result: --out must lie on storage that all nodes share"
    if reason:
        state.failed[work.place.name] = reason
    return reason


def stop(running: Iterable[Running]) -> None:
    """Let trainings save, and wait for them; a second interruption ends them at once."""
    processes = list(running)
    if processes:
        said = "\nstopping: trainings are saved; interrupt again to lose what they did since"
        print(said, file=sys.stderr, flush=True)
    try:
        for process in processes:
            process.stop()
        while any(process.poll() is None for process in processes):
            time.sleep(LOOK)
    except KeyboardInterrupt:
        for process in processes:
            process.kill()


def finish(state: State) -> int:
    """Show the table; the exit code."""
    content = read_json(state.out / TABLE)
    if content["rows"]:
        found = groups(content["rows"])
        show(*table(found, baselines(content), all_names(content["rows"])))
    print(f"open {state.out / PAGE}")
    for name, reason in state.failed.items():
        print(f"semantica: cell {name} failed: {reason}", file=sys.stderr)
    if state.failed:
        print("semantica: the same command tries them again", file=sys.stderr)
    return int(bool(state.failed))
