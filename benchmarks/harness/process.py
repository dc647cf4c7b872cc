"""Implementations in processes of their own: both ends of the pipe, and the race of whole runs.

Requests and answers are JSON, one a line, answers on what was standard output when the process started.
"""

import gc
import importlib
import json
import os
import random
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semantica.benchmarks.harness.arithmetic import exact_fp32
from semantica.errors import UserError
from semantica.memory import peak_resident

if TYPE_CHECKING:
    from semantica.benchmarks.harness.race import Protocol, Times


# seconds before whoever is next: threads of the process before may still spin
QUIET = 0.02


class Wrong(Exception):
    """An implementation that must not be timed; the message says why."""


def resolve(target: str) -> Callable:
    """ "module:function" as the function, from what is installed or from the working folder.

    Raises:
        UserError: no such module or function.
    """
    module, _, name = target.partition(":")
    # last, so that nothing in the user's folder stands in for an installed package
    sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{target!r} cannot be imported as module:function ({error})") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(function):
        raise UserError(f"{target!r} is not a function")
    return function


def serve(handlers: dict[str, Callable[..., dict]]) -> None:
    """In the process: answer requests until there are no more."""
    # whatever libraries print goes to the log, not between the answers
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        what, arguments = json.loads(line)
        exact_fp32()
        try:
            answer = handlers[what](**arguments)
        # whatever an implementation raises is its own failure: the race goes on without it
        except Exception as error:
            traceback.print_exc()
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        if "error" in answer:
            give_back()
        print(json.dumps(answer), file=answers, flush=True)


def give_back() -> None:
    """After a failure: what it left with torch's allocator is the device's again, for those that go on."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        # a fault may have taken the device from this process, which has answered with it
        with suppress(RuntimeError):
            torch.cuda.empty_cache()


def peak_memory() -> int:
    """Bytes: the allocator's peak where CUDA was used, else the largest resident size of this process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return peak_resident()


class Process:
    """An implementation's own process. Whatever fails there is `Wrong` here.

    module: is run as a script, with a folder of its own as the only argument. name: of that folder, in `place`.
    """

    def __init__(self, module: str, name: str, place: Path):
        self.folder = place / re.sub("[^A-Za-z0-9_.-]", "-", name)
        self.folder.mkdir(parents=True)
        self.log = (self.folder / "log.txt").open("w")
        # -P: the root of a checkout must not be on sys.path
        command = [sys.executable, "-P", "-m", module, str(self.folder)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )

    def ask(self, what: str, **arguments) -> dict:
        try:
            self.process.stdin.write(json.dumps([what, arguments]) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Wrong(f"its process ended with code {self.process.wait()}: {last_line(self.log.name)}")
        answer = json.loads(line)
        if "error" in answer:
            raise Wrong(answer["error"])
        return answer

    def close(self) -> None:
        # what a process that is gone was last asked cannot be written any more
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()


def last_line(path: str) -> str:
    lines = Path(path).read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"


@dataclass(eq=False)
class Entrant:
    """An implementation in a race of whole runs, and what the race finds of it.

    Attributes:
        process: answers requests; to each run with `seconds`, a list of the time of each call in it, and `peak_bytes`.
        built, first, last: answers to the request that built it, to its first run and to its latest.
        answers: to the timed runs.
        reason: why it is not timed, or no longer; the first fault only.
    """

    process: Process
    built: dict = field(default_factory=dict)
    first: dict = field(default_factory=dict)
    last: dict = field(default_factory=dict)
    answers: list[dict] = field(default_factory=list)
    reason: str = ""

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """What is wrong within is its fault, and the race goes on."""
        try:
            yield
        except Wrong as error:
            self.reason = self.reason or str(error)

    def all(self, name: str) -> list[float]:
        """A list in each answer, such as `seconds`, over all timed runs."""
        return [value for answer in self.answers for value in answer[name]]

    @property
    def facts(self) -> dict:
        return {"first_s": self.first["seconds"][0], "peak_bytes": self.last["peak_bytes"]}

    @property
    def times(self) -> "Times":
        from semantica.benchmarks.harness.race import Times

        return Times(self.all("seconds"))


def fair(entrants: Iterable[Entrant]) -> list[Entrant]:
    return [entrant for entrant in entrants if not entrant.reason]


def race(
    what: str,
    entrants: Iterable[Entrant],
    protocol: "Protocol",
    device: str,
    draw: Callable[[], Any],
    run: Callable[[Entrant, Any], dict],
    judge: Callable[[list[Entrant], Any, int], None] = lambda entered, content, rounds: None,
) -> dict[str, float]:
    """Rounds of whole runs, in random order within each; returns the ceilings in the same rounds.

    Args:
        what: is raced, for the progress bar.
        draw: what a round computes, the same for all.
        run: one run, or several in turn, of an entrant; returns its answer.
        judge: called after each round with those who ran, the content, and how many timed rounds there were by then:
            0 while all warm up.
    """
    from semantica.benchmarks.harness.race import Ceilings
    from semantica.progress import phase

    entered, rng, ceilings, rounds, began = fair(entrants), random.Random(), Ceilings(device), -protocol.warmup, 0.0
    with phase(f"{what}: rounds", protocol.most) as done:
        while entered and rounds < protocol.most:
            began = time.perf_counter() if rounds <= 0 else began
            if rounds >= max(protocol.least, 1) and time.perf_counter() - began > protocol.seconds:
                break
            rounds += 1
            content, ran = draw(), []
            rng.shuffle(entered)
            for entrant in entered:
                time.sleep(QUIET)
                with entrant.refusing():
                    entrant.last = run(entrant, content)
                    ran.append(entrant)
                    if rounds > 0:
                        entrant.answers.append(entrant.last)
            judge(ran, content, max(rounds, 0))
            entered = fair(entered)
            if rounds > 0:
                time.sleep(QUIET)
                ceilings.measure()
                done.total = protocol.rounds((time.perf_counter() - began) / rounds)
                done.update()
    return ceilings.rates()
