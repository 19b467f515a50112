#!/usr/bin/env bash
# sentencepiece 0.2.3: where there are more texts than `input_sentence_size`, every process trains on
# another sample of them, and so makes another model, although `set_random_generator_seed` was given
# the same seed. Below that size the same texts give the same model, byte for byte.
#
# Output seen:
#   600 of 600 texts: equal models in five processes: True
#   200 of 600 texts: equal models in five processes: False
set -euo pipefail
work="$(mktemp -d)"; trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check sentencepiece==0.2.3
cat > "$work/train.py" <<'P'
import hashlib
import io
import itertools
import sys

import sentencepiece

letters = itertools.product("abcdefgh", "ijklmnopq", "rstuvwxyz")
texts = [f"{a}{b}{c}{a} {c}{b}{a}" for a, b, c in letters]
sentencepiece.set_random_generator_seed(7)
model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts[:600]),
    model_writer=model,
    vocab_size=60,
    hard_vocab_limit=False,
    input_sentence_size=int(sys.argv[1]),
    shuffle_input_sentence=True,
    num_threads=1,
    minloglevel=2,
)
print(hashlib.sha256(model.getvalue()).hexdigest())
P
result() {
  : > "$work/models"
  for _ in 1 2 3 4 5; do "$work/venv/bin/python" "$work/train.py" "$1" >> "$work/models" || exit 1; done
  equal=True; [ "$(sort -u "$work/models" | wc -l)" -eq 1 ] || equal=False
  echo "$1 of 600 texts: equal models in five processes: $equal"
}
[ "$(result 600)" = "600 of 600 texts: equal models in five processes: True" ]
[ "$(result 200)" = "200 of 600 texts: equal models in five processes: False" ]
echo "as described"
