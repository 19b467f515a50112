"""API keys: a file of names and key hashes, so that its readers cannot call the service."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from pathlib import Path

from sicot_jax.errors import InputError

_LINE = re.compile(r"(?P<name>[\w.-]{1,64}) (?P<hash>[0-9a-f]{64})")


class ApiKeys:
    """Names of callers and sha256 hashes of their keys.

    Keys are random and long, so that a plain hash of one cannot be inverted by guessing.
    """

    def __init__(self, hashes: dict[str, bytes]):
        self._hashes = hashes

    def owner(self, key: str) -> str | None:
        """Returns the name that a key belongs to; compares every hash in constant time.

        Args:
          key: the key of a request.

        Returns:
          The name, or None for an unknown key.
        """
        digest = hashlib.sha256(key.encode()).digest()
        owner = None
        for name, stored in self._hashes.items():
            if hmac.compare_digest(stored, digest):
                owner = name
        return owner


def read_api_keys(path: Path) -> ApiKeys:
    """Returns the keys of a file.

    Args:
      path: file with lines "NAME SHA256"; lines that start with "#" are comments.

    Returns:
      The keys.

    Raises:
      InputError: no such file, a line of another form, or no key.
    """
    hashes = _read_hashes(path)
    if not hashes:
        raise InputError(
            f"{path}: no key in it; make one with `sicot serve-key NAME --file {path}`"
        )
    return ApiKeys(hashes)


def _read_hashes(path: Path) -> dict[str, bytes]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: {error}; make keys with `sicot serve-key NAME --file {path}`"
        ) from error
    hashes: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if not match or match["name"] in hashes:
            raise InputError(f"{path}: line {number}: wanted 'NAME SHA256', each name once")
        hashes[match["name"]] = bytes.fromhex(match["hash"])
    return hashes


def add_api_key(path: Path, name: str) -> str:
    """Makes a new key and appends its hash to a file.

    Args:
      path: file of keys; made if missing, readable by its owner alone.
      name: name of the caller.

    Returns:
      The key, which is stored nowhere.

    Raises:
      InputError: a bad name, or one that has a key.
    """
    if not re.fullmatch(r"[\w.-]{1,64}", name):
        raise InputError(f"{name!r}: wanted a name of letters, digits, '.', '_' and '-'")
    if path.exists() and name in _read_hashes(path):
        raise InputError(f"{path}: {name} has a key; remove its line to give another")
    key = f"sicot_{secrets.token_urlsafe(32)}"
    before = path.read_text() if path.exists() else ""
    with path.open("a") as file:
        file.write(
            "\n" * bool(before and not before.endswith("\n"))
            + f"{name} {hashlib.sha256(key.encode()).hexdigest()}\n"
        )
    path.chmod(0o600)
    return key
