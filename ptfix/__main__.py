"""`python -m ptfix`."""

import sys

from ptfix.cli import main

sys.exit(main())
