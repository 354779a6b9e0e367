"""Repairs of fairseq that a user of the stock commands would otherwise trip over.

:func:`apply` is called when the plug-in is imported; every repair changes nothing for those who do not need it.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import functools
import os
import sys
import typing
from collections.abc import Callable, Sequence

import numpy as np
import torch
from fairseq import options, scoring, utils
from fairseq.data import data_utils
from fairseq.logging.meters import StopwatchMeter
from fairseq.models import distributed_fairseq_model

from pydiffseq.errors import InputError
from pydiffseq.fairseq_plugin import checkpoints, half_precision

PACKAGE = os.path.realpath(os.path.join(os.path.dirname(__file__), os.pardir))
PLUGIN_NAMES = ("pydiffseq", "pydiffseq.fairseq_plugin", os.path.join("pydiffseq", "fairseq_plugin"))


def apply() -> None:
    """Apply all repairs; a second call does nothing."""
    tune_cpu()
    show_input_errors_in_one_line()
    allow_checkpoint_types()
    checkpoints.apply()
    half_precision.apply()
    if not hasattr(distributed_fairseq_model.DistributedDataParallel, "__wrapped__"):
        distributed_fairseq_model.DistributedDataParallel = without_device_on_cpu(
            distributed_fairseq_model.DistributedDataParallel)
    if not hasattr(data_utils.batch_by_size, "__wrapped__"):
        data_utils.batch_by_size = keeping_last_batch(data_utils.batch_by_size)
    if not hasattr(options.parse_args_and_arch, "__wrapped__"):
        options.parse_args_and_arch = generating_a_shard(without_implied_tpu(options.parse_args_and_arch))
    if not hasattr(scoring.build_scorer, "__wrapped__"):
        scoring.build_scorer = scoring_nothing(scoring.build_scorer)
        StopwatchMeter.__init__ = started_at_a_nanosecond(StopwatchMeter.__init__)
    if not hasattr(utils.import_user_module, "__wrapped__"):
        utils.import_user_module = accept_own_user_dir(utils.import_user_module)


def tune_cpu() -> None:
    """Two settings without which ragged batches of small matrices spend their time outside the arithmetic.

    oneDNN compiles a kernel for each matrix shape and by default keeps 1,024 of them, fewer than the shapes of an epoch;
    glibc returns every freed buffer above 128 kB to the system and faults it in again, page by page.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "16384")   # the cache of torch's oneDNN layer
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):   # not glibc
        return
    trim_threshold, mmap_threshold = -1, -3
    mallopt(mmap_threshold, 32 << 20)
    mallopt(trim_threshold, 1 << 30)


def show_input_errors_in_one_line() -> None:
    """Let the fairseq commands end with the message of an :class:`InputError` and exit code 1, without a traceback."""
    if hasattr(sys.excepthook, "__wrapped__"):
        return
    previous = sys.excepthook

    @functools.wraps(previous)
    def excepthook(kind, error, traceback) -> None:
        input_error = _find_input_error(error)
        if input_error is not None:
            print(f"pydiffseq: error: {input_error}", file=sys.stderr)
        else:
            previous(kind, error, traceback)

    sys.excepthook = excepthook


def _find_input_error(error: BaseException | None) -> InputError | None:
    """``error`` itself or the one it was raised from: fairseq raises another one on top while it loads a checkpoint."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def checkpoint_types() -> list:
    """What fairseq's checkpoints and its broadcast of them hold beside tensors and plain containers."""
    from omegaconf import DictConfig, ListConfig
    from omegaconf.base import ContainerMetadata, Metadata
    from omegaconf.nodes import AnyNode

    reconstruct, scalar = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    numbers = [np.int32, np.int64, np.float32, np.float64, np.bool_]
    return [
        argparse.Namespace, collections.defaultdict, collections.OrderedDict, dict, list, set, tuple, int, float, str,
        typing.Any, DictConfig, ListConfig, ContainerMetadata, Metadata, AnyNode,
        # The meters of --eval-bleu are numpy scalars and arrays.
        np.ndarray, np.dtype, reconstruct, scalar,
        # numpy 1 wrote these names, numpy 2 reads them.
        (reconstruct, "numpy.core.multiarray._reconstruct"), (scalar, "numpy.core.multiarray.scalar"),
        *numbers, *(type(np.dtype(number)) for number in numbers),
    ]


def allow_checkpoint_types() -> None:
    """Let ``torch.load`` read fairseq's checkpoints with ``weights_only=True``, its default since torch 2.6."""
    torch.serialization.add_safe_globals(checkpoint_types())


def without_implied_tpu(parse: Callable) -> Callable:
    """Wrap ``options.parse_args_and_arch``, where ``--bf16`` switches ``--tpu`` on, so that only ``--tpu`` does."""

    @functools.wraps(parse)
    def parse_args_and_arch(parser: argparse.ArgumentParser, input_args: Sequence[str] | None = None,
                            *args: typing.Any, **kwargs: typing.Any) -> typing.Any:
        result = parse(parser, input_args, *args, **kwargs)
        namespace = result[0] if isinstance(result, tuple) else result
        words = sys.argv[1:] if input_args is None else input_args
        if getattr(namespace, "tpu", False) and "--tpu" not in words:
            namespace.tpu = False
        return result

    return parse_args_and_arch


