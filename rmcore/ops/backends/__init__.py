"""The four implementations behind ``rmcore.ops``, one module each, all with the same five functions.

``unavailable(op, device, dtype)`` says in words why an operation cannot run here, or None; ``score``, ``accumulate``,
``pair_variance`` and ``power_iteration`` do the work on arguments that ``rmcore.ops`` has already checked.
"""
