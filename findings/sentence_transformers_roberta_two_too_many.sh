#!/usr/bin/env bash
# sentence-transformers: without a limit in its tokenizer, a RoBERTa model is given two tokens more than it has positions for.
#
# Packages: sentence-transformers 6.2.0, transformers 5.24.0, torch 2.13.0. A RoBERTa of random weights with 20 positions; its
# tokenizer names no model_max_length, as one that was made with the tokenizers library does not.
#
# The limit then is max_position_embeddings. RoBERTa's positions begin after that of padding, at 2, so a table of 514 rows serves 512
# tokens. Texts of 513 and more tokens raise an IndexError or RuntimeError, which on real data may come after hours; a BERT with the
# same tokenizer cuts them. model.max_seq_length = 512 helps, and is saved as the tokenizer's limit.
#
# Output seen (limit found, and whether texts of 18 and of 40 tokens are encoded):
#   BERT      20   yes yes
#   RoBERTa   20   yes no
#   RoBERTa   18   yes yes
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 sentence-transformers==6.2.0 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import torch
from sentence_transformers import SentenceTransformer, models
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

torch.manual_seed(0)
special = dict(bos_token="<s>", cls_token="<s>", pad_token="<pad>", eos_token="</s>", sep_token="</s>", unk_token="<unk>")
vocabulary = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *"abcdefgh"])}
words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
words.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
sizes = dict(
    vocab_size=12, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=20, pad_token_id=1,
)


def tried(name, model_of, config_of, limit=None):
    model_of(config_of(**sizes)).save_pretrained(name)
    tokenizer.save_pretrained(name)
    model = SentenceTransformer(modules=[models.Transformer(name), models.Pooling(32, "mean")], device="cpu")
    if limit:
        model.max_seq_length = limit
    done = []
    for tokens in (18, 40):
        try:
            model.encode("a " * (tokens - 2))
            done.append("yes")
        except (IndexError, RuntimeError):
            done.append("no")
    print(f"{name:9} {model.max_seq_length}  ", *done)
    return model.max_seq_length, *done


assert tried("BERT", BertModel, BertConfig) == (20, "yes", "yes")
assert tried("RoBERTa", RobertaModel, RobertaConfig) == (20, "yes", "no"), "RoBERTa's positions are counted otherwise now"
assert tried("RoBERTa", RobertaModel, RobertaConfig, 18) == (18, "yes", "yes")
PY
"$tmp/venv/bin/python" case.py
