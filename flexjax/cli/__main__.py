"""`python -m flexjax.cli` is `flexjax`."""

import sys

from flexjax.cli.main import main

sys.exit(main())
