"""`python -m graphpatch.cli`, where no `graphpatch` is on the path."""

import sys

from .main import main

sys.exit(main())
