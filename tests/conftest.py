"""Settings of the whole suite."""

import os

# torch keeps compiled graphs between runs, also those of an op whose schema has changed since.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
