"""One training step of the recipe's network (forward and backward) with different threads under our kernels.

    pytest benchmarks/bench_train_step.py --benchmark-enable --benchmark-group-by=group

The kernels run on torch's own OpenMP pool; here that is compared with a pool of their own (plain threads, started per
call) and with kernels on one thread, inside a whole model, where two pools would fight for the cores.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pydiffseq.models import ARDiffusion, ARDiffusionConfig
from pydiffseq.ops._extension import C

BATCH, SOURCE, TARGET, VOCABULARY = 280, 10, 10, 6000
CONTENDERS = {"pydiffseq": "torch's pool", "own-threads": "threads of our own", "kernels-on-one-thread": "one thread"}


def recipe_network() -> ARDiffusion:
    torch.manual_seed(0)
    return ARDiffusion(ARDiffusionConfig(
        vocabulary=VOCABULARY, source_vocabulary=VOCABULARY, hidden_dim=256, ffn_dim=1024, encoder_layers=3,
        decoder_layers=3, target_length=128, dropout=0.1, attention_dropout=0.0, length_policy="predict",
        length_relative=True, self_conditioning=0.5, noise_factor=4.0, embedding_norm=True, clean_x0=True, ce_on="pred",
        label_smoothing=0.1, encoder_pre_norm=True, without_pooler=True, decoder_final_norm=True, share_embeddings=True))


def make_step(dtype: torch.dtype):
    model = recipe_network().to(dtype)
    source = torch.randint(4, VOCABULARY, (BATCH, SOURCE))
    target = torch.randint(4, VOCABULARY, (BATCH, TARGET))
    target[:, -1] = 2
    ids = torch.arange(BATCH)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        losses = model(source, target, ids, seed=1)
        sum(value.sum() for value in losses.per_token.values()).backward()

    return step


def time_in_this_process(contender: str, dtype: str, rounds: int = 15) -> float:
    """Shortest step in seconds. ``contender`` decides before the first kernel call where the kernels' threads come from."""
    import time

    from pydiffseq.ops import _extension

    if contender != "pydiffseq":
        _extension._share_torch_threads = lambda: None   # never hand torch's libgomp to the kernels
    if contender == "kernels-on-one-thread":
        one = _extension.C.set_num_threads
        _extension.C = type("OneThread", (), {name: getattr(C, name) for name in dir(C) if not name.startswith("__")})
        _extension.C.set_num_threads = staticmethod(lambda threads: one(1))
    step = make_step(getattr(torch, dtype))
    for _ in range(3):
        step()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return min(times)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_train_step(benchmark, dtype: str, contender: str) -> None:
    """Each contender runs in a process of its own; what is recorded is its shortest step."""
    benchmark.group = f"train_step B{BATCH} S{SOURCE} N{TARGET} H256 3+3 layers {dtype}"
    benchmark.extra_info = {"op": "train_step", "contender": contender}
    code = f"import bench_train_step as b; print(b.time_in_this_process({contender!r}, {dtype!r}))"
    output = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True,
                            cwd=__file__.rpartition("/")[0]).stdout
    seconds = float(output.split()[-1])
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.stats.stats.data[:] = [seconds]
