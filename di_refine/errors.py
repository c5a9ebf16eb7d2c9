"""The two kinds of failure a command reports in one sentence."""


class InputError(ValueError):
    """The user can mend this: an option, a file, a mismatch between files. Commands exit with status 2."""


class RunError(RuntimeError):
    """Something went wrong while running: a full disk, a non-finite loss. Commands exit with status 1."""
