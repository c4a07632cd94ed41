"""The one exception that stands for a mistake in what a person passed in."""


class InputError(ValueError):
    """Bad input, said in one line: what was expected, what came, and what to do.

    The command line prints the message and exits with code 2; any other exception is a bug of ours and
    keeps its traceback.
    """
