"""The exception for what a user got wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """A file, an option or an environment that a command cannot work with.

    The message is one sentence that names the thing, what was given and what is accepted. The ``pydiffseq`` commands
    print it without a traceback and exit with status 2.
    """


@contextlib.contextmanager
def input_errors() -> Iterator[None]:
    """Turn a ``ValueError`` or ``TypeError`` of the library into an :class:`InputError`, which shows in one line."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error
