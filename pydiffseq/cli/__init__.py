"""The ``pydiffseq`` command. Each subcommand is a module with ``add_arguments(parser)`` and ``run(args) -> int``."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from pydiffseq.errors import InputError
from pydiffseq.version import __version__

# name -> one-line help. The module pydiffseq.cli.<name>, with _ for -, is imported only when its command is called.
COMMANDS = {
    "info": "versions, devices, compiled kernels, and what is missing with the command that mends it",
    "convert": "turn official weights into a checkpoint that the fairseq commands read",
    "evaluate": "the papers' metrics: BLEU, ROUGE, BERTScore, and the diversity of candidates",
    "export": "make a small checkpoint for translation from a training checkpoint",
    "mbr": "choose one candidate per sentence by minimum Bayes risk",
    "merge-generate": "merge what fairseq-generate wrote in shards, in the order of the sentences",
    "prepare": "turn parallel text into fairseq's binarised data with a joint vocabulary",
}

USER_ERROR = 2
INTERRUPTED = 130


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of an option, where it says something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "", False) else super()._get_help_string(action)


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands, with the arguments of ``command`` alone filled in."""
    parser = argparse.ArgumentParser(
        prog="pydiffseq", description="Sequence-to-sequence text diffusion: tools around the fairseq commands.",
        epilog="'pydiffseq COMMAND --help' explains a command; training and translation run through fairseq-train, "
               "fairseq-generate and fairseq-interactive with --task diffusion_seq2seq.")
    parser.add_argument("--version", action="version", version=f"pydiffseq {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, formatter_class=HelpFormatter)
        if name == command:
            module = importlib.import_module(f"pydiffseq.cli.{name.replace('-', '_')}")
            subparser.description = module.__doc__
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, 2 for what the user can mend, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    command = next((word for word in argv if not word.startswith("-")), None)
    args = build_parser(command).parse_args(argv)
    try:
        return args.run(args)
    except BrokenPipeError:
        # The reader of a pipe (head, less) has left: not an error, but Python must not flush into it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (InputError, OSError) as error:
        print(f"pydiffseq {args.command}: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"pydiffseq {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
