"""`python -m moekit` is the command `moekit`."""

import sys

from moekit.cli import main

sys.exit(main())
