"""Loading: memory that workers share, how many of them there are, and what a container leaves them."""

import gc
import itertools
import multiprocessing
import time
from types import SimpleNamespace

import pytest
import torch

from semantica.errors import UserError
from semantica.images import jpeg_decoder
from semantica.train.config import TrainConfig
from semantica.train.data import loading, workers
from semantica.train.data.folders import scan
from semantica.train.data.loading import PLACES, Fetch, batches, host_batches, worker_bytes
from semantica.train.data.pairs import Pairs
from semantica.train.processes import World
from semantica.train.setup import loaded


@pytest.fixture
def pairs(photos) -> Pairs:
    return Pairs(scan(photos, "folders"), seed=3, image_size=16, global_batch=4)


def test_a_place_is_not_written_again_before_it_was_read(pairs):
    """Workers that ran ahead as far as they may; what is kept of a batch stays as it was."""
    truth = [pairs.batch(range(4 * i, 4 * i + 4)) for i in range(12)]
    for count in (1, 2):
        feed = batches(pairs, first_index=0, batch=4, workers=count)
        kept = []
        for batch in itertools.islice(feed, 12):
            kept.append(batch)
            # each worker has by now made all that it was asked for
            time.sleep(0.05)
        feed.close()
        for expected, found in zip(truth, kept):
            assert all(torch.equal(found[name], expected[name]) for name in expected if name not in ("bad", "group"))
        raw = host_batches(pairs, first_index=0, batch=4, workers=count)
        for expected in truth:
            found = next(raw)
            time.sleep(0.02)
            assert torch.equal(found["index"], expected["index"]) and found["target"].is_shared()
        raw.close()


def test_workers_end_with_the_iterator_and_with_an_exception(pairs):
    before = set(multiprocessing.active_children())
    stream = batches(pairs, first_index=0, batch=2, workers=2)
    next(stream)
    assert len(set(multiprocessing.active_children()) - before) == 2
    stream.close()
    assert set(multiprocessing.active_children()) <= before

    def consume():
        for _ in batches(pairs, first_index=0, batch=2, workers=2):
            raise KeyError("the consumer fails")

    with pytest.raises(KeyError) as caught:
        consume()
    del caught
    gc.collect()
    assert set(multiprocessing.active_children()) <= before


def test_what_crosses_are_bytes(pairs):
    # 16 x 16 x 3 bytes twice, two flips, a level, a drop and a number
    assert worker_bytes(pairs, 4) == PLACES * 4 * (2 * 16 * 16 * 3 + 2 + 8 + 1 + 8)
    memory = Fetch(pairs, 4, 2).memory
    assert len(memory) == 2 and {tensor.shape[:2] for tensor in memory[0].values()} == {(PLACES, 4)}


def test_no_room_for_shared_memory_is_said_before_a_worker_dies_of_it(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "shared_room", lambda: 10_000.0)
    with pytest.raises(UserError, match=r"2 workers share 0 MiB .* has room for 0: give it more \(docker: --shm-size"):
        next(batches(pairs, first_index=0, batch=4, workers=2))
    assert next(batches(pairs, first_index=0, batch=4, workers=0))["index"].tolist() == [0, 1, 2, 3]
    # without --workers it is worked with
    monkeypatch.setattr(workers, "shared_room", lambda: 10_000.0)
    config, said = TrainConfig("data", tmp_path, batch=4), []
    measure = SimpleNamespace(peak=1e12, flops=1)
    feed = loaded(config, pairs, 2, torch.device("cpu"), World(), measure, said.append)
    assert next(feed)["index"].tolist() == [8, 9, 10, 11]
    assert len(said) == 1 and "0 workers; shared memory has no room for more" in said[0]


class Neighbour(World):
    """The second of two processes of one machine, the other of which asks for the same."""

    rank = local_rank = 1
    size = local_size = 2

    def __init__(self):
        self.control = None

    def all_gather_object(self, value):
        return [value, value]


