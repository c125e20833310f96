"""Errors that are the user's to mend."""

from causal_conv1d_vim.runtime.backend import BackendError


class UserError(Exception):
    """Something in the command, the data or a file is wrong; the message is one sentence: what, what was expected, how
    to fix it. Command lines print it and exit with status 2."""


# What command lines answer with one line: an environment variable may also force a backend that cannot run.
USER_ERRORS = (UserError, BackendError)
