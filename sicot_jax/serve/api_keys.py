"""API keys: a file of names and hashes, so that who reads it cannot call the service."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from pathlib import Path

from sicot_jax.errors import InputError

_LINE = re.compile(r"(?P<name>[\w.-]{1,64}) (?P<hash>[0-9a-f]{64})")


class Keys:
    """Name -> sha256 of a key. Keys are random and long, so that a plain hash of one cannot be
    guessed back.
    """

    def __init__(self, hashes: dict[str, bytes]):
        self._hashes = hashes

    def name_of(self, key: str) -> str | None:
        """Whose key it is; every hash is compared, in constant time."""
        digest = hashlib.sha256(key.encode()).digest()
        found = None
        for name, stored in self._hashes.items():
            if hmac.compare_digest(stored, digest):
                found = name
        return found


def read_keys(path: Path) -> Keys:
    """InputError: no such file, a line that is none, no key."""
    hashes = _read_hashes(path)
    if not hashes:
        raise InputError(
            f"{path}: no key in it; make one with `sicot serve-key NAME --file {path}`"
        )
    return Keys(hashes)


def _read_hashes(path: Path) -> dict[str, bytes]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: {error}; make keys with `sicot serve-key NAME --file {path}`"
        ) from error
    hashes: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if not found or found["name"] in hashes:
            raise InputError(f"{path}: line {number}: wanted 'NAME SHA256', each name once")
        hashes[found["name"]] = bytes.fromhex(found["hash"])
    return hashes


def add_key(path: Path, name: str) -> str:
    """A new key for `name`, its hash at the end of the file. InputError: a bad name, or one that
    has a key.
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
