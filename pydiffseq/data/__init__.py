"""Corpus preparation: parallel text to fairseq's binarised data (used by ``pydiffseq prepare``)."""
