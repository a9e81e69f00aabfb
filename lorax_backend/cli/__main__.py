"""`python -m lorax_backend.cli` is `lorax-triton`."""

import sys

from lorax_backend.cli.main import main

sys.exit(main())
