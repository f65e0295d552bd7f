"""``python -m bench.quality``: does sampling layers by gradient norms beat sampling them at random?

A small model learns tasks that it does not know, by every method at equal steps, data and share of trained parameters,
often enough that a difference can be told from noise. What was found is docs/evidence.md, which is generated from the
stored rows.
"""
