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


def run_local(work: Unit, units: Sequence[int], processes: int, done: Callable[[int, str], None]) -> None:
    """Call `work(unit)` for every unit in processes of their own.

    `done(unit, error)` follows each, with "" where all went well; a process that dies (out of memory, a fault in a
    decoder) costs its unit and is replaced.
    """
    left = deque(units)
    with one_thread():
        workers = [Worker(work) for _ in range(min(processes, len(left)))]
    try:
        busy: dict[Connection, tuple[Worker, int]] = {}
        while left or busy:
            while workers and left:
                worker = workers.pop()
                unit = left.popleft()
                # one that is dead already is found so when it is heard
                with suppress(OSError):
                    worker.pipe.send(unit)
                busy[worker.pipe] = (worker, unit)
            for pipe in wait(list(busy)):
                worker, unit = busy.pop(pipe)
                try:
                    error = pipe.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    error = f"its process ended with exit code {worker.process.exitcode}"
                    with one_thread():
                        worker = Worker(work)
                workers.append(worker)
                done(unit, error)
    finally:
        for worker in [*workers, *(w for w, _ in busy.values())]:
            worker.process.terminate()
            worker.process.join()


class Worker:
    """A process that takes units from a pipe until it closes."""

    def __init__(self, work: Unit):
        # not forked: threads of the parent would be lost with what they hold
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, work), daemon=True)
        self.process.start()
        theirs.close()


def serve(pipe: Connection, work: Unit) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=leave_with_parent, daemon=True).start()
    while True:
        try:
            unit = pipe.recv()
        except EOFError:
            return
        pipe.send(attempt(work, unit))


def attempt(work: Unit, unit: int) -> str:
    """"" or what went wrong, in one line."""
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


def run_ray(work: Unit, units: Sequence[int], done: Callable[[int, str], None]) -> None:
    """The same through Ray Data: one unit is one task."""
    import ray.data

    def task(row: dict) -> dict:
        return {"unit": row["unit"], "error": attempt(work, int(row["unit"]))}

    rows = ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=len(units))
    for row in rows.map(task, num_cpus=1).iter_rows():
        done(int(row["unit"]), row["error"])


def start_ray() -> Callable[[], None]:
    """Connect to the cluster that RAY_ADDRESS names, or start one here; returns what ends it again."""
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray needs Ray: install semantica-diffusion[ray]") from error
    if ray.is_initialized():
        return lambda: None
    ray.init(
        include_dashboard=False, log_to_driver=False, logging_level="warning",
        runtime_env={"env_vars": dict.fromkeys(THREADS, "1")},
    )  # fmt: skip
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray.shutdown


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
