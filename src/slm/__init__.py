"""slm: a language model that keeps learning."""

__version__ = "0.1.0"
