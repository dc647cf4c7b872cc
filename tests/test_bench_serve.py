"""`semantica bench serve`: what the load generator says is read rightly, and a short load on a server is measured."""

import json
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from semantica import UserError
from semantica.benchmarks.bench import run
from semantica.benchmarks.serving.load import Answer, answers, body, figures, load, serving

BUNDLE = Path(__file__).parent / "stored" / "bundle"
# as hey prints it
TABLE = """response-time,DNS+dialup,DNS,Request-write,Response-delay,Response-read,status-code,offset
0.1000,0.0003,0.0000,0.0001,0.5418,0.0002,200,0.0000
0.3000,0.0003,0.0000,0.0001,0.5418,0.0002,200,0.2000
0.0100,0.0003,0.0000,0.0001,0.5418,0.0002,429,0.9000
0.2000,0.0003,0.0000,0.0001,0.5418,0.0002,200,0.3000
0.0100,0.0003,0.0000,0.0001,0.5418,0.0002,503,0.4000
"""


def test_figures_of_answers():
    made = answers(TABLE)
    assert made[2] == Answer(429, 0.9, 0.01)
    found = figures(made, 6)
    # three images within half a second; of the six, one was refused, and of two there is no good answer
    assert found["rate"] == pytest.approx(6.0) and (found["refused"], found["failed"]) == (1, 2)
    assert [found[name] for name in ("p50", "p95", "p99")] == pytest.approx([200.0, 290.0, 298.0])


def test_the_body_is_a_form_that_is_taken(served):
    engine = served.Held()
    engine.release()
    with served.live(engine, served.CARD) as running:
        kind = {"content-type": "multipart/form-data; boundary=a4f1c0e2b7"}
        made = served.HTTP.post(f"{running.api}/images/variations", content=body(3), headers=kind)
    assert made.status_code == 200 and engine.batches[0][0].job.steps == 3


@pytest.mark.parametrize(
    "options, words",
    [
        (("--requests", "0"), "--requests is 0"),
        (("--clients", "0"), "impossible together"),
        (("--clients", "500"), "impossible together"),
        (("--model", "no-such-model"), "--model no-such-model: neither"),
        (("--json", "/nowhere/a.json"), "/nowhere is not a folder"),
    ],
)
def test_what_cannot_be_measured(options, words):
    with pytest.raises(UserError, match=words):
        run(["serve", *options])


def test_without_the_load_generator_the_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="hey is missing.*apt-get install hey"):
        load("http://127.0.0.1:9", tmp_path / "form", 1, 1)
    # before anything is exported or started
    monkeypatch.setattr("semantica.benchmarks.serving.command.bundle_of", None)
    with pytest.raises(UserError, match="hey is missing"):
        run(["serve"])


def test_a_load_on_another_server_has_no_ratio(tmp_path, monkeypatch):
    """The one with a short queue, in a time of its own."""
    at = "semantica.benchmarks.serving.command"
    ran = nullcontext(SimpleNamespace(url="http://127.0.0.1:9", began=0.0))
    row = {"rate": 2.0, "refused": 0, "failed": 0, **dict.fromkeys(("p50", "p95", "p99", "batch", "low", "high"), 1.0)}
    for name, stand in (
        ("need_generator", lambda: None), ("serving", lambda *rest: ran), ("ask", lambda *rest: None),
        ("loaded", lambda running, form, clients, requests: {"clients": clients, **row}),
    ):  # fmt: skip
        monkeypatch.setattr(f"{at}.{name}", stand)
    out = tmp_path / "rows.json"
    assert run(["serve", "--model", str(BUNDLE), "--soak", "0", "--starts", "1", "--json", str(out)]) == 0
    assert [(row["clients"], row["ratio"]) for row in json.loads(out.read_text())["rows"]] == [
        (1, 1),
        (8, 1),
        (64, None),
    ]


def test_a_server_that_says_much_is_not_stopped_by_it(tmp_path, monkeypatch):
    """As one does whose every request fails: a pipe takes 64 KiB."""
    script, done = tmp_path / "server", tmp_path / "done"
    lines = ("echo http://127.0.0.1:9", "head -c 1000000 /dev/zero >&2", f"touch {done}", "exec sleep 60")
    script.write_text("\n".join(("#!/bin/sh", *lines)) + "\n")
    script.chmod(0o755)
    monkeypatch.setattr("semantica.benchmarks.serving.load.sys.executable", str(script))
    with serving(BUNDLE) as running:
        assert running.url == "http://127.0.0.1:9"
        for _ in range(600):
            if done.exists():
                break
            time.sleep(0.05)
        assert done.exists()
    script.write_text("#!/bin/sh\necho no such engine >&2\nexit 2\n")
    with pytest.raises(UserError, match="^the server did not start: no such engine$"), serving(BUNDLE):
        pass


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("hey") is None, reason="needs the load generator hey")
def test_a_short_load(tmp_path, capsys):
    out = tmp_path / "rows.json"
    options = ("--requests", "16", "--rounds", "2", "--steps", "2", "--soak", "40", "--starts", "1", "--queue", "2")
    assert run(["serve", "--model", str(BUNDLE), *options, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [row["clients"] for row in found["rows"]] == [1, 8, 16] and found["rows"][0]["batch"] == 1
    assert all(row["failed"] == 0 and row["rate"] > 0 for row in found["rows"]) and found["memory"]["failed"] == 0
    assert found["rows"][1]["batch"] > 1 and len(found["starts"]) == 1
    assert found["environment"]["commit"] and found["config"]["max_batch"] == 8
    assert "images a batch" in capsys.readouterr().out
