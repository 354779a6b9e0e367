"""The exception for what a user got wrong."""


class InputError(ValueError):
    """A file, an option or an environment that a command cannot work with.

    The message is one sentence that names the thing, what was given and what is accepted. The ``pydiffseq`` commands
    print it without a traceback and exit with status 2.
    """
