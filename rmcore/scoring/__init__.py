"""The parts of a score call, for :mod:`rmcore.engine`.

- ``checks``: what a call may be given.
- ``score_call``: one call under way, micro-batch by micro-batch.
- ``pairs``: pairs of a batch, and the matrices of their preferences.
- ``asking``: the judge's questions of one call, put as they come up.
- ``overlap``: judge and backbone at the same time; ``gil`` shares the interpreter between them.
"""
