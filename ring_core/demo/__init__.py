"""A small language model trained on one long document, sharded over processes and not.

The model and its training loop show what a model needs of this library: a plan, this rank's rows,
their positions, and one call. Everything else is a plain transformer.
"""
