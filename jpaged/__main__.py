"""`python -m jpaged`: the command without its script."""

import sys

from jpaged.cli import main

sys.exit(main())
