"""The first contact with a GPU, without one: whatever happens to it, what it had found is on disk."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import fresh_python

from rmcore.bench import gpu_build, gpu_check, gpu_report, gpu_run
from rmcore.bench.gpu_run import Run, Step
from rmcore.ops import proven

PROBE = [
    "score",
    "--device",
    "cpu",
    "--size",
    "32",
    "--backends",
    "torch",
    "--rows",
    *"123456789",
    "--budget",
    "0.01",
    "--repeats",
    "5",
]


def script(code: str, name: str = "step", limit_s: float = 20, **kwargs: str) -> Step:
    return Step(name, limit_s, (sys.executable, "-c", code), **kwargs)


def rows(run: Run) -> list[dict]:
    return [json.loads(line) for line in run.rows.read_text().splitlines()]


def _probe(out: str) -> None:
    from rmcore.bench import gpu_probe

    raise SystemExit(gpu_probe.main([*PROBE, "--out", out]))


@pytest.mark.slow
def test_killed_at_ten_random_moments_the_rows_found_so_far_are_whole(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rmcore.bench.gpu_probe"])
    rng, counts, whole_s = random.Random(0), [], 0.0
    for k in range(11):
        out = tmp_path / f"{k}.jsonl"
        process = context.Process(target=_probe, args=(str(out),))
        process.start()
        while process.is_alive() and not out.exists():
            time.sleep(0.002)
        began = time.monotonic()
        if k == 0:  # once to its end, to know how long that takes
            process.join()
            whole_s = time.monotonic() - began
        else:
            process.join(rng.uniform(0.0, whole_s))
            process.kill()
            process.join()
        lines = out.read_text().splitlines()
        found = [json.loads(line) for line in lines]
        assert [row["rows"] for row in found] == list(range(1, len(found) + 1))
        assert all(row["case"] == "score torch" and row["bits_repeat"] and row["us"] > 0 for row in found)
        assert gpu_report.read_rows(out) == found
        counts.append(len(found))
    assert counts[0] == 9
    assert len(set(counts)) > 1  # some ended early, some late


def test_a_runner_killed_outright_leaves_its_finished_steps(tmp_path: Path):
    code = f"""
