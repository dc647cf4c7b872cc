"""What tables and plots show is what there is: names as they are, bars where their values lie."""

import pytest

from semantica.benchmarks.harness import table
from semantica.train.pages import report

NAME = "crawl [old] [/a].warc"


def test_names_in_tables_are_no_markup(capsys, tmp_path):
    table.show(("model", "time"), [(NAME, "1"), (f"b{NAME}", "2")])
    assert NAME in capsys.readouterr().out
    stored = dict.fromkeys(("images", "pages", "pairs"), 0)
    row = {"name": NAME, "pages": 1, "linked": 1, "stored": stored, "problems": 0, "problems_named": []}
    report.summary(tmp_path / "[bold]", {"inputs": [row], "pictures": {}})
    shown = "".join(capsys.readouterr().out.split())
    assert "[old]" in shown and "[/a].warc" in shown and "[bold]┏" in shown


def test_bars_lie_where_their_values_do(monkeypatch, tmp_path):
    """Also where most bins are empty: as wide as a bin, about a whole number, or from where the bin begins."""
    drawn = {}

    def keep(figure) -> str:
        (axes,) = figure.axes
        drawn[axes.get_xlabel().split()[0]] = [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in axes.patches]
        return "<svg>"

    monkeypatch.setattr(report, "svg", keep)
    stats = {"images_per_page": {"0": 9, "2": 3, "5": 4}, "side": {"64": 5, "256": 6}, "problems": 0, "inputs": []}
    stats |= {"pages": {}, "pictures": {}, "stored": dict.fromkeys(("images", "pages", "pairs", "shards", "bytes"), 0)}
    report.write_report(tmp_path, stats, {"shards": [], "encoder": {"name": "none"}})
    near = pytest.approx
    assert drawn["pictures"] == [(near(1.54), near(0.92), 3), (near(4.54), near(0.92), 4)]
    assert drawn["shorter"] == [(near(80 - 14.72), near(29.44), 5), (near(272 - 14.72), near(29.44), 6)]
