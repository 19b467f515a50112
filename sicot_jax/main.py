"""`python -m sicot_jax.main --config=configs/1m.py [--workdir=DIR] [--config.key=value ...]`: train
and evaluate.
"""

import sys

from sicot_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
