"""Images made by replicas in Ray Serve: what becomes of requests whose replica ends, and of those whose client leaves.

Most of it over a handle that does what a test says; the last test kills a replica of a real one.
"""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import psutil
import pytest

from semantica import UserError
from semantica.cli import main
from semantica.serving.job import Closed, Full

pytest.importorskip("fastapi")
pytest.importorskip("ray.serve", exc_type=ImportError)

import ray  # noqa: E402
from ray.exceptions import (  # noqa: E402
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    RayTaskError,
)
from ray.serve.exceptions import BackPressureError  # noqa: E402

from semantica.serving.replicas import Replica, Replicas, check_room  # noqa: E402

# the quick tests have no Ray
pytestmark = pytest.mark.slow
STORED = Path(__file__).parent / "stored"
BUNDLE, PICTURE = STORED / "bundle", STORED / "images" / "condition-0.png"
IMAGES = np.zeros((1, 8, 8, 3), np.uint8)
DIED, AWAY = ActorDiedError(), ActorUnavailableError("away", None)
# with the images on it, which Ray keeps where they were made
NODE, LOST = NodeDiedError("the node has died"), ObjectLostError("0" * 56, None, "")


def told(cause: Exception) -> Exception:
    """What Ray raises of an exception in a replica."""
    return RayTaskError("make", "Traceback", cause).as_instanceof_cause()


class Response:
    """An answer that comes at once, or never."""

    def __init__(self, outcome):
        self.outcome, self.cancelled = outcome, False

    def cancel(self) -> None:
        self.cancelled = True

    def __await__(self):
        if self.outcome is None:
            yield from asyncio.Event().wait().__await__()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class Deployment:
    """A handle whose calls have the outcomes that a test gives it, one after the other."""

    def __init__(self, *outcomes, most: int = 4, running=lambda: 1):
        self.outcomes, self.responses, self.batches, self.ended = list(outcomes), [], [], 0
        self.make = SimpleNamespace(remote=self.remote)
        self.maker = Replicas(self, most, lambda *batch: self.batches.append(batch), running, self.end)

    def remote(self, job) -> Response:
        self.responses.append(Response(self.outcomes.pop(0)))
        return self.responses[-1]

    def end(self) -> None:
        self.ended += 1


def test_images_come_with_what_replicas_measured(served):
    there = Deployment((IMAGES, [(3, 0.5, 0.1), (1, 0.2, 0.0)]))
    assert asyncio.run(there.maker.submit(served.job())) is IMAGES
    assert there.batches == [(3, 0.5, 0.1), (1, 0.2, 0.0)] and there.maker.queued() == 0


@pytest.mark.parametrize("lost", [DIED, AWAY, NODE, LOST, told(Closed("the GPU is lost"))])
def test_what_a_replica_leaves_undone_is_asked_of_another_once(served, lost):
    there = Deployment(lost, (IMAGES, []))
    assert asyncio.run(there.maker.submit(served.job())) is IMAGES and len(there.responses) == 2
    there = Deployment(lost, lost, (IMAGES, []))
    with pytest.raises(Closed, match="two replicas in turn have ended|the GPU is lost"):
        asyncio.run(there.maker.submit(served.job()))
    assert len(there.responses) == 2 and there.maker.queued() == 0


