"""Reads training titles in one of the variants of `data.title`: raw, masked, shuffled or none."""

from __future__ import annotations

import itertools
import re

import numpy as np

from sicot_jax.catalog.catalog import Catalog, Record, Split, Tokenizer
from sicot_jax.catalog.sampling import permute
from sicot_jax.catalog.tokenizer import find_words, split_words
from sicot_jax.config import Config

# Scripts written without spaces between words: Thai, Lao, Khmer, Burmese, Chinese, Japanese.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_SHUFFLE_EPOCH = (
    -1 % 2**63
)  # an epoch that training never reaches, so its order differs from theirs


class TitleVariantReader:
    """Returns the token ids of a training record's title in the variant of `data.title`.

    Variants: "raw"; "masked" (words of the SKU and the category removed); "shuffled" (the title
    of another training record) and "shuffled_within_class", both fixed by the seed; "none".

    Attributes:
      split: the training records.
      tokenizer: tokenizer of the catalogue.
      config: the data section; `title` and `max_tokens` are read.
      seed: seed of the run.
    """

    def __init__(self, catalog: Catalog, config: Config) -> None:
        self.split = catalog.splits["train"]
        self.tokenizer = catalog.tokenizer
        self.config = config.data
        self.seed = config.seed
        if self.config.title == "shuffled_within_class":
            labels = self.split.labels
            self._by_class = np.argsort(labels, kind="stable")
            self._rank = np.empty_like(self._by_class)
            self._rank[self._by_class] = np.arange(len(labels))
            classes, self._starts, self._counts = np.unique(
                labels[self._by_class], return_index=True, return_counts=True
            )
            self._class_row = np.searchsorted(classes, labels)

    def __call__(self, record: Record, index: int) -> np.ndarray:
        """Returns the title's token ids, cut or padded with 0.

        Args:
          record: record `index` of the training split.
          index: its number; query photos, which follow the split's records, have no title.

        Returns:
          int32 [max_tokens].
        """
        ids = self._ids(record, index)[: self.config.max_tokens]
        padded = np.zeros(self.config.max_tokens, np.int32)
        padded[: len(ids)] = ids
        return padded

    def _ids(self, record: Record, index: int) -> np.ndarray:
        """Returns the ids of all words of the title, int32 [words]."""
        if index >= len(self.split):  # a query photo (`SplitWithQueryPhotos`)
            return np.zeros(0, np.int32)
        match self.config.title:
            case "none":
                ids = np.zeros(0, np.int32)
            case "raw":
                ids = record["token_ids"]
            case "masked":
                text = mask_label_words(
                    f"{record['title']} {record['tags']}", f"{record['sku']} {record['category']}"
                )
                ids = self.tokenizer.encode(text)
            case _:
                ids = self.split[self._shuffled_index(index)]["token_ids"]
        return np.asarray(ids, np.int32)

    def _shuffled_index(self, index: int) -> int:
        """Returns the record whose title record `index` gets: a permutation fixed by the seed."""
        if self.config.title == "shuffled":
            order = permute(
                np.asarray([index]), size=len(self.split), seed=self.seed, epoch=_SHUFFLE_EPOCH
            )
            return int(order[0])
        # A rotation within the class: every title moves where the class has two or more.
        row = self._class_row[index]
        start, count = self._starts[row], self._counts[row]
        shift = 1 + self.seed % max(count - 1, 1)
        return int(self._by_class[start + (self._rank[index] - start + shift) % count])


class EncodedSplit:
    """Records of a split with the token ids of another tokenizer.

    Attributes:
      split: the records.
      tokenizer: maps their titles and tags to token ids.
      labels: int32 [N], class ids.
    """

    def __init__(self, split: Split, tokenizer: Tokenizer) -> None:
        self.split, self.tokenizer, self.labels = split, tokenizer, split.labels

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Record:
        record = self.split[index]
        ids = self.tokenizer.encode(f"{record['title']} {record['tags']}")
        return Record(**{**record, "token_ids": ids})  # type: ignore[typeddict-item]


def mask_label_words(title: str, label_text: str) -> str:
    """Removes the words of a label (SKU and category) from a title.

    Singular and plural are one word ("dresses", "dress"), and so are a word and its split or
    hyphenated spelling ("tshirts", "T-shirt"). In scripts without spaces the label's words are
    also cut out of longer runs.

    Args:
      title: the title, with its tags.
      label_text: text whose words must not remain.

    Returns:
      The title with a space in place of each of these words, otherwise as it was: a tokenizer that
      cuts text into pieces sees the rest as in an unmasked title. A title that loses a word is in
      NFKC, one that loses none is returned unchanged.
    """
    label_words = split_words(label_text)
    joined = [a + b for a, b in itertools.pairwise(label_words)]
    masked = set().union(*(_singular_forms(word) for word in (*label_words, *joined)))
    text, spans = find_words(title)
    words = split_words(title)
    hidden = [
        span
        for word, span in zip(words, spans, strict=True)
        if not masked.isdisjoint(_singular_forms(word))
    ]
    for i, (a, b) in enumerate(itertools.pairwise(words)):
        if not masked.isdisjoint(_singular_forms(a + b)):
            hidden.append((spans[i][0], spans[i + 1][1]))
    for word in filter(_UNSPACED.search, label_words):
        hidden += [match.span() for match in re.finditer(re.escape(word), text, re.IGNORECASE)]
    if not hidden:
        return title
    kept, end = [], 0
    for start, stop in sorted(hidden):
        kept.append(text[end:start])
        end = max(end, stop)
    return " ".join((*kept, text[end:]))


def _singular_forms(word: str) -> set[str]:
    """Returns the word and what it may be the plural of; equal articles share a form."""
    forms = {word}
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        forms.add(word[:-1])
        if word.endswith(("ses", "xes", "zes", "ches", "shes", "oes")):
            forms.add(word[:-2])
        if word.endswith("ies"):
            forms.add(word[:-3] + "y")
        if word.endswith("ves"):
            forms.update((word[:-3] + "f", word[:-3] + "fe"))
    return forms
