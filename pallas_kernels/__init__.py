"""The hot operations of microadam_jax, one folder per operation.

Each folder holds ``reference.py``, the operation in ``jax.numpy``: it is the specification
that every kernel is tested against and the path that XLA compiles wherever no kernel runs.
"""
