"""From sentences to ids of a fairseq dictionary: sentencepiece, subword-nmt codes, or tokens that are already split.

The dictionary starts with fairseq's ``<s> <pad> </s> <unk>`` (ids 0 to 3); both languages share it.
"""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pydiffseq.errors import InputError

if TYPE_CHECKING:
    from fairseq.data import Dictionary

# fairseq's <s>, <pad>, </s>, <unk> against sentencepiece's <unk>, <s>, </s>.
FAIRSEQ_SPECIALS = 4
SENTENCEPIECE_SPECIALS = 3
NORMALIZATIONS = ("nmt_nfkc", "nmt_nfkc_cf")
MODEL_TYPES = ("unigram", "bpe")
# Sentences that sentencepiece draws from a larger corpus: its trainer holds them in memory.
TRAINING_SENTENCES = 2_000_000


class Encoder(Protocol):
    """Turns lines into ids. ``files`` are written beside the data (name -> content)."""

    dictionary: Dictionary
    files: dict[str, bytes]

    def __call__(self, lines: Sequence[str]) -> list[np.ndarray]:
        """Ids of each line, an int64 array ``[length + 1]`` that ends with ``</s>``."""
        ...


def load_dictionary(path: Path) -> Dictionary:
    """A fairseq dictionary file (one ``symbol count`` per line)."""
    from fairseq.data import Dictionary

    if not path.is_file():
        raise InputError(f"no dictionary {path}")
    try:
        return Dictionary.load(str(path))
    except Exception as error:  # fairseq raises plain Exception for a wrong encoding
        raise InputError(f"{path} is not a fairseq dictionary ('symbol count' on each line): {error}") from error


def train_sentencepiece(sentences: Iterable[str], vocab_size: int, *, model_type: str = "unigram",
                        normalization: str = "nmt_nfkc", character_coverage: float = 1.0, seed: int = 1) -> bytes:
    """Train a sentencepiece model whose fairseq dictionary has ``vocab_size`` entries, special symbols included.

    Returns:
        The serialised model. More than ``TRAINING_SENTENCES`` sentences are sampled.

    Raises:
        InputError: the corpus has too few distinct pieces, or more characters than ``vocab_size`` holds.
    """
    import sentencepiece

    sentencepiece.set_random_generator_seed(seed)
    model = io.BytesIO()
    difference = FAIRSEQ_SPECIALS - SENTENCEPIECE_SPECIALS
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, vocab_size=vocab_size - difference,
            model_type=model_type, normalization_rule_name=normalization, character_coverage=character_coverage,
            input_sentence_size=TRAINING_SENTENCES, shuffle_input_sentence=True, max_sentence_length=1 << 16,
            minloglevel=2)
    except (RuntimeError, ValueError, OSError) as error:
        raise _training_error(str(error), vocab_size, difference) from error
    return model.getvalue()


def _training_error(message: str, vocab_size: int, difference: int) -> InputError:
    if found := re.search(r"too high.*<= (\d+)", message, re.DOTALL):
        return InputError(f"a vocabulary of {vocab_size} is too large for this corpus, which has pieces for at most "
                          f"{int(found[1]) + difference}; give --vocab-size {int(found[1]) + difference} or less")
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        least = int(found[1]) + FAIRSEQ_SPECIALS
        return InputError(f"a vocabulary of {vocab_size} is too small for the characters of this corpus; give "
                          f"--vocab-size {least} or more, or a --character-coverage below 1")
    return InputError(f"sentencepiece could not train a model of {vocab_size} entries: {' '.join(message.split())}")


class SentencePieceEncoder:
    """Encodes as ``fairseq-interactive --bpe sentencepiece`` does; pieces the dictionary lacks become ``<unk>``."""

    def __init__(self, model: bytes, dictionary: Dictionary | None = None, threads: int | None = None) -> None:
        import sentencepiece
        from fairseq.data import Dictionary

        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError) as error:
            raise InputError("the file given with --sentencepiece-model is not a sentencepiece model") from error
        pieces = [self.processor.id_to_piece(i) for i in range(len(self.processor))]
        if dictionary is None:
            dictionary = Dictionary()
            for i, piece in enumerate(pieces):
                if not (self.processor.is_control(i) or self.processor.is_unknown(i)):
                    dictionary.add_symbol(piece, n=0)
        self.dictionary = dictionary
        self.files = {"sentencepiece.model": model}
        self.threads = threads or os.cpu_count() or 1
        self.to_fairseq = np.array([dictionary.indices.get(piece, dictionary.unk()) for piece in pieces])

    def __call__(self, lines: Sequence[str]) -> list[np.ndarray]:
        end = self.dictionary.eos()
        encoded = self.processor.encode(list(lines), out_type=int, num_threads=self.threads)
        return [np.append(self.to_fairseq[ids], end) if ids else np.array([end]) for ids in encoded]


class TokenEncoder:
    """Splits at white space, after ``split`` (for instance BPE codes) if one is given."""

    def __init__(self, dictionary: Dictionary, split: Callable[[str], str] | None = None,
                 files: dict[str, bytes] | None = None) -> None:
        self.dictionary = dictionary
        self.split = split
        self.files = files or {}

    def __call__(self, lines: Sequence[str]) -> list[np.ndarray]:
        indices, unknown, end = self.dictionary.indices, self.dictionary.unk(), self.dictionary.eos()
        return [np.array([*(indices.get(token, unknown) for token in tokens), end], dtype=np.int64)
                for tokens in (split_tokens(line, self.split) for line in lines)]


def split_tokens(line: str, split: Callable[[str], str] | None) -> list[str]:
    return (split(line) if split else line).split()


def load_bpe_codes(path: Path) -> Callable[[str], str]:
    """A function that splits a line of tokens by subword-nmt codes (marker ``@@``)."""
    try:
        from subword_nmt.apply_bpe import BPE
    except ImportError as error:
        raise InputError("--bpe-codes needs the package subword-nmt: pip install subword-nmt") from error
    if not path.is_file():
        raise InputError(f"no file {path} with BPE codes")
    try:
        with path.open(encoding="utf-8") as file:
            return BPE(file).process_line
    except (SystemExit, ValueError) as error:  # subword-nmt exits the interpreter at a malformed line
        raise InputError(f"{path} does not hold subword-nmt codes") from error


def count_dictionary(sentences: Iterable[str], split: Callable[[str], str] | None) -> Dictionary:
    """A dictionary of all tokens, most frequent first, padded to a multiple of 8 as ``fairseq-preprocess`` does."""
    from fairseq.data import Dictionary

    counts: Counter[str] = Counter()
    for line in sentences:
        counts.update(split_tokens(line, split))
    dictionary = Dictionary()
    for token, count in counts.items():
        dictionary.add_symbol(token, n=count)
    dictionary.finalize(padding_factor=8)
    return dictionary


def set_counts(dictionary: Dictionary, counts: np.ndarray) -> None:
    """Write how often each id occurred (int64 ``[len(dictionary)]``) into the dictionary."""
    dictionary.count[:] = [int(count) for count in counts]
