"""Each loss of distilling and its gradients, compared with plain torch in float64, and its use of memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill_models import INNER, distilled_of, divisor_of, doubled, gradients, losses_of, plain_losses
from fastbert.compression import losses
from fastbert.compression.layer_maps import chosen_layers, layer_pairs
from fastbert.text.files import InputError
from training_models import KINDS

pytestmark = pytest.mark.native

CASES = [(kind, "logits", 32) for kind in KINDS] + [("sentence", name, width) for name in INNER for width in (32, 16)]


@pytest.mark.parametrize(("kind", "name", "width"), CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_a_loss_and_its_gradients_against_float64(kind, name, width):
    """Packed and by hooks, compared with one text at a time from its hidden states: equal in float64, and within twice
    the error of the plain way in float32. The labels' loss is included, so that sums and weights are tested too."""
    trained, task, windows = distilled_of(kind, "labels", name, width=width)
    exact, divisor = doubled(trained), divisor_of(trained, task, windows)

    def plain(of):
        found = plain_losses(of, task, windows, divisor)
        total = sum(found[each] * weight for each, weight in of.recipe.weights.items())
        return found, gradients(of, total)

    truth, true_gradients = plain(exact)
    total, *parts = losses_of(exact, task, windows, divisor)
    torch.testing.assert_close(torch.stack(parts), torch.stack(list(truth.values())), rtol=1e-9, atol=1e-12)
    ours, in_float32 = gradients(exact, total), gradients(trained, losses_of(trained, task, windows, divisor)[0])
    allowed = plain(trained)[1]
    assert ours.keys() == true_gradients.keys() == in_float32.keys()
    scale = max(g.norm() for g in true_gradients.values())
    for parameter, g in true_gradients.items():
        assert (ours[parameter] - g).norm() <= 1e-9 * scale, parameter
        error, budget = ((found[parameter] - g).norm() for found in (in_float32, allowed))
        assert error <= 2 * budget + 1e-6 * scale, parameter


def test_a_teacher_with_the_same_weights_gives_zero_losses():
    trained, task, windows = distilled_of("sentence", "logits", "hidden", "attention", "minilm", pairs=((0, 0), (1, 1)))
    trained.student.load_state_dict(
        {name: t for name, t in trained.teacher.state_dict().items() if name in trained.student.state_dict()}
    )
    divisor = divisor_of(trained, task, windows)
    found = dict(zip(trained.recipe.weights, losses_of(trained, task, windows, divisor)[1:], strict=True))
    assert found["hidden"] < 1e-12
    assert found["attention"] < 1e-12
    assert found["logits"] > 1e-3, "the teacher has one more layer"


@pytest.mark.once
@pytest.mark.parametrize("kind", ["scores", "relations"])
@pytest.mark.parametrize("most", [1, 40, 10**9])
def test_long_sequences_are_computed_in_blocks_of_queries(kind, most, monkeypatch):
    """Sums and gradients are the same, and no tensor has more scores than a block may have."""
    lengths, head_count = [9, 1, 0, 17], 2
    monkeypatch.setattr(losses, "BLOCK_SCORES", most)
    a, b, u, v = (torch.randn(27, head_count, 3, dtype=torch.float64) for _ in range(4))
    a.requires_grad_(), b.requires_grad_()
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        total = losses.pairwise(a, b, (u, v), lengths, kind)
    total.backward()
    assert largest <= max(27 * head_count * 3, min(most, head_count * 17 * 17), head_count * 17)

    x, y = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
    truth = torch.zeros((), dtype=torch.float64)
    for p, q, r, s in zip(*(t.split(lengths) for t in (x, y, u, v)), strict=True):
        own, given = (torch.einsum("ihd,jhd->hij", *pair) / 3**0.5 for pair in ((p, q), (r, s)))
        if len(p) and kind == "scores":
            truth = truth + len(p) * (own - given).square().mean()
        elif len(p):
            divergence = given.softmax(-1) * (given.log_softmax(-1) - own.log_softmax(-1))
            truth = truth + divergence.sum() / head_count
    truth.backward()
    torch.testing.assert_close(total, truth)
    torch.testing.assert_close(a.grad, x.grad)
    torch.testing.assert_close(b.grad, y.grad)


@pytest.mark.once
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_words_are_computed_in_blocks_of_rows(rows, monkeypatch):
    """Gradients of the hidden states, the table and the bias, for an upstream gradient."""
    monkeypatch.setattr(losses, "BLOCK_LOGITS", rows * 11)
    h, weight, bias, u, w, c = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((12, 4), (11, 4), (11,), (12, 6), (11, 6), (11,))
    )
    ours, plain = ([t.clone().requires_grad_() for t in (h, weight, bias)] for _ in range(2))
    found = losses.words(*ours, (u, w, c), 3.0)
    truth = losses.classes(plain[0] @ plain[1].T + plain[2], u @ w.T + c, 3.0)
    (0.7 * found).backward()
    (0.7 * truth).backward()
    torch.testing.assert_close(found, truth)
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert (
        losses.words(torch.zeros(0, 4), weight.float(), bias.float(), (u[:0].float(), w.float(), c.float()), 1.0) == 0
    )


@pytest.mark.once
def test_different_numbers_of_heads_are_refused():
    a, b = torch.randn(5, 2, 4), torch.randn(5, 3, 4)
    with pytest.raises(ValueError, match="the student compares 2 heads, the teacher 3"):
        losses.pairwise(a, a, (b, b), [5], "scores")


# ---- layers ------------------------------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize(
    ("given", "students", "teachers", "expected"),
    [
        ("skip", 3, 6, [1, 3, 5]),
        ("skip", 4, 6, [0, 2, 3, 5]),
        ("skip", 6, 6, [0, 1, 2, 3, 4, 5]),
        ("last", 3, 6, [3, 4, 5]),
        ("first", 3, 6, [0, 1, 2]),
        ("0,5", 2, 6, [0, 5]),
        ("5,5", 2, 6, [5, 5]),
    ],
)
def test_layers_by_name_and_by_number(given, students, teachers, expected):
    assert chosen_layers(given, "--layers", students, teachers) == expected
    assert layer_pairs(given, "--layers", students, teachers) == list(enumerate(expected))


@pytest.mark.once
def test_pairs_of_some_layers():
    assert layer_pairs("2:5,0:1", "--layers", 3, 6) == [(2, 5), (0, 1)]


@pytest.mark.once
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("1,3,6", "the teacher has the layers 0 to 5, and no layer 6"),
        ("1,3", "has 2 layers, and the student has 3"),
        ("3:1", "the student has the layers 0 to 2, and no layer 3"),
        ("0:9", "the teacher has the layers 0 to 5, and no layer 9"),
        ("0:1,0:1", "names a pair of layers twice"),
        ("even", "skip, last, first, or numbers of layers"),
        ("1,-2,3", "skip, last, first, or numbers of layers"),
        ("", "skip, last, first, or numbers of layers"),
    ],
)
def test_invalid_layers_are_refused(given, says):
    with pytest.raises(InputError, match=f"^--layers .*{says}"):
        layer_pairs(given, "--layers", 3, 6)


@pytest.mark.once
def test_a_student_deeper_than_its_teacher_needs_numbers():
    with pytest.raises(InputError, match="the student has 7, the teacher 6: name the layers"):
        chosen_layers("skip", "--init", 7, 6)
    assert chosen_layers("0,1,1", "--init", 3, 2) == [0, 1, 1]
