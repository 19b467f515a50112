"""The main job: baseline and co-training on one catalogue with the same schedule, side by side."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from sicot_jax.catalog.opening import open_catalog
from sicot_jax.config import Config, ConfigError, LossConfig
from sicot_jax.errors import InputError
from sicot_jax.report.page import write_report
from sicot_jax.train import train


def arms(config: Config) -> dict[str, Config]:
    """Run name -> config; they differ in the loss alone."""
    if not config.loss.with_text:
        raise ConfigError("compare wants a co-training config, got loss.mixed=0 and loss.semantic=0; set loss.mixed=1")
    baseline = LossConfig(visual=1.0, semantic=0.0, mixed=0.0, logit_adjustment=config.loss.logit_adjustment)
    return {"baseline": dataclasses.replace(config, loss=baseline), "co_training": config}


def compare(config: Config, workdir: Path) -> None:
    """Train, evaluate and report both arms under `workdir`; what is done is not done again."""
    configs = arms(config)
    catalog = open_catalog(config.data)
    if len(catalog.tokenizer.vocabulary) < 2:
        raise InputError(
            f"{catalog.name} has no title with a known word, and co-training wants some; add titles (by hand, or "
            "sicot import --titles-from RUN), keep rare words (sicot import --min-count=1, then "
            "sicot compare --config=base --config.data.path=DIR), or train the baseline alone: "
            "sicot train ... --config.loss.mixed=0"
        )
    for number, (name, arm) in enumerate(configs.items(), 1):
        print(f"\n[{number}/{len(configs)}] {name.replace('_', '-')}", file=sys.stderr)
        train(arm, workdir / name, catalog=catalog)
    print(write_report([workdir / name for name in configs], workdir / "report"))
    print(f"\nReport: {workdir / 'report' / 'report.md'}")