def test_what_is_wrong_with_a_request_is_not_tried_again(served):
    there = Deployment(told(UserError("no such thing")))
    with pytest.raises(UserError, match="^no such thing$"):
        asyncio.run(there.maker.submit(served.job()))
    there = Deployment(told(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        asyncio.run(there.maker.submit(served.job()))
    with pytest.raises(Closed):
        asyncio.run(Deployment(BackPressureError(1, 1), BackPressureError(1, 1)).maker.submit(served.job()))


def test_who_leaves_takes_the_work_along(served):
    async def run() -> None:
        there = Deployment(None, None)
        tasks = [asyncio.ensure_future(there.maker.submit(served.job(i))) for i in range(2)]
        await asyncio.sleep(0.01)
        assert there.maker.queued() == 2
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        assert tasks[0].cancelled() and [response.cancelled for response in there.responses] == [True, False]
        assert there.maker.queued() == 1
        there.maker.close()
        with pytest.raises(Closed, match="shutting down"):
            await there.maker.submit(served.job())
        assert not tasks[1].done()
        there.maker.abort("too late")
        with pytest.raises(Closed, match="shutting down"):
            await tasks[1]
        assert there.responses[1].cancelled and there.maker.join(1) and there.ended == 1

    asyncio.run(run())


def test_more_than_may_be_on_its_way_is_refused(served):
    async def run() -> None:
        there = Deployment(None, (IMAGES, []), most=4)
        # an empty queue takes a job of any size
        waiting = asyncio.ensure_future(there.maker.submit(served.job(n=3)))
        await asyncio.sleep(0.01)
        assert await there.maker.submit(served.job()) is IMAGES
        there.maker.pace = 2.5
        with pytest.raises(Full) as caught:
            await there.maker.submit(served.job(n=2))
        assert caught.value.seconds == 8 and len(there.responses) == 2
        waiting.cancel()
        await asyncio.wait([waiting])

    asyncio.run(run())


def test_it_is_ready_while_there_are_replicas(served):
    numbers = [0, 2]
    there = Deployment(running=lambda: numbers.pop(0))
    maker = there.maker
    for expected in ("no replica is running", ""):
        maker.asked -= 10
        maker.ready()
        served.until(lambda: maker.news is not None and maker.news.done())
        assert maker.ready() == expected
    assert maker.join(1)


def test_a_replica_that_cannot_load_its_model_is_not_well(tmp_path):
    from semantica.serving.command import ServeConfig

    replica = Replica(ServeConfig(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="is not a folder"):
        asyncio.run(replica.describe())
    with pytest.raises(RuntimeError, match="is not a folder"):
        replica.check_health()


def test_a_replica_whose_engine_is_lost_ends_and_one_that_is_told_to_stop_does_not(served, monkeypatch):
    ended = []

    def exits(code: int) -> None:
        ended.append(code)
        raise SystemExit(code)

    async def refuses(_) -> None:
        raise Closed("the GPU is lost")

    monkeypatch.setattr("semantica.serving.replicas.os._exit", exits)
    there = SimpleNamespace(problem=None, batches=[], batcher=SimpleNamespace(submit=refuses, error=None))
    with pytest.raises(Closed):
        asyncio.run(Replica.make(there, served.job()))
    there.batcher.error = RuntimeError("the GPU is lost")
    with pytest.raises(SystemExit):
        asyncio.run(Replica.make(there, served.job()))
    assert ended == [1]


def test_replicas_for_which_there_is_no_room_are_not_waited_for(monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "memory": 1e9})
    check_room(2, {"num_cpus": 1, "num_gpus": 0})
    with pytest.raises(UserError, match="3 replicas need 3 CPUs, Ray's cluster has 2: give fewer --replicas"):
        check_room(3, {"num_cpus": 1, "num_gpus": 0})
    with pytest.raises(UserError, match="1 replicas need 1 GPUs, Ray's cluster has 0"):
        check_room(1, {"num_cpus": 1, "num_gpus": 1})


def test_a_cluster_that_does_not_come_up_is_one_line(monkeypatch, capsys):
    def fails(**_):
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", fails)
    assert main(["serve", "--model", str(BUNDLE), "--port", "0", "--engine", "ray"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Ray does not start or answer here (The current node timed out" in said


def test_killed_replicas_come_back_and_no_request_is_lost(tmp_path):
    command = ["serve", "--model", str(BUNDLE), "--engine", "ray", "--replicas", "1", "1", "--port", "0"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-P", "-m", "semantica.cli", *command],
            # a cluster of this test's own
            env=os.environ | {"RAY_ADDRESS": "local"}, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
        try:
            where = re.search(r"at (http://\S+)/v1", server.stdout.readline())
            assert where, (tmp_path / "log").read_text()
            with httpx.Client(base_url=where[1], timeout=90) as client, ThreadPoolExecutor(4) as pool:
                alone = {seed: ask(client, seed) for seed in range(2)}
                (killed,) = replicas(server)
                answers = [pool.submit(ask, client, i % 2) for i in range(4)]
                time.sleep(0.3)
                os.kill(killed, signal.SIGKILL)
                # the same images, made by the next one
                for i, answer in enumerate(answers):
                    assert answer.result() == alone[i % 2]
                assert ask(client, 1) == alone[1] and replicas(server) != [killed]
                assert client.get("/readyz").status_code == 200
            server.terminate()
            assert server.wait(60) == 0, (tmp_path / "log").read_text()
        finally:
            server.kill()


def replicas(server: subprocess.Popen) -> list[int]:
    found = psutil.Process(server.pid).children(recursive=True)
    return [process.pid for process in found if "ray::ServeReplica" in "".join(process.cmdline()[:1])]


def ask(client: httpx.Client, seed: int) -> list:
    """The images of a run that takes long."""
    fields = {"n": "10", "steps": "100", "seed": str(seed), "response_format": "b64_json"}
    answer = client.post("/v1/images/variations", files={"image": PICTURE.read_bytes()}, data=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]