def generating_a_shard(parse: Callable) -> Callable:
    """Wrap ``options.parse_args_and_arch`` so that fairseq-generate obeys ``--num-shards`` and ``--shard-id``.

    It reads the options of distributed training instead, which also leave out sentences where there are several GPUs. In
    a process of torchrun, without ``--num-shards``, the shard is the rank's.
    """

    @functools.wraps(parse)
    def parse_args_and_arch(*args: typing.Any, **kwargs: typing.Any) -> typing.Any:
        result = parse(*args, **kwargs)
        namespace = result[0] if isinstance(result, tuple) else result
        if not hasattr(namespace, "retain_iter_history") or hasattr(namespace, "buffer_size"):
            return result   # training, validation, fairseq-interactive
        shards, shard = namespace.num_shards, namespace.shard_id
        if not 0 <= shard < shards:
            raise InputError(f"--shard-id must be in 0..{shards - 1} with --num-shards {shards}, got {shard}")
        if shards == 1:
            shards, shard = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        namespace.distributed_world_size, namespace.distributed_rank = shards, shard
        return result

    return parse_args_and_arch


def scoring_nothing(build_scorer: Callable) -> Callable:
    """Wrap ``scoring.build_scorer`` so that a shard of fairseq-generate without a batch, which has no score, says so."""

    @functools.wraps(build_scorer)
    def build(*args: typing.Any, **kwargs: typing.Any) -> typing.Any:
        scorer = build_scorer(*args, **kwargs)
        result_string = scorer.result_string
        added: list[bool] = []
        for name in ("add", "add_string"):
            if hasattr(scorer, name):
                setattr(scorer, name, _noting(getattr(scorer, name), added))
        scorer.result_string = lambda *words: result_string(*words) if added else "no sentences"
        return scorer

    return build


def _noting(function: Callable, calls: list[bool]) -> Callable:
    @functools.wraps(function)
    def noted(*args: typing.Any, **kwargs: typing.Any) -> typing.Any:
        calls[:] = [True]
        return function(*args, **kwargs)

    return noted


def started_at_a_nanosecond(initialise: Callable) -> Callable:
    """Wrap ``StopwatchMeter.__init__``: fairseq-generate divides by the time it took, which is 0 without a batch."""

    @functools.wraps(initialise)
    def init(self: StopwatchMeter, *args: typing.Any, **kwargs: typing.Any) -> None:
        initialise(self, *args, **kwargs)
        self.sum = 1e-9

    return init


def keeping_last_batch(batch_by_size: Callable) -> Callable:
    """Wrap ``data_utils.batch_by_size``, which drops the last batch unless its size is a multiple of 8 (the default).

    These are the longest sentences of a data set: fairseq would neither train on them nor translate and score them.
    """

    @functools.wraps(batch_by_size)
    def batch_all(indices: typing.Any, *args: typing.Any, **kwargs: typing.Any) -> typing.Any:
        if not isinstance(indices, np.ndarray):
            indices = np.fromiter(indices, dtype=np.int64, count=-1)
        batches = batch_by_size(indices, *args, **kwargs)
        kept = sum(map(len, batches))
        if kwargs.get("fixed_shapes") is not None or kept == len(indices):
            return batches
        return [*batches, indices[kept:]]

    return batch_all


def without_device_on_cpu(parallel: type) -> Callable:
    """Wrap ``DistributedDataParallel``, which fairseq always gives a CUDA device, so that it trains on CPUs, too."""

    @functools.wraps(parallel, updated=())
    def distributed_data_parallel(module: torch.nn.Module, *args: typing.Any, **kwargs: typing.Any) -> torch.nn.Module:
        if all(parameter.device.type == "cpu" for parameter in module.parameters()):
            kwargs |= {"device_ids": None, "output_device": None}
        return parallel(module, *args, **kwargs)

    return distributed_data_parallel


def accept_own_user_dir(import_user_module: Callable) -> Callable:
    """Wrap ``utils.import_user_module`` so that a ``--user-dir`` naming this package, already imported, is satisfied.

    fairseq itself compares paths as they are written and takes another spelling of the same folder for a clash.
    """

    @functools.wraps(import_user_module)
    def import_user_module_once(args: typing.Any) -> None:
        folder = getattr(args, "user_dir", None)
        if folder is None or not _is_own(str(folder)):
            import_user_module(args)

    return import_user_module_once


def _is_own(folder: str) -> bool:
    if os.path.exists(folder):
        return os.path.realpath(folder) in (PACKAGE, os.path.join(PACKAGE, "fairseq_plugin"))
    return os.path.normpath(folder) in PLUGIN_NAMES