import sys
from pathlib import Path
from rmcore.bench.gpu_run import Run, Step
run = Run(Path({str(tmp_path)!r}), 60)
for k in range(1000):
    run.step(Step(f"s{{k}}", 5, (sys.executable, "-S", "-c", "pass")), Path({str(tmp_path)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    file = tmp_path / "rows.jsonl"
    while not file.exists() or file.read_bytes().count(b"\n") < 5:
        time.sleep(0.01)
    process.kill()
    process.wait()
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["step"] for row in found] == [f"s{k}" for k in range(len(found))]
    assert all(row["rc"] == 0 for row in found)


def test_at_its_limit_a_step_is_asked_to_report_and_its_children_die_with_it(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(gpu_run, "GRACE_S", 2.0)
    code = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started deaf to it
stubborn = "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", stubborn])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
try:
    time.sleep(600)
except KeyboardInterrupt:
    open({str(tmp_path / "reported")!r}, "w").write("yes")
    time.sleep(600)  # and does not end by itself
"""
    run = Run(tmp_path, 60)
    run.step(script(code, limit_s=4), tmp_path)  # a Python that starts while others work takes a second or two
    assert (tmp_path / "reported").read_text() == "yes"
    (row,) = rows(run)
    assert row["rc"] == 124
    child = int((tmp_path / "child").read_text())
    state = Path(f"/proc/{child}/stat")
    for _ in range(3000):
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("a child survived its step")


@pytest.mark.parametrize(
    ("rows_written", "code", "out"),
    [
        ([{"err_g": 1e-4, "err_v": 1e-3, "finite": True, "bits_repeat": True}], 0, False),
        ([{"err_g": 1e-4, "err_v": 1e-3, "finite": True, "bits_repeat": False}], 0, True),
        ([{"err_g": 1e-4, "err_v": 1e-3, "finite": False, "bits_repeat": True}], 0, True),
        ([{"err_g": 0.9, "err_v": 1e-3, "finite": True, "bits_repeat": True}], 0, True),
        ([{"err_g": 1e-4, "err_v": 1e-3, "finite": True, "bits_repeat": True}, {"failed": "CUDA error"}], 0, True),
        ([{"err_g": 1e-4, "err_v": 1e-3, "finite": True, "bits_repeat": True}], 3, True),
        ([{"declined": "not part of this build"}], 0, True),
        ([], 0, True),
    ],
)
def test_a_backend_that_fails_its_smoke_test_is_timed_no_more_and_the_other_is(tmp_path, rows_written, code, out):
    lines = "".join(json.dumps(row) + "\\n" for row in rows_written)
    text = f"import os; open(os.environ['RMCORE_GPU_ROWS'], 'a').write({lines!r}.replace('\\\\n', '\\n')); exit({code})"
    run = Run(tmp_path, 60)
    run.step(script(text, "smoke-cuda", disqualifies="cuda"), tmp_path)
    run.step(script("pass", "score-cuda", needs="cuda"), tmp_path)
    run.step(script("pass", "score-triton", needs="triton"), tmp_path)
    found = {row["step"]: row for row in rows(run) if "rc" in row or "skipped" in row}
    assert ("skipped" in found["score-cuda"]) == out
    assert found["score-triton"]["rc"] == 0


def test_what_was_not_tried_is_not_timed_either(tmp_path: Path):
    run = Run(tmp_path, 60)
    run.step(script("exit(1)", "smoke-cuda", disqualifies="cuda"), tmp_path)
    run.step(script("pass", "smoke-int8-cuda", needs="cuda", disqualifies="cuda int8"), tmp_path)
    run.step(script("pass", "score-int8-cuda", needs="cuda int8"), tmp_path)
    found = [row for row in rows(run) if "skipped" in row]
    assert [row["step"] for row in found] == ["smoke-int8-cuda", "score-int8-cuda"]


def test_a_row_cut_short_by_a_kill_stops_nothing(tmp_path: Path):
    good = json.dumps({"err_g": 1e-4, "err_v": 1e-3, "finite": True, "bits_repeat": True})
    cut = good + "\n" + good[:20] + "\n"
    text = f"import os; open(os.environ['RMCORE_GPU_ROWS'], 'a').write({cut!r})"
    run = Run(tmp_path, 60)
    run.step(script(text, "smoke-cuda", disqualifies="cuda"), tmp_path)
    assert run.out_of_the_running == set()


def test_without_time_left_nothing_starts_and_the_rows_say_so(tmp_path: Path):
    run = Run(tmp_path, 5)
    run.step(script("open('ran', 'w')"), tmp_path)
    assert not (tmp_path / "ran").exists()
    assert rows(run) == [{"step": "step", "skipped": "no time left"}]


def test_a_command_that_is_not_there_is_a_failed_step_and_the_next_one_runs(tmp_path: Path):
    run = Run(tmp_path, 60)
    run.step(Step("ncu", 5, ("no-such-profiler",)), tmp_path)
    run.step(script("pass", "next"), tmp_path)
    assert [row["rc"] for row in rows(run)] == [127, 0]
    assert run.failed == ["ncu"]


def test_the_parts_fit_into_the_time_lent():
    first, second = gpu_check.first_part("cuda", 4096), gpu_check.second_part("cuda", 4096)
    names = [step.name for step in first]
    # Right or wrong, int8 too; what an unknown card does by itself; the headline; whatever can drag on at the end.
    order = ["card", "smoke-cuda", "smoke-triton", "smoke-int8-cuda", "smoke-int8-triton", "self-check", "score-cuda"]
    order += ["score-triton", "score-int8-triton", "other-triton", "tests-int8", "tests-kernels", "forms", "tune"]
    assert [name for name in names if name in order] == order
    assert sum(step.limit_s for step in first[: names.index("tests-int8")]) <= 600 + 40  # limits, not expectations
    assert all(step.limit_s <= 110 for step in (*first, *second))
    assert second[0].name == "large"
    assert {"tests-packing", "versus", "ncu"} <= {step.name for step in second}


def test_a_report_names_the_card_and_needs_to_know_it(tmp_path: Path, capsys):
    path = tmp_path / "rows.jsonl"
    case = {"step": "score", "case": "score cuda", "size": 4096, "dtype": "float16", "rows": 1, "us": 19.5}
    path.write_text(json.dumps(case) + "\n" + '{"step": "sc')
    assert gpu_report.report(path, tmp_path) == 1
    card = {"step": "environment", "case": "environment", "size": 0, "dtype": "", "name": "NVIDIA H100 80GB HBM3"}
    card |= {
        "versions": {"triton": "3.6.0"},
        "date": "today",
        "commit": "abc",
        "sources": {"triton": {"score": "T"}, "cuda": {"score": "C"}},
    }
    path.write_text(json.dumps(card) + "\n" + json.dumps(case) + "\n" + '{"step": "sc')
    assert gpu_report.report(path, tmp_path, tmp_path / "proven.json") == 0
    document = json.loads((tmp_path / "gpu-nvidia-h100-80gb-hbm3.json").read_text())
    assert document["rows"] == [card, case]
    assert "us=19.5" in capsys.readouterr().out
    # A later run that measures less keeps what it did not measure, with its own date and commit.
    other = case | {"rows": 64, "us": 30.0}
    path.write_text("".join(json.dumps(row) + "\n" for row in (card | {"date": "later", "commit": "def"}, other)))
    assert gpu_report.report(path, tmp_path, tmp_path / "proven.json") == 0
    document = json.loads((tmp_path / "gpu-nvidia-h100-80gb-hbm3.json").read_text())
    assert document["rows"][1:] == [other]
    assert document["earlier"] == [{"date": "today", "commit": "abc"} | case]


def test_the_assembled_tree_is_what_an_installation_has(tmp_path: Path):
    gpu_build.assemble(tmp_path / "tree")
    code = "import rmcore.kernels.heuristics, rmcore.bench.gpu_probe, rmcore; print(rmcore.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "tree")}
    done = subprocess.run(
        fresh_python.command(code), cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(tmp_path / "tree" / "rmcore" / "__init__.py")


def test_glibc_versions_are_read_from_a_library(tmp_path: Path):
    library = tmp_path / "x.so"
    library.write_bytes(b"\x7fELF...GLIBC_2.17\0GLIBC_2.34\0GLIBC_2.2.5\0GLIBC_PRIVATE\0GLIBC_2.4\0")
    assert gpu_build.newest_glibc(library) == (2, 34)


def test_what_a_run_found_becomes_the_table_that_ops_reads(tmp_path: Path):
    digests = {
        "triton": {"score": "T score", "score_int8": "T int8", "accumulate": "T accumulate"},
        "cuda": {"score": "C"},
    }
    card = {"name": "NVIDIA H200", "versions": {"triton": "3.6.0"}, "commit": "abc", "sources": digests}
    good = {"err_g": 1e-4, "err_v": 1e-3, "finite": True, "bits_repeat": True}
    cases = [
        {"case": "score cuda", **good},
        {"case": "score triton", **good},
        {"case": "score triton", **good, "bits_repeat": False},
        {"case": "score_int8 triton", **good},
        {"case": "accumulate triton", "err_diagonal": 0.5, "bits_repeat": True},
        {"case": "pair_variance triton", **good},
        {"case": "pair_variance triton", "failed": "CUDA error"},
        {"case": "power_iteration triton torch.float16", "err": 1e-5, "bits_repeat": True},
        {"case": "power_iteration cuda", "declined": "not part of this build"},
    ]
    table = tmp_path / "proven.json"
    gpu_report.update_proven(table, card, cases)
    found = {(row["op"], row["backend"]): (row["right"], row["bits_equal"]) for row in json.loads(table.read_text())}
    assert found == {
        ("score", "cuda"): (True, True),
        ("score", "triton"): (True, False),
        ("score_int8", "triton"): (True, True),
        ("accumulate", "triton"): (False, True),
        ("pair_variance", "triton"): (False, True),
        ("power_iteration", "triton"): (True, True),
    }
    sources = {(row["op"], row["backend"]): row["sources"] for row in json.loads(table.read_text())}
    assert sources == dict.fromkeys(found, "") | {
        ("score", "triton"): "T score", ("score_int8", "triton"): "T int8", ("score", "cuda"): "C",
        ("accumulate", "triton"): "T accumulate",
    }  # fmt: skip
    rows_found = [proven.Finding(**row) for row in json.loads(table.read_text())]
    assert {row.triton for row in rows_found if row.backend == "triton"} == {"3.6.0"}
    # A later run with the same Triton replaces its rows, one with another stands beside them.
    gpu_report.update_proven(table, card | {"commit": "def"}, cases[1:2])
    gpu_report.update_proven(table, card | {"versions": {"triton": "3.9.0"}}, cases[1:2])
    later = [row for row in json.loads(table.read_text()) if row["op"] == "score" and row["backend"] == "triton"]
    assert [(row["triton"], row["commit"], row["bits_equal"]) for row in later] == [
        ("3.6.0", "def", True),
        ("3.9.0", "abc", True),
    ]
    assert len(json.loads(table.read_text())) == 7


def test_what_was_timed_side_by_side_becomes_lines_for_the_table(tmp_path: Path, capsys):
    good = {
        "bits_repeat": True,
        "finite": True,
        "err_g": 1e-4,
        "err_v": 1e-4,
        "step": "tiles",
        "size": 4096,
        "dtype": "",
    }
    tile = "Tile(rows=64, cols=32)"
    cases = [
        {"case": "form tail apart, score", "rows": 16, "us": 30.0},
        {"case": "form tail last, score", "rows": 16, "us": 25.0},
        {"case": "form pairs by pairs", "k": 4, "us": 9.0},
        {"case": "form pairs by groups", "k": 4, "us": 8.0, "bits_repeat": False},
        {"case": "form pairs in the product", "k": 4, "us": 8.5},
        {"case": "tile project table, score", "rows": 64, "us": 18.3, "tile": "Tile(rows=64, cols=64)"},
        {"case": "tile project named, score", "rows": 64, "us": 17.0, "tile": tile},
        {"case": "tile product table, score", "rows": 16, "us": 11.0, "tile": "Tile(rows=16, cols=128)"},
        {"case": "tile product named, score", "rows": 16, "us": 1.0, "tile": tile, "err_v": 0.5},
        {"case": "tile gram table, score", "rows": 1, "failed": "CUDA error"},
        {"case": "form large plain, score", "rows": 4096, "us": 333.0},
        {"case": "form large persistent, score", "rows": 4096, "us": 320.0},
        {"case": "form large specialized, score", "rows": 4096, "us": 290.0, "bits_repeat": False},
        {"case": "form large-accumulate plain", "rows": 65536, "us": 5680.0},
        {"case": "form large-accumulate specialized", "rows": 65536, "us": 5700.0},
    ]
    rows = [good | case for case in cases]
    told = [
        "form tail B=16: last 25.0 µs, apart 30.0 µs",
        "form pairs k=4: in the product 8.5 µs, by pairs 9.0 µs",
        "tile project B=64: named 17.0 µs, table 18.3 µs"
        f" -> (64, {tile}),  # measured: 17.0 µs, 18.3 µs with what was here",
        "form large B=4096: persistent 320.0 µs, plain 333.0 µs"
        ' -> SERVES = [Large("persistent")]  # measured at B=4096: 320.0 µs, 333.0 µs plain',
        "form large-accumulate B=65536: plain 5680.0 µs, specialized 5700.0 µs",
    ]
    assert gpu_report.choices(rows) == told
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert gpu_report.report(path, None) == 0
    assert told[2] in capsys.readouterr().out


def test_named_tiles_are_timed_beside_the_tables(tmp_path: Path, monkeypatch):
    pytest.importorskip("triton")
    from rmcore.bench import gpu_probe
    from rmcore.kernels import heuristics

    seen = []

    def once(*_: object) -> dict[str, object]:
        seen.append(
            {name: getattr(heuristics, name)(heuristics.Device("sm90", 132), 2, 16) for name in ("project", "product")}
        )
        return {"us": 1.0}

    monkeypatch.setattr(gpu_probe, "_score_once", once)
    assert gpu_probe.main(["tiles", "--device", "cpu", "--size", "128", "--out", str(tmp_path / "rows")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert len(rows) == len(seen) == 2 * len(gpu_probe.TILES)
    for k, (kernel, count, named) in enumerate(gpu_probe.TILES):
        assert rows[2 * k + 1]["tile"] == str(heuristics.Tile(**named))
        assert rows[2 * k]["rows"] == rows[2 * k + 1]["rows"] == count
        assert seen[2 * k + 1][kernel] == heuristics.Tile(**named)
    assert {row["step"] for row in rows} == {"tiles"}
