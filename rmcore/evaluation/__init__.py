"""How good a reward model, its uncertainty and a router are, measured on recorded preferences.

- ``statistics``: accuracy, calibration, ranking of errors, intervals.
- ``evaluate``: a model on a file of preferences; ``streams``: the quality streams.
- ``report``, ``plots``: what a person reads.
"""
