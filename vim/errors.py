"""Errors that the user can fix."""

from causal_conv1d_vim.runtime.backend import BackendError


class UserError(Exception):
    """Something in the command, the data or a file is wrong. The message is one sentence: what was wrong, what was
    expected, how to fix it. Command lines print it and exit with status 2."""


# What command lines answer with one line: an environment variable may also force a backend that cannot run.
USER_ERRORS = (UserError, BackendError)
