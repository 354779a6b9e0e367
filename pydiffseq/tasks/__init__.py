"""Found by ``fairseq-train --user-dir pydiffseq``: fairseq imports every module of a user folder's ``tasks``."""