def test_processes_of_a_machine_share_its_room(pairs, tmp_path, monkeypatch):
    """Each alone would find enough, for the others have taken none yet."""
    measure = SimpleNamespace(peak=1e12, flops=1)
    config, need = TrainConfig("data", tmp_path, batch=4, workers=2), 2 * worker_bytes(pairs, 2)
    given = (config, pairs, 0, torch.device("cpu"), Neighbour(), measure, [].append)
    monkeypatch.setattr(loading, "shared_room", lambda: 2.0 * need)
    loaded(*given).close()
    monkeypatch.setattr(loading, "shared_room", lambda: 1.5 * need)
    # the first process says it
    with pytest.raises(SystemExit) as left:
        loaded(*given)
    assert left.value.code == 2
    monkeypatch.setattr(Neighbour, "rank", 0)
    monkeypatch.setattr(Neighbour, "local_rank", 0)
    with pytest.raises(UserError, match="^4 workers share 0 MiB with their trainers and .*fewer --workers$"):
        loaded(*given)


@pytest.mark.parametrize(
    ("given", "count", "said"),
    [
        (dict(), 5, "10.00 ms a sample on one processor (JPEG by {}), the step can use 400 a second at most: 5 w"),
        (dict(asked=3), 3, "3 workers, as asked for"),
        # one processor drives each GPU
        (dict(processors=8, sharing=2), 3, "3 workers of 5 that it takes, no more processors: store smaller pictures"),
        (dict(processors=2), 1, "1 worker of 5 that it takes"),
        (dict(processors=64, demand=None), 32, "the step can use all there is: 32 workers"),
        (dict(processors=64, demand=None, device="cpu"), 32, "32 workers"),
        (dict(processors=6, device="cpu"), 3, "3 workers of 5"),
        (dict(demand=1.0), 1, "1 worker"),
        (dict(room=5.5), 4, "4 workers; shared memory has no room for more"),
        (dict(seconds=None), 1, "cannot be measured"),
    ],
)
def test_workers_are_as_many_as_the_step_can_use(pairs, monkeypatch, given, count, said):
    case = dict(asked=None, demand=400.0, sharing=1, device="cuda", processors=16, seconds=0.010, room=1e6) | given
    monkeypatch.setattr(workers, "processors", lambda: case["processors"])
    monkeypatch.setattr(workers, "sample_seconds", lambda *_: case["seconds"])
    monkeypatch.setattr(workers, "shared_room", lambda: case["room"] * worker_bytes(pairs, 4))
    found, why = workers.choose(pairs, 0, 4, case["asked"], case["demand"], case["sharing"], case["device"])
    assert found == count and said.format("simplejpeg" if jpeg_decoder() else "Pillow") in why and "\n" not in why


def test_the_measurement_leaves_threads_and_randomness_alone(pairs):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert 0 < workers.sample_seconds(pairs, 0) < 1
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


def test_a_container_counts_by_its_share(tmp_path, monkeypatch):
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: range(48), raising=False)
    for text, count in (("max 100000", 48), ("1600000 100000", 16), ("50000 100000", 1), ("", 48)):
        (tmp_path / "cpu.max").write_text(text)
        monkeypatch.setattr(workers, "CGROUP", tmp_path / "cpu.max")
        assert workers.processors() == count
    monkeypatch.setattr(workers, "CGROUP", tmp_path / "none")
    assert workers.processors() == 48


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_sees_the_same_bits(pairs):
    """Also where the device is far behind the host, and pinned memory is used again."""
    truth = [pairs.batch(range(4 * i, 4 * i + 4)) for i in range(24)]
    for count in (0, 2):
        feed = batches(pairs, first_index=0, batch=4, workers=count, device="cuda")
        torch.cuda._sleep(200_000_000)
        found = list(itertools.islice(feed, 24))
        feed.close()
        for expected, batch in zip(truth, found):
            assert all(torch.equal(batch[name].cpu(), expected[name]) for name in expected if name != "bad")
            assert batch["u"].device.type == "cpu" and batch["target"].is_cuda
