"""Tensors of a model that was trained."""

from __future__ import annotations

import torch

__all__ = ["HEAD", "body_tensors", "head_tensors", "same"]


HEAD = {"num_features": 64, "kernel_scale": 3.0}


def head_tensors(trainer):
    return {name: t.detach().clone() for name, t in trainer.head.state_dict().items()}


def body_tensors(trainer):
    return {name: t.detach().clone() for name, t in trainer.backbone.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
