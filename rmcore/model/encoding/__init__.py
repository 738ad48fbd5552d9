"""How texts that begin alike are encoded once, for :mod:`rmcore.model.backbone`.

- ``packing``: prefix trees of texts, cut into packs.
- ``tree_attention``: attention over packed trees, with the kernels there are.
- ``sharing``: which texts are encoded as packed trees, and the trial that says whether the model allows it.
- ``architecture``: what a transformers model is made of, and for which ones sharing is exact.
"""
