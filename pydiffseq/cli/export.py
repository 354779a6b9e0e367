"""Make a small checkpoint for translation: the averaged weights in float16, without optimiser and training state.

fairseq-generate and fairseq-interactive read the result like any checkpoint. Training cannot go on from it, but a new
one can start from its weights (--finetune-from-model).
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


def read(path: Path) -> dict[str, Any]:
    """The checkpoint ``path``, loaded with ``weights_only``."""
    import torch

    if not path.is_file():
        raise InputError(f"the checkpoint {path} does not exist")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path} is not a readable checkpoint ({type(error).__name__}: "
                         f"{str(error).splitlines()[0]})") from error
    return checkpoint if isinstance(checkpoint, dict) else {}


def slim(checkpoint: dict[str, Any], weights: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """What fairseq needs to build the model, and the weights as ``dtype``."""
    cfg = checkpoint["cfg"]
    cfg["model"]["ema_rate"] = 0.0
    return {
        "args": None, "cfg": cfg, "last_optimizer_state": None, "criterion": None,
        "task_state": checkpoint.get("task_state", {}), "extra_state": {},
        "optimizer_history": checkpoint.get("optimizer_history", []),
        "model": {key: value.to(dtype) if value.is_floating_point() else value for key, value in weights.items()},
    }


def write(state: dict[str, Any], path: Path) -> None:
    """Save ``state``; the file appears only when it is complete."""
    import torch

    temporary = path.with_name(path.name + ".tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:   # torch's zip writer reports a full disk as a RuntimeError
        raise InputError(f"{path} could not be written ({str(error).splitlines()[0]})") from error
    finally:
        temporary.unlink(missing_ok=True)


def run(args: argparse.Namespace) -> int:
    import torch

    from pydiffseq.fairseq_plugin import compat

    if args.output.exists() and not args.overwrite:
        raise InputError(f"{args.output} exists; give another name or --overwrite")
    if not args.output.parent.is_dir():
        raise InputError(f"the folder {args.output.parent} of the output does not exist")
    compat.allow_checkpoint_types()
    checkpoint = read(args.checkpoint)
    weights = averaged_weights(checkpoint.get("model") or {})
    if not weights or "model" not in (checkpoint.get("cfg") or {}):
        raise InputError(f"{args.checkpoint} holds no pydiffseq model; "
                         "give a checkpoint trained with --arch ar_diffusion or diffuseq")
    write(slim(checkpoint, weights, getattr(torch, args.dtype)), args.output)
    count = sum(value.numel() for value in weights.values())
    print(f"{args.output}: {count:,} parameters, {args.dtype}, {args.output.stat().st_size / 1e6:.1f} MB")
    return 0
