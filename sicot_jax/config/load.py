"""Loads configs from files, run folders and bundled names, and applies command-line overrides.

A config file is Python with `get_config() -> Config`. `--config` takes a path first, then the name
of a bundled config, or the `config.json` that a run wrote. `--config.optim.learning_rate=0.05`
overrides one field.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sicot_jax.common.text import one_line
from sicot_jax.config.checks import ConfigError, closest_match_hint
from sicot_jax.config.schema import CONFIG_FORMAT, Config, config_to_dict, flatten_config
from sicot_jax.errors import InputError


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Loads a config by path or bundled name and applies overrides.

    Args:
      name: a `.py` file, a run's `config.json`, or the name of a bundled config ("base").
      overrides: flags `--config.a.b=value`.

    Returns:
      The config.

    Raises:
      ConfigError: no such config, unknown key, wrong type, or a combination that cannot run.

    Example:
      >>> config = load_config("tiny", ["--config.train.steps=3"])
      >>> config.train.steps
      3
    """
    path = _config_path(name)
    config = _read_json(path) if path.suffix == ".json" else _run_config_file(name, path)
    return override_config(config, overrides)


def bundled_configs_dir() -> Path:
    """Returns the folder of the bundled configs, in the checkout or the installed package."""
    package = Path(__file__).parents[1]
    checkout = package.parent / "configs"
    return checkout if (package.parent / "pyproject.toml").exists() else package / "configs"


def _config_path(name: str) -> Path:
    """The file itself where it exists, else the bundled config of that name."""
    path = Path(name)
    if path.is_file():
        return path
    bundled = bundled_configs_dir() / f"{name.removesuffix('.py').removeprefix('configs/')}.py"
    if not bundled.is_file():
        known = sorted(p.stem for p in bundled_configs_dir().glob("*.py"))
        raise ConfigError(
            f"--config={name}: no such file and no bundled config; bundled are {', '.join(known)}"
        )
    return bundled


def _read_json(path: Path) -> Config:
    try:
        stored = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: no JSON ({error}); wanted the config.json of a run") from error
    if not isinstance(stored, dict) or "config" not in stored:
        raise ConfigError(f"{path}: no config in it; wanted the config.json of a run")
    if stored.get("format") != CONFIG_FORMAT:
        raise ConfigError(
            f"{path}: format {stored.get('format')!r:.40}, this version reads {CONFIG_FORMAT}"
        )
    return config_from_dict(stored["config"])


def _run_config_file(name: str, path: Path) -> Config:
    spec = importlib.util.spec_from_file_location(f"sicot_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config={name}: wanted a .py file or a run's config.json")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except InputError:
        raise
    except (SyntaxError, NameError, AttributeError, ImportError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: {type(error).__name__}: {error}; wanted Python with get_config() -> Config"
        ) from error
    if not isinstance(config, Config):
        raise ConfigError(f"{path}: get_config() gave {type(config).__name__}, wanted Config")
    return config


def read_flat_config(path: Path) -> dict[str, Any]:
    """Reads a run's config.json as one flat dict.

    Args:
      path: the config.json of a run.

    Returns:
      Full field name -> value as JSON has it (lists for tuples); a field that the file lacks has
      its default.

    Raises:
      ConfigError: as `load_config`.
    """
    config = load_config(str(path))
    return flatten_config(json.loads(json.dumps(config_to_dict(config))))


def config_from_dict(tree: dict[str, Any], kind: type = Config, prefix: str = "") -> Any:
    """Builds a config, or a section of one, from nested dicts and checks the types.

    Args:
      tree: field name -> value, or a dict for a section; fields left out have their defaults.
      kind: the dataclass to build.
      prefix: put before field names in messages.

    Returns:
      An instance of `kind`.

    Raises:
      ConfigError: an unknown key (with the closest known one), a value of another type, or a
        combination that cannot run.
    """
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{prefix.rstrip('.') or 'config'}={tree!r} is {type(tree).__name__}, wanted a table "
            "of fields"
        )
    types = typing.get_type_hints(kind)
    fields = {field.name: types[field.name] for field in dataclasses.fields(kind)}
    values = {}
    for key, value in tree.items():
        if key not in fields:
            hint = closest_match_hint(key, list(fields))
            raise ConfigError(f"unknown config key {prefix}{one_line(key)}{hint}")
        if dataclasses.is_dataclass(fields[key]):
            values[key] = config_from_dict(value, fields[key], f"{prefix}{key}.")
        else:
            values[key] = _typed(value, fields[key], prefix + key)
    return kind(**values)


def _typed(value: Any, wanted: Any, name: str) -> Any:
    """The value as the field's type; a list becomes a tuple, an int a float."""
    origin = typing.get_origin(wanted) or wanted
    if origin is tuple and isinstance(value, list | tuple):
        kinds = typing.get_args(wanted)
        if len(value) != len(kinds):
            raise ConfigError(f"{name}={tuple(value)}, wanted {len(kinds)} values")
        return tuple(
            _typed(item, kind, f"{name}[{i}]")
            for i, (item, kind) in enumerate(zip(value, kinds, strict=True))
        )
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{name}={value!r:.40}, wanted a number of 64 bits")
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, origin) or (origin is int and isinstance(value, bool)):
        raise ConfigError(
            f"{name}={value!r} is {type(value).__name__}, wanted "
            f"{getattr(origin, '__name__', origin)}"
        )
    return value


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """Applies `--config.a.b=VALUE` flags to a config.

    Args:
      config: is left as it is.
      overrides: flags, with or without `--config.`; VALUE is read as the field's type (text as it
        is, else a Python literal). All are applied before the result is checked.

    Returns:
      The changed config.

    Raises:
      ConfigError: an unknown field, a value of another type, or a combination that cannot run.
    """
    if not overrides:
        return config
    tree = config_to_dict(config)
    known = flatten_config(tree)
    for flag in overrides:
        key, equals, text = flag.partition("=")
        name = key.removeprefix("--").removeprefix("config.")
        if name not in known:
            section = [field for field in known if field.startswith(name + ".")]
            hint = (
                f", a section; its fields are {', '.join(section)}"
                if section
                else closest_match_hint(name, list(known))
            )
            raise ConfigError(f"unknown option {one_line(flag)}{hint}")
        if not equals:
            raise ConfigError(f"option {flag}: wanted {flag}=VALUE")
        *sections, field = name.split(".")
        section_tree = tree
        for part in sections:
            section_tree = section_tree[part]
        section_tree[field] = _parse(text, known[name], flag)
    return config_from_dict(tree)


def _parse(text: str, old: Any, flag: str) -> Any:
    """The text of a flag as a value like `old`; `config_from_dict` checks the type."""
    if isinstance(old, str):
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise ConfigError(f"{one_line(flag)}: {text!r:.80} is no {type(old).__name__}") from error
