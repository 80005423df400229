"""Weights in 8 bits: training computes exactly what inference does; the layout; what is chosen."""

import pytest
import torch

from compression_models import config_of, needs_products, task_and_windows
from fastbert.checkpoint import CheckpointError
from fastbert.compression import quantize as quantize_module
from fastbert.compression.quantize import QuantisedTraining, Settings, outputs_of_task, stored, within
from fastbert.compression.quantize_plan import make_plan, relative_error
from fastbert.compression.sampling import sample
from fastbert.formats.integers import described, expect_layout, put_in, take_out
from fastbert.inference.eight_bits import squares_of_columns
from fastbert.inference.training_in_8_bits import TrainedInt8Linear, in_8_bits, integers_of
from fastbert.models.heads import BertForSequenceClassification
from fastbert.testing import relative_rms


def linear_of(columns=48, inner=64, dtype=torch.float32):
    torch.manual_seed(0)
    linear = torch.nn.Linear(inner, columns, dtype=dtype)
    return linear, torch.rand(inner) + 0.5


# ---- the layer in training -------------------------------------------------------------------------------


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("has_factors", [True, False], ids=["factors", "none"])
def test_training_multiplies_as_inference_does(dtype, has_factors):
    """Equal to the bit, with and without gradients, and under autocast; after a step with the new weights. A row of the
    weight has one scale, although inference alone would give its 192 elements two."""
    linear, factors = linear_of(inner=192)
    trained = TrainedInt8Linear(linear, factors if has_factors else None)
    x = (torch.randn(9, 192) * torch.rand(192) * 4).to(dtype)
    for _ in range(2):
        integers = integers_of(trained.weight, factors if has_factors else None)
        made = in_8_bits(trained.weight, trained.bias, factors if has_factors else None)
        assert torch.equal(made.integers, integers.integers)
        assert integers.scales.shape == (48, 1)
        with torch.no_grad():
            inference = made.linear(x)
            assert torch.equal(trained(x), inference)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                under_autocast = trained(x.float())
            assert torch.equal(under_autocast, made.linear(x.bfloat16()))
            assert torch.equal(trained.frozen()(x), inference)
        y = trained(x.clone().requires_grad_())
        assert torch.equal(y, inference)
        y.float().sum().backward()
        with torch.no_grad():
            trained.weight.add_(torch.randn_like(trained.weight), alpha=0.1)
            trained.bias.add_(1.0)


@pytest.mark.native
def test_gradients_ignore_the_rounding():
    """dx by the weight that the integers stand for, dW by x: against float64, within twice torch's own error."""
    linear, factors = linear_of()
    trained = TrainedInt8Linear(linear, factors)
    x, dy = torch.randn(3, 7, 64).requires_grad_(), torch.randn(3, 7, 48)
    trained(x).backward(dy)
    rounded = integers_of(linear.weight, factors).weight()
    of_64 = [t.detach().double().requires_grad_() for t in (x, rounded, linear.bias)]
    of_32 = [t.detach().clone().requires_grad_() for t in (x, rounded, linear.bias)]
    for parts, upstream in ((of_64, dy.double()), (of_32, dy)):
        torch.nn.functional.linear(*parts).backward(upstream)
    for got, exact, plain in zip((x, trained.weight, trained.bias), of_64, of_32, strict=True):
        budget = 2 * relative_rms(plain.grad, exact.grad) + 1e-7
        assert relative_rms(got.grad, exact.grad) <= budget
    assert trained.weight is linear.weight
    assert not any("factors" in name for name in trained.state_dict())


# ---- the layout ------------------------------------------------------------------------------------------


@pytest.mark.once
def test_a_weight_is_stored_and_read_back():
    linear, factors = linear_of()
    for chosen in (factors, None):
        integers, state = integers_of(linear.weight, chosen), {"a.bias": linear.bias}
        put_in(state, "a", integers)
        assert (state["a.weight"].dtype, state["a.weight"].shape) == (torch.int8, (48, 64))
        assert (state["a.weight_scale"].dtype, state["a.weight_scale"].shape) == (torch.float32, (48, 1))
        assert ("a.input_factors" in state) == (chosen is not None)
        floats, found = take_out(state, "x")
        assert set(floats) == {"a.bias", "a.weight"}
        assert torch.equal(floats["a.weight"], found["a"].weight())
        assert relative_rms(floats["a.weight"], linear.weight.double()) < 0.01
        assert all(torch.equal(a, b) for a, b in zip(found["a"][:2], integers[:2], strict=True))


