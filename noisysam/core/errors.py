"""The two ways in which a command ends early, each told in one line without a traceback."""


class UserError(Exception):
    """Something the user gave is wrong and can be mended by the user. Exit code 2."""


class RunFailed(Exception):
    """A run, or a command at work, could not be carried to its end. Exit code 1."""
