"""The denoising loop from recordings: on CUDA one graph for each shape of its inputs, replayed without Python and launches.

The step list is known before the loop, so a graph holds all of it: timesteps, coefficients, masks and encodings are
inputs, copied into the graph's own tensors; the Philox step is a constant of each launch.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from pydiffseq.ops.nearest import keeping_packs

MOST_RECORDINGS = 64
MOST_STEPS = 100      # of a list that is recorded: a graph has about 15 nodes for each layer and step
WIDTH_UNIT = 8        # target and
SOURCE_UNIT = 16      # source widths are rounded up to multiples

Replay = Callable[[], None]
Recorder = Callable[[Callable[[], Any]], tuple[Replay, Any]]   # function -> its replay, and where the results then are


class Recording(NamedTuple):
    """Tensors that a replay reads, the replay, and what it writes."""

    inputs: list[Tensor]
    replay: Replay
    outputs: Any


class Replayer:
    """``function`` of a tree of tensors, recorded for shapes that come again.

    A shape's first call runs as it is, which serves as the warm-up; the second one is recorded. If that fails, one
    warning says so and all calls run as they are from then on.

    Args:
        function: makes a tree of tensors from a tree of tensors, and waits for no device.
        record: how a call is recorded, :class:`CudaRecorder` or a stand-in.

    Attributes:
        recorded, replayed: how often so far.
    """

    def __init__(self, function: Callable[[Any], Any], record: Recorder) -> None:
        self.function, self.record = function, record
        self.recorded = self.replayed = 0
        self._recordings: OrderedDict[tuple, Recording | None] = OrderedDict()   # None: seen once
        self._failed = False

    def __call__(self, inputs: Any) -> Any:
        """The results; tensors of their own, which no later call overwrites."""
        if self._failed:
            return self.function(inputs)
        leaves, tree = tree_flatten(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = str(tree), *(_signature(leaf) for leaf in leaves)
        if key not in self._recordings:
            self._keep(key, None)
            return self.function(inputs)
        recording = self._recordings[key] or self._try_to_record(leaves, tree)
        if recording is None:
            return self.function(inputs)
        self._keep(key, recording)
        for own, tensor in zip(recording.inputs, tensors, strict=True):
            own.copy_(tensor)
        recording.replay()
        self.replayed += 1
        return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, recording.outputs)

    def _keep(self, key: tuple, recording: Recording | None) -> None:
        self._recordings[key] = recording
        self._recordings.move_to_end(key)
        if len(self._recordings) > MOST_RECORDINGS:
            self._recordings.popitem(last=False)

    def _try_to_record(self, leaves: list[Any], tree: TreeSpec) -> Recording | None:
        own = [leaf.clone(memory_format=torch.contiguous_format) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        inputs = tree_unflatten(own, tree)
        try:
            replay, outputs = self.record(lambda: self.function(inputs))
        except Exception as error:   # whatever a driver refuses, the loop itself still runs
            self._failed = True
            self._recordings.clear()
            warnings.warn(f"the denoising loop could not be recorded ({type(error).__name__}: {error}); it runs step by "
                          "step, which is slower for small batches", stacklevel=4)
            return None
        self.recorded += 1
        return Recording([leaf for leaf in own if isinstance(leaf, Tensor)], replay, outputs)


def _signature(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


class CudaRecorder:
    """Records CUDA graphs, which share one pool of memory: they run one after another."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Any]) -> tuple[Replay, Any]:
        graph = torch.cuda.CUDAGraph()
        with keeping_packs() as packs, torch.cuda.graph(graph, pool=self.pool):
            outputs = function()

        def replay(_alive: list = packs) -> None:
            graph.replay()

        return replay, outputs


def bucket(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, ...: so many sentences a recording is for."""
    power = 1 << max(0, count - 1).bit_length()
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power


def round_up(width: int, unit: int) -> int:
    """The next multiple of ``unit``."""
    return -(-width // unit) * unit
