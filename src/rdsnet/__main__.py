"""`python -m rdsnet`."""

import sys

from rdsnet.cli.main import main

sys.exit(main())
