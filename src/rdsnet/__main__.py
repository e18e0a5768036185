"""`python -m rdsnet`."""

import sys

from rdsnet.cli import main

sys.exit(main())
