"""Diffusion on tensors: noise schedules, token timesteps, step lists and solvers. Pure functions, no ``nn.Module``."""

from pydiffseq.diffusion.schedules import SCHEDULES, NoiseSchedule, make_schedule, model_time
from pydiffseq.diffusion.solvers import SOLVERS, ancestral, ddim, ddim_coefficients, get_solver, skip, skip_coefficients
from pydiffseq.diffusion.steps import StepList, ancestral_steps, skip_indices, uniform_steps, xy_steps
from pydiffseq.diffusion.token_times import (
    TIMESTEP_SAMPLERS,
    LossAwareSampler,
    TimestepSampler,
    UniformSampler,
    XYUniformSampler,
    make_timestep_sampler,
    xy_token_timesteps,
)

__all__ = [
    "SCHEDULES",
    "SOLVERS",
    "TIMESTEP_SAMPLERS",
    "LossAwareSampler",
    "NoiseSchedule",
    "StepList",
    "TimestepSampler",
    "UniformSampler",
    "XYUniformSampler",
    "ancestral",
    "ancestral_steps",
    "ddim",
    "ddim_coefficients",
    "get_solver",
    "make_schedule",
    "make_timestep_sampler",
    "model_time",
    "skip",
    "skip_coefficients",
    "skip_indices",
    "uniform_steps",
    "xy_steps",
    "xy_token_timesteps",
]
