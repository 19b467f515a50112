"""The semantic stream in plain PyTorch: titles in, embeddings and the weight of each word out.

    encoder = SicotTextEncoder.from_pretrained("exported")
    embedding, weights = encoder(encoder.token_ids(["red cotton shirt"]))

Needs torch and safetensors, and sentencepiece where the vocabulary consists of pieces. Photos are
recognised without it; with `model.py` of the same folder the logits of the mixed stream are
`recognizer.fc(torch.maximum(recognizer.embed(images), embedding))`. `sicot convert to-torch
--with-text` writes this file next to the weights; edit it as you like.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn


class SicotTextEncoder(nn.Module):
    """Embeds titles: ReLU(BN(W e)), e the weighted mean of the word vectors.

    The embedding of a title without a known word is zero.
    """

    def __init__(self, text: dict[str, Any], num_words: int, tokenizer: Callable[[str], list[int]]):
        """Builds the stream with initial weights.

        Args:
          text: "encoder" (mean, lstm, lstm_attention, bilinear, low_rank, bilinear_form or dot),
            "windows", "hidden", "weighting" (softmax or sigmoid), "word_width",
            "embedding_width" and "max_tokens".
          num_words: Size of the vocabulary, with the padding word 0.
          tokenizer: Title -> ids from 1 on.
        """
        super().__init__()
        self.text, self.tokenizer = text, tokenizer
        encoder, width, hidden = text["encoder"], text["word_width"], text["hidden"]
        self.words = nn.Embedding(num_words, width)
        self.lstm: Any = None
        self.first: Any = None
        self.second: Any = None
        self.out: Any = None
        if encoder.startswith("lstm"):
            self.lstm = nn.LSTM(width, width // 2, batch_first=True, bidirectional=True)
        if encoder == "lstm_attention":
            self.first = nn.Linear(width, hidden, bias=False)
            self.out = nn.Linear(hidden, 1, bias=False)
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
    def from_pretrained(cls, folder: str | Path) -> SicotTextEncoder:
        """Loads the semantic stream of a folder of `sicot convert to-torch --with-text`.

        Args:
          folder: The folder.

        Returns:
          The stream, in evaluation mode.
        """
        folder = Path(folder)
        text = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))["text"]
        weights = load_file(folder / "text.safetensors")
        encoder = cls(text, len(weights["words.weight"]), read_tokenizer(folder))
        counters = {
            name: tensor
            for name, tensor in encoder.state_dict().items()
            if name.endswith(".num_batches_tracked")
        }
        encoder.load_state_dict(weights | counters)
        return encoder.eval()

    def token_ids(self, titles: list[str]) -> torch.Tensor:
        """Tokenizes titles.

        Args:
          titles: B titles.

        Returns:
          Int64 [B, max_tokens], padded with 0; unknown words are left out.
        """
        ids = torch.zeros((len(titles), self.text["max_tokens"]), dtype=torch.int64)
        for row, title in zip(ids, titles, strict=True):
            known = self.tokenizer(title)[: ids.shape[1]]
            row[: len(known)] = torch.tensor(known, dtype=torch.int64)
        return ids

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes embeddings and the weight of each word.

        Args:
          ids: Output of `token_ids`, int64 [B, T].

        Returns:
          Embeddings [B, D] and word weights [B, T].
        """
        mask = ids > 0
        words = self.words(ids)
        if self.lstm is not None:
            words = self._lstm_states(words, mask)
        if self.text["encoder"] in ("mean", "lstm"):
            scores, weighting = torch.zeros_like(words[..., 0]), "softmax"
        else:
            scores, weighting = self._scores(words, mask), self.text["weighting"]
        weights = word_weights(scores, mask, weighting)
        title = torch.einsum("bt,bte->be", weights, words)
        embedding = torch.relu(self.projection_norm(self.projection(title)))
        return torch.where(mask.any(1, keepdim=True), embedding, 0.0), weights

    def _lstm_states(self, words: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        # Known words come first; a title without one is masked below.
        lengths = mask.sum(1).clamp(min=1)
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


def word_weights(scores: torch.Tensor, mask: torch.Tensor, weighting: str) -> torch.Tensor:
    """Turns the scores of words into weights.

    Args:
      scores: Scores [B, T].
      mask: Mask of the ids that are words, bool [B, T].
      weighting: "softmax" over the words, or "sigmoid" of each divided by their number.

    Returns:
      Weights [B, T], 0 where there is no word.
    """
    if weighting == "sigmoid":
        return torch.where(mask, scores.sigmoid(), 0.0) / mask.sum(1, keepdim=True).clamp(min=1)
    lowest = torch.finfo(scores.dtype).min
    return torch.where(mask, scores.masked_fill(~mask, lowest).softmax(-1), 0.0)


def read_tokenizer(folder: Path) -> Callable[[str], list[int]]:
    """Reads the vocabulary of a folder.

    Args:
      folder: Folder with `words.txt` or `sentencepiece.model`.

    Returns:
      Function from a title to ids; unknown words are left out.
    """
    if (folder / "words.txt").exists():
        lines = (folder / "words.txt").read_bytes().decode().split("\n")[:-1]
        index = {word: i for i, word in enumerate(lines) if i}
        return lambda title: [index[word] for word in split_words(title) if word in index]
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.model"))
    return lambda title: [i for i in processor.encode(title) if i not in (0, processor.unk_id())]


_APOSTROPHES = re.compile("['\u2019\u02bc]")
_MARKS = "".join(
    chr(i) for i in range(0x300, sys.maxunicode + 1) if unicodedata.category(chr(i))[0] == "M"
)
_WORD = re.compile(rf"[^\W_](?:[^\W_]|[{_MARKS}])*")


def split_words(title: str) -> list[str]:
    """Splits a title into words: NFKC, lower case, letters and digits of any script.

    Args:
      title: The title.

    Returns:
      Its words in order; apostrophes join words, other punctuation separates them.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", title).lower())
    return _WORD.findall(_APOSTROPHES.sub("", text))
