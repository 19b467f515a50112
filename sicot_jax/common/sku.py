"""Product numbers and categories as keys: one spelling of what files hold; what cannot be one.

Every reader of SKUs and categories takes them through here, so that the same product has the same
key in a manifest, an index, a list of withdrawn products, a log and a request.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

MAX_SKU_LENGTH = 256
_MAX_EXAMPLES = 3

# A line break in a SKU would shift a one-name-a-line table, a lone surrogate cannot be written as
# UTF-8, and an invisible character (zero-width space, byte order mark, bidi override) would make a
# second class that looks the same.
_REFUSED_CATEGORIES = ("Cc", "Zl", "Zp", "Cs", "Cf")
# What pandas, SQL and spreadsheets write where there is no value, in lower case.
_PLACEHOLDERS = frozenset(
    [
        *("nan", "-nan", "null", "(null)", "\\n", "none", "nil", "nat", "<na>", "undefined"),
        *("[null]", "(blank)", "inf", "-inf", "#n/a n/a"),
        *("#n/a", "#na", "#null!", "#ref!", "#value!", "#name?", "#div/0!", "#num!"),
        *("#nv", "#wert!", "#bezug!", "#zahl!", "#valeur!", "#nombre!", "#nom?", "#¡valor!"),
    ]
)
# As spreadsheets (4.00638E+12, 4,00638E+12), float columns (4.006381333931e+12) and Java (4.006E12)
# write numbers.
_SCIENTIFIC = re.compile(r"[+-]?(?:\d+(?:[.,]\d+)?[eE]\+\d{2,}|\d+[.,]\d+[eE][+-]?\d{1,3})")
# Words that some shop may use as a product number.
_UNLIKELY = frozenset(
    ("na", "n/a", "n.a.", "-", "--", "---", "?", ".", "0", "unknown", "missing", "empty", "tbd")
)
_WITH_POINT_ZERO = re.compile(r"\d+[.,]0+")
_GROUPED = re.compile(r"\d{1,3}(?:[.,']\d{3}){2,}")
_TOO_NARROW = re.compile(r"#{3,}")  # a spreadsheet's column is too narrow for the number


class SkuError(ValueError):
    """A text that cannot be a SKU; the message is `reason: detail`."""


def normalize_sku(text: str) -> str:
    """Returns the one spelling of a SKU, by which it is looked up.

    Args:
      text: as it stands in a file or request.

    Returns:
      Unicode form NFC, every kind of blank as a space, none at the ends.
    """
    if text.isascii():
        return text.strip()
    composed = unicodedata.normalize("NFC", text)
    return "".join(" " if unicodedata.category(c) == "Zs" else c for c in composed).strip()


def read_sku(text: str) -> str:
    """Returns the key of a SKU that a file brings in.

    Args:
      text: as it stands in the file.

    Returns:
      The key; empty where the text has nothing but blanks.

    Raises:
      SkuError: invisible characters, too long, a placeholder, or a number whose digits are lost.
    """
    if any(unicodedata.category(char) in _REFUSED_CATEGORIES for char in text):
        raise SkuError(f"SKU with a line break, tab or invisible character: {text!a:.80}")
    key = normalize_sku(text)
    if len(key) > MAX_SKU_LENGTH:
        raise SkuError(f"SKU too long: {len(key)} characters, at most {MAX_SKU_LENGTH}")
    if key.lower() in _PLACEHOLDERS or _TOO_NARROW.fullmatch(key):
        raise SkuError(f"placeholder in place of a SKU: {key!r}")
    if _SCIENTIFIC.fullmatch(key):
        raise SkuError(
            f"SKU in scientific notation: {key!r}, whose digits are lost; make the column text "
            "where the file comes from, and export it again"
        )
    return key


class SkuReader:
    """Makes the keys of one source, and collects the doubtful ones."""

    def __init__(self) -> None:
        self._keys: dict[str, str] = {}
        self._look_alikes: dict[str, str] = {}
        self._doubtful: dict[str, dict[str, None]] = {}

    def key(self, text: str) -> str:
        """Returns the key of a SKU.

        Args:
          text: as it stands in the file.

        Returns:
          The key; empty where the text has nothing but blanks.

        Raises:
          SkuError: the text cannot be a SKU.
        """
        known = self._keys.get(text)
        if known is None:
            known = self._keys[text] = read_sku(text)
            if known:
                self._note_doubt(known)
        return known

    def doubt(self, kind: str, example: str) -> None:
        """Notes a doubtful SKU.

        Args:
          kind: what is doubtful, as in "SKUs that KIND".
          example: the SKU, as it is to be shown.
        """
        self._doubtful.setdefault(kind, {})[example] = None

    def _note_doubt(self, key: str) -> None:
        if key.lower() in _UNLIKELY:
            self.doubt("may stand for a missing one", repr(key))
        if _WITH_POINT_ZERO.fullmatch(key):
            self.doubt(
                "are whole numbers with .0, as a program writes that took them for numbers",
                repr(key),
            )
        if _GROUPED.fullmatch(key):
            self.doubt("are numbers with separators between thousands", repr(key))
        if key[0] in "='\"":
            self.doubt("begin like a formula or quote of a spreadsheet", repr(key))
        # Compatibility forms too: full-width digits.
        folded = unicodedata.normalize("NFKC", key).casefold().replace(" ", "").lstrip("0")
        other = self._look_alikes.setdefault(folded, key)
        if other != key:
            self.doubt(
                "differ from another only in case, blanks, width or leading zeros",
                f"{other!r} and {key!r}",
            )

    def warnings(self) -> list[str]:
        """Returns a line for each kind of doubtful SKUs, with some of them."""
        lines = []
        for kind, skus in self._doubtful.items():
            more = f" and {len(skus) - _MAX_EXAMPLES} more" if len(skus) > _MAX_EXAMPLES else ""
            shown = ", ".join(list(skus)[:_MAX_EXAMPLES])
            lines.append(f"SKUs that {kind}: {shown}{more}; check the source")
        return lines


def normalize_category(text: str) -> str:
    """Returns the one spelling of a category, by which photos are grouped and filtered.

    Args:
      text: as it stands in a file or request.

    Returns:
      Unicode form NFC, runs of any kind of blank as one space, none at the ends; empty where a
      placeholder such as NULL stands in place of a category.
    """
    name = " ".join(unicodedata.normalize("NFC", text).split())
    return "" if name.lower() in _PLACEHOLDERS else name


def normalize_skus(texts: Iterable[str]) -> list[str]:
    """Returns the spellings by which SKUs are looked up, without empty ones.

    Args:
      texts: as they stand in a file or on the command line.

    Returns:
      `normalize_sku` of each text that is not blank.
    """
    return [key for key in map(normalize_sku, texts) if key]
