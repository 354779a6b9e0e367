"""German lines on standard input, English lines on standard output, with the shipped model: ``make translate``.

It runs fairseq-interactive and keeps the translations alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODEL = HERE / "model"


def main() -> int:
    lines = [line.rstrip("\n") for line in sys.stdin]
    if not lines:
        return 0
    command = [
        str(Path(sys.executable).parent / "fairseq-interactive"), str(MODEL), "-s", "de", "-t", "en",
        "--task", "diffusion_seq2seq", "--path", str(MODEL / "checkpoint.pt"), "--bpe", "sentencepiece",
        "--sentencepiece-model", str(HERE / "sentencepiece.model"),
        "--buffer-size", "1000", "--max-tokens", "4000", "--skip-invalid-size-inputs-valid-test",
        "--decode-steps", "3", "--length-beam", "3", "--noise-beam", "2", *sys.argv[1:]]
    result = subprocess.run(command, input="\n".join(lines) + "\n", text=True, encoding="utf-8", capture_output=True,
                            env={**os.environ, "PYTHONWARNINGS": "ignore"})
    if result.returncode:
        sys.stderr.write(result.stderr)
        return result.returncode
    translated = {}
    for line in result.stdout.splitlines():
        if line.startswith("D-"):
            number, _, text = line.split("\t", 2)
            translated[int(number[2:])] = text
    for number in range(len(lines)):
        print(translated.get(number, ""))
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except UnicodeDecodeError as error:
        raise SystemExit(f"translate: standard input is not UTF-8 ({error.reason} at byte {error.start})") from error
