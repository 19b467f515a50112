"""Makes the words of generated titles: promotions, colours and invented words."""

from __future__ import annotations

import math

PROMOTIONS = (
    "sale", "new arrival", "free shipping", "hot", "2026", "best price", "discount",
    "limited offer", "top quality", "gift", "fast delivery", "genuine", "in stock", "bestseller",
    "wholesale", "special deal", "original", "trend", "must have", "promotion", "clearance",
    "official store", "premium", "now", "only today", "recommended", "popular",
)  # fmt: skip
COLOURS = (
    "red", "orange", "yellow", "lime", "green", "mint",
    "cyan", "azure", "blue", "violet", "magenta", "pink",
)  # fmt: skip

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def pseudo_word(number: int, syllables: int) -> str:
    """Returns a different invented word for each number below 70^syllables.

    Args:
      number: of the word.
      syllables: of the word, each a consonant and a vowel.

    Returns:
      The word.
    """
    base = len(_CONSONANTS) * len(_VOWELS)
    # The factor is prime to the base: neighbours look unlike each other.
    number = (number * 1_000_003 + 12_345) % base**syllables
    parts = []
    for _ in range(syllables):
        number, digit = divmod(number, base)
        parts.append(_CONSONANTS[digit // len(_VOWELS)] + _VOWELS[digit % len(_VOWELS)])
    return "".join(parts)


def num_syllables(count: int) -> int:
    """Returns the number of syllables that gives `count` different words, at least two.

    Args:
      count: number of words.

    Returns:
      Syllables per word.
    """
    return max(2, math.ceil(math.log(count + 1, len(_CONSONANTS) * len(_VOWELS))))
