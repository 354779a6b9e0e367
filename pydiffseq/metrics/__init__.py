"""Quality and diversity of text as pure functions: what the papers report, and the utilities of MBR."""

from pydiffseq.metrics.diversity import distinct_n, self_bleu
from pydiffseq.metrics.rouge import rouge_l, rouge_n, rouge_tokens
from pydiffseq.metrics.sentence import (
    SMOOTHINGS,
    UTILITIES,
    chrf,
    edit_similarity,
    sentence_bleu,
    unigram_f1,
)

__all__ = ["SMOOTHINGS", "UTILITIES", "chrf", "distinct_n", "edit_similarity", "rouge_l", "rouge_n", "rouge_tokens",
           "self_bleu", "sentence_bleu", "unigram_f1"]
