"""The letters used for tensor axes in every docstring and annotation of this project.

    B  rows: the examples in one batch
    T  tokens of a row
    C  channels of a query or a key
    N  keys in the store
    J  coordinates of a point, the form of a query or a key in which the nearest key is the most similar
    M  candidate keys a decision looks at
    K  keys kept per row
    U  distinct increments in use in one batch
    L  re-parameterized layers
    R  rank of an increment
    I  input features of a linear layer
    O  output features of a linear layer
    Y  labels of a task

jaxtyping annotations such as ``Float[Tensor, "B C"]`` are documentation at run time and are checked
in the test suite only (pytest installs jaxtyping's import hook, see ``tests/conftest.py``).
"""
