"""Heads on disk: bit for bit, atomic, and clear about everything that is wrong."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rmcore._base.errors import CheckpointError, InputError
from rmcore._base.files import atomic_folder
from rmcore.head import checkpoint
from rmcore.head.checkpoint import load_head, save_head

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = [{}, {"features": "linear"}, {"layer_size": 12}, {"layer_size": 12, "features": "linear"},
         {"layer_size": 12, "activation": "tanh", "layernorm": True}, {"mode": "concat", "likelihood": "gaussian"},
         {"num_features": 129, "amplitude": 0.7, "kernel_scale": 3.0}]  # fmt: skip


@pytest.fixture(scope="module")
def head(make_data, fit_head):
    return fit_head(make_data(dtype=torch.float32), dtype=torch.float16)


@pytest.fixture
def saved(head, tmp_path):
    save_head(head, tmp_path / "head")
    return tmp_path / "head"


def change_json(folder, **changes):
    file = folder / "rmcore.json"
    values = json.loads(file.read_text())
    for dotted, value in changes.items():
        *parents, name = dotted.split("__")
        place = values
        for parent in parents:
            place = place[parent]
        place[name] = value
    file.write_text(json.dumps(values))


def change_tensors(folder, change):
    """Rewrite the tensors and their digest, so that only their contents can be found wrong."""
    file = folder / "head.safetensors"
    save_file(change(load_file(file)), file)
    change_json(folder, head__sha256=hashlib.sha256(file.read_bytes()).hexdigest())


# -- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("include_posterior", [True, False])
def test_a_loaded_head_scores_bit_for_bit(make_data, fit_head, tmp_path, dtype, kind, include_posterior):
    data = make_data(dtype=torch.float32)
    head = fit_head(data, dtype=dtype, **kind)
    save_head(head, tmp_path / "head", include_posterior=include_posterior)
    again = load_head(tmp_path / "head")
    assert again.config == head.config
    assert again.dtype == head.dtype == dtype
    assert (again.posterior is None) == (not include_posterior)
    for a, b in zip(head.score(data.hidden), again.score(data.hidden), strict=True):
        assert torch.equal(a, b)
    if head.config.mode == "difference":
        sizes = torch.tensor([100, 200])
        for a, b in zip(head.score_pairs(data.hidden, sizes), again.score_pairs(data.hidden, sizes), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(again.beta, head.beta)


def test_an_input_scale_is_kept(make_data, fit_head, tmp_path):
    data = make_data(scale=1e5, dtype=torch.float32)
    head = fit_head(data, dtype=torch.float16)
    assert head.feature_map.input_scale < 1
    save_head(head, tmp_path / "head")
    again = load_head(tmp_path / "head")
    assert again.feature_map.input_scale == head.feature_map.input_scale
    assert torch.equal(again.score(data.hidden).uncertainty, head.score(data.hidden).uncertainty)


def test_learning_goes_on_after_loading(make_data, fit_head, saved):
    data, more = make_data(dtype=torch.float32), make_data(seed=4, shift=3.0, dtype=torch.float32)
    head, again = fit_head(data, dtype=torch.float16), load_head(saved)
    assert again.posterior.count == 500
    before = again.score(more.hidden).variance
    for h in (head, again):
        h.update(more.hidden, more.labels, pairs=more.pairs)
    assert again.posterior.count == 1000
    assert torch.equal(again.score(more.hidden).variance, head.score(more.hidden).variance)
    assert float(again.score(more.hidden).variance.mean()) < float(before.mean())


def test_without_its_posterior_a_head_does_not_learn(head, make_data, tmp_path):
    data = make_data(dtype=torch.float32)
    save_head(head, tmp_path / "head", include_posterior=False)
    with pytest.raises(InputError, match=r"^posterior: got none"):
        load_head(tmp_path / "head").update(data.hidden, data.labels, pairs=data.pairs)


def test_saving_what_was_loaded_writes_the_same_file(saved, tmp_path):
    save_head(load_head(saved), tmp_path / "again")
    assert (tmp_path / "again" / "head.safetensors").read_bytes() == (saved / "head.safetensors").read_bytes()
    assert (tmp_path / "again" / "rmcore.json").read_bytes() == (saved / "rmcore.json").read_bytes()


def test_nothing_is_pickled(saved):
    assert {file.name for file in saved.iterdir()} == {"rmcore.json", "head.safetensors"}
    values = json.loads((saved / "rmcore.json").read_text())
    assert (values["format"], values["format_version"], values["kind"]) == ("rmcore", 1, "head")


# -- what is wrong ---------------------------------------------------------------------------------------------------


def truncate(folder):
    file = folder / "head.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def empty(folder):
    (folder / "head.safetensors").write_bytes(b"")


def flip_a_byte(folder):
    file = folder / "head.safetensors"
    contents = bytearray(file.read_bytes())
    contents[-50] ^= 1
    file.write_bytes(contents)


def swap_a_foreign_file(folder):
    save_file({"weight": torch.zeros(3)}, folder / "head.safetensors")


def truncated_and_digest_forged(folder):
    truncate(folder)
    change_json(folder, head__sha256=hashlib.sha256((folder / "head.safetensors").read_bytes()).hexdigest())


def poison(folder):
    change_tensors(folder, lambda t: t | {"factor": t["factor"] * float("nan")})


def reshape(folder):
    change_tensors(folder, lambda t: t | {"projection": t["projection"][:-1].contiguous()})


def retype(folder):
    change_tensors(folder, lambda t: t | {"projection": t["projection"].float()})


def drop(folder):
    change_tensors(folder, lambda t: {name: v for name, v in t.items() if name != "phase"})


def extra(folder):
    change_tensors(folder, lambda t: t | {"surprise": torch.zeros(2)})


CORRUPT = {
    "no folder": (lambda f: (f / "rmcore.json").unlink(), r"expected a folder with rmcore\.json"),
    "no tensors": (lambda f: (f / "head.safetensors").unlink(), r"head\.safetensors: missing"),
    "truncated tensors": (truncate, "truncated, altered"),
    "empty tensors": (empty, "truncated, altered"),
    "flipped byte": (flip_a_byte, "truncated, altered"),
    "foreign tensors": (swap_a_foreign_file, "truncated, altered"),
    "truncated, digest forged": (truncated_and_digest_forged, "does not fit together"),
    "NaN": (poison, "factor: got NaN or Inf"),
    "shape": (reshape, r"projection: got \(63, 16\).*expected \(64, 16\)"),
    "dtype": (retype, r"projection: got .*torch.float32, expected .*torch.float16"),
    "missing tensor": (drop, r"got tensors .*expected .*phase"),
    "unknown tensor": (extra, "surprise"),
    "truncated JSON": (
        lambda f: (f / "rmcore.json").write_text((f / "rmcore.json").read_text()[:200]),
        "not readable as JSON",
    ),
    "nested JSON": (lambda f: (f / "rmcore.json").write_text("[" * 100_000), "not readable as JSON"),
    "binary JSON": (lambda f: (f / "rmcore.json").write_bytes(b"\xff\xfe\x00\x80"), "not readable as JSON"),
    "JSON of another program": (lambda f: (f / "rmcore.json").write_text('{"model_type": "bert"}'), "another program"),
    "JSON list": (lambda f: (f / "rmcore.json").write_text("[]"), "another program"),
    "newer version": (lambda f: change_json(f, format_version=2), r"format_version 2, this rmcore \(.*\) reads 1"),
    "no version": (lambda f: change_json(f, format_version=None), "format_version None"),
    "no head": (lambda f: change_json(f, head=None), "no 'head' section"),
    "unknown setting": (lambda f: change_json(f, head__config__colour=1), r"unknown keys \['colour'\]"),
    "bad setting": (lambda f: change_json(f, head__config__ridge=-1), "ridge: got -1"),
    "no settings": (lambda f: change_json(f, head__config=None), "does not fit together"),
    "unknown dtype": (lambda f: change_json(f, head__dtype="int4"), "does not fit together"),
    "another size": (lambda f: change_json(f, head__config__num_features=65), r"expected \(65,"),
    "scalar that is none": (lambda f: change_json(f, head__factor_scale="big"), "does not fit together"),
    "scalar that is NaN": (lambda f: change_json(f, head__beta0=float("nan")), "beta0: got nan"),
    "scale that is zero": (lambda f: change_json(f, head__factor_scale=0.0), "factor_scale: got 0"),
    "no posterior entry": (lambda f: change_json(f, head__posterior=None), "gram"),
}


@pytest.mark.parametrize(("damage", "message"), CORRUPT.values(), ids=CORRUPT)
def test_a_damaged_folder_is_refused_with_the_reason(saved, damage, message):
    damage(saved)
    with pytest.raises(CheckpointError, match=message) as error:
        load_head(saved)
    assert str(saved) in str(error.value)
    assert isinstance(error.value, ValueError)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected a folder with rmcore\.json"):
        load_head(tmp_path / "nowhere")


# -- writing ---------------------------------------------------------------------------------------------------------


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_a_folder_of_ours_is_replaced(saved, make_data, fit_head):
    other = fit_head(make_data(seed=7, dtype=torch.float32), dtype=torch.float16)
    before = contents(saved)
    save_head(other, saved)
    assert contents(saved) != before
    assert torch.equal(load_head(saved).beta, other.beta)
    assert [f.name for f in saved.parent.iterdir()] == ["head"]


def test_a_folder_of_somebody_elses_is_not(head, tmp_path):
    (tmp_path / "thesis.tex").write_text("ten years of work")
    with pytest.raises(InputError, match=r"^path: got .*expected a new or empty folder"):
        save_head(head, tmp_path)
    assert contents(tmp_path) == {"thesis.tex": b"ten years of work"}
    with pytest.raises(InputError, match=r"^path: got "):
        save_head(head, tmp_path / "thesis.tex")
    assert contents(tmp_path) == {"thesis.tex": b"ten years of work"}


def test_empty_and_deep_folders_are_taken(head, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        save_head(head, folder)
        assert torch.equal(load_head(str(folder)).beta, head.beta)


def test_the_present_folder_can_be_written(head, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_head(head, ".")
    assert torch.equal(load_head(tmp_path / "here").beta, head.beta)


def test_a_link_is_written_through(head, tmp_path):
    save_head(head, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save_head(head, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["link", "real"]


def test_a_failure_while_writing_leaves_the_old_folder(head, saved, monkeypatch):
    before = contents(saved)

    def full(tensors, file):
        Path(file).write_bytes(b"half a fi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_head(head, saved)
    with pytest.raises(OSError, match="No space left"):
        save_head(head, saved.parent / "new")
    assert contents(saved) == before
    assert [f.name for f in saved.parent.iterdir()] == ["head"]


def test_a_failure_at_the_very_end_brings_the_old_folder_back(head, saved, monkeypatch):
    before, replace, calls = contents(saved), os.replace, []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", second_fails)
    with pytest.raises(OSError, match="Input/output"):
        save_head(head, saved)
    assert contents(saved) == before
    assert [f.name for f in saved.parent.iterdir()] == ["head"]


def test_an_interrupt_is_a_failure_too(saved):
    before = contents(saved)

    def interrupted():
        with atomic_folder(saved, marker=checkpoint.CONFIG_FILE) as folder:
            (folder / "rmcore.json").write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert contents(saved) == before
    assert [f.name for f in saved.parent.iterdir()] == ["head"]
