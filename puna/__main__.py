"""`python -m puna` is the command line."""

import sys

from puna.cli import main

sys.exit(main())
