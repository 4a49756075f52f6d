"""`python -m carillon_client`: see cli.py."""

import sys

from carillon_client.cli import main

sys.exit(main())
