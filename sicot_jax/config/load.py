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

from sicot_jax.config.schema import (
    CONFIG_FORMAT,
    Config,
    ConfigError,
    _hint,
    flatten_config,
    config_to_dict,
)
from sicot_jax.errors import InputError


def read_flat_config(path: Path) -> dict[str, Any]:
    """The config in a run's config.json, flat, as JSON has it; a field newer than the run has its
    default.
    """
    return flatten_config(json.loads(json.dumps(config_to_dict(load_config(str(path))))))


def config_from_dict(tree: dict[str, Any], kind: type = Config, prefix: str = "") -> Any:
    """Nested dict -> dataclass. ConfigError on an unknown key (with the nearest known one) or a
    value of another type.
    """
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{prefix.rstrip('.') or 'config'}={tree!r} is {type(tree).__name__}, wanted a table of fields"
        )
    types = typing.get_type_hints(kind)
    fields = {field.name: types[field.name] for field in dataclasses.fields(kind)}
    values = {}
    for key, value in tree.items():
        if key not in fields:
            raise ConfigError(f"unknown config key {prefix}{key}{_hint(key, list(fields))}")
        if dataclasses.is_dataclass(fields[key]):
            values[key] = config_from_dict(value, fields[key], f"{prefix}{key}.")
        else:
            values[key] = _typed(value, fields[key], prefix + key)
    try:
        return kind(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _typed(value: Any, wanted: Any, name: str) -> Any:
    origin = typing.get_origin(wanted) or wanted
    if origin is tuple and isinstance(value, list | tuple):
        kinds = typing.get_args(wanted)
        if len(value) != len(kinds):
            raise ConfigError(f"{name}={tuple(value)}, wanted {len(kinds)} values")
        return tuple(
            _typed(item, kind, f"{name}[{i}]")
            for i, (item, kind) in enumerate(zip(value, kinds, strict=True))
        )
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, origin) or (origin is int and isinstance(value, bool)):
        raise ConfigError(
            f"{name}={value!r} is {type(value).__name__}, wanted {getattr(origin, '__name__', origin)}"
        )
    return value


def bundled_configs_dir() -> Path:
    """`configs/` of the checkout, or its copy inside the installed package."""
    package = Path(__file__).parents[1]
    checkout = package.parent / "configs"
    return checkout if (package.parent / "pyproject.toml").exists() else package / "configs"


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Config of a file (`.py`, or a run's `config.json`), else of a bundled name, with
    `--config.a.b=value` overrides.

    Raises ConfigError: no such config, unknown key, wrong type, or a combination that cannot run.
    """
    path = Path(name)
    if not path.is_file():
        bundled = bundled_configs_dir() / f"{name.removesuffix('.py').removeprefix('configs/')}.py"
        if not bundled.is_file():
            known = sorted(p.stem for p in bundled_configs_dir().glob("*.py"))
            raise ConfigError(
                f"--config={name}: no such file and no bundled config; bundled are {', '.join(known)}"
            )
        path = bundled
    if path.suffix == ".json":
        try:
            read_flat_config = json.loads(path.read_text())
        except ValueError as error:
            raise ConfigError(
                f"{path}: no JSON ({error}); wanted the config.json of a run"
            ) from error
        if not isinstance(read_flat_config, dict) or "config" not in read_flat_config:
            raise ConfigError(f"{path}: no config in it; wanted the config.json of a run")
        if read_flat_config.get("format") != CONFIG_FORMAT:
            raise ConfigError(
                f"{path}: format {read_flat_config.get('format')}, this version reads {CONFIG_FORMAT}"
            )
        config = config_from_dict(read_flat_config["config"])
    else:
        spec = importlib.util.spec_from_file_location(f"sicot_config_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise ConfigError(f"--config={name}: wanted a .py file or a run's config.json")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            config = module.get_config()
        except InputError:
            raise
        except (
            SyntaxError,
            NameError,
            AttributeError,
            ImportError,
            TypeError,
            ValueError,
        ) as error:
            raise ConfigError(
                f"{path}: {type(error).__name__}: {error}; wanted Python with get_config() -> Config"
            ) from error
        if not isinstance(config, Config):
            raise ConfigError(f"{path}: get_config() gave {type(config).__name__}, wanted Config")
    return override_config(config, overrides)


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """Config with `--config.a.b=VALUE` flags applied; VALUE is read as the field's type (text as it
    is, else a literal).
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
                else _hint(name, list(known))
            )
            raise ConfigError(f"unknown option {flag}{hint}")
        if not equals:
            raise ConfigError(f"option {flag}: wanted {flag}=VALUE")
        *path, last = name.split(".")
        place = tree
        for part in path:
            place = place[part]
        place[last] = _parse(text, known[name], flag)
    return config_from_dict(tree)


def _parse(text: str, old: Any, flag: str) -> Any:
    """The text of a flag as a value like `old`; `from_dict` checks the type."""
    if isinstance(old, str):
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise ConfigError(f"{flag}: {text!r} is no {type(old).__name__}") from error
