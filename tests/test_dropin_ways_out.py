"""Export and tracing of accelerated models, changes made after `accelerate`, int8, pipelines."""

import copy
import warnings

import pytest
import torch

import fastbert
from fastbert.testing import relative_rms

transformers = pytest.importorskip("transformers", reason="its models are accelerated")

pytestmark = pytest.mark.native

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40, "initializer_range": 0.2,
}  # fmt: skip
MASK = torch.arange(13) < torch.tensor([13, 7, 2, 4])[:, None]


def pair(**settings) -> tuple[torch.nn.Module, torch.nn.Module]:
    plain = transformers.BertModel(transformers.BertConfig(**SIZES, **settings)).eval()
    return fastbert.accelerate(copy.deepcopy(plain), impl="native"), plain


def batch_of(mask: torch.Tensor = MASK) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(5, 60, mask.shape), "attention_mask": mask.long()}


def assert_same(ours, plain, mask: torch.Tensor = MASK) -> None:
    torch.testing.assert_close(ours.last_hidden_state[mask], plain.last_hidden_state[mask], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.pooler_output, plain.pooler_output, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not_strict"])
@pytest.mark.filterwarnings("ignore")
def test_export(strict):
    """An exported program keeps padding, so it also holds for other masks."""
    ours, plain = pair()
    program = torch.export.export(ours, (), kwargs=batch_of(), strict=strict)
    other = MASK.flip(0)
    batch = batch_of(other)
    assert_same(program.module()(**batch), plain(**batch), other)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_records_the_original():
    """A trace keeps the branches of one batch, so packing would be wrong for the next one."""
    ours, plain = pair(return_dict=False)
    batch = batch_of()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(ours, tuple(batch.values()), strict=False)
    assert "torch.jit.trace is running" in str(fastbert.explain(ours))
    mask = torch.arange(9) >= torch.tensor([0, 5])[:, None]
    other = batch_of(mask)
    torch.testing.assert_close(traced(*other.values())[0][mask], plain(**other)[0][mask])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_of_torchs_encoder_records_the_original():
    layer = torch.nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    plain = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    ours = fastbert.accelerate(copy.deepcopy(plain), impl="native")
    x = torch.randn(4, 13, 32)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(ours, (x,), check_trace=False)
        assert "torch.jit.trace is running" in str(fastbert.explain(ours))
        torch.testing.assert_close(traced(x[:2] + 1), plain(x[:2] + 1), atol=1e-5, rtol=1e-4)


def test_a_layer_replaced_afterwards():
    ours, plain = pair()
    for model in (ours, plain):
        model.encoder.layer[1] = copy.deepcopy(plain.encoder.layer[0])
    batch = batch_of()
    with pytest.warns(UserWarning, match="a BertLayer is in place of an accelerated layer"):
        first = ours(**batch)
    assert_same(first, plain(**batch))
    fastbert.accelerate(ours, impl="native")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(ours(**batch), plain(**batch))


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_layer_in_a_checkpoint_wrapper():
    """torch's wrapper calls the wrapped layer."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    ours, plain = pair()
    ours.encoder.layer[1] = checkpoint_wrapper(ours.encoder.layer[1])
    batch = batch_of()
    assert_same(ours(**batch), plain(**batch))


def test_layers_removed_afterwards():
    ours, plain = pair()
    for model in (ours, plain):
        model.encoder.layer = model.encoder.layer[:1]
    batch = batch_of()
    assert_same(ours(**batch), plain(**batch))


def test_feed_forward_in_chunks():
    """Chunks limit the memory of the feed-forward layer without changing results; packed tokens need none."""
    ours, plain = pair()
    ours.config.chunk_size_feed_forward = plain.config.chunk_size_feed_forward = 13
    for model in (ours, plain):
        for layer in model.encoder.layer:
            layer.chunk_size_feed_forward = 1
    batch = batch_of()
    assert_same(ours(**batch), plain(**batch))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_attention_of_the_original_gives_the_same(attention):
    ours, plain = pair()
    plain.set_attn_implementation(attention)
    batch = batch_of()
    assert_same(ours(**batch), plain(**batch))


def test_a_sequence_alone_and_in_a_batch():
    ours, _ = pair()
    batch = batch_of()
    together = ours(**batch)
    for row, length in enumerate(MASK.sum(1).tolist()):
        alone = ours(batch["input_ids"][row : row + 1, :length])
        torch.testing.assert_close(
            alone.last_hidden_state[0], together.last_hidden_state[row, :length], atol=1e-5, rtol=1e-4
        )


ALL_LOSSES = {
    "regression": (2, torch.float32),
    "multi_label_classification": (2, torch.float32),
    "single_label_classification": (None, torch.long),
}


@pytest.mark.parametrize("problem", ALL_LOSSES)
@pytest.mark.parametrize("return_dict", [True, False], ids=["output", "tuple"])
def test_problem_types(problem, return_dict):
    width, dtype = ALL_LOSSES[problem]
    config = transformers.BertConfig(**SIZES, problem_type=problem)
    plain = transformers.BertForSequenceClassification(config).eval()
    ours = fastbert.accelerate(copy.deepcopy(plain), impl="native")
    labels = torch.randint(0, 2, (4,) if width is None else (4, width)).to(dtype)
    batch = batch_of()
    outputs = [m(**batch, labels=labels, return_dict=return_dict) for m in (ours, plain)]
    assert type(outputs[0]) is type(outputs[1])
    for a, b in zip(*(o if isinstance(o, tuple) else o.to_tuple() for o in outputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_moved_cast_and_switched_after_accelerate():
    ours, plain = pair()
    batch = batch_of()
    with torch.inference_mode():
        ours(**batch)
    for model in (ours, plain):
        model.double().train().eval().to("cpu")
    assert_same(ours(**batch), plain(**batch))
    for model in (ours, plain):
        model.float()
        model.set_input_embeddings(torch.nn.Embedding(60, 32, _weight=torch.linspace(-1, 1, 1920).view(60, 32)))
        assert model.get_input_embeddings() is model.embeddings.word_embeddings
    assert_same(ours(**batch), plain(**batch))


def test_tied_weights_stay_tied():
    ours = fastbert.accelerate(transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).eval(), impl="native")
    assert ours.cls.predictions.decoder.weight is ours.bert.embeddings.word_embeddings.weight
    copied = copy.deepcopy(ours)
    assert copied.cls.predictions.decoder.weight is copied.bert.embeddings.word_embeddings.weight


def test_explain_says_that_padding_stays_under_compile():
    ours, plain = pair()
    for compiled in (torch.compile(ours), ours):
        if compiled is ours:
            ours.compile()
        left = fastbert.explain(compiled).left
        assert "padding is kept" in left["(the model), under torch.compile"]
    plain.compile()
    assert "padding" not in str(fastbert.explain(plain))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning", "ignore:.*quantized tensor creation")
@pytest.mark.parametrize("first", ["accelerate", "quantize"])
def test_layers_quantized_to_int8_on_the_fly(first):
    """torch scales each activation by its largest value: without padding the results are equal. Padding is not part of
    our scale, so with padding the errors against the unquantised model are compared."""
    quantization = pytest.importorskip("torch.ao.quantization", reason="quantizes")
    if not {"fbgemm", "x86", "qnnpack", "onednn"} & set(torch.backends.quantized.supported_engines):
        pytest.skip("this torch has no int8 products")

    def quantized(model: torch.nn.Module) -> torch.nn.Module:
        return quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)

    ours, plain = pair()
    theirs = quantized(plain)
    with torch.inference_mode():
        if first == "accelerate":
            ours(**batch_of())  # lays out the weights
            ours = quantized(ours)
        else:
            ours = fastbert.accelerate(quantized(plain), impl="native")
        full = {"input_ids": torch.randint(5, 60, (4, 13))}
        mine, other, truth = (m(**full).last_hidden_state for m in (ours, theirs, plain))
        assert relative_rms(mine, other) <= 0.5 * relative_rms(other, truth)  # a value may be rounded to the other side
        batch = batch_of()
        mine, other, truth = (m(**batch).last_hidden_state[MASK] for m in (ours, theirs, plain))
        assert not ours.forward.warned
        assert relative_rms(mine, truth) <= 1.5 * relative_rms(other, truth)
        assert relative_rms(other, truth) > 1e-3
        report = fastbert.explain(ours)
    assert "torch.ao" in report.left["encoder.layer.0.intermediate.dense"]
    assert report.replaced["encoder.layer.0"] == "BertLayer: attention, add_layer_norm"


TEXTS = ["a b", "the cat sat on the mat", "c", "a longer text of ten words : the cat and b"]
TASKS = {
    "feature-extraction": ("Model", TEXTS),
    "fill-mask": ("ForMaskedLM", [f"{text} [MASK]" for text in TEXTS]),
    "text-classification": ("ForSequenceClassification", TEXTS),
    "token-classification": ("ForTokenClassification", TEXTS),
    "question-answering": ("ForQuestionAnswering", [{"question": "the cat", "context": text} for text in TEXTS]),
}


@pytest.fixture(scope="module")
def tokenizer():
    import tokenizers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(" ".join(TEXTS).split()))]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=40,
    )  # fmt: skip


def assert_alike(mine, theirs) -> None:
    """Asserts that lists and dicts of numbers are equal."""
    assert type(mine) is type(theirs)
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        mine, theirs = list(mine.values()), list(theirs.values())
    if isinstance(mine, list):
        assert len(mine) == len(theirs)
        for pair_of in zip(mine, theirs, strict=True):
            assert_alike(*pair_of)
    elif isinstance(mine, str) or mine is None:
        assert mine == theirs
    else:
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pipelines(task, batch_size, tokenizer):
    from transformers.pipelines import SUPPORTED_TASKS

    if task not in SUPPORTED_TASKS:
        pytest.skip("this transformers has no such pipeline")
    head, inputs = TASKS[task]
    plain = getattr(transformers, "Bert" + head)(transformers.BertConfig(**SIZES)).eval()
    ours = fastbert.accelerate(copy.deepcopy(plain), impl="native")
    mine, theirs = (
        transformers.pipeline(task, model=m, tokenizer=tokenizer, device="cpu")(
            copy.deepcopy(inputs), batch_size=batch_size
        )
        for m in (ours, plain)
    )
    encoder = ours if head == "Model" else ours.bert
    assert not encoder.forward.warned
    if task != "feature-extraction":
        assert_alike(mine, theirs)
        return
    for text, a, b in zip(TEXTS, mine, theirs, strict=True):  # results at padding differ
        real = len(text.split()) + 2
        assert_alike(a[0][:real], b[0][:real])
        assert len(a[0]) == len(b[0])
