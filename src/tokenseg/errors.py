"""Errors that a user can mend.

Every message says what was given, what is allowed and what to do. The command line turns a `TokenSegError`
into one line on stderr and exit code 2; anything else that escapes is a bug of ours.
"""

from __future__ import annotations


class TokenSegError(ValueError):
    """An error that the user can mend: the base of all that TokenSeg raises on purpose, and a `ValueError`.

    >>> from tokenseg import TokenSegError, load_model
    >>> try:
    ...     load_model("nowhere")
    ... except TokenSegError as error:
    ...     print(error)
    model nowhere does not exist here, and is no built-in model (there is hippocampus); name a built-in model, ...
    """


class FileError(TokenSegError):
    """A file is missing, truncated, not a medical image, or cannot be written."""


class DataError(TokenSegError):
    """A dataset, image or label is readable but cannot be used as it is."""


class GeometryError(DataError):
    """Two images that must share a grid do not, or a grid is not usable."""


class ConfigError(TokenSegError):
    """Settings, a plan or a command line contradict what is allowed."""


class ModelError(TokenSegError):
    """A model folder is incomplete, corrupt, of another schema, or does not fit the input."""


class TrainingError(TokenSegError):
    """Training cannot go on; what was reached is saved."""
