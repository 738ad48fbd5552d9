"""Figures carry the report's numbers, are written whole or not at all, and need matplotlib only when drawn."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from rmcore._base.errors import InputError, RmcoreError
from rmcore.evaluation.evaluate import evaluate_pairs
from rmcore.evaluation.plots import (
    PlotsUnavailableError,
    plot_accuracy_cost,
    plot_reliability,
    plot_report,
    plot_risk_coverage,
    plot_uplift,
    save_figure,
)
from rmcore.evaluation.report import ScoredPairs

PLOTS = (plot_accuracy_cost, plot_uplift, plot_reliability, plot_risk_coverage, plot_report)
PNG = b"\x89PNG\r\n\x1a\n"


def make_report(n=200, **changes):
    rng = np.random.default_rng(0)
    fields = {
        "logit": rng.normal(0.5, 1, n),
        "label": np.ones(n),
        "uncertainty": 1 + rng.random(n),
        "cluster": rng.integers(0, max(1, n // 2), n),
        "controls": {"|length difference|": rng.random(n)},
    }
    return evaluate_pairs(ScoredPairs(**(fields | changes)), replicates=30)


@pytest.fixture(scope="module")
def report():
    pytest.importorskip("matplotlib")
    return make_report()


@pytest.mark.parametrize("plot", PLOTS)
def test_every_plot_writes_a_png(plot, report, tmp_path):
    path = tmp_path / "deep" / "figure.png"
    plot(report, path)
    assert path.read_bytes().startswith(PNG)
    assert [entry.name for entry in path.parent.iterdir()] == ["figure.png"]


@pytest.mark.parametrize("plot", PLOTS)
# What other tests left behind is collected here as often as anywhere; it says nothing of a plot.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("error")
def test_every_plot_draws_the_smallest_and_the_flattest_data(plot, tmp_path):
    pytest.importorskip("matplotlib")
    single = {"logit": [1.0], "label": [1], "uncertainty": [1.0], "cluster": [0], "controls": {}}
    plot(make_report(**single), tmp_path / "one.png")
    plot(make_report(6, logit=np.ones(6), uncertainty=np.ones(6)), tmp_path / "flat.png")


def test_curves_show_the_reports_numbers(report):
    ax = plot_accuracy_cost(report).axes[0]
    line = next(line for line in ax.get_lines() if line.get_label() == "uncertainty u")
    curve = report.score("u").curve
    np.testing.assert_allclose(line.get_ydata(), 100 * curve.at(np.asarray(line.get_xdata()) / 100))
    random = next(line for line in ax.get_lines() if line.get_label() == "random routing")
    np.testing.assert_allclose(random.get_ydata(), 100 * curve.accuracy[[0, -1]])
    assert f"{100 * report.accuracy.point:.1f}" in ax.get_title(loc="left")


def test_reliability_diagram_shows_every_bin_and_its_count(report):
    ax = plot_reliability(report).axes[0]
    points = next(line for line in ax.get_lines() if line.get_marker() == "o")
    np.testing.assert_allclose(points.get_ydata(), 100 * report.reliability.accuracy)
    assert f"pairs in each bin: {report.reliability.count.max()}" in [text.get_text() for text in ax.texts]


def test_scores_can_be_chosen(report):
    labels = {line.get_label() for line in plot_uplift(report, scores=["margin"]).axes[0].get_lines()}
    assert labels == {"margin −|g|", "random routing"}
    with pytest.raises(InputError, match="name: got 'entropy'"):
        plot_uplift(report, scores=["entropy"])
    with pytest.raises(InputError, match="scores: got 0 names"):
        plot_uplift(report, scores=[])


def test_the_same_report_gives_the_same_bytes(report, tmp_path):
    plot_report(report, tmp_path / "a.png")
    plot_report(report, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(report, tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr("rmcore._base.files.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_uplift(report, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_only_png_is_written(report, tmp_path):
    with pytest.raises(InputError, match=r"path: got .*figure.pdf, expected a file name ending in .png"):
        save_figure(plot_uplift(report), tmp_path / "figure.pdf")


def test_a_callers_matplotlib_settings_are_left_alone(report):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot_report(report)
    assert dict(matplotlib.rcParams) == before


def test_matplotlib_loads_on_first_use_and_pyplot_never(torch_python):
    pytest.importorskip("matplotlib")
    code = """
import sys, numpy as np
from rmcore.evaluation import evaluate, plots, report
assert "matplotlib" not in sys.modules
pairs = report.ScoredPairs(logit=[1.0, -1.0], label=[1, 1], uncertainty=[1, 2], cluster=[0, 1])
plots.plot_report(evaluate.evaluate_pairs(pairs, replicates=5))
assert "matplotlib.pyplot" not in sys.modules
"""
    done = torch_python.start(code)
    _, errors = done.communicate()
    assert done.returncode == 0, errors


@pytest.mark.parametrize("plot", PLOTS)
def test_without_matplotlib_the_error_names_the_extra(plot, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotsUnavailableError, match=r"pip install 'rmcore\[plots\]'") as caught:
        plot(make_report(5))
    assert isinstance(caught.value, RmcoreError)
    assert isinstance(caught.value, ImportError)
