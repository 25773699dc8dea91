"""`python -m jaxserve.cli`, where the script is not on the path."""

import sys

from jaxserve.cli import main

sys.exit(main())
