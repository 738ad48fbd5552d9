"""What tests/gpu/test_packing_gpu.py asks of a backbone is there, and means what that file takes it to mean."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[2] / "gpu" / "test_packing_gpu.py"


def test_the_gpus_tests_of_packing_read_a_backbone_as_it_is(monkeypatch):
    transformers = pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("packing_on_a_gpu", FILE)
    assert spec is not None
    assert spec.loader is not None
    file = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(file)
    monkeypatch.setattr(transformers.LlamaModel, "to", lambda self, _device, _dtype: self.float())
    monkeypatch.setitem(file.SHAPE, "num_hidden_layers", 1)
    texts = file.groups(0, (3, 2), 40)
    backbone = file.make(torch.float32, "sdpa")
    alone = file.one_at_a_time(backbone, texts)
    assert alone.shape == (len(texts), file.SHAPE["hidden_size"])
    torch.testing.assert_close(backbone.hidden(texts), alone, rtol=1e-3, atol=1e-4)
    assert backbone.stats.packed_tokens > 0
    assert backbone.explain().backend == "sdpa"
    (pack, *_) = file.PrefixTree([text.ids for text in texts]).packs(10**6)
    assert len(pack) > 0
    assert callable(file._compiled)
    assert file.block_mask_of(pack, torch.device("cpu")).shape[-1] >= len(pack)
