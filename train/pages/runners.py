"""Who runs the units: processes of this machine, or Ray."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait

from semantica.errors import UserError

# a function of one unit's number: it writes its result to disk
Unit = Callable[[int], None]
# workers are as many as processors, so each computes with one thread
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Local:
    """Processes of this machine, which live from phase to phase."""

    def __init__(self, processes: int):
        self.processes = processes
        self.idle: list[Worker] = []

    def run(self, work: Unit, units: Sequence[int], done: Callable[[int, str], None]) -> None:
        """Call `work(unit)` for every unit.

        `done(unit, error)` follows each, with "" where all went well; a process that dies (out of memory, a fault in a
        decoder) costs its unit and is replaced.
        """
        left = deque(units)
        busy: dict[Connection, tuple[Worker, int]] = {}
        try:
            while left or busy:
                while left and len(busy) < self.processes:
                    worker = self.idle.pop() if self.idle else Worker()
                    unit = left.popleft()
                    worker.send(work, unit)
                    busy[worker.pipe] = (worker, unit)
                for pipe in wait(list(busy)):
                    worker, unit = busy.pop(pipe)
                    error = worker.answer()
                    if worker.process.is_alive():
                        self.idle.append(worker)
                    done(unit, error)
        finally:
            self.idle += [worker for worker, _ in busy.values()]

    def close(self) -> None:
        for worker in self.idle:
            worker.process.terminate()
            worker.process.join()


class Worker:
    """A process that takes units from a pipe until it closes."""

    def __init__(self):
        # not forked: threads of the parent would be lost with what they hold
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        with one_thread():
            self.process.start()
        theirs.close()
        self.work: Unit | None = None

    def send(self, work: Unit, unit: int) -> None:
        # one that is dead already is found so when it is asked
        with suppress(OSError):
            # what is to be done knows all inputs, so it travels once
            if work is not self.work:
                self.pipe.send(work)
                self.work = work
            self.pipe.send(unit)

    def answer(self) -> str:
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            return f"its process ended with exit code {self.process.exitcode}"


def serve(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=leave_with_parent, daemon=True).start()
    work: Unit | None = None
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            return
        if isinstance(message, int):
            pipe.send(attempt(work, message))
        else:
            work = message


def attempt(work: Unit, unit: int) -> str:
    """ "" or what went wrong, in one line."""
    try:
        work(unit)
    except KeyboardInterrupt:
        raise
    # a fault in compiled code derives from BaseException
    except BaseException as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ""


def leave_with_parent() -> None:
    """A parent that was killed leaves no process behind."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


@contextmanager
def one_thread() -> Iterator[None]:
    """What is started inside computes with one thread."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Ray:
    """The cluster that RAY_ADDRESS names, or one that is started here. Raises `UserError` without Ray."""

    def __init__(self):
        try:
            import ray.data
        except ImportError as error:
            raise UserError("--on ray needs Ray: install semantica-diffusion[ray]") from error
        self.ray, self.ours = ray, not ray.is_initialized()
        if self.ours:
            ray.init(
                include_dashboard=False, log_to_driver=False, logging_level="warning",
                runtime_env={"env_vars": dict.fromkeys(THREADS, "1")},
            )  # fmt: skip
        ray.data.DataContext.get_current().enable_progress_bars = False

    def run(self, work: Unit, units: Sequence[int], done: Callable[[int, str], None]) -> None:
        """As `Local.run`, through Ray Data: one unit is one task."""

        def task(row: dict) -> dict:
            return {"unit": row["unit"], "error": attempt(work, int(row["unit"]))}

        rows = self.ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=len(units))
        for row in rows.map(task, num_cpus=1).iter_rows():
            done(int(row["unit"]), row["error"])

    def close(self) -> None:
        if self.ours:
            self.ray.shutdown()


def ray_encoders(make: Callable[[], Callable]) -> list:
    """One actor for each GPU of the cluster, that calls what `make` gave; none where there is no GPU."""
    import ray

    class Actor:
        def __init__(self):
            self.call = make()

        def describe(self, pictures):
            return self.call(pictures)

    count = int(ray.cluster_resources().get("GPU", 0))
    return [ray.remote(num_gpus=1, num_cpus=0)(Actor).remote() for _ in range(count)]


class Remote:
    """A describer that asks one of the actors; a unit always asks the same one."""

    def __init__(self, actor):
        self.actor = actor

    def __call__(self, pictures):
        import ray

        return ray.get(self.actor.describe.remote(pictures))