BROKEN = {
    "no_scales": (lambda s: s.pop("a.weight_scale"), "has no a.weight_scale"),
    "other_scales": (
        lambda s: s.update({"a.weight_scale": torch.ones(3, 1)}),
        r"scales and factors are \[\[3, 1\]",
    ),
    "groups": (lambda s: s.update({"a.weight_scale": torch.ones(48, 5)}), r"scales and factors are \[\[48, 5\]"),
    "factors": (lambda s: s.update({"a.input_factors": torch.ones(3)}), r"factors are \[\[48, 1\], \[3\]\]"),
}


@pytest.mark.once
@pytest.mark.parametrize(("spoil", "message"), BROKEN.values(), ids=BROKEN)
def test_integers_with_missing_or_wrong_scales_are_refused(spoil, message):
    linear, factors = linear_of()
    state: dict[str, torch.Tensor] = {}
    put_in(state, "a", integers_of(linear.weight, factors))
    spoil(state)
    with pytest.raises(CheckpointError, match=message):
        take_out(state, "folder")


@pytest.mark.once
def test_unsupported_layouts_are_refused():
    good = described([], has_factors=False)
    expect_layout(good, "x")
    group = good["config_groups"]["group_0"]

    def changed(**parts):
        return {**good, "config_groups": {"group_0": {**group, **parts}}}

    for config, message in (
        ({"quant_method": "bitsandbytes"}, "quantised by bitsandbytes"),
        ({**good, "format": "pack-quantized"}, "compressed-tensors, pack-quantized"),
        (changed(weights={**group["weights"], "num_bits": 4}), "'num_bits': 4"),
        (changed(weights={**group["weights"], "symmetric": False}), "symmetric integers of 8 bits"),
        (changed(input_activations=None), "its activations are None"),
        (changed(input_activations={**group["input_activations"], "dynamic": False}), "ranges found for each token"),
    ):
        with pytest.raises(CheckpointError, match=message):
            expect_layout(config, "x")


@pytest.mark.once
def test_compressed_tensors_reads_files_without_factors_and_refuses_others():
    """It reads weights to the last bit; a scheme with factors is not one of its schemes."""
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.base import BaseCompressor

    linear, _factors = linear_of()
    config = library.QuantizationConfig.model_validate(described(["classifier"], has_factors=False))
    scheme = next(iter(config.config_groups.values()))
    integers = integers_of(linear.weight, None)
    state: dict[str, torch.Tensor] = {}
    put_in(state, "a", integers)
    found = BaseCompressor.get_value_from_registry(config.format).decompress(
        {name.removeprefix("a."): t for name, t in state.items()}, scheme
    )
    assert torch.equal(found["weight"], integers.weight())
    with pytest.raises(ValueError, match="input_factors"):
        library.QuantizationConfig.model_validate(described([], has_factors=True))


# ---- the plan --------------------------------------------------------------------------------------------


def calibrated(**changes):
    torch.manual_seed(0)
    model = BertForSequenceClassification(config_of(**changes), impl="native").eval()
    return model, outputs_of_task(model, *task_and_windows(40))


@pytest.mark.native
@needs_products
def test_a_plan_measures_without_changing_the_model():
    model, outputs = calibrated()
    with torch.no_grad():
        exact = outputs()
    modules = list(model.modules())
    plan = make_plan(model, outputs)
    with torch.no_grad():
        assert torch.equal(outputs(), exact)
    assert list(model.modules()) == modules
    assert len(plan.factors) == 18
    assert set(plan.sensitivities) == {
        f"bert.encoder.layer.{n}.{part}" for n in range(3)
        for part in ("attention.self", "attention.output.dense", "intermediate.dense", "output.dense")
    }  # fmt: skip
    layer = "bert.encoder.layer.0.attention.self."
    assert plan.factors[layer + "query"] is plan.factors[layer + "value"]
    assert 1e-4 < plan.error == plan.error_of_all < 0.2


