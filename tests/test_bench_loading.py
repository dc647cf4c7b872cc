"""`semantica bench loading` and `bench train --sustained`: what is right comes first, and a slow loader cannot hide."""

import io
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from semantica.benchmarks.harness import sources
from semantica.benchmarks.loading.contenders import Plain, decoders, pairs_of, truth
from semantica.benchmarks.loading.photos import draw_photo, draw_photos
from semantica.benchmarks.training import sustained
from semantica.cli import main
from semantica.images import to_planes


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn")
    draw_photos(root / "photos", 8, 200, 150)
    return root / "photos"


def test_photos_are_the_same_for_a_seed_and_as_dense_as_a_cameras(drawn):
    assert np.array_equal(np.asarray(draw_photo(3, 60, 40)), np.asarray(draw_photo(3, 60, 40)))
    paths = sorted(drawn.glob("*/*.jpg"))
    assert len(paths) == 8 and len({path.read_bytes() for path in paths}) == 8
    assert all(0.1 < path.stat().st_size / (200 * 150) < 0.5 for path in paths)


def test_every_decoder_shows_the_same_square():
    file = io.BytesIO()
    draw_photo(9, 160, 160).save(file, "JPEG", quality=90)
    data = file.getvalue()
    expected = truth(data, 48)
    for name, decode in decoders(48).items():
        found = decode(data)
        assert found.shape == (48, 48, 3) and found.dtype == np.uint8
        error = np.mean((found - expected) ** 2)
        # half of the 160 pixels is above 1.5 times 48: what is decoded at a fraction loses a little
        assert 10 * np.log10(255**2 / error) > (45 if name == "Pillow" else 35), name


def test_the_plain_loader_shows_what_the_trainers_does(drawn):
    pairs = pairs_of(drawn, 64)
    plain, ours = Plain(pairs)[5], pairs.batch([5])
    for name in ("target", "condition"):
        assert plain[name].shape == ours[name][0].shape
        # its crops are at fractions of a pixel
        assert (plain[name] - ours[name][0]).abs().mean() < 0.1
    assert plain["noise"].dtype == torch.float32 and to_planes(np.zeros((1, 2, 2, 3), np.uint8)).min() == -1


def test_figures_are_stored_with_the_code_they_are_of(drawn, tmp_path, capsys):
    out = tmp_path / "loading.json"
    options = ["--data", drawn, "--size", "64", "--pictures", "4", "--samples", "16", "--rounds", "1", "--json", out]
    assert main(["bench", "loading", *map(str, options)]) == 0
    content = json.loads(out.read_text())
    rows = content["loading"]
    assert content["environment"]["device"].endswith(", 1 threads")
    assert [row["loader"] for row in rows if "loader" in row] == ["plain", "trainer's", "trainer's, --resize"]
    assert all(row.get("rate", row.get("ms")) > 0 and not sources.stale(row) for row in rows)
    assert "samples/s, one worker" in capsys.readouterr().out
    assert main(["bench", "loading", "--size", "8"]) == 2 and "--size is 8" in capsys.readouterr().err


class Clock:
    """Time that passes only where something says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_starving_loader_cannot_hide():
    """Ten batches lie ready, then each takes ten times as long as a step."""
    clock = Clock()

    def feed():
        for number in itertools.count():
            clock.now += 0.0 if number < 10 else 0.1
            yield {}

    def step():
        began = clock()
        next(trainer.feed)
        waited = clock() - began
        clock.now += 0.01
        return None, waited

    trainer = SimpleNamespace(device=torch.device("cpu"), step=step)
    made = feed()
    assert sustained.load(made, 4, 10, 5.0, trainer.device, clock) == pytest.approx(40)
    together, waited, seconds = sustained.timed(trainer, made, 5.0, clock)
    assert together == pytest.approx(1 / 0.11) and waited == pytest.approx(10 / 11) and seconds >= 5
    alone, waited, _ = sustained.timed(trainer, itertools.cycle([{}]), 1.0, clock)
    assert alone == pytest.approx(100) and waited == 0


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (dict(loader=500, step=100, share=0.99, data_wait=0.001), "fed: the loader gives 500"),
        (dict(loader=50, step=400, share=0.12, data_wait=0.9), "STARVED: .* give 18 workers, or store smaller"),
        (dict(loader=105, step=100, share=0.95, data_wait=0.02), "STARVED"),
        (dict(loader=500, step=100, share=0.8, data_wait=0.2), "UNEVEN: .* 20% of the time"),
        (dict(loader=500, step=100, share=0.6, data_wait=0.01), "CROWDED: .* keeps 60% of its speed"),
    ],
)
def test_the_verdict_is_of_all_figures(row, said):
    import re

    assert re.match(said, sustained.verdict({"workers": 2, **row}))


def test_what_does_not_go_with_it_is_one_line(capsys):
    for options, message in (
        (["--sustained", "0"], "--sustained is 0"),
        (["--sustained", "5", "--processes", "1"], "--processes says nothing to --sustained"),
        (["--data", "x"], "--data is for --sustained"),
    ):
        assert main(["bench", "train", *options]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and message in said[0]


def test_sustained_runs_loader_and_step(drawn):
    """The plain rung, for the last one compiles for a minute."""
    row, said = sustained.measure("plain", "tiny", 4, "cpu", None, 1.0, str(drawn))
    assert row["together"] > 0 and 0 <= row["data_wait"] < 1 and row["seconds"] >= 1 and not sources.stale(row)
    assert row["workers"] == 1 and said.startswith("data: ") and "samples/s and the step takes" in said
