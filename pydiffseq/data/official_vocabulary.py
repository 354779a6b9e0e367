"""Vocabulary files of the official code, and their ids in the order of a fairseq dictionary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydiffseq.data.text import read_lines
from pydiffseq.errors import InputError

# fairseq's first four symbols, and what BERT, byte-level BPE and DiffuSeq's own vocabularies call them.
SPECIALS = {"<s>": ("<s>", "[CLS]", "[START]"), "<pad>": ("<pad>", "[PAD]"), "</s>": ("</s>", "[SEP]", "[END]"),
            "<unk>": ("<unk>", "[UNK]")}
DIFFUSEQ_SPECIALS = ["[START]", "[END]", "[UNK]", "[PAD]"]   # put before the lines of its files (spec 1.1)


def read_vocabulary(path: Path, size: int) -> list[str]:
    """The ``size`` tokens of a vocabulary file by official id.

    A JSON object maps tokens to ids (byte-level BPE); in text, each line's first field is a token: all of them (BERT),
    or all but DiffuSeq's four special ones, which come first.

    Raises:
        InputError: no such file, no such format, or another number of tokens.
    """
    if not path.is_file():
        raise InputError(f"no vocabulary {path}")
    lines = [] if path.suffix == ".json" else read_lines(path)
    tokens = [line.split(" ")[0].split("\t")[0] for line in lines] or _from_json(path)
    if len(tokens) == size - len(DIFFUSEQ_SPECIALS):
        tokens = DIFFUSEQ_SPECIALS + tokens
    if len(tokens) != size:
        raise InputError(f"{path} has {len(tokens):,} tokens, but the embedding table has {size:,} rows")
    return tokens


def _from_json(path: Path) -> list[str]:
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
        tokens = sorted(ids, key=ids.__getitem__)
        if [ids[token] for token in tokens] == list(range(len(tokens))):
            return tokens
    except (ValueError, AttributeError, TypeError):
        pass
    raise InputError(f"{path} is not a JSON object of tokens and their ids 0, 1, ...")


def fairseq_order(tokens: Sequence[str]) -> tuple[list[str], list[int]]:
    """The symbols of a fairseq dictionary behind its four special ones, and every entry's official id.

    Raises:
        InputError: a special token is missing, or a token is there twice, is empty or holds a blank.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    rows = []
    for symbol, names in SPECIALS.items():
        found = [name for name in names if name in ids]
        if len(found) != 1:
            raise InputError(f"the vocabulary must have one token for {symbol} (any of {', '.join(names)}), "
                             f"it has {', '.join(found) or 'none'}")
        rows.append(ids[found[0]])
    rest = [i for i in range(len(tokens)) if i not in set(rows)]
    symbols = [tokens[i] for i in rest]
    wrong = next((i for i in rest if ids[tokens[i]] != i or tokens[i].split() != [tokens[i]]), None)
    if wrong is not None:
        raise InputError(f"token {wrong} of the vocabulary ({tokens[wrong]!r}) is there twice, is empty or holds a blank")
    return symbols, rows + rest
