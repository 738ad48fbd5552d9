"""``rmcore train``: what makes a model with uncertainties.

- ``command``: the command; ``options``: what it can be told, in groups; ``config``: ``--config train.yaml``.
- ``checks``: options that do not go together; ``data``: what is read.
- ``head``: a head on frozen states; ``ai_labels``, ``critiques``, ``attributes``: with a judge's labels, behind
  critiques, of several attributes; ``backbone``: a backbone trained first.
"""
