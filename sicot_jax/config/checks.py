"""Validation helpers that all config sections share."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from typing import Any

from sicot_jax.errors import InputError


class ConfigError(InputError):
    """A config that cannot be run; the message is one line: what, got, wanted, advice."""


def closest_match_hint(value: object, known: Sequence[str]) -> str:
    """Returns "; did you mean X?" with the known name closest to a mistyped one, or "".

    Args:
      value: what was given; any type.
      known: the names that exist.

    Returns:
      Text to append to an error message.
    """
    close = difflib.get_close_matches(str(value), known, 1)
    return f"; did you mean {close[0]}?" if close else ""


@dataclasses.dataclass(frozen=True)
class FieldChecks:
    """Raises ConfigError, with the full field name, for the fields of one config section.

    Attributes:
      section: name of the section, e.g. "train" or "data.generated".
      config: the section's dataclass.
    """

    section: str
    config: Any

    def finite(self) -> None:
        """Raises ConfigError where a float of the section is infinite or not a number."""
        for field in dataclasses.fields(self.config):
            value = getattr(self.config, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                self.refuse(field.name, "a finite number")

    def positive(self, *names: str) -> None:
        """Raises ConfigError for the first of the named fields that is not above 0.

        Args:
          *names: field names within the section.
        """
        for name in names:
            if not getattr(self.config, name) > 0:
                self.refuse(name, "a positive number")

    def not_negative(self, *names: str) -> None:
        """Raises ConfigError for the first of the named fields that is below 0.

        Args:
          *names: field names within the section.
        """
        for name in names:
            if not getattr(self.config, name) >= 0:
                self.refuse(name, "0 or more")

    def share(self, *names: str, above_zero: bool = False) -> None:
        """Raises ConfigError for the first of the named fields outside [0, 1].

        Args:
          *names: field names within the section.
          above_zero: exclude 0 itself.
        """
        for name in names:
            value = getattr(self.config, name)
            if not 0 <= value <= 1 or (above_zero and value == 0):
                self.refuse(
                    name, "a share above 0 up to 1" if above_zero else "a share from 0 to 1"
                )

    def choice(self, name: str, choices: Sequence[str]) -> None:
        """Raises ConfigError where the field is none of the choices.

        Args:
          name: field name within the section.
          choices: the values that are allowed.
        """
        value = getattr(self.config, name)
        if value not in choices:
            self.refuse(name, f"one of {choices}{closest_match_hint(value, choices)}")

    def refuse(self, name: str, wanted: str) -> None:
        """Raises ConfigError "section.name=value, wanted ...".

        Args:
          name: field name within the section.
          wanted: the values that are allowed, in words.

        Raises:
          ConfigError: always.
        """
        raise ConfigError(f"{self.section}.{name}={getattr(self.config, name)!r}, wanted {wanted}")
