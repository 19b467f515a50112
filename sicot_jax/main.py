"""Trains and evaluates a run: `python -m sicot_jax.main --config=configs/1m.py [--workdir=DIR]`.

Further options, `--config.key=value` among them, are those of `sicot train`.
"""

import sys

from sicot_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
