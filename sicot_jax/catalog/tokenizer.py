"""Splits titles into words and maps them to token ids: the only definition of a word."""

from __future__ import annotations

import functools
import io
import itertools
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.catalog.catalog import Tokenizer
from sicot_jax.catalog.sampling import permute
from sicot_jax.common.text import one_line_error
from sicot_jax.errors import InputError

WORDS_FILE = "words.txt"
SENTENCEPIECE_FILE = "sentencepiece.model"
PIECES_FILE = "pieces.txt"
WORD_START = "\u2581"  # how a piece begins that begins a word
# More pieces than this turn sentencepiece into a list of complete phrases.
MAX_PIECES = 32_000
_MAX_SENTENCES = 2_000_000
_MAX_SENTENCE_BYTES = 4192  # sentencepiece leaves out longer ones
_RESERVED = "\u2585"  # sentencepiece's own sign; it leaves out every sentence that holds one

_APOSTROPHE = "'\u2019\u02bc"
_APOSTROPHES = re.compile(f"[{_APOSTROPHE}]")
_ASCII_WORD = re.compile("[A-Za-z0-9][A-Za-z0-9']*")


@functools.cache
def _word_pattern(inside: str = "") -> re.Pattern[str]:
    """Returns the pattern of a word, which may hold these characters but not begin with one."""
    # `\w` leaves out combining marks, which would cut the words of Hindi, Thai or Arabic at their
    # vowels.
    marks = [
        code
        for code in range(0x300, sys.maxunicode + 1)
        if unicodedata.category(chr(code))[0] == "M"
    ]
    starts = [code for i, code in enumerate(marks) if i == 0 or marks[i - 1] != code - 1]
    ends = [code for i, code in enumerate(marks) if i == len(marks) - 1 or marks[i + 1] != code + 1]
    ranges = "".join(f"{chr(a)}-{chr(b)}" for a, b in zip(starts, ends, strict=True))
    not_first = f"(?![{inside}])" if inside else ""
    return re.compile(rf"{not_first}[^\W_](?:[^\W_]|[{ranges}{inside}])*")


def _normalize(text: str) -> str:
    if text.isascii():
        return text.lower()
    # Lower-casing may undo the composition ("İ" becomes two characters), hence NFKC twice.
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower())


def split_words(text: str) -> list[str]:
    """Splits a text into words: NFKC, lower case, runs of letters and digits of any script.

    Import, title regression, ranking features and the exported PyTorch model all follow this rule.

    Args:
      text: a title, a category, tags.

    Returns:
      The words in text order. Apostrophes join ("men's" -> "mens"), any other punctuation
      separates ("t-shirt" -> "t", "shirt") and is dropped.
    """
    normalized = _APOSTROPHES.sub("", _normalize(text))
    if normalized.isascii():
        return re.findall(r"[a-z0-9]+", normalized)
    return _word_pattern().findall(normalized)


