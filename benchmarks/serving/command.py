"""`semantica bench serve`: one server, one client at a time against several at once; overload, memory, cold start."""

import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from tyro.extras import literal_type_from_choices

from semantica.benchmarks.harness.table import Column, cells, heads, show
from semantica.benchmarks.harness.verb import check_files
from semantica.benchmarks.sampling.models import NAMES, folder_of
from semantica.benchmarks.serving.load import Running, ask, body, figures, load, need_generator, serving, watched
from semantica.engines import BACKENDS
from semantica.errors import UserError
from semantica.files import write_json

COLUMNS = (
    Column("clients", "{clients}"),
    Column("images/s", "{rate:.1f}"),
    Column("lowest - highest", "{low:.1f} - {high:.1f}"),
    Column("against the first", lambda row, rows: "" if row["ratio"] is None else f"{row['ratio']:.2f}x"),
    Column("p50 ms", "{p50:.1f}"),
    Column("p95 ms", "{p95:.1f}"),
    Column("p99 ms", "{p99:.1f}"),
    Column("images a batch", "{batch:.1f}"),
    Column("refused (429)", "{refused}"),
    Column("failed", "{failed}"),
)
MIB = 1 << 20


@dataclass(frozen=True)
class ServeBenchConfig:
    """Load a server with clients that each ask for one variation again and again, made by the load generator `hey`.

    Numbers of clients take turns on one server. Then more clients than its queue takes, on a second one: each of their
    requests must be answered with an image or 429. Then its memory over many short requests, and the time from a
    process' start to its first image.
    """

    model: str = "tiny"
    """A preset with drawn weights, exported first, or a bundle or run folder."""
    clients: tuple[int, ...] = (1, 8)
    requests: int = 240
    """Requests of each number of clients in each round, of all of them together."""
    rounds: int = 3
    steps: int = 20
    max_batch: int = 8
    max_wait: float = 5.0
    """As of `semantica serve`."""
    engine: literal_type_from_choices(("auto", *BACKENDS)) = "auto"
    queue: int = 8
    """Images that may wait on the second server, which gets eight times as many clients."""
    soak: int = 10_000
    """Requests of one step over which memory is watched; 0 leaves that out."""
    starts: int = 3
    """Processes that are started for the time to a first image."""
    json: Path | None = None
    """Store the rows."""

    def check(self) -> "ServeBenchConfig":
        """Raises `UserError` for impossible options."""
        for name in ("requests", "rounds", "steps", "max_batch", "queue", "starts"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give at least 1")
        if self.soak < 0 or not self.clients or min(self.clients) < 1 or max(self.clients) > self.requests:
            raise UserError(
                f"--clients {self.clients} --requests {self.requests} --soak {self.soak}: impossible together"
            )
        if self.model not in NAMES and not Path(self.model).is_dir():
            raise UserError(f"--model {self.model}: neither one of {', '.join(NAMES)} nor a folder")
        check_files(self.json)
        return self


def serve(config: ServeBenchConfig) -> int:
    """Print the figures; returns the exit code, 1 where a request failed.

    Raises:
        UserError: impossible options, a model that is not served, or no load generator.
    """
    config.check()
    # before a model is exported, not after
    need_generator()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model, forms = bundle_of(config.model, place), {1: place / "short", config.steps: place / "form"}
        for steps, path in forms.items():
            path.write_bytes(body(steps))
        options = ("--engine", config.engine, "--max-batch", str(config.max_batch), "--max-wait", str(config.max_wait))
        with serving(model, *options) as running:
            rows = raced(config, running, forms[config.steps])
        with serving(model, *options, "--queue", str(config.queue)) as running:
            crowd = 8 * config.queue
            ask(running.url, config.steps)
            rows.append(loaded(running, forms[config.steps], crowd, max(config.requests, 4 * crowd)))
        for row in rows[:-1]:
            row["ratio"] = row["rate"] / rows[0]["rate"]
        # another server, in a time of its own
        rows[-1]["ratio"] = None
        show(heads(COLUMNS), cells(COLUMNS, rows))
        print(f"the last row: {crowd} clients on a queue of {config.queue}")
        memory = soaked(config, model, options, forms[1]) if config.soak else {}
        starts = sorted(started(model, options, config.steps) for _ in range(config.starts))
    print(f"first image {median(starts):.2f} s after the process' start ({starts[0]:.2f} - {starts[-1]:.2f})")
    if config.json is not None:
        from semantica.benchmarks.harness.store import environment
        from semantica.device import pick_device

        settings = {k: v if isinstance(v, int | float | tuple) else str(v) for k, v in asdict(config).items()}
        where = {"environment": environment(pick_device("auto").type), "config": settings}
        facts = {"model": config.model, "processors": os.cpu_count(), "steps": config.steps, "starts": starts}
        write_json(config.json, {**where, "rows": rows, "memory": memory, **facts})
    return 1 if any(row["failed"] for row in rows) or memory.get("failed") else 0


def bundle_of(name: str, place: Path) -> Path:
    """What is served: the user's folder, or a bundle of a preset."""
    if name not in NAMES:
        return Path(name)
    from semantica.export.config import ExportConfig
    from semantica.export.write import export

    export(ExportConfig(model=folder_of(name, place), out=place / "bundle"))
    return place / "bundle"


def raced(config: ServeBenchConfig, running: Running, form: Path) -> list[dict]:
    """A row for each number of clients, which take turns."""
    for count in config.clients:
        loaded(running, form, count, 2 * count)
    found: dict[int, list[dict]] = {count: [] for count in config.clients}
    for i in range(config.rounds):
        # each of them first as often as last
        for count in config.clients[:: 1 if i % 2 else -1]:
            found[count].append(loaded(running, form, count, config.requests))
    return [joined(rounds) for rounds in found.values()]


def joined(rounds: list[dict]) -> dict:
    """The row of several rounds: medians, and sums of what was refused or failed."""
    row = {name: median(each[name] for each in rounds) for name in ("rate", "p50", "p95", "p99", "batch")}
    row |= {name: sum(each[name] for each in rounds) for name in ("refused", "failed")}
    rates = [each["rate"] for each in rounds]
    return rounds[0] | row | {"low": min(rates), "high": max(rates)}


def loaded(running: Running, form: Path, clients: int, requests: int) -> dict:
    """The figures of one load."""
    # each client makes as many
    requests -= requests % clients
    before = running.batches()
    row = figures(load(running.url, form, clients, requests), requests)
    batches, images = (after - old for after, old in zip(running.batches(), before))
    rate = row["rate"]
    return {"clients": clients, **row, "batch": images / max(1.0, batches), "low": rate, "high": rate}


def soaked(config: ServeBenchConfig, model: Path, options: tuple[str, ...], form: Path) -> dict:
    """The memory of a server over many requests: when it was warm, at the end, and at most in between."""
    clients = max(config.clients)
    with serving(model, *options) as running:
        loaded(running, form, clients, max(clients, config.soak // 10))
        with watched(running) as found:
            row = loaded(running, form, clients, max(clients, config.soak - config.soak // 10))
    memory = {"warm": found[0], "end": found[-1], "peak": max(found), "failed": row["failed"]}
    print(
        f"memory over {config.soak} requests of one step, {clients} clients, {row['rate']:.0f}/s: "
        f"{found[0] / MIB:.1f} MiB after a tenth, {found[-1] / MIB:.1f} at the end, {max(found) / MIB:.1f} at most"
    )
    return memory


def started(model: Path, options: tuple[str, ...], steps: int) -> float:
    """Seconds from a process' start to its first image."""
    with serving(model, *options) as running:
        ask(running.url, steps)
        return time.perf_counter() - running.began
