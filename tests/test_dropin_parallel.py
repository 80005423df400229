"""Copies that torch and PEFT make of an accelerated model: replicas on several devices, adapters around its layers."""

import copy
import gc
import importlib
import weakref

import pytest
import torch

import fastbert
from fastbert.dropin.forward import Forward
from fastbert.testing import assert_within_budget, relative_rms

transformers = pytest.importorskip("transformers", reason="its models are accelerated")

pytestmark = pytest.mark.native

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def build() -> torch.nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(initializer_range=0.2, **SIZES))


def batch_of() -> dict[str, torch.Tensor]:
    mask = torch.arange(13) < torch.tensor([13, 7, 2, 4])[:, None]
    ids = torch.where(mask, torch.randint(5, 60, (4, 13)), 0)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.tensor([0, 1, 1, 0])}


# ---- nn.DataParallel -------------------------------------------------------------------------------------


@pytest.fixture
def replicate(monkeypatch):
    """torch's `replicate`, with copies on this device instead of a broadcast to two GPUs."""
    module = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)

    def broadcast(tensors, devices, detach=False):
        return [[t.detach().clone() if detach else t.clone() for t in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    return module.replicate


def test_replicas_run_their_own_weights(replicate):
    """torch copies a module's `__dict__`: a `forward` in it would stay bound to the first module's weights."""
    ours = fastbert.accelerate(build(), impl="native")
    replicas = replicate(ours, [0, 1])
    for replica in replicas:
        mine = {id(m) for m in replica.modules()}
        forwards = [m.__dict__["forward"] for m in replica.modules() if "forward" in m.__dict__]
        assert len(forwards) == 4  # of the head, the encoder and two layers
        assert all(isinstance(f, Forward) and id(f.module) in mine for f in forwards)
    batch = batch_of()
    expected = ours(**batch).logits
    with torch.no_grad():
        for p in ours.parameters():
            p.zero_()
    for replica in replicas:
        torch.testing.assert_close(replica(**batch).logits, expected)
        assert not replica.bert.forward.warned


def test_gradients_flow_from_replicas(replicate):
    plain = build()
    ours, truth = fastbert.accelerate(copy.deepcopy(plain), impl="native"), copy.deepcopy(plain).double()
    batch = batch_of()
    halves = [{name: t[i : i + 2] for name, t in batch.items()} for i in (0, 2)]
    sum(r(**half).loss for r, half in zip(replicate(ours, [0, 1]), halves, strict=True)).backward()
    for model in (plain, truth):
        sum(model(**half).loss for half in halves).backward()
    grads = [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (ours, plain, truth)]
    assert_within_budget(*grads, name="all gradients")


def test_restore_removes_everything():
    model = build()
    before = [set(m.__dict__) for m in model.modules()]
    fastbert.restore(fastbert.accelerate(model, impl="native"))
    assert [set(m.__dict__) for m in model.modules()] == before


@pytest.mark.parametrize("called", [False, True])
def test_a_restored_model_is_freed_at_once(called):
    """What an inspection saw held the modules and, through their attributes, itself: after `restore` and `del`, the
    weights stayed until the garbage collector ran."""
    gc.collect()
    model = fastbert.accelerate(build(), impl="native")
    if called:
        with torch.no_grad():
            model(**batch_of())
    fastbert.restore(model)
    gc.disable()
    try:
        weight = weakref.ref(model.bert.encoder.layer[0].output.dense)
        del model
        assert weight() is None
    finally:
        gc.enable()


# ---- PEFT ------------------------------------------------------------------------------------------------


def with_lora(model: torch.nn.Module, targets: tuple[str, ...]) -> torch.nn.Module:
    peft = pytest.importorskip("peft", reason="makes the adapters")
    torch.manual_seed(1)  # the same adapters for each
    config = peft.LoraConfig(r=4, target_modules=list(targets), task_type="SEQ_CLS", init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("targets", [("query", "value"), ("query", "key", "value", "dense")], ids=["some", "all"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_adapters(order, targets):
    """Accelerated before or after PEFT: outputs, gradients, and the merged model."""
    base, batch = build(), batch_of()
    plain = with_lora(copy.deepcopy(base), targets).eval()
    if order == "before":
        ours = with_lora(fastbert.accelerate(copy.deepcopy(base), impl="native"), targets).eval()
    else:
        ours = fastbert.accelerate(with_lora(copy.deepcopy(base), targets).eval(), impl="native")
    truth = copy.deepcopy(plain).double()
    models = (ours, plain, truth)
    outputs = [m(**batch) for m in models]
    error, allowed = (relative_rms(o.logits, outputs[2].logits) for o in outputs[:2])
    assert error <= max(2 * allowed, 4 * torch.finfo(torch.float32).eps)  # eight numbers may be right by luck

    grads = []
    for model, output in zip(models, outputs, strict=True):
        trained = [p for p in model.parameters() if p.requires_grad]
        assert 0 < len(trained) < len(list(model.parameters()))
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(output.loss, trained)]))
    assert_within_budget(*grads, name="all gradients")
    report = str(fastbert.explain(ours))
    assert "called as it is: a Linear" in report
    assert not ours.base_model.model.bert.forward.warned

    merged = [m.merge_and_unload() for m in models]
    assert "q, k, v in one product, attention, feed_forward" in str(fastbert.explain(merged[0]))
    with torch.no_grad():
        torch.testing.assert_close(merged[0](**batch).logits, merged[1](**batch).logits, atol=1e-5, rtol=1e-4)


def test_adapter_through_the_model_itself(monkeypatch):
    peft = pytest.importorskip("peft", reason="makes the adapters")
    # transformers 5.24 asks for a PEFT version that is not published; the one before has what it calls
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.14.0")
    plain, batch = build().eval(), batch_of()
    ours = fastbert.accelerate(copy.deepcopy(plain), impl="native")
    for model in (ours, plain):
        torch.manual_seed(1)
        model.add_adapter(peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights=False))
    torch.testing.assert_close(ours(**batch).logits, plain(**batch).logits, atol=1e-5, rtol=1e-4)
    ours.disable_adapters()
    plain.disable_adapters()
    torch.testing.assert_close(ours(**batch).logits, plain(**batch).logits, atol=1e-5, rtol=1e-4)


# ---- loss scaling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2.0**10, 2.0**126], ids=["finite", "overflows"])
def test_gradient_scaler(scale):
    """GradScaler makes a step if gradients are finite; otherwise it skips the step and halves its scale."""
    plain, batch = build(), batch_of()
    ours = fastbert.accelerate(copy.deepcopy(plain), impl="native")
    after = []
    for model in (ours, plain):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch).loss
            scaler.scale(loss * 8).backward()
            scaler.step(optimizer)
            scaler.update()
        after.append((scaler.get_scale(), model.classifier.weight.detach()))
    assert after[0][0] == after[1][0]
    assert (after[0][0] < scale) == (scale > 2.0**100)
    torch.testing.assert_close(after[0][1], after[1][1], atol=2e-2, rtol=2e-2)
