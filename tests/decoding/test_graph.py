"""Loops from recordings: a recorder that runs the recorded call on its own tensors stands in for CUDA graphs."""

import dataclasses
import sys

import pytest
import torch
from test_decode import IDS, PREDICT, SOURCE, tiny, words
from test_updates import absorbing_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pydiffseq import ops
from pydiffseq.decoding import DecodeOptions, Decoder, decode
from pydiffseq.decoding.graph import Replayer, bucket
from pydiffseq.decoding.loop import Loop
from pydiffseq.models import diffuseq
from pydiffseq.nn.packing import Packing
from pydiffseq.ops import _extension


def record_call(function):
    """The results lie where the recording put them, as those of a CUDA graph."""
    outputs = function()

    def replay():
        for own, new in zip(tree_leaves(outputs), tree_leaves(function()), strict=True):
            own.copy_(new)

    return replay, outputs


@pytest.mark.parametrize("changes", [{}, PREDICT, {**PREDICT, "self_conditioning": 0.5}, {"timestep_sampler": "uniform"}],
                         ids=str)
@pytest.mark.parametrize("options", [
    DecodeOptions(steps=4, noise_beam=2), DecodeOptions(steps=3, final="state", step_end="zero", history=True),
    DecodeOptions(steps=3, solver="dpmpp2m", rounding="off", noise_limit=1.0)], ids=["recipe", "published", "second order"])
def test_a_replayed_loop_gives_the_same_bits(changes, options, monkeypatch):
    """Batches of other sizes and orders meet in one recording; what one call gave is not overwritten by the next."""
    model = tiny(**changes)
    decoder = Decoder(model, options, record_call)
    monkeypatch.setattr(Packing, "of", lambda mask: None)   # as on a device
    orders = [torch.tensor(order) for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 2, 0], [2, 0, 1], [1, 0, 3, 2], [2], [2])]
    found = [decoder(SOURCE[order], IDS[order]) for order in orders]
    for groups, order in zip(found, orders, strict=True):
        expected = decode(model, SOURCE[order], IDS[order], options)
        assert words(groups) == words(expected)
        for group, other in zip(groups, expected, strict=True):
            for a, b in zip(group, other, strict=True):
                assert torch.equal(a.token_scores, b.token_scores) and a.steps == b.steps
                assert [step.tolist() for step in a.history] == [step.tolist() for step in b.history]
    assert decoder.replayer.replayed >= 4 and decoder.replayer.recorded >= 2
    assert decoder.steps_planned == decoder.steps_run == sum(map(len, orders)) * options.noise_beam * options.steps


@pytest.mark.parametrize("options", [DecodeOptions(patience=1), DecodeOptions(graphs=False), DecodeOptions(steps=101)])
def test_what_is_not_recorded(options):
    assert Decoder(tiny(), options, record_call).replayer is None
    assert Decoder(tiny(), DecodeOptions()).replayer is None   # on a CPU nothing is


def test_a_recording_that_fails_leaves_the_loop_as_it_is():
    def refuse(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    model, options = tiny(), DecodeOptions(steps=2)
    decoder = Decoder(model, options, refuse)
    decoder(SOURCE, IDS)
    with pytest.warns(UserWarning, match="could not be recorded .RuntimeError: operation not permitted.*step by step"):
        found = decoder(SOURCE, IDS)
    assert words(found) == words(decoder(SOURCE, IDS)) == words(decode(model, SOURCE, IDS, options))
    assert decoder.replayer.recorded == 0


def test_old_shapes_make_room(monkeypatch):
    monkeypatch.setattr("pydiffseq.decoding.graph.MOST_RECORDINGS", 2)
    replayer = Replayer(lambda x: x + 1, record_call)
    for size in (1, 1, 2, 2, 3, 3, 1, 1):
        assert torch.equal(replayer(torch.arange(size)), torch.arange(size) + 1)
    assert replayer.recorded == replayer.replayed == 4 and len(replayer._recordings) == 2


def test_sentences_are_counted_up_to_few_sizes():
    assert [bucket(count) for count in (1, 2, 3, 4, 5, 7, 9, 12, 13, 64, 65)] == [1, 2, 3, 4, 6, 8, 12, 12, 16, 64, 96]


class NoHostReads(TorchDispatchMode):
    """Refuses what would wait for a device, or copy from the host, in a loop that is recorded."""

    FORBIDDEN = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique", "lift_fresh", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        assert name.split(".")[0] not in self.FORBIDDEN, f"{name} in the loop"
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("options", [
    DecodeOptions(steps=3, history=True), DecodeOptions(steps=3, solver="dpmpp2m", noise_limit=1.0, rounding="from"),
    DecodeOptions(steps=3, solver="cedi"), DecodeOptions(steps=3, solver="ancestral", absorb_rate=0.5),
    DecodeOptions(steps=3, solver="ancestral", absorb_rate=0.5, drift="start")])
@pytest.mark.parametrize("kind", ["ar", "ar predict", "diffuseq"])
def test_the_loop_reads_nothing_from_the_device(options, kind, monkeypatch):
    if options.absorb_rate and kind != "diffuseq":
        options = dataclasses.replace(options, absorb_rate=0.0, drift="follow")
    model = {"ar": tiny, "ar predict": lambda: tiny(**PREDICT), "diffuseq": absorbing_model}[kind]()
    original = Loop.run

    def watched(self):
        # The seed is a number of the host; the ops read it there.
        seed = torch.tensor([options.seed])
        monkeypatch.setattr("pydiffseq.ops.draw_seed", lambda _: seed)
        monkeypatch.setattr("pydiffseq.ops.noise.draw_seed", lambda seed: seed)
        with NoHostReads():
            return original(self)

    monkeypatch.setattr(Loop, "run", watched)
    assert len(decode(model, SOURCE, IDS, options)) == 4


@pytest.mark.parametrize("changes", [{}, {"length_policy": "predict", "soft_absorb": False}], ids=str)
def test_diffuseq_with_bounds_in_place_of_lengths(changes, monkeypatch):
    """On a device the longest sequence is not read but bounded; the columns too many are masked."""
    model, options = absorbing_model(**changes), DecodeOptions(steps=3, noise_beam=2)
    expected = decode(model, SOURCE, IDS, options)
    monkeypatch.setattr(diffuseq, "readable", lambda x: False)
    assert words(decode(model, SOURCE, IDS, options)) == words(expected)


@pytest.mark.skipif(_extension.C is None, reason="packs are of the kernels")
def test_packs_that_exist_are_found_until_the_table_changes():
    """What a CUDA graph reads in place of packing anew; the CPU's packs lie in the same cache."""
    table, bias = torch.randn(20, 8), torch.randn(20)
    _existing_pack = sys.modules["pydiffseq.ops.nearest"]._existing_pack   # the package has the op under this name
    assert _existing_pack(table, bias, True) is None
    ops.nearest(torch.randn(3, 8), table, bias, metric="dot")
    assert _existing_pack(table, bias, True) is not None and _existing_pack(table, None, False) is None
    table.add_(1.0)
    assert _existing_pack(table, bias, True) is None
