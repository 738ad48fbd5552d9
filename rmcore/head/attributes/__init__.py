"""Multi-attribute reward heads and their uncertainty: URM, URME, QRM, PURM, ArmoRM's gate; from cached states.

- ``head``: the module; ``gating``: its weights; ``losses``: what it is trained by.
- ``fit``: stage 1 on attribute labels, stage 2 the gate on pairs; ``pair_states``: these; ``optimise``: the loop.
- ``ensemble``: several heads.
- ``storage``: a folder of one's own; ``published``: URM's layout.
- ``scores``: what a head says of responses; ``serving``: the head as :func:`rmcore.ops.score_attributes` takes it.
"""

from __future__ import annotations

from rmcore.head.attributes.ensemble import AttributeEnsemble, EnsembleScores, fit_ensemble, fit_heads
from rmcore.head.attributes.fit import fit_attributes, fit_gate, fit_pairs
from rmcore.head.attributes.gating import GateConfig
from rmcore.head.attributes.head import HELPSTEER2, URM_WEIGHTS, AttributeConfig, AttributeHead
from rmcore.head.attributes.optimise import FitOptions
from rmcore.head.attributes.pair_states import PairStates
from rmcore.head.attributes.published import read_published, write_published
from rmcore.head.attributes.scores import AttributeScores
from rmcore.head.attributes.serving import serving_weights
from rmcore.head.attributes.storage import load_attributes, save_attributes

__all__ = [
    "HELPSTEER2",
    "URM_WEIGHTS",
    "AttributeConfig",
    "AttributeEnsemble",
    "AttributeHead",
    "AttributeScores",
    "EnsembleScores",
    "FitOptions",
    "GateConfig",
    "PairStates",
    "fit_attributes",
    "fit_ensemble",
    "fit_gate",
    "fit_heads",
    "fit_pairs",
    "load_attributes",
    "read_published",
    "save_attributes",
    "serving_weights",
    "write_published",
]
