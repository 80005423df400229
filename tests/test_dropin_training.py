"""Training accelerated models: checkpointing, dropout, autocast, one graph, the Trainer, parallel wrappers."""

import copy
from collections import defaultdict

import pytest
import torch

import fastbert
from dropin_models import MASKS, WIDTH, batch_of, build, three
from fastbert.dropin import layer as dropin_layer
from fastbert.testing import assert_within_budget, relative_rms

transformers = pytest.importorskip("transformers", reason="its models are accelerated")
pytestmark = pytest.mark.native


def losses_of(model: torch.nn.Module, batch: dict, steps: int = 3) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.filterwarnings("ignore")
def test_gradient_checkpointing_changes_nothing_but_memory(reentrant):
    """With dropout: a recomputed layer draws the same masks, because these depend only on the seed."""
    model = build("bert", "ForSequenceClassification", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    ours = fastbert.accelerate(model, impl="native").train()
    ours.enable_input_require_grads()  # as checkpointing does: its hook needs the word embeddings to be called
    checkpointed = copy.deepcopy(ours)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    batch = batch_of(ours, MASKS["right"]) | {"labels": torch.randint(0, 2, (4,))}
    runs = defaultdict(int)

    def counted(name):
        original = getattr(dropin_layer, name)

        def call(*args):
            runs[name] += 1
            return original(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("run", "run_for_first"):
            patch.setattr(dropin_layer, name, counted(name))
        once = losses_of(checkpointed, batch, steps=1)
    # forward, and again in backward: the first layer, and the last, of which the head reads only first tokens
    assert runs == {"run": 2, "run_for_first": 2}
    # reentrant checkpointing runs the forward pass without gradients, by products that round otherwise
    torch.testing.assert_close(once, losses_of(ours, batch, steps=1), rtol=1e-6, atol=1e-6)


def test_dropout_drops():
    model = build("bert", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    ours = fastbert.accelerate(model, impl="native").train()
    batch = batch_of(ours, MASKS["right"])

    def run(seed):
        torch.manual_seed(seed)
        return ours(**batch).last_hidden_state

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    mean = torch.stack([run(seed).detach() for seed in range(200)]).mean(0)
    theirs = fastbert.restore(copy.deepcopy(ours))
    other = torch.stack([theirs(**batch).last_hidden_state.detach() for _ in range(200)]).mean(0)
    assert relative_rms(mean[MASKS["right"]], other[MASKS["right"]]) < 0.2


def test_dropout_in_evaluation_mode():
    """Monte Carlo dropout: the model is in evaluation mode, its dropout modules are not."""
    ours = fastbert.accelerate(build("bert", hidden_dropout_prob=0.3), impl="native")
    batch = batch_of(ours, MASKS["right"])
    outputs = []
    for on in (False, True, True, False):
        for module in ours.modules():
            if isinstance(module, torch.nn.Dropout):
                module.train(on)
        outputs.append(ours(**batch).last_hidden_state)
    assert torch.equal(outputs[0], outputs[3])
    assert not any(torch.equal(a, b) for a, b in ((outputs[0], outputs[1]), (outputs[1], outputs[2])))


@pytest.mark.parametrize("family", ["bert", "electra", "modernbert"])
def test_autocast(family):
    """The hidden states have the dtype of the layers' input: bfloat16 after a projection, float32 after a LayerNorm."""
    ours, plain, truth = three(build(family))
    batch, mask = batch_of(plain, MASKS["right"]), MASKS["right"]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [m(**batch).last_hidden_state for m in (ours, plain)]
    assert outputs[0].dtype == outputs[1].dtype
    assert_within_budget(*(o[mask] for o in (*outputs, truth(**batch).last_hidden_state)))


@pytest.mark.parametrize("family", ["bert", "mpnet"])
@pytest.mark.filterwarnings("ignore")
def test_compiles_in_one_graph(family):
    """In one graph with its loss, for changing lengths, with and without a mask; the gradients are the same."""
    model = build(family, "ForSequenceClassification", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ours = fastbert.accelerate(model, impl="native")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for mask in ("none", "right"):
        batch = batch_of(ours, MASKS[mask]) | {"labels": torch.tensor([0, 1, 1, 0])}
        losses = [of(**batch).loss for of in (compiled, ours)]
        torch.testing.assert_close(*losses)
        grads = [torch.autograd.grad(loss, list(ours.parameters())[:20], allow_unused=True) for loss in losses]
        torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-3)


def test_trainer_draws_the_same_loss_curve(tmp_path):
    """20 steps of transformers' Trainer from one seed without dropout, compared with the curve in float64."""
    pytest.importorskip("accelerate", reason="Trainer needs it")
    model = build("bert", "ForSequenceClassification", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    texts = [torch.randint(5, 60, (int(n),)) for n in torch.randint(3, WIDTH, (48,))]
    examples = [{"input_ids": text.tolist(), "labels": int(text.sum()) % 2} for text in texts]

    def collate(rows):
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids != 0).long(),
                "labels": torch.tensor([row["labels"] for row in rows])}  # fmt: skip

    def curve(of: torch.nn.Module) -> torch.Tensor:
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=20, learning_rate=1e-3, logging_steps=1, report_to="none", use_cpu=True, seed=5,
            per_device_train_batch_size=8, save_strategy="no", disable_tqdm=True, optim="sgd",
        )  # fmt: skip
        losses = []

        class Recorder(transformers.Trainer):
            def compute_loss(self, model, inputs, *args, **kwargs):  # logs are rounded to four digits
                loss = super().compute_loss(model, inputs, *args, **kwargs)
                losses.append(loss.item())
                return loss

        Recorder(of, arguments, train_dataset=examples, data_collator=collate).train()
        return torch.tensor(losses, dtype=torch.float64)

    ours, plain, truth = three(model)
    curves = [curve(m) for m in (ours, plain, truth)]
    assert len(curves[0]) == 20
    assert curves[2][0] != curves[2][-1]
    assert relative_rms(curves[0], curves[2]) <= 2 * relative_rms(curves[1], curves[2]) + 1e-6


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
@pytest.mark.filterwarnings("ignore")
def test_data_parallel_wrappers(wrap, one_process):
    """Layers are called as modules, so hooks that gather a sharded layer before its forward still run."""
    ours, plain, _ = three(build("bert", "ForSequenceClassification"))
    batch = batch_of(plain, MASKS["right"]) | {"labels": torch.randint(0, 2, (4,))}
    if wrap == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(ours)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (1,))
        for layer in ours.bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(ours, mesh=mesh)
    loss, expected = wrapped(**batch).loss, plain(**batch).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert not ours.bert.forward.warned
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if q.grad is not None:
            mine = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            torch.testing.assert_close(mine, q.grad, atol=1e-5, rtol=1e-3, msg=name)
