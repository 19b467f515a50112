"""Trains with and without text on one catalogue with the same schedule, and reports both."""

from __future__ import annotations

import sys
from pathlib import Path

from sicot_jax.catalog.open import open_catalog
from sicot_jax.config import Config, ConfigError
from sicot_jax.errors import InputError
from sicot_jax.experiments.variants import make_variant
from sicot_jax.report.page import write_report
from sicot_jax.training.loop import train


def compared_configs(config: Config) -> dict[str, Config]:
    """Returns the configs of a comparison, which differ in their use of text alone.

    Args:
      config: one that uses text.

    Returns:
      Name of the run -> config: "baseline", and "co_training" or "tag_prediction".

    Raises:
      ConfigError: the config uses no text.
    """
    if not (config.loss.with_text or config.model.shared_word_weights):
        raise ConfigError(
            "comparing needs a config that uses text, got loss.mixed and loss.tag_prediction 0 and "
            "model.shared_word_weights=False; set loss.mixed=1"
        )
    name = "co_training" if config.loss.with_semantic else "tag_prediction"
    return {"baseline": make_variant(config, "baseline"), name: config}


def compare(config: Config, workdir: Path) -> None:
    """Trains, evaluates and reports a config with text and its baseline; resumes what was stopped.

    Args:
      config: one that uses text.
      workdir: folder of the two run folders and of the report.

    Raises:
      ConfigError: the config uses no text.
      InputError: the catalogue has no title.
    """
    configs = compared_configs(config)
    catalog = open_catalog(config.data)
    if len(catalog.tokenizer.vocabulary) < 2:
        raise InputError(
            f"{catalog.name} has no title with a known word, and training with text wants some; "
            "add titles (by hand, or sicot import --titles-from RUN), keep rare words (sicot "
            "import --min-count=1, then sicot compare --config=base --config.data.path=DIR), or "
            "train the baseline alone: sicot train ... --config.loss.mixed=0 "
            "--config.loss.tag_prediction=0 --config.model.shared_word_weights=False"
        )
    for number, (name, chosen) in enumerate(configs.items(), 1):
        print(f"\n[{number}/{len(configs)}] {name.replace('_', '-')}", file=sys.stderr)
        train(chosen, workdir / name, catalog=catalog)
    print(write_report([workdir / name for name in configs], workdir / "report"))
    print(f"\nReport: {workdir / 'report' / 'report.md'}")
