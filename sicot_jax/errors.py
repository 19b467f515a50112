"""Errors a user can mend: the command line prints their one line (what, got, wanted, remedy),
without a traceback.
"""


class InputError(ValueError):
    """Wrong input: config, manifest, catalogue or checkpoint."""


class TrainingStopped(RuntimeError):
    """Training ended before its last step; the message says why and how to go on."""


class NotFinite(TrainingStopped):
    """Training that diverged: the same command would again."""
