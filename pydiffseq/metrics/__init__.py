"""Quality and diversity of text as pure functions: what the papers report, and the utilities of MBR."""

from pydiffseq.metrics.sentence import (
    SMOOTHINGS,
    UTILITIES,
    chrf,
    edit_similarity,
    sentence_bleu,
    unigram_f1,
)

__all__ = ["SMOOTHINGS", "UTILITIES", "chrf", "edit_similarity", "sentence_bleu", "unigram_f1"]
