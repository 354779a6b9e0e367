"""Hydra imports ``hydra_plugins.*`` at start: registers pydiffseq for ``fairseq-hydra-train`` if no .pth file was read.

That is the case for ``pip install --target`` and for folders on ``PYTHONPATH``. Other hydra applications, which have
not imported fairseq, are left alone.
"""

import os
import sys

if "fairseq" in sys.modules and os.environ.get("PYDIFFSEQ_AUTOLOAD", "1") != "0":
    import pydiffseq.fairseq_plugin  # noqa: F401
