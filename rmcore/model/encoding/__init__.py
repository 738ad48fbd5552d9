"""From rendered texts to pooled states: which tokens, and what is computed once.

- ``limits``: the most tokens of a text, and what is cut of longer ones.
- ``whole``: rendered conversations through the tokenizer.
- ``packing``: prefix trees of texts, cut into packs.
- ``tree_attention``: attention over packed trees, with the kernels there are.
- ``sharing``: which texts are encoded as packed trees, and the trial that says whether the model allows it.
- ``architecture``: what a transformers model is made of, and for which ones sharing is exact.
"""
