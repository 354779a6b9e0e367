"""README's examples stay alive: its Python runs, and every option of its commands exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def commands(program: str) -> list[list[str]]:
    text = "\n".join(blocks("")).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith(f"{program} ")]


def test_python_example_runs() -> None:
    (source,) = blocks("python")
    checks = "assert set(losses.per_token) >= {'mse', 'nll'}; assert len(hypotheses) == 2"
    subprocess.run([sys.executable, "-c", f"{source}\n{checks}"], check=True)


@pytest.mark.parametrize(("program", "parser"), [
    ("fairseq-train", "get_training_parser"), ("fairseq-generate", "get_generation_parser"),
    ("fairseq-interactive", "get_interactive_generation_parser")])
def test_fairseq_options_exist(program: str, parser: str) -> None:
    options = pytest.importorskip("fairseq.options")
    found = [words for words in commands(program) if "..." not in words]
    assert found
    for words in found:
        arguments = words[1:]
        make = getattr(options, parser)
        args = options.parse_args_and_arch(make(), input_args=arguments)
        assert args.task == "diffusion_seq2seq"


def test_pydiffseq_options_exist() -> None:
    from pydiffseq.cli import build_parser

    found = commands("pydiffseq")
    assert {words[1] for words in found} >= {"prepare", "export"}
    for words in found:
        build_parser(words[1]).parse_args(words[1:])
