"""Learning of a timestep sampler while a model trains: from the losses of all processes, kept in the checkpoint."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pydiffseq.diffusion import TimestepSampler


class SamplerState(nn.Module):
    """Puts the state of ``sampler`` in the model's state dict and updates it, alike in every process.

    The state is no buffer: a cast of the model to bfloat16 must not touch the float64 losses.
    """

    def __init__(self, sampler: TimestepSampler) -> None:
        super().__init__()
        self.sampler = sampler

    @torch.no_grad()
    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """Record the losses float ``[B]`` of the timesteps int64 ``[B]`` of every process; B may differ between them.

        A loss that is not finite is left out: it would make every later draw NaN.
        """
        drawn, values = gather_rows(torch.stack((timesteps.double(), losses.double()), 1)).unbind(1)
        finite = values.isfinite()
        self.sampler.update(drawn[finite].long(), values[finite])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in self.sampler.state_dict().items():
            destination[prefix + name] = value

    def _load_from_state_dict(
            self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
            missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str]) -> None:
        names = list(self.sampler.state_dict())
        missing = [prefix + name for name in names if prefix + name not in state_dict]
        if missing:
            missing_keys.extend(missing)
            return
        try:
            self.sampler.load_state_dict({name: state_dict[prefix + name] for name in names})
        except ValueError as error:
            error_msgs.append(str(error))


def gather_rows(rows: Tensor) -> Tensor:
    """The rows ``[n, k]`` of all processes, in the order of their ranks; ``rows`` itself without torch.distributed."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    size = torch.tensor([len(rows)], device=rows.device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    counts = [int(s) for s in sizes]
    padded = nn.functional.pad(rows, (0, 0, 0, max(counts) - len(rows)))   # all_gather takes one shape
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
