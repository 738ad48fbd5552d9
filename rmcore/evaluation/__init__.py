"""How good a reward model, its uncertainty and a router are, measured on recorded preferences.

- ``evaluate``: a head, or scores from anywhere, on labelled pairs → an ``EvaluationReport``.
- ``statistics``: what it is made of: accuracy, calibration, ranking of errors, uplift over random routing, intervals.
- ``report``, ``plots``: the data classes, and what a person reads (of an evaluation, of a run).
- ``streams``: pairs to evaluate on, with their recorded verdicts.
"""
