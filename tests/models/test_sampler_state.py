"""The loss-aware sampler inside a model: it learns while training, alike in every process, and is in the checkpoint."""

import dataclasses
import io
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from pydiffseq.diffusion import LossAwareSampler
from pydiffseq.models import ARDiffusion, ARDiffusionConfig
from pydiffseq.models.sampler_state import SamplerState, gather_rows

CONFIG = ARDiffusionConfig(
    vocabulary=11, source_vocabulary=11, latent_dim=4, time_dim=4, hidden_dim=8, ffn_dim=8, heads=2, encoder_layers=1,
    decoder_layers=1, source_positions=6, target_length=4, dropout=0.0, attention_dropout=0.0, diffusion_steps=6,
    timestep_sampler="lossaware", length_policy="pad")
SOURCE = torch.tensor([[5, 6, 2], [4, 2, 1], [9, 8, 2], [7, 2, 1]])
TARGET = torch.tensor([[4, 5, 2], [9, 10, 2], [2, 1, 1], [7, 2, 1]])


def small(**changes) -> ARDiffusion:
    torch.manual_seed(1)
    return ARDiffusion(dataclasses.replace(CONFIG, **changes)).train()


def learn(model: ARDiffusion, updates: int, rows: slice = slice(None)) -> None:
    ids = torch.arange(len(SOURCE))
    for update in range(updates):
        model(SOURCE[rows], TARGET[rows], ids=ids[rows], seed=update)


@pytest.mark.parametrize("policy", ["pad", "predict"])
def test_training_records_the_unweighted_loss_of_every_sentence_with_tokens(policy):
    model = small(length_policy=policy)
    losses = model(SOURCE, TARGET, seed=7)
    tokens, state = losses.mask.sum(1), model.sampler.state_dict()
    told = tokens > 0
    assert state["seen"].sum() == told.sum() == (4 if policy == "pad" else 3)
    per_sentence = (sum(losses.per_token.values()).sum(1) / tokens)[told].detach().double()
    torch.testing.assert_close(state["losses"].sum(), per_sentence.sum())
    assert torch.equal(state["seen"], torch.bincount(losses.timesteps[told, 0], minlength=6))


def test_evaluation_does_not_teach():
    model = small().eval()
    model(SOURCE, TARGET, seed=7)
    assert not model.sampler.state_dict()["seen"].any()


def test_a_warm_sampler_draws_by_loss_and_its_weights_keep_the_expected_loss():
    model = small()
    learn(model, 60)
    p = model.sampler.probabilities()
    assert (model.sampler.seen >= 10).all() and p.max() > 1.01 * p.min()
    losses = model(SOURCE, TARGET, seed=3)
    weights = 1 / (6 * p[losses.timesteps[:, 0]])
    fixed = small(timestep_sampler="uniform")
    fixed.sampler.sample = lambda *args, **kwargs: (losses.timesteps[:, 0], torch.ones(4))
    plain = fixed(SOURCE, TARGET, seed=3)
    for name, value in plain.per_token.items():
        torch.testing.assert_close(losses.per_token[name], value * weights[:, None].float(), rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_not_finite_is_left_out():
    state = SamplerState(LossAwareSampler(5))
    state.update(torch.tensor([1, 2, 3]), torch.tensor([1.0, float("nan"), float("inf")]))
    assert state.sampler.state_dict()["seen"].tolist() == [0, 1, 0, 0, 0]


def test_the_checkpoint_holds_the_state_and_a_cast_does_not_touch_it():
    model = small()
    learn(model, 20)
    before = {name: value.clone() for name, value in model.sampler.state_dict().items()}
    model.bfloat16()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert all(isinstance(value, Tensor) for value in saved.values())
    restored = small()
    restored.load_state_dict(saved)
    for name, value in before.items():
        assert torch.equal(restored.sampler.state_dict()[name], value)
        assert value.dtype == restored.sampler.state_dict()[name].dtype
    learn(restored, 1)   # a state of its own
    assert torch.equal(model.sampler.state_dict()["seen"], before["seen"])


def test_loading_says_what_does_not_fit():
    model = small()
    state = model.state_dict()
    del state["sampler_state.seen"]
    with pytest.raises(RuntimeError, match="sampler_state.seen"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"sampler state must have shape \[9, 10\]"):
        small(diffusion_steps=9).load_state_dict(model.state_dict())


def test_samplers_that_do_not_learn_add_nothing_to_the_checkpoint():
    for name in ("uniform", "xy_uniform"):
        assert not [key for key in small(timestep_sampler=name).state_dict() if "sampler" in key]


def test_gather_without_processes_is_the_identity():
    rows = torch.rand(3, 2)
    assert gather_rows(rows) is rows


def _train_a_share(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    model = small()
    learn(model, 12, slice(0, 3) if rank == 0 else slice(3, 4))   # shares of different size
    torch.save(model.sampler.state_dict(), f"{path}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32" or not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_learn_what_one_would(tmp_path):
    mp.spawn(_train_a_share, args=(str(tmp_path),), nprocs=2)
    torch.manual_seed(1)
    model = small()
    learn(model, 12)
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(state["seen"], model.sampler.seen)
        torch.testing.assert_close(state["losses"], model.sampler.losses, rtol=1e-5, atol=1e-6)
