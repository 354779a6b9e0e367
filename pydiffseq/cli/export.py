"""Make a small checkpoint for translation: the averaged weights in float16, without optimiser and training state.

fairseq-generate and fairseq-interactive read the result like any checkpoint; training cannot go on from it.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from pydiffseq.errors import InputError

DTYPES = ("float16", "bfloat16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint of fairseq-train with an arch of pydiffseq")
    parser.add_argument("output", type=Path, help="file to write")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="precision of the weights")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")


def averaged_weights(state: dict[str, Any]) -> dict[str, Any]:
    """The moving average as ``net.*`` where the checkpoint has one, else the trained weights."""
    prefix = "ema.module."
    averaged = {f"net.{key[len(prefix):]}": value for key, value in state.items() if key.startswith(prefix)}
    return averaged or {key: value for key, value in state.items() if key.startswith("net.")}


def run(args: argparse.Namespace) -> int:
    import torch

    from pydiffseq.fairseq_plugin import compat

    if args.output.exists() and not args.overwrite:
        raise InputError(f"{args.output} exists; give another name or --overwrite")
    if not args.checkpoint.is_file():
        raise InputError(f"the checkpoint {args.checkpoint} does not exist")
    compat.apply()
    try:
        checkpoint = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{args.checkpoint} is not a readable checkpoint ({type(error).__name__}: "
                         f"{str(error).splitlines()[0]})") from error
    weights = averaged_weights(checkpoint.get("model", {}))
    if not weights:
        raise InputError(
            f"{args.checkpoint} holds no pydiffseq model; give a checkpoint trained with --arch ar_diffusion")
    dtype = getattr(torch, args.dtype)
    cfg = checkpoint["cfg"]
    cfg["model"]["ema_rate"] = 0.0
    slim = {
        "args": None, "cfg": cfg, "last_optimizer_state": None, "task_state": {}, "extra_state": {},
        "criterion": None, "optimizer_history": checkpoint.get("optimizer_history", []),
        "model": {key: value.to(dtype) if value.is_floating_point() else value for key, value in weights.items()},
    }
    temporary = args.output.with_name(args.output.name + ".tmp")
    try:
        torch.save(slim, temporary)
        os.replace(temporary, args.output)
    finally:
        temporary.unlink(missing_ok=True)
    size = args.output.stat().st_size
    print(f"{args.output}: {sum(v.numel() for v in weights.values()):,} parameters, {args.dtype}, {size / 1e6:.1f} MB")
    return 0
