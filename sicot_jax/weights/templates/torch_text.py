"""The semantic stream in plain PyTorch: titles in, embeddings and the weight of each word out.

Needs torch, safetensors, and sentencepiece where the vocabulary is one of pieces.

    stream = SemanticStream.from_pretrained("exported")
    embedding, weights = stream(stream.ids(["red cotton shirt"]))

Recognising photos does not need it; with `model.py` of the same folder the mixed stream is
`recognizer.fc(torch.maximum(recognizer.embed(images), embedding))`. Written beside the weights by
`sicot convert to-torch
--with-text`; change it as you like.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn


class SemanticStream(nn.Module):
    """s = ReLU(BN(W e)), e the words' vectors weighted by one of the encoders; zero for a title
    without a known word.

    text: encoder (mean, lstm, lstm_attention, bilinear, low_rank, bilinear_form, dot), windows,
      hidden, weighting (softmax or
      sigmoid), word_width, embedding_width and max_tokens.
    tokenizer: a title -> list of ids, 1 and more.
    """

    def __init__(self, text: dict, words: int, tokenizer):
        super().__init__()
        self.text, self.tokenizer = text, tokenizer
        encoder, width, hidden = text["encoder"], text["word_width"], text["hidden"]
        self.words = nn.Embedding(words, width)
        self.lstm: Any = None
        self.first: Any = None
        self.second: Any = None
        self.out: Any = None
        if encoder.startswith("lstm"):
            self.lstm = nn.LSTM(width, width // 2, batch_first=True, bidirectional=True)
        if encoder == "lstm_attention":
            self.first, self.out = (
                nn.Linear(width, hidden, bias=False),
                nn.Linear(hidden, 1, bias=False),
            )
        elif encoder == "bilinear":
            self.first = nn.Linear(text["windows"] ** 2, hidden)
            self.out = nn.Linear(hidden, 1, bias=text["weighting"] == "sigmoid")
        elif encoder == "low_rank":
            self.first, self.second = (nn.Linear(width, hidden, bias=False) for _ in range(2))
            self.out = nn.Linear(hidden, 1, bias=False)
        elif encoder == "bilinear_form":
            self.first = nn.Linear(width, width, bias=False)
        self.projection = nn.Linear(width, text["embedding_width"], bias=False)
        self.projection_norm = nn.BatchNorm1d(text["embedding_width"])

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SemanticStream:
        """The semantic stream in a folder of `sicot convert to-torch --with-text`, ready for
        titles.
        """
        folder = Path(folder)
        text = json.loads((folder / "config.json").read_text())["text"]
        weights = load_file(folder / "text.safetensors")
        stream = cls(text, len(weights["words.weight"]), read_tokenizer(folder))
        counters = {
            name: x
            for name, x in stream.state_dict().items()
            if name.endswith(".num_batches_tracked")
        }
        stream.load_state_dict(weights | counters)
        return stream.eval()

    def ids(self, titles: list[str]) -> torch.Tensor:
        """Titles -> int64 [B, max_tokens], padded with 0; unknown words are left out."""
        rows = torch.zeros((len(titles), self.text["max_tokens"]), dtype=torch.int64)
        for row, title in zip(rows, titles, strict=True):
            known = self.tokenizer(title)[: rows.shape[1]]
            row[: len(known)] = torch.tensor(known, dtype=torch.int64)
        return rows

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [B, T] -> embeddings [B, D], weights of the words [B, T]."""
        mask = ids > 0
        words = self.words(ids)
        if self.lstm is not None:
            words = self._states(words, mask)
        if self.text["encoder"] in ("mean", "lstm"):
            scores, weighting = torch.zeros_like(words[..., 0]), "softmax"
        else:
            scores, weighting = self._scores(words, mask), self.text["weighting"]
        weights = weigh(scores, mask, weighting)
        embedding = torch.relu(
            self.projection_norm(self.projection(torch.einsum("bt,bte->be", weights, words)))
        )
        return torch.where(mask.any(1, keepdim=True), embedding, 0.0), weights

    def _states(self, words: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        lengths = mask.sum(1).clamp(
            min=1
        )  # known words come first; a title without one is masked below
        packed = nn.utils.rnn.pack_padded_sequence(
            words, lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        states, _ = nn.utils.rnn.pad_packed_sequence(
            self.lstm(packed)[0], batch_first=True, total_length=words.shape[1]
        )
        return states * mask[..., None]

    def _scores(self, words: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        encoder = self.text["encoder"]
        if encoder == "lstm_attention":
            return self.out(torch.tanh(self.first(words)))[..., 0]
        context = (words * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        if encoder == "bilinear":
            windows = self.text["windows"]
            left, right = (x.unflatten(-1, (windows, -1)).mean(-1) for x in (context, words))
            outer = left[:, None, :, None] * right[:, :, None, :] * (words.shape[-1] // windows)
            return self.out(torch.tanh(self.first(outer.flatten(2))))[..., 0]
        if encoder == "low_rank":
            return self.out(torch.tanh(self.first(context)[:, None] * self.second(words)))[..., 0]
        if encoder == "bilinear_form":
            return torch.einsum("be,bte->bt", self.first(context), words)
        return torch.einsum("be,bte->bt", context, words) / words.shape[-1] ** 0.5


def weigh(scores: torch.Tensor, mask: torch.Tensor, weighting: str) -> torch.Tensor:
    """Scores [B, T] -> weights: softmax over the known words, or the sigmoid of each divided by
    their number.
    """
    if weighting == "sigmoid":
        return torch.where(mask, scores.sigmoid(), 0.0) / mask.sum(1, keepdim=True).clamp(min=1)
    lowest = torch.finfo(scores.dtype).min
    return torch.where(mask, scores.masked_fill(~mask, lowest).softmax(-1), 0.0)


def read_tokenizer(folder: Path):
    """A title -> list of ids, by the folder's `words.txt` or `sentencepiece.model`."""
    if (folder / "words.txt").exists():
        lines = (folder / "words.txt").read_bytes().decode().split("\n")[:-1]
        places = {word: i for i, word in enumerate(lines) if i}
        return lambda title: [places[word] for word in split_words(title) if word in places]
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.model"))
    return lambda title: [i for i in processor.encode(title) if i not in (0, processor.unk_id())]


_APOSTROPHES = re.compile("['\u2019\u02bc]")
_MARKS = "".join(
    chr(i) for i in range(0x300, sys.maxunicode + 1) if unicodedata.category(chr(i))[0] == "M"
)
_WORD = re.compile(rf"[^\W_](?:[^\W_]|[{_MARKS}])*")


def split_words(title: str) -> list[str]:
    """Words in order: NFKC, lower case, letters and digits of any script; apostrophes join, other
    punctuation separates.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", title).lower())
    return _WORD.findall(_APOSTROPHES.sub("", text))
