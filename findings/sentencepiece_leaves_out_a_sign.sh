#!/usr/bin/env bash
# sentencepiece 0.2.3: the trainer leaves out every text with the sign U+2585 (lower five eighths
# block), which it uses itself for what is unknown; it says so only at log level 0 ("Reserved chars
# are found. Skipped"). Other block elements are ordinary signs.
#
# Output seen:
#   U+2584: letters of the text known: True
#   U+2585: letters of the text known: False
set -euo pipefail
work="$(mktemp -d)"; trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check sentencepiece==0.2.3
cat > "$work/train.py" <<'P'
import io
import sys

import sentencepiece

sign = chr(int(sys.argv[1], 16))
model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["red shoe"] * 50 + [f"cotton {sign} jacket"] * 50),
    model_writer=model,
    vocab_size=60,
    hard_vocab_limit=False,
    minloglevel=1,
)
trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
ids = trained.encode("jacket")
print(f"U+{ord(sign):04X}: letters of the text known: {trained.unk_id() not in ids}")
P
[ "$("$work/venv/bin/python" "$work/train.py" 2584)" = "U+2584: letters of the text known: True" ]
[ "$("$work/venv/bin/python" "$work/train.py" 2585)" = "U+2585: letters of the text known: False" ]
echo "as described"
