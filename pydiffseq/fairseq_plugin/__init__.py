"""The fairseq adapter: importing it registers the task, the models and the criterion."""

from pydiffseq.fairseq_plugin import compat

compat.apply()

from pydiffseq.fairseq_plugin import criterion, model, task  # noqa: E402, F401
