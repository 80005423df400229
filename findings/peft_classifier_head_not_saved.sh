#!/usr/bin/env bash
# PEFT: an adapter of a DeBERTa or XLNet classifier gives other scores after it was saved and loaded, since a part of the
# classifier's head is neither trained nor saved.
#
# Packages: peft 0.21.2, transformers 5.24.0, torch 2.13.0. Encoders of random weights, saved without a head, as those on the
# Hub are; LoRA with task_type="SEQ_CLS".
#
# For this task PEFT trains and saves the new head by itself: the modules named `classifier` or `score`. DeBERTa's
# classifier reads a pooler, whose weights are new as well but belong to no encoder's file: they stay as they were drawn, are not
# in the adapter, and are drawn again when the adapter is loaded onto the encoder. XLNet's head has other names, so
# nothing of it is trained or saved. BERT's pooler is in the encoder's file. Way out: name such modules in modules_to_save
# (["classifier", "pooler"] here, ["sequence_summary", "logits_proj"] for XLNet).
#
# Output seen:
#                 trained besides LoRA            scores before, and after loading
#   BERT          classifier                      equal
#   DeBERTa       classifier                      differ by 0.001
#   XLNet         nothing                         differ by 0.02
#   DeBERTa with modules_to_save                  equal
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.manual_seed(0)
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
CASES = {
    "Bert": (SIZES, ["query", "value"]),
    "DebertaV2": (SIZES | {"pooler_hidden_size": 32}, ["query_proj", "value_proj"]),
    "XLNet": ({"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 64, "vocab_size": 50}, ["layer_1", "layer_2"]),
}
ids = torch.tensor([[3, 4, 5, 6]])


def scores(name: str, more: list[str] | None) -> tuple[set[str], float]:
    """What is trained besides LoRA, and how far the scores move when the adapter is saved and loaded."""
    settings, targets = CASES[name]
    folder = f"{name}-{more}"
    getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings)).save_pretrained(folder)
    classifier = getattr(transformers, f"{name}ForSequenceClassification")
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=targets, modules_to_save=more)
    model = get_peft_model(classifier.from_pretrained(folder, num_labels=2), lora)
    names = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(ids, labels=torch.tensor([1])).loss.backward()
    optimizer.step()
    model.save_pretrained(f"{folder}-adapter")
    loaded = PeftModel.from_pretrained(classifier.from_pretrained(folder, num_labels=2), f"{folder}-adapter")
    with torch.no_grad():
        moved = (loaded.eval()(ids).logits - model.eval()(ids).logits).abs().max().item()
    return {n.removeprefix("base_model.model.").split(".")[0] for n in names}, moved


seen = {}
for name, more in (("Bert", None), ("DebertaV2", None), ("XLNet", None), ("DebertaV2", ["classifier", "pooler"])):
    trained, moved = seen[name, bool(more)] = scores(name, more)
    print(f"{name:10} trained besides LoRA: {', '.join(sorted(trained)) or 'nothing':20} scores differ by {moved:.3g}")
assert seen["Bert", False] == ({"classifier"}, 0.0)
assert seen["DebertaV2", True] == ({"classifier", "pooler"}, 0.0)
assert seen["DebertaV2", False][0] == {"classifier"} and seen["DebertaV2", False][1] > 1e-4, "PEFT saves the pooler now"
assert not seen["XLNet", False][0] and seen["XLNet", False][1] > 1e-4, "PEFT knows XLNet's head now"
PY
"$tmp/venv/bin/python" case.py
