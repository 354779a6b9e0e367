"""Turn official weights of DiffuSeq or AR-Diffusion into a checkpoint that the fairseq commands read.

Beside the checkpoint a fairseq dictionary is written, in which the special tokens have fairseq's ids; prepare your text
with it (pydiffseq prepare --srcdict). The file of weights is read without executing anything in it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydiffseq.cli.export import read, write
from pydiffseq.cli.prepare import require_fairseq
from pydiffseq.errors import InputError, input_errors

if TYPE_CHECKING:
    from fairseq.data import Dictionary
    from torch import nn

# Under which key a training checkpoint of the official code keeps the weights.
NESTED = ("model_dict", "model_state_dict", "state_dict")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", type=Path, help="file of torch.save with the official state dict or checkpoint")
    parser.add_argument("output", type=Path, help="checkpoint to write")
    parser.add_argument("--system", choices=("diffuseq", "ar_diffusion"), required=True, help="whose weights they are")
    parser.add_argument("--vocab", type=Path, required=True, metavar="FILE",
                        help="vocabulary of the weights: BERT's vocab.txt, a vocab.json, or DiffuSeq's own")
    parser.add_argument("--dict", type=Path, metavar="FILE",
                        help="fairseq dictionary to write (default: dict.txt beside the output)")
    parser.add_argument("-O", "--option", action="append", default=[], metavar="NAME=VALUE",
                        help="option of the model that its tensors do not tell, such as target_length=50 (repeatable)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing output files")


def options(pairs: list[str], config: type) -> dict[str, Any]:
    """``NAME=VALUE`` as values of the types that the fields of ``config`` have."""
    kinds = {f.name: str(f.type) for f in dataclasses.fields(config)}
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or name not in kinds:
            raise InputError(f"--option takes NAME=VALUE with an option of the model, got {pair!r}")
        try:
            values[name] = PARSERS.get(kinds[name], str)(text)
        except ValueError as error:
            raise InputError(f"the option {name} takes a value of type {kinds[name]}, got {text!r}") from error
    return values


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


PARSERS: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "bool": _boolean}


def state_dict(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights inside a training checkpoint, or the mapping itself."""
    return next((checkpoint[key] for key in NESTED if isinstance(checkpoint.get(key), Mapping)), checkpoint)


def rearrange(weights: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """Official ids -> fairseq's: entry i of every table of the vocabulary becomes the official entry ``rows[i]``."""
    from pydiffseq.convert import VOCABULARY_TABLES

    return {name: value[rows] if name in VOCABULARY_TABLES else value for name, value in weights.items()}


def fairseq_checkpoint(system: str, network: nn.Module, weights: dict[str, Any], dictionary: Dictionary) -> dict[str, Any]:
    """What fairseq's commands read: configuration, weights and the digests of the dictionaries."""
    from fairseq import options as fairseq_options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from omegaconf import OmegaConf

    from pydiffseq.fairseq_plugin.model import FROM_DICTIONARY
    from pydiffseq.fairseq_plugin.task import DiffusionSeq2SeqTask

    words = ["data", "--task", "diffusion_seq2seq", "--arch", system, "--criterion", "diffusion_seq2seq"]
    cfg = convert_namespace_to_omegaconf(
        fairseq_options.parse_args_and_arch(fairseq_options.get_training_parser(), input_args=words))
    for name, value in dataclasses.asdict(network.config).items():   # type: ignore[call-overload]
        if name not in FROM_DICTIONARY:
            cfg.model[name] = value
    cfg.model.ema_rate = 0.0
    task = DiffusionSeq2SeqTask(cfg.task, dictionary, dictionary)
    model = task.build_model(cfg.model)
    model.net.load_state_dict(weights)
    return {
        "args": None, "cfg": OmegaConf.to_container(cfg, resolve=True), "last_optimizer_state": None, "criterion": None,
        "task_state": task.state_dict(), "extra_state": {}, "model": model.state_dict(),
        "optimizer_history": [{"criterion_name": "DiffusionCriterion", "optimizer_name": "none", "num_updates": 0,
                               "lr_scheduler_state": {}}],
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what fairseq and hydra say of themselves while a configuration is made."""
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def run(args: argparse.Namespace) -> int:
    require_fairseq("convert")
    with quiet():
        return convert(args)


def convert(args: argparse.Namespace) -> int:
    from fairseq.data import Dictionary

    from pydiffseq.convert import SYSTEMS, load_official
    from pydiffseq.data.official_vocabulary import fairseq_order, read_vocabulary
    from pydiffseq.fairseq_plugin import compat

    dictionary_path = args.dict or args.output.with_name("dict.txt")
    for path in (args.output, dictionary_path):
        if path.exists() and not args.overwrite:
            raise InputError(f"{path} exists; give another name or --overwrite")
        if not path.parent.is_dir():
            raise InputError(f"the folder {path.parent} of the output does not exist")
    compat.allow_checkpoint_types()
    config = options(args.option, SYSTEMS[args.system].config)
    with input_errors():
        network = load_official(args.system, state_dict(read(args.weights)), **config)
    size, source_size = network.config.vocabulary, network.config.source_vocabulary
    if source_size != size:
        raise InputError(f"source and target must share one vocabulary, got tables of {source_size} and {size} rows")
    symbols, rows = fairseq_order(read_vocabulary(args.vocab, size))
    dictionary = Dictionary()
    for symbol in symbols:
        dictionary.add_symbol(symbol)
    write(fairseq_checkpoint(args.system, network, rearrange(network.state_dict(), rows), dictionary), args.output)
    dictionary.save(str(dictionary_path))
    count = sum(parameter.numel() for parameter in network.parameters())
    print(f"{args.output}: {count:,} parameters; {dictionary_path}: {len(dictionary):,} entries")
    print(SYSTEMS[args.system].advice)
    return 0
