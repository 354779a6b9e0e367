import sys

from pydiffseq.cli import main

sys.exit(main())