def find_words(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Finds where the words of a text are.

    Args:
      text: a title.

    Returns:
      The text in NFKC, and (start, stop) of each word of `split_words` in it, with the apostrophes
      that the word holds.
    """
    if text.isascii():
        pattern = _ASCII_WORD
    else:
        text, pattern = unicodedata.normalize("NFKC", text), _word_pattern(_APOSTROPHE)
    return text, [match.span() for match in pattern.finditer(text)]


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def _read_lines(path: Path) -> list[str]:
    lines = path.read_bytes().decode("utf-8-sig").split("\n")[:-1]
    return [line.removesuffix("\r") for line in lines]  # an editor may have saved it again


class WordTokenizer:
    """Maps known words to ids; needs only numpy and the standard library.

    Attributes:
      vocabulary: [V] words by id; entry 0 is the padding "".

    Raises:
      ValueError: the vocabulary does not start with "".
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.vocabulary: Sequence[str] = list(vocabulary)
        if not self.vocabulary or self.vocabulary[0] != "":
            raise ValueError(
                f"vocabulary starts with {list(self.vocabulary[:1])}, wanted the padding '' "
                "as entry 0"
            )
        self._ids = {word: i for i, word in enumerate(self.vocabulary) if i}

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of the text's known words.

        Args:
          text: a title; words outside the vocabulary are left out.

        Returns:
          int32 [number of known words], 1..V-1, in text order.
        """
        return np.array(
            [self._ids[word] for word in split_words(text) if word in self._ids], dtype=np.int32
        )

    def save(self, folder: Path) -> None:
        """Writes `words.txt`: line i is word i, the first line is empty.

        Args:
          folder: an existing folder.
        """
        _write_lines(Path(folder) / WORDS_FILE, self.vocabulary)


class SentencePieceTokenizer:
    """Maps text to pieces of a sentencepiece model, for scripts without spaces between words.

    The library is loaded at the first `encode`: opening and pickling work without it.

    Attributes:
      model: the serialised sentencepiece model.
      vocabulary: [V] pieces by id; entry 0 is the padding "".
    """

    def __init__(self, model: bytes, vocabulary: Sequence[str]) -> None:
        self.model = model
        self.vocabulary: Sequence[str] = list(vocabulary)

    @functools.cached_property
    def _processor(self) -> Any:
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    def __reduce__(self) -> tuple:
        return SentencePieceTokenizer, (self.model, self.vocabulary)

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of the text's known pieces.

        Args:
          text: a title; padding and the unknown piece are left out.

        Returns:
          int32 [number of known pieces], in text order.
        """
        ids = np.array(self._processor.encode(text), dtype=np.int32)
        return ids[(ids != 0) & (ids != self._processor.unk_id())]

    def save(self, folder: Path) -> None:
        """Writes `sentencepiece.model` and its pieces, `pieces.txt`, laid out as `words.txt`.

        Args:
          folder: an existing folder.
        """
        (Path(folder) / SENTENCEPIECE_FILE).write_bytes(self.model)
        _write_lines(Path(folder) / PIECES_FILE, self.vocabulary)


def build_tokenizer(
    texts: Iterable[str],
    *,
    kind: str = "words",
    drop_top_share: float = 0.001,
    min_count: int = 3,
    max_vocabulary: int = 400_000,
    seed: int = 0,
) -> Tokenizer:
    """Builds a tokenizer from the training titles.

    Args:
      texts: training titles, of any length.
      kind: "words" (one id a word) or "sentencepiece" (a unigram model of at most
        min(max_vocabulary, 32,000) pieces; other versions of sentencepiece make other pieces).
      drop_top_share: share of the most frequent words to drop: floor(drop_top_share * W) of W
        distinct words; words only.
      min_count: rarer words are dropped; words only.
      max_vocabulary: number of words or pieces kept at most.
      seed: chooses sentencepiece's sentences where there are more than two million; a sentence is
        a title, or a part of at most 4,192 bytes.

    Returns:
      The tokenizer; word ids follow (count descending, word). Texts without a single word give
      the vocabulary [""].

    Raises:
      InputError: an argument is out of range, or sentencepiece fails.
    """
    if not 0 <= drop_top_share < 1:
        raise InputError(
            f"drop_top_share={drop_top_share}, wanted 0 <= drop_top_share < 1; the default is 0.001"
        )
    if min_count < 1 or max_vocabulary < 1:
        raise InputError(
            f"min_count={min_count}, max_vocabulary={max_vocabulary}, wanted both at least 1"
        )
    if kind == "words":
        counts = Counter(itertools.chain.from_iterable(map(split_words, texts)))
        ordered = sorted(counts, key=lambda word: (-counts[word], word))
        kept = [
            word
            for word in ordered[int(drop_top_share * len(ordered)) :]
            if counts[word] >= min_count
        ]
        return WordTokenizer(["", *kept[:max_vocabulary]])
    if kind == "sentencepiece":
        return _build_sentencepiece(texts, max_vocabulary, seed)
    raise InputError(f"tokenizer kind {kind!r}, wanted 'words' or 'sentencepiece'")


def _build_sentencepiece(texts: Iterable[str], max_vocabulary: int, seed: int) -> Tokenizer:
    sentences = _sentences(texts, seed)
    if not sentences:
        return WordTokenizer([""])
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=min(max_vocabulary, MAX_PIECES),
            hard_vocab_limit=False,  # a small catalogue has fewer pieces than asked for
            normalization_rule_name="nmt_nfkc_cf",
            max_sentence_length=_MAX_SENTENCE_BYTES,
            num_threads=4,  # a fixed number: partial sums, and with them the pieces, depend on it
            pad_id=0,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = one_line_error(error)
        more = "Vocabulary size" in reason and max_vocabulary < MAX_PIECES
        remedy = f"raise max_vocabulary={max_vocabulary} or use words" if more else "use words"
        raise InputError(f"sentencepiece failed ({reason}); {remedy}") from error
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = ["", *(processor.id_to_piece(i) for i in range(1, processor.get_piece_size()))]
    return SentencePieceTokenizer(model.getvalue(), pieces)


def _sentences(texts: Iterable[str], seed: int) -> list[str]:
    """Returns sentences that sentencepiece reads to the last one, at most `_MAX_SENTENCES`."""
    sentences = [
        part
        for text in texts
        if split_words(text)
        for part in _split_long(" ".join(text.replace(_RESERVED, " ").split()), _MAX_SENTENCE_BYTES)
    ]
    if len(sentences) <= _MAX_SENTENCES:
        return sentences
    # Drawn here: sentencepiece draws others in every process, whatever its seed.
    drawn = permute(np.arange(_MAX_SENTENCES), size=len(sentences), seed=seed, epoch=0)
    return [sentences[i] for i in np.sort(drawn)]


def _split_long(sentence: str, max_bytes: int) -> Iterator[str]:
    """Yields the sentence in parts of at most `max_bytes` bytes, cut at blanks where it has any."""
    rest = sentence.encode()
    while len(rest) > max_bytes:
        cut = rest.rfind(b" ", 1, max_bytes + 1)
        if cut < 0:
            cut = max_bytes
            while rest[cut] & 0xC0 == 0x80:  # inside a character
                cut -= 1
        yield rest[:cut].decode()
        rest = rest[cut:].lstrip()
    yield rest.decode()


def load_tokenizer(folder: Path) -> Tokenizer:
    """Reads the tokenizer that `save` wrote.

    Args:
      folder: holds `words.txt`, or `sentencepiece.model` and `pieces.txt`.

    Returns:
      The tokenizer.

    Raises:
      InputError: the folder holds neither.
    """
    folder = Path(folder)
    if (folder / WORDS_FILE).exists():
        return WordTokenizer(_read_lines(folder / WORDS_FILE))
    if (folder / SENTENCEPIECE_FILE).exists():
        return SentencePieceTokenizer(
            (folder / SENTENCEPIECE_FILE).read_bytes(), _read_lines(folder / PIECES_FILE)
        )
    raise InputError(
        f"no tokenizer in {folder}: wanted {WORDS_FILE} or {SENTENCEPIECE_FILE}; import again"
    )