@pytest.mark.native
@needs_products
def test_the_most_sensitive_layers_stay_in_floating_point():
    """Columns that differ by a factor of a thousand make a weight's integers inaccurate: this weight stays."""
    model, outputs = calibrated()
    with torch.no_grad():
        model.bert.encoder["layer"][1].intermediate["dense"].weight[:, ::16] *= 200.0
    loose = make_plan(model, outputs, smooth=False)
    first = max(loose.sensitivities, key=loose.sensitivities.__getitem__)
    limit = loose.error * 0.9
    plan = make_plan(model, outputs, smooth=False, error=limit)
    assert plan.kept[0] == first
    assert plan.error <= limit < plan.error_of_all
    assert not any(name.startswith(title) for title in plan.kept for name in plan.factors)
    nothing = make_plan(model, outputs, smooth=False, error=1e-9)
    assert (nothing.factors, nothing.error, len(nothing.kept)) == ({}, 0.0, 12)


@pytest.mark.native
@needs_products
def test_smoothing_helps_if_some_columns_are_large():
    """The second linear layer's input has columns a hundred times larger than the others."""
    model, outputs = calibrated()
    with torch.no_grad():
        for layer in model.bert.encoder["layer"]:
            layer.intermediate["dense"].weight[::24] *= 40.0
            layer.output["dense"].weight[:, ::24] /= 40.0
    rough, smooth = (make_plan(model, outputs, smooth=on).error for on in (False, True))
    assert smooth < 0.8 * rough


@pytest.mark.once
def test_the_size_of_a_column_is_its_percentile():
    linear, x = torch.nn.Linear(4, 4), torch.arange(1.0, 101.0)[:, None] * torch.tensor([1.0, -2.0, 3.0, 0.0])
    found = squares_of_columns([linear], lambda: linear(x), percentile=90)[linear]
    assert torch.equal(found.sqrt(), torch.tensor([90.0, 180.0, 270.0, 0.0]))
    found = squares_of_columns([linear], lambda: linear(x))[linear]
    assert torch.allclose(found, x.square().mean(0))
    assert relative_error(torch.tensor([1.1, 2.2]), torch.tensor([1.0, 2.0])) == pytest.approx(0.1)


@pytest.mark.once
def test_calibration_draws_texts_that_fit():
    """Drawn by the seed, in their order, and only so many tokens that they can be computed at once."""
    items = list(range(40))
    drawn = [sample(items, 16, seed) for seed in (0, 0, 1)]
    assert all(len(set(some)) == 16 and some == sorted(some) for some in drawn)
    assert drawn[0] == drawn[1] != drawn[2]
    assert sample(items, 99, 0) == items
    lengths = [quantize_module.MOST_TOKENS - 5, 5, 1]
    assert within(lengths, int) == lengths[:2]
    assert within([quantize_module.MOST_TOKENS + 1, 1], int) == [quantize_module.MOST_TOKENS + 1]


@pytest.mark.native
@needs_products
def test_training_calibrates_on_drawn_examples(monkeypatch):
    task, windows = task_and_windows(40)
    seen = []

    def noted(network, task, chosen):
        seen.append(chosen)
        return outputs_of_task(network, task, chosen)

    monkeypatch.setattr(quantize_module, "outputs_of_task", noted)
    model = BertForSequenceClassification(config_of(), impl="native")
    QuantisedTraining(Settings(texts=16, seed=3), "name").prepare(model, task, windows)
    assert seen == [sample(windows, 16, 3)]
    assert not model.training


@pytest.mark.once
def test_a_plan_without_layers_is_stored_as_a_plain_checkpoint():
    """In the dtype of the plan."""
    from fastbert.compression.quantize_plan import Plan

    model = BertForSequenceClassification(config_of())
    config, state, about = stored(model.config, model.state_dict(), Plan({}), torch.bfloat16)
    assert config.dtype == "bfloat16"
    assert {t.dtype for name, t in state.items() if not name.startswith("classifier")} == {torch.bfloat16}
    assert "bert.encoder.layer.2.output.dense" in about["quantization_config"]["ignore"]
