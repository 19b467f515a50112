"""`python -m sicot_jax.cli`: the `sicot` command without an installed script."""

import sys

from sicot_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
