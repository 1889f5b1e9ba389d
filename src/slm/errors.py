"""Every error a user can meet, in one tree.

    SlmError
    ├── ConfigError      a setting is unknown or out of range
    ├── DataError        a file, a row or a text cannot be used as given
    ├── TaskError        a task name is unknown, taken or not allowed
    ├── BackboneError    a backbone cannot be loaded, or holds a module slm cannot handle
    ├── StoreError       a folder is no store, is damaged, or belongs to another backbone
    ├── IncrementError   an increment does not fit the layer it is meant for
    │   └── CrowdedError  increments differ too much to be used in one batch; each by itself can be
    └── LearningError    training went wrong (a loss that is not finite, say)

A message is one line: what failed and with which value, what is allowed, what to do.
"""


class SlmError(Exception):
    """Root of every error raised on purpose by slm."""


class ConfigError(SlmError):
    """A setting is unknown or out of range; all mistakes of one mapping are reported at once."""


class DataError(SlmError):
    """A file, a row or a text cannot be used as given."""


class TaskError(SlmError):
    """A task name is unknown, taken or not allowed."""


class BackboneError(SlmError):
    """A backbone cannot be loaded, or holds a module that slm cannot handle."""


class StoreError(SlmError):
    """A folder is no store, is damaged, or belongs to another backbone."""


class IncrementError(SlmError):
    """An increment does not fit the layer it is meant for."""


class CrowdedError(IncrementError):
    """Increments differ too much in rank or layers to be used in one batch; each by itself can be."""


class LearningError(SlmError):
    """Training went wrong, so nothing was committed."""
