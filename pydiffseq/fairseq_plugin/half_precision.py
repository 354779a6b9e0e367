"""Repairs of fairseq's training with ``--fp16`` and ``--bf16``; :func:`apply` is called with the other repairs."""

from __future__ import annotations

import functools
import typing

import torch
from fairseq import optim
from fairseq.optim.fp16_optimizer import _FP16OptimizerMixin
from fairseq.trainer import Trainer

MASTERS = "float32_masters"


def apply() -> None:
    """Apply both repairs; a second call does nothing."""
    train_on_cpu()
    keep_masters()


def train_on_cpu() -> None:
    """Let ``--fp16`` train on a CPU, where fairseq asks for a CUDA device to flatten gradients and after an overflow."""
    if hasattr(Trainer.train_step, "__repaired__"):
        return
    build, step = optim.FP16Optimizer.build_optimizer.__func__, Trainer.train_step

    @functools.wraps(build)
    def build_optimizer(cls: type, cfg: typing.Any, params: typing.Any, **kwargs: typing.Any) -> typing.Any:
        params = list(params)
        if params[0].device.type == "cpu":
            cfg.common.fp16_no_flatten_grads = True
        return build(cls, cfg, params, **kwargs)

    @functools.wraps(step)
    def train_step(self: Trainer, samples: typing.Any, raise_oom: bool = False) -> typing.Any:
        try:
            return step(self, samples, raise_oom)
        except (AssertionError, RuntimeError) as error:   # of tensor.cuda(), while it handled the overflow
            if self.cuda or not isinstance(error.__context__, OverflowError):
                raise
            self.zero_grad()
            return None

    optim.FP16Optimizer.build_optimizer = classmethod(build_optimizer)
    train_step.__repaired__ = True  # type: ignore[attr-defined]
    Trainer.train_step = train_step


def keep_masters() -> None:
    """Save the float32 weights behind the 16-bit ones, without which no training can resume exactly."""
    if hasattr(_FP16OptimizerMixin.state_dict, "__wrapped__"):
        return
    save, load = _FP16OptimizerMixin.state_dict, _FP16OptimizerMixin.load_state_dict

    @functools.wraps(save)
    def state_dict(self: typing.Any) -> dict:
        return {**save(self), MASTERS: torch.cat([p.detach().flatten() for p in _masters(self)])}

    @functools.wraps(load)
    def load_state_dict(self: typing.Any, state: dict, optimizer_overrides: dict | None = None) -> None:
        state = dict(state)
        saved = state.pop(MASTERS, None)
        load(self, state, optimizer_overrides)
        masters = _masters(self)
        sizes = [p.numel() for p in masters]
        if saved is not None and saved.numel() == sum(sizes):
            for p, values in zip(masters, saved.split(sizes), strict=True):
                p.data.copy_(values.view_as(p))

    _FP16OptimizerMixin.state_dict, _FP16OptimizerMixin.load_state_dict = state_dict, load_state_dict


def _masters(optimizer: typing.Any) -> list[torch.Tensor]:
    """One flat tensor a device, or one tensor a parameter with ``--fp16-no-flatten-grads``."""
    params = optimizer.fp32_params
    return list(params.values()) if isinstance(params, dict) else [params] if torch.is_tensor(params) else list(params)
