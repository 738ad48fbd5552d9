"""``rmcore serve --ray``: what is refused before a cluster is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from rmcore.cli import app
from rmcore.cli.serve_ray import ServingOnRay
from rmcore.integrations.ray.serve import ServeScale
from rmcore.integrations.ray.serve.copies import holders


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ray-replicas", "2"], "--ray-replicas: got 2 without --ray"),
        (["--ray-gpus", "0.5"], "--ray-gpus: got 0.5 without --ray"),
        (["--ray", "local", "--ray-replicas", "3:1"], "expected a number, or MIN:MAX"),
        (["--ray", "local", "--ray-replicas", "0"], "expected a number, or MIN:MAX"),
        (["--ray", "local", "--ray-assemblers", "0"], "ray-assemblers"),
        (["--ray", "local", "--port", "0"], "--port: got 0 with --ray"),
        (["--ray", "local", "--peers", "http://127.0.0.1:8400"], "--peers: got given with --ray"),
        (["--ray", "local", "--budget", "0.1", "--verdicts", "v.jsonl"], "--rank-by: got learned with --ray"),
        (["--ray", "local", "--judge-fraction", "0.1", "--verdicts", "v.jsonl"], "--judge-fraction: got 0.1 with"),
        (["--ray", "local", "--budget", "0.1", "--rank-by", "u"], "expected --judge-url or --verdicts"),
        (["--ray", "local", "--journal", "nowhere"], "--journal: got 'nowhere', expected"),
        (["--ray", "local"], "no-model"),
    ],
)
def test_what_cannot_be_is_refused_first(tmp_path: Path, monkeypatch, options: list[str], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v.jsonl").write_text("")
    done = CliRunner().invoke(app, ["serve", "./no-model", *options])
    assert done.exit_code in (1, 2)
    assert said in done.output.replace("│", " ")


def test_replicas_are_a_number_or_a_range() -> None:
    assert (ServingOnRay(ray_replicas="3").scale().replicas, ServingOnRay(ray_replicas="3").scale().max_replicas) == (
        3,
        None,
    )
    found = ServingOnRay(ray_replicas="1:8", ray_gpus=0.5, ray_entries=4).scale()
    assert (found.replicas, found.max_replicas, found.most, found.num_gpus, found.entries) == (1, 8, 8, 0.5, 4)
    assert ServingOnRay().scale().most == 1


def test_the_command_starts_as_many_processes_as_the_class() -> None:
    """Of assemblers three: then each has two that hold copies of its groups, and any two may die at once."""
    scale = ServingOnRay().scale()
    assert scale == ServeScale()
    names = [f"Assembler{number}" for number in range(scale.assemblers)]
    assert {len(holders(name, names)) for name in names} == {2}
