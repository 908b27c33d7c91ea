"""A small network learns to take the noise off a photograph, sharded along a curve and not.

``python -m ring_attention_hilbert.demo`` runs it. Only ``denoising`` knows that there are ranks:
rows come from the plan's ``shard``, and their cells from its positions.
"""
