"""Errors that are the user's to mend."""


class UserError(Exception):
    """Something in the command, the data or a file is wrong; the message is one sentence: what, what was expected, how
    to fix it. Command lines print it and exit with status 2."""
