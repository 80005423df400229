#!/usr/bin/env bash
# transformers: AutoTokenizer of a BERT folder keeps tokenizer.json's vocabulary and drops its normalizer and pre-tokenizer.
#
# Packages: transformers 5.24.0, tokenizers 0.23.3. The folder holds config.json ("bert"), tokenizer_config.json ("BertTokenizer"),
# vocab.txt and a tokenizer.json that splits on white space only.
#
# tokenizer.json is the whole pipeline, and up to transformers 4 AutoTokenizer loaded it as it is. In 5 the class BertTokenizer
# builds BERT's own normalizer and pre-tokenizer again. A model that was trained with another pre-tokenizer gets other tokens,
# without a warning; PreTrainedTokenizerFast still reads the file of the same folder.
#
# Output seen:
#   tokenizer.json itself     [CLS] Hello a-b world [SEP]
#   AutoTokenizer             [CLS] Hello a - b world [SEP]
#   PreTrainedTokenizerFast   [CLS] Hello a-b world [SEP]
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

folder = Path("bert")
folder.mkdir()
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Hello", "world", "a-b", "a", "-", "b"]
(folder / "vocab.txt").write_text("\n".join(words) + "\n")
(folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
(folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": False}))
tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
)
tokenizer.save(str(folder / "tokenizer.json"))

text = "Hello a-b world"
auto, fast = AutoTokenizer.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
rows = {
    "tokenizer.json itself": tokenizer.encode(text).tokens,
    "AutoTokenizer": auto.convert_ids_to_tokens(auto(text)["input_ids"]),
    "PreTrainedTokenizerFast": fast.convert_ids_to_tokens(fast(text)["input_ids"]),
}
for name, tokens in rows.items():
    print(f"{name:25} {' '.join(tokens)}")
assert rows["tokenizer.json itself"] == rows["PreTrainedTokenizerFast"]
assert rows["AutoTokenizer"] == ["[CLS]", "Hello", "a", "-", "b", "world", "[SEP]"], "AutoTokenizer reads the pipeline now"
PY
"$tmp/venv/bin/python" case.py
