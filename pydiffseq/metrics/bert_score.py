"""BERTScore through its own package, where that and a local model are there; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

PUBLISHED_MODEL, PUBLISHED_LAYER = "microsoft/deberta-xlarge-mnli", 40   # DiffuSeq's


class Unavailable(RuntimeError):
    """Why BERTScore cannot be computed here, in one sentence."""


def bert_score(hypotheses: Sequence[str], references: Sequence[Sequence[str]], model: Path,
               layer: int = PUBLISHED_LAYER) -> float:
    """Mean F1 of BERTScore (Zhang et al., 2020), without rescaling, as DiffuSeq reports it; the best of several references.

    Args:
        model: folder of a Hugging Face model with its tokeniser.
        layer: whose states are compared; 40 is the package's choice for the model that DiffuSeq used.

    Raises:
        Unavailable: the package or the model is not there.
    """
    try:
        from bert_score import score
    except ImportError as error:
        raise Unavailable(f"the package bert-score is not there ({error}): pip install bert-score") from error
    if not (model / "config.json").is_file():
        raise Unavailable(f"{model} is no folder of a Hugging Face model (it has no config.json)")
    texts = [list(known) for known in references]
    values = score(list(hypotheses), texts, model_type=str(model), num_layers=layer, lang="en")
    return float(values[2].mean())
