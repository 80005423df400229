"""`load_into`: tensors go into a module by name: prefixes, old names, tied tensors, and what does not fit."""

import pytest
import torch
from torch import nn

from fastbert.checkpoint import CheckpointError, load_into, load_state_dict, save_state_dict

pytestmark = pytest.mark.once


class Encoder(nn.Module):
    """A small module with names like those of a BERT."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.word_embeddings = nn.Embedding(7, 4)
        self.embeddings.LayerNorm = nn.LayerNorm(4)
        self.encoder = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])


class Head(nn.Module):
    """An encoder under `bert.` with a decoder tied to its embeddings."""

    def __init__(self):
        super().__init__()
        self.bert = Encoder()
        self.decoder = nn.Linear(4, 7)
        self.decoder.weight = self.bert.embeddings.word_embeddings.weight


def randomized(module: nn.Module) -> dict[str, torch.Tensor]:
    """A state with the module's names and new values; tied names have the same value."""
    values = {}
    return {
        name: values.setdefault(id(t), torch.randn(t.shape)).clone()
        for name, t in module.state_dict(keep_vars=True).items()
    }


def prefixed(tensors: dict) -> dict:
    return {f"bert.{name}": t for name, t in tensors.items()}


def test_load_exact_names():
    module = Encoder()
    tensors = randomized(module)
    assert load_into(module, tensors) == ([], [])
    torch.testing.assert_close(module.state_dict(), tensors, rtol=0, atol=0)


def test_prefix_is_removed():
    module = Encoder()
    tensors = randomized(module)
    assert load_into(module, prefixed(tensors)) == ([], [])
    torch.testing.assert_close(module.state_dict(), tensors, rtol=0, atol=0)


def test_prefix_is_added():
    module = Head()
    tensors = randomized(module)
    bare = {name.removeprefix("bert."): t for name, t in tensors.items()}
    assert load_into(module, bare) == ([], [])
    torch.testing.assert_close(module.state_dict(), tensors, rtol=0, atol=0)


def test_legacy_names():
    """TensorFlow's names for LayerNorm, and buffers that transformers once saved."""
    module = Encoder()
    tensors = randomized(module)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for name, t in tensors.items()
    }
    assert old.keys() != tensors.keys()
    old["embeddings.position_ids"] = torch.arange(9)[None]
    for state_dict in (old, prefixed(old)):
        module = Encoder()
        assert load_into(module, state_dict) == ([], [])
        torch.testing.assert_close(module.state_dict(), tensors, rtol=0, atol=0)


def test_the_exact_name_wins_over_the_prefixed(tmp_path):
    module = Encoder()
    tensors = randomized(module)
    both = prefixed(randomized(module)) | tensors
    loaded = load_into(module, both, strict=False)
    torch.testing.assert_close(module.state_dict(), tensors, rtol=0, atol=0)
    assert sorted(loaded.unexpected) == sorted(prefixed(tensors))


def test_a_tied_name_is_not_missing(tmp_path):
    """A tied tensor is saved once, under either name."""
    module = Head()
    tensors = randomized(module)
    for left_out in ("decoder.weight", "bert.embeddings.word_embeddings.weight"):
        module = Head()
        assert load_into(module, {name: t for name, t in tensors.items() if name != left_out}) == ([], [])
        torch.testing.assert_close(module.state_dict(), tensors, rtol=0, atol=0)
        assert module.decoder.weight is module.bert.embeddings.word_embeddings.weight
    save_state_dict(tmp_path, module.state_dict())
    assert "decoder.weight" not in load_state_dict(tmp_path)


def test_tied_names_with_different_values():
    """Otherwise one of the two would be lost without a word."""
    tensors = randomized(Head()) | {"decoder.weight": torch.randn(7, 4)}
    with pytest.raises(CheckpointError, match=r"1 tied in the module but different in the file \(decoder.weight and"):
        load_into(Head(), tensors)
    module = Head()
    load_into(module, tensors, strict=False)
    assert torch.equal(module.decoder.weight, tensors["bert.embeddings.word_embeddings.weight"])


def test_missing_unexpected_and_misshapen_are_listed_in_one_line():
    module = Encoder()
    tensors = randomized(module)
    tensors["encoder.0.bias"] = torch.zeros(5)
    tensors["cls.bias"] = torch.zeros(1)
    del tensors["encoder.1.weight"], tensors["encoder.1.bias"]
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_into(module, tensors, source="some/folder")
    assert str(caught.value) == (
        "some/folder does not fit Encoder: 2 missing (encoder.1.weight, encoder.1.bias); 1 unexpected (cls.bias); "
        "1 that do not fit (encoder.0.bias: [5] in the file, [4] in the module)"
    )
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)  # nothing was loaded


def test_long_lists_end_in_a_count():
    with pytest.raises(CheckpointError, match=r"25 unexpected \(x.0, .*, x.9 and 15 more\)") as caught:
        load_into(Encoder(), randomized(Encoder()) | {f"x.{i}": torch.zeros(1) for i in range(25)})
    assert "x.10" not in str(caught.value)


def test_names_that_may_be_missing_or_unexpected():
    tensors = prefixed(randomized(Encoder())) | {
        "cls.predictions.bias": torch.zeros(1),
        "classifier.weight": torch.ones(1),
    }
    del tensors["bert.encoder.1.bias"]
    loaded = load_into(Encoder(), tensors, ignore_missing=["encoder.1.*"], ignore_unexpected=["cls.*", "classifier.*"])
    assert loaded == (["encoder.1.bias"], ["cls.predictions.bias", "classifier.weight"])
    with pytest.raises(CheckpointError, match=r"1 unexpected \(classifier.weight\)$"):
        load_into(Encoder(), tensors, ignore_missing=["encoder.*"], ignore_unexpected=["cls.*"])
    with pytest.raises(CheckpointError, match=r"Encoder: 1 missing \(encoder.1.bias\)$"):
        load_into(Encoder(), tensors, ignore_unexpected=["cl*"])


def test_not_strict_still_checks_shapes():
    assert load_into(Encoder(), {"x": torch.zeros(1)}, strict=False).unexpected == ["x"]
    with pytest.raises(CheckpointError, match=r"encoder.0.bias: \[5\] in the file"):
        load_into(Encoder(), {"encoder.0.bias": torch.zeros(5)}, strict=False)


def test_integers_do_not_fit_floating_point_parameters():
    """int8 weights have the right shape, but mean nothing without their scales."""
    tensors = randomized(Encoder()) | {"encoder.0.weight": torch.ones(4, 4, dtype=torch.int8)}
    with pytest.raises(CheckpointError, match=r"encoder.0.weight: torch.int8 in the file, torch.float32 in the module"):
        load_into(Encoder(), tensors)


def test_dtype_is_the_modules_and_tensors_are_copied():
    module = Encoder().double()
    tensors = {name: t.bfloat16() for name, t in randomized(module).items()}
    load_into(module, tensors)
    torch.testing.assert_close(module.state_dict(), {name: t.double() for name, t in tensors.items()}, rtol=0, atol=0)
    tensors["encoder.0.bias"].zero_()
    assert module.encoder[0].bias.abs().sum() > 0


def test_assign_onto_meta():
    with torch.device("meta"):
        module = Encoder()
    tensors = randomized(Encoder())
    load_into(module, prefixed(tensors), assign=True)
    torch.testing.assert_close(module.state_dict(), tensors, rtol=0, atol=0)
    assert module.encoder[0].weight.data_ptr() == tensors["encoder.0.weight"].data_ptr()
    assert isinstance(module.encoder[0].weight, nn.Parameter)
