"""What identifies a run: code commit, hardware, time, and hashes of what it was trained on."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import time
from pathlib import Path

import jax

from sicot_jax.catalog.catalog import Catalog, Tokenizer
from sicot_jax.common.files import file_sha256, relative_note
from sicot_jax.config import DataConfig
from sicot_jax.errors import InputError

_CHECKOUT = Path(__file__).parents[2]


def code_commit() -> str:
    """Returns the commit of the checkout that this code runs from.

    Returns:
      40 hexadecimal digits, with "+" where files have changed since; "" for an installed package.
    """
    if not (_CHECKOUT / ".git").exists():
        return ""
    try:
        commit, changes = (_git("rev-parse", "HEAD"), _git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit + ("+" if changes else "")


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=_CHECKOUT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def hardware_name(device_mesh: jax.sharding.Mesh) -> str:
    """Returns the number and kind of devices, the host's architecture and the version of JAX.

    Args:
      device_mesh: the devices.

    Returns:
      For example "8 x cpu (x86_64), jax 0.10.2".
    """
    device = device_mesh.devices.flat[0]
    return (
        f"{device_mesh.size} x {device.device_kind} ({platform.machine()}), jax {jax.__version__}"
    )


def utc_now() -> str:
    """Returns the time in UTC, such as "2026-01-31T12:00:00Z"."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def vocabulary_hash(tokenizer: Tokenizer) -> str:
    """Returns a hash that is equal where token ids mean the same words.

    Args:
      tokenizer: tokenizer of a catalogue or a run.

    Returns:
      SHA-256 of the vocabulary, 64 hexadecimal digits.
    """
    return hashlib.sha256("\n".join(tokenizer.vocabulary).encode()).hexdigest()


def class_table_hash(catalog: Catalog) -> str:
    """Returns a hash that is equal where class ids mean the same products.

    Args:
      catalog: an opened catalogue.

    Returns:
      SHA-256 of the SKUs in the order of class ids, 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for sku in catalog.classes.sku:
        digest.update(sku.encode() + b"\n")
    return digest.hexdigest()


def triplets_hash(data: DataConfig) -> str:
    """Returns the hash of the file of `data.triplets`.

    Args:
      data: section `data` of a config.

    Returns:
      SHA-256 of the file, 64 hexadecimal digits; "" where the config names none.

    Raises:
      InputError: the file cannot be read.
    """
    if not data.triplets:
        return ""
    try:
        return file_sha256(Path(data.triplets))
    except OSError as error:
        raise InputError(
            f"data.triplets={data.triplets}{relative_note(Path(data.triplets))}: "
            f"{error.strerror}; wanted the Parquet file of `sicot events triplets`"
        ) from error
