"""Repairs of fairseq's checkpoint files: a failed write leaves the previous file whole, an unreadable one is named."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

from fairseq import checkpoint_utils
from fairseq.file_io import PathManager

from pydiffseq.errors import InputError

WRITE_ERRORS = (OSError, RuntimeError)   # torch's zip writer reports a full disk as a RuntimeError


def apply() -> None:
    """Apply the repairs of this module; a second call does nothing."""
    if not hasattr(checkpoint_utils.torch_persistent_save, "__wrapped__"):
        checkpoint_utils.torch_persistent_save = without_remains(checkpoint_utils.torch_persistent_save)
        checkpoint_utils.load_checkpoint_to_cpu = naming_unreadable_file(checkpoint_utils.load_checkpoint_to_cpu)
        PathManager.copy = staticmethod(atomic(PathManager.copy))


def without_remains(save: Callable) -> Callable:
    """Wrap ``torch_persistent_save``, which leaves half a ``.tmp`` file on a full disk, so that it removes it."""

    @functools.wraps(save)
    def torch_persistent_save(obj: Any, filename: str, *args: Any, **kwargs: Any) -> None:
        try:
            save(obj, filename, *args, **kwargs)
        except WRITE_ERRORS as error:
            _remove(f"{filename}.tmp")
            raise InputError(f"the checkpoint {filename} could not be written ({_first_line(error)}); "
                             "earlier checkpoints are as they were") from error

    return torch_persistent_save


def atomic(copy: Callable) -> Callable:
    """Wrap ``PathManager.copy``, which writes into the old ``checkpoint_last.pt``, so that it replaces it when complete.

    Only plain files with ``overwrite`` are concerned; anything else (remote storage) stays fairseq's.
    """

    @functools.wraps(copy)
    def copy_then_replace(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        if not overwrite or not os.path.isfile(src_path):
            return copy(src_path, dst_path, overwrite)
        temporary = f"{dst_path}.tmp"
        try:
            shutil.copyfile(src_path, temporary)
            os.replace(temporary, dst_path)
        except OSError as error:
            _remove(temporary)
            raise InputError(f"the checkpoint {src_path} could not be copied to {dst_path} ({_first_line(error)}); "
                             "earlier checkpoints are as they were") from error
        return True

    return copy_then_replace


def naming_unreadable_file(load: Callable) -> Callable:
    """Wrap ``load_checkpoint_to_cpu`` so that a truncated or foreign file gives one sentence with its name."""

    @functools.wraps(load)
    def load_checkpoint_to_cpu(path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return load(path, *args, **kwargs)
        except (InputError, FileNotFoundError):
            raise
        except Exception as error:   # of the zip reader, the unpickler, or fairseq's upgrade of old checkpoints
            raise InputError(f"the checkpoint {path} cannot be read: it is truncated, or no checkpoint of fairseq "
                             f"({type(error).__name__}: {_first_line(error)})") from error

    return load_checkpoint_to_cpu


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.remove(path)
