"""Registers the task, the models and the criterion with fairseq (see :mod:`pydiffseq.fairseq_plugin`)."""

import pydiffseq.fairseq_plugin  # noqa: F401
