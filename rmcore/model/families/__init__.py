"""Published reward models, declared: which states are pooled, which tensors play which part, how they make a score.

- ``registry``: the families; ``spec``: how one is written down; ``table``: the same for people.
- ``detect``: which family a model is of, by configuration and tensor names.
- ``load``: body by transformers, head by name, from safetensors and without the model's own code.
- ``head``, ``pooling``: from states to rows; where the states are.
"""
