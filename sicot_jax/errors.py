"""Errors that a user can fix.

The command line prints their one line (what, got, wanted, advice) without a traceback.
"""


class InputError(ValueError):
    """Wrong input: config, manifest, catalogue or checkpoint."""


class TrainingStopped(RuntimeError):  # noqa: N818 (stopping by a signal is no error)
    """Training ended before its last step; the message says why and how to continue."""


class NotFinite(TrainingStopped):
    """Training diverged: the same command would diverge again."""
