"""AdamW in one C++ pass: torch's numbers, state and errors, and rows of a table that never had a gradient."""

import copy

import pytest
import torch

from fastbert.kernels.cpu import adamw as one_pass
from fastbert.kernels.cpu import operators as cpp
from fastbert.testing import relative_rms
from fastbert.training.adamw import AdamW

# a table, a matrix with partly filled registers, vectors of one element and of more than a block, a scalar, no element
SHAPES = {"table": (70, 48), "matrix": (5, 37), "one": (1,), "long": (4099,), "scalar": (), "empty": (0,)}
EPS, DECAY, RATE = 1e-8, 0.1, 3e-3


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    return {name: torch.nn.Parameter(torch.randn(shape, **draw).to(dtype)) for name, shape in SHAPES.items()}


def groups(given: dict[str, torch.nn.Parameter], decay: float = DECAY) -> list[dict]:
    vectors = [p for p in given.values() if p.dim() < 2]
    return [
        {"params": [given["table"], given["matrix"]], "weight_decay": decay},
        {"params": vectors, "lr": RATE / 3, "weight_decay": 0.0, "betas": (0.8, 0.99)},
    ]


def gradients_of(step: int, given: dict[str, torch.nn.Parameter]) -> None:
    """A few rows of the table have gradients; `one` has none in the second step, so its step count is lower."""
    generator = torch.Generator().manual_seed(100 + step)
    for name, p in given.items():
        g = torch.randn(p.shape, generator=generator, dtype=torch.float32, device="cpu") * 10.0 ** (step - 2)
        if name == "table":
            g[torch.rand(len(g), generator=generator) < 0.8] = 0.0
        p.grad = None if name == "one" and step == 1 else g.to(p.dtype)


def trained(kind, given, steps, decay=DECAY, max_norm=None, state=None, first=0, **options):
    optimizer = kind(groups(given, decay), lr=RATE, eps=EPS, **options)
    if state is not None:
        optimizer.load_state_dict(state)
    for step in range(first, steps):
        gradients_of(step, given)
        if max_norm is not None:
            if isinstance(optimizer, AdamW):
                optimizer.clip(max_norm)
            else:
                torch.nn.utils.clip_grad_norm_(list(given.values()), max_norm)
        optimizer.step()
    return optimizer


def assert_as_torch(ours, optimizer, plain, plain_optimizer, truth, truth_optimizer, slack=4e-7):
    """Parameters and moments have at most twice torch's error and some roundings: one number may be right by luck."""
    for name in SHAPES:
        found = [
            {"p": given[name], **by.state[given[name]]}
            for given, by in ((ours, optimizer), (plain, plain_optimizer), (truth, truth_optimizer))
        ]
        for of in ("p", "exp_avg", "exp_avg_sq"):
            if not found[2][of].numel():
                continue
            error, budget = (relative_rms(values[of], found[2][of]) for values in found[:2])
            assert error <= 2 * budget + slack, f"{of} of {name}: relative RMS error {error:.2e}, torch's {budget:.2e}"
        assert found[0]["step"] == found[1]["step"] == found[2]["step"]


@pytest.mark.cpp
@pytest.mark.parametrize("decay", [DECAY, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("max_norm", [None, 2.0, 1e6], ids=["unclipped", "clipped", "below the norm"])
def test_parameters_and_moments_are_torchs(dtype, decay, max_norm):
    ours, plain = parameters(dtype), parameters(dtype)
    truth = {name: torch.nn.Parameter(p.detach().double()) for name, p in ours.items()}
    of_ours = trained(AdamW, ours, 5, decay, max_norm)
    of_plain = trained(torch.optim.AdamW, plain, 5, decay, max_norm, fused=True)
    of_truth = trained(torch.optim.AdamW, truth, 5, decay, max_norm)
    # a budget in bfloat16 depends on how single elements are rounded
    slack = 4e-7 if dtype == torch.float32 else 2e-3
    assert_as_torch(ours, of_ours, plain, of_plain, truth, of_truth, slack)


@pytest.mark.cpp
@pytest.mark.parametrize("decay", [DECAY, 0.0])
def test_rows_that_never_had_a_gradient_only_decay(decay):
    """A row that once had a gradient continues to move without one."""
    given = parameters()
    optimizer = trained(AdamW, given, 2, decay)
    table = given["table"]
    state, moved = optimizer.state[table], optimizer._plan.resting[0] == 0
    assert 0 < moved.sum() < len(table)
    assert torch.equal(moved, (state["exp_avg"] != 0).any(1))
    before = table.detach().clone()
    gradients_of(2, given)
    table.grad.zero_()
    optimizer.step()
    still = ~moved
    torch.testing.assert_close(table[still], before[still] * (1.0 - RATE * decay), rtol=1e-6, atol=0)
    assert not (table[moved] == before[moved]).all(1).any()


@pytest.mark.cpp
def test_moments_that_are_written_take_effect():
    """After moments were written in place, replaced or loaded, their rows no longer count as unmoved."""
    ours, plain = parameters(), parameters()
    of_ours, of_plain = trained(AdamW, ours, 1), trained(torch.optim.AdamW, plain, 1, fused=True)
    for given, optimizer in ((ours, of_ours), (plain, of_plain)):
        optimizer.state[given["table"]]["exp_avg"].add_(0.5)
        optimizer.state[given["matrix"]]["exp_avg"] = torch.ones_like(given["matrix"])
        gradients_of(1, given)
        given["table"].grad.zero_()
        given["matrix"].grad.zero_()
        optimizer.step()
    for name in SHAPES:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-4, atol=1e-6)


@pytest.mark.cpp
def test_both_optimisers_continue_from_each_others_state():
    """Two steps by one optimiser and two by the other equal four steps of either."""
    whole = parameters()
    of_whole = trained(torch.optim.AdamW, whole, 4, fused=True)
    for first, then in ((AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW), (AdamW, AdamW)):
        given = parameters()
        state = copy.deepcopy(trained(first, given, 2).state_dict())
        assert set(state["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
        optimizer = trained(then, given, 4, state=state, first=2)
        for name, p in given.items():
            torch.testing.assert_close(p, whole[name], rtol=2e-6, atol=1e-7)
            for of in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(
                    optimizer.state[p][of], of_whole.state[whole[name]][of], rtol=1e-5, atol=1e-9
                )


@pytest.mark.cpp
def test_a_step_is_one_call_and_is_seen_by_autograd(monkeypatch):
    given, calls = parameters(), []
    call = cpp.call
    monkeypatch.setattr(cpp, "call", lambda function, *rest: calls.append(function) or call(function, *rest))
    kept = (given["matrix"] ** 2).sum()  # autograd saves the matrix
    trained(AdamW, given, 1, max_norm=1.0)
    assert calls == ["sum_squares", "adamw"]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


OTHERS = {
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "a tensor for lr": {"lr": torch.tensor(1e-3)},
}


@pytest.mark.parametrize("why", [*OTHERS, "float64", "a strided gradient", "a closure", "no C++"])
def test_torch_computes_what_the_cpp_does_not_support(why, monkeypatch):
    if why == "no C++":
        monkeypatch.setattr(cpp, "dtypes", tuple)
    monkeypatch.setattr(one_pass.Update, "step", lambda *given: pytest.fail("C++ was asked"))
    found = []
    for kind in (AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(4, 6, dtype=torch.float64 if why == "float64" else torch.float32))
        optimizer = kind([p], **{"lr": 1e-3, **OTHERS.get(why, {})})
        p.grad = torch.randn(6, 4, dtype=p.dtype).t() if why == "a strided gradient" else torch.randn_like(p)
        norms = [torch.nn.utils.clip_grad_norm_([p], 0.5)] if kind is torch.optim.AdamW else [optimizer.clip(0.5)]
        norms += [optimizer.step(lambda: torch.tensor(7.0))] if why == "a closure" else [optimizer.step()]
        found.append((p, norms))
    (p, norms), (expected, of_torch) = found
    assert torch.equal(p, expected)
    assert norms == [pytest.approx(float(of_torch[0])), of_torch[1]]


def test_a_gradient_scalers_step_uses_clipped_gradients():
    """After unscale_ and clip, GradScaler's step is computed by torch, which does not know our scale."""
    moments = []
    for kind in (AdamW, torch.optim.AdamW):
        p = torch.nn.Parameter(torch.ones(4, 6, dtype=torch.float32, device="cpu"))
        optimizer = kind([p], lr=1e-3, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale((p * torch.arange(24.0).view(4, 6)).sum()).backward()
        scaler.unscale_(optimizer)
        norm = optimizer.clip(0.5) if kind is AdamW else float(torch.nn.utils.clip_grad_norm_([p], 0.5))
        scaler.step(optimizer)
        moments.append((norm, optimizer.state[p]["exp_avg"]))
    assert moments[0][0] == pytest.approx(moments[1][0])
    torch.testing.assert_close(moments[0][1], moments[1][1])


@pytest.mark.cpp
@pytest.mark.parametrize("then", ["zero_grad", "clip"])
def test_a_clip_without_a_step_does_not_affect_the_next_step(then):
    """GradScaler skips a step with infinite gradients. The next gradients have their own norm, or no clipping."""
    moments = []
    for kind in (AdamW, torch.optim.AdamW):
        p = torch.nn.Parameter(torch.ones(4, 6, dtype=torch.float32, device="cpu"))
        optimizer = kind([p], lr=1e-3)
        p.grad = torch.full_like(p, 100.0)
        if kind is AdamW:
            optimizer.clip(0.5)
        if then == "zero_grad":
            optimizer.zero_grad()
        p.grad = torch.arange(24.0).view(6, 4).t()  # strided, so torch computes
        if then == "clip":
            optimizer.clip(1e9) if kind is AdamW else torch.nn.utils.clip_grad_norm_([p], 1e9)
        optimizer.step()
        moments.append(optimizer.state[p]["exp_avg"])
    torch.testing.assert_close(*moments)


def test_hooks_of_a_step_run_once_if_torch_computes_it():
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.float32, device="cpu"))
    torch.optim.AdamW([p])  # from now on torch calls the hooks around its own step
    optimizer, ran = AdamW([p], lr=1e-3, amsgrad=True), []
    optimizer.register_step_pre_hook(lambda *given: ran.append("before"))
    optimizer.register_step_post_hook(lambda *given: ran.append("after"))
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert ran == ["before", "after"]
    assert (p < 1).all()


@pytest.mark.cpp
def test_the_norm_is_that_of_all_gradients():
    given = parameters()
    gradients_of(3, given)
    optimizer = AdamW(groups(given), lr=0.0)
    values = torch.cat([p.grad.flatten().double() for p in given.values() if p.grad is not None])
    assert optimizer.clip(1.0) == pytest.approx(float(values.norm()), rel=1e-6)
    given["matrix"].grad[0, 0] = torch.nan
    assert not optimizer.clip(1.0) >= 0.0


@pytest.mark.cpp
def test_wrong_sizes_are_refused():
    p, by = torch.zeros(4, 6), one_pass.numbers(1, 1e-3, (0.9, 0.999), 1e-8, 0.0, 1.0, one_pass.NOTHING_KEPT)
    count, three = torch.zeros(()), torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="exp_avg must be on the CPU"):
        one_pass.Update([p], [p[:2]], [p], [count], [None], [0], [None])
    with pytest.raises(ValueError, match="at_rest must be"):
        one_pass.Update([p], [p], [p], [count], [three], [0], [None])
    with pytest.raises(TypeError, match="step must be"):
        one_pass.Update([p], [p], [p], [count.double()], [None], [0], [None])
    update = one_pass.Update([p], [p], [p], [count], [None], [0], [None])
    with pytest.raises(TypeError, match="gradient must be"):
        update.step([p.double()], [None], [by])
    with pytest.raises(ValueError, match="its parameter's shape"):
        update.step([p.view(6, 4)], [None], [by])
    with pytest.raises(ValueError, match="touched must be"):
        update.step([p], [three], [by])
    with pytest.raises(ValueError, match="numbers for 0"):
        update.step([p], [None], [])
    assert count == 0


@pytest.mark.cpp
def test_a_step_reads_the_gradients_that_it_gets():
    """Not those that were checked before."""
    p, count = torch.ones(3), torch.zeros(())
    by = one_pass.numbers(1, 1.0, (0.9, 0.999), 1e-8, 0.0, 1.0, one_pass.NOTHING_KEPT)
    update = one_pass.Update([p], [torch.zeros(3)], [torch.zeros(3)], [count], [None], [0], [None])
    assert update.takes([torch.full((3,), 5.0)])
    update.step([torch.full((3,), -5.0)], [None], [by])
    torch.testing.assert_close(p, torch.full((3,), 2.0))


@pytest.mark.once
def test_a_step_by_torch_changes_version_counters():
    """torch's fused step does not increase version counters, so layers that keep integers of their weights used those
    of the first step until the training ended. Here the dtype is float64, for which torch computes."""
    given = parameters(torch.float64)
    optimizer = trained(AdamW, given, 1, fused=True)
    gradients_of(2, given)
    watched = [t for p in given.values() for t in (p, *(optimizer.state[p][m] for m in ("exp_avg", "exp_avg_sq")))]
    before = [t._version for t in watched]
    optimizer.step()
    assert all(t._version > version for t, version in zip(watched, before, strict=True))


# ---- a plan and what it does not know -------------------------------------------------------------------


def change_nothing(given, optimizer):
    pass


def other_memory(given, optimizer):
    given["matrix"].data = given["matrix"].detach().clone() + 1.0


def no_gradient(given, optimizer):
    given["matrix"].grad = None


def another_group(given, optimizer):
    given["new"] = torch.nn.Parameter(torch.ones(3, 4, dtype=torch.float32, device="cpu"))
    given["new"].grad = torch.ones_like(given["new"])
    optimizer.add_param_group({"params": [given["new"]]})


def strided(given, optimizer):
    given["matrix"].grad = given["matrix"].grad.t().contiguous().t()


def written_count(given, optimizer):
    optimizer.state[given["matrix"]]["step"].add_(3)


def replaced_state(given, optimizer):
    optimizer.state[given["matrix"]] = {name: t.clone() + 1.0 for name, t in optimizer.state[given["matrix"]].items()}


def other_options(given, optimizer):
    optimizer.param_groups[0].update(lr=0.1, betas=(0.7, 0.8), eps=1e-3, weight_decay=0.5)


def no_eps(given, optimizer):
    for p in given.values():
        p.grad = None if p.grad is None else torch.ones_like(p)
    optimizer.param_groups[0]["eps"] = 0.0


def moved_to_another_group(given, optimizer):
    first, second = optimizer.param_groups
    second["params"].insert(0, first["params"].pop())  # the order of all parameters is the same


def other_memory_of_the_state(given, optimizer):
    """What moving an optimiser to another device does, with other values."""
    for state in optimizer.state.values():
        for t in state.values():
            t.data = t.detach() + 1.0


def same_parameter_twice(given, optimizer):
    optimizer.param_groups[0]["params"].append(given["matrix"])


CHANGES = [
    change_nothing, other_memory, no_gradient, another_group, strided, written_count, replaced_state, other_options,
    no_eps, moved_to_another_group, other_memory_of_the_state, same_parameter_twice,
]  # fmt: skip


@pytest.mark.cpp
@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_steps_take_effect(change):
    """A step is prepared once. Whatever differs in a later step is noticed: three steps, the change, two more."""
    found = []
    for kind in (AdamW, torch.optim.AdamW):
        given = parameters()
        optimizer = trained(kind, given, 3)
        for step in (3, 4):
            gradients_of(step, {name: p for name, p in given.items() if name != "new"})
            if step == 3:
                change(given, optimizer)
            optimizer.step()
        found.append((given, optimizer))
    (ours, of_ours), (plain, of_plain) = found
    for name, p in plain.items():
        torch.testing.assert_close(ours[name], p, rtol=2e-5, atol=1e-7)
        assert of_ours.state[ours[name]]["step"] == of_plain.state[p]["step"]
        for moment in ("exp_avg", "exp_avg_sq"):
            moments = [by.state[given[name]][moment] for given, by in found]
            torch.testing.assert_close(*moments, rtol=1e-5, atol=1e-7)


@pytest.mark.cpp
def test_a_copied_optimiser_steps_its_own_parameters():
    given = parameters()
    optimizer = trained(AdamW, given, 2)
    copied_given, copied = copy.deepcopy((given, optimizer))
    before = {name: p.detach().clone() for name, p in given.items()}
    gradients_of(2, copied_given)
    copied.step()
    assert all(torch.equal(p, before[name]) for name, p in given.items())
    gradients_of(2, given)
    optimizer.step()
    assert all(torch.equal(p, copied_given[name]) for name, p in given.items())


@pytest.mark.cpp
@pytest.mark.parametrize("way", ["deepcopy", "load_state_dict"])
def test_a_clipped_gradient_is_clipped_in_a_copy_too(way):
    """`clip` leaves the scaling to the next step, which the copy, or a state loaded in between, did not know of."""
    table, plain = (torch.ones(4, 8, requires_grad=True) for _ in range(2))  # unlike a Parameter, copied with gradient
    optimizer, of_plain = AdamW([table], lr=0.1), torch.optim.AdamW([plain], lr=0.1)
    table.grad, plain.grad = torch.full((4, 8), 3.0), torch.full((4, 8), 3.0)
    optimizer.clip(1.0)
    torch.nn.utils.clip_grad_norm_([plain], 1.0)
    if way == "deepcopy":
        optimizer = copy.deepcopy(optimizer)
        table = optimizer.param_groups[0]["params"][0]
    else:
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    of_plain.step()
    torch.testing.assert_close(optimizer.state[table]["exp_avg"], of_plain.state[plain]["exp_avg"])


@pytest.mark.cpp
def test_a_step_that_failed_is_not_counted():
    found = []
    for fails in (False, True):
        given = parameters()
        optimizer = trained(AdamW, given, 2)
        gradients_of(2, given)
        if fails:
            decay = optimizer.param_groups[1].pop("weight_decay")
            with pytest.raises(KeyError):
                optimizer.step()
            optimizer.param_groups[1]["weight_decay"] = decay
        optimizer.step()
        found.append(given)
    assert all(torch.equal(p, found[0][name]) for name, p in found[1].items())


# ---- deferred decay --------------------------------------------------------------------------------------


def table_and_matrix(dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"table": (50, 20), "matrix": (7, 20)}
    return {n: torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in shapes.items()}


def steps_with_few_rows(given, optimizer, before_step, steps: int = 30) -> None:
    """In each step two rows of the table have a gradient, more and more of them; the rate changes."""
    generator = torch.Generator().manual_seed(4)
    for step in range(steps):
        rows = torch.randint(5 + step, (2,), generator=generator)
        before_step(step, rows)
        given["table"].grad, given["matrix"].grad = map(torch.zeros_like, given.values())
        given["table"].grad[rows] = torch.randn(2, 20, generator=generator).to(given["table"].dtype)
        given["matrix"].grad += given["table"].detach()[rows].sum()  # as if the forward pass had read these rows
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        optimizer.step()


@pytest.mark.cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "then", ["nothing", "whole", "no gradient", "state_dict", "pickle", "torch's step", "other eps"]
)
def test_deferred_decay_has_the_same_bits(dtype, then):
    """Also if all is settled at times, and if in between the optimiser makes another plan, or torch steps."""
    plain, deferring = table_and_matrix(dtype), table_and_matrix(dtype)
    of_plain = AdamW(plain.values(), lr=0.1, weight_decay=0.3)
    of_deferring = AdamW(deferring.values(), lr=0.1, weight_decay=0.3)
    of_deferring.defer(deferring["table"])
    late = []

    def after(given, optimizer, step):
        if then == "whole" and step % 5 == 0:
            optimizer.settle()
        elif then == "no gradient" and step == 12:
            given["table"].grad, given["matrix"].grad = None, torch.ones_like(given["matrix"])
            optimizer.step()
        elif then == "state_dict" and step == 12:
            optimizer.state_dict()
        elif then == "pickle" and step == 12:
            copy.deepcopy(optimizer)
        elif then == "torch's step" and step == 12:
            given["table"].grad, given["matrix"].grad = map(torch.ones_like, given.values())
            optimizer.step(lambda: torch.zeros(()))
        elif then == "other eps" and step == 12:
            optimizer.param_groups[0]["eps"] = 1e-6

    def settling(step, rows):
        after(deferring, of_deferring, step)
        of_deferring.settle(rows)
        if of_deferring._plan is not None and of_deferring._plan.late is not None:
            late.append(int(of_deferring._plan.late.max()))

    steps_with_few_rows(plain, of_plain, lambda step, rows: after(plain, of_plain, step))
    steps_with_few_rows(deferring, of_deferring, settling)
    assert max(late) == (4 if then == "whole" else 7)
    if then == "nothing" and dtype == torch.float32:
        assert not torch.equal(plain["table"], deferring["table"])
    of_deferring.settle()
    for name in plain:
        assert torch.equal(plain[name], deferring[name])
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(of_plain.state[plain[name]][moment], of_deferring.state[deferring[name]][moment])


@pytest.mark.cpp
def test_a_table_that_is_written_while_its_decay_is_deferred_is_refused():
    given = table_and_matrix(torch.float32)
    optimizer = AdamW(given.values(), lr=0.1, weight_decay=0.3)
    optimizer.defer(given["table"])
    steps_with_few_rows(given, optimizer, lambda step, rows: optimizer.settle(rows), 3)
    with torch.no_grad():
        given["table"].zero_()
    with pytest.raises(RuntimeError, match="call the optimizer's settle"):
        optimizer.settle()
    with pytest.raises(RuntimeError, match="call the optimizer's settle"):
        optimizer.step()


@pytest.mark.cpp
def test_rows_that_are_settled_must_exist():
    given = table_and_matrix(torch.float32)
    optimizer = AdamW(given.values(), lr=0.1, weight_decay=0.3)
    optimizer.defer(given["table"])
    steps_with_few_rows(given, optimizer, lambda step, rows: optimizer.settle(rows), 3)
    for wrong in ([50], [3, -1]):
        with pytest.raises(ValueError, match="rows must be from 0 to 49"):
            optimizer.settle(torch.tensor(wrong))
    with pytest.raises(TypeError):
        optimizer.settle(torch.tensor([1], dtype=torch.int32))
    optimizer.settle(torch.tensor([], dtype=torch.int64))


@pytest.mark.cpp
def test_deferred_decay_is_kept_when_a_state_is_loaded():
    """`load_state_dict` forgot the decay that was deferred, and the table whose decay to defer."""
    found = []
    for defers in (False, True):
        given = table_and_matrix(torch.float32)
        optimizer = AdamW(given.values(), lr=0.1, weight_decay=0.3)
        if defers:
            optimizer.defer(given["table"])
        state = None

        def load(step, rows, optimizer=optimizer):
            nonlocal state
            if step == 8:
                state = copy.deepcopy(optimizer.state_dict())
            elif step == 13:
                optimizer.load_state_dict(state)
            optimizer.settle(rows)

        steps_with_few_rows(given, optimizer, load)
        assert (optimizer.deferred is not None) == defers
        assert (optimizer._plan.late is not None) == defers
        optimizer.settle()
        found.append(given)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.cpp
@pytest.mark.parametrize(("name", "value"), [("step", 100.0), ("exp_avg", 0.5)])
def test_a_state_that_is_written_before_rows_are_settled(name, value):
    """`settle` noted the versions of all states as its own, so the plan did not see that something else had written."""
    found = []
    for defers in (False, True):
        given = table_and_matrix(torch.float32)
        optimizer = (AdamW if defers else torch.optim.AdamW)(given.values(), lr=0.1, weight_decay=0.3)
        if defers:
            optimizer.defer(given["table"])

        def write(step, rows, optimizer=optimizer, given=given):
            if step == 13:
                optimizer.state[given["table"]][name].fill_(value)
            if isinstance(optimizer, AdamW):
                optimizer.settle(rows)

        steps_with_few_rows(given, optimizer, write, 20)
        if defers:
            optimizer.settle()
        found.append(given)
    assert all(torch.allclose(found[0][of], found[1][of], atol=1e-5) for of in found[0])


@pytest.mark.cpp
def test_a_parameter_whose_data_was_transposed():
    """p.data = p.data.t() leaves the address and the shape of a square matrix; the step used the old strides."""
    found = []
    for kind in (AdamW, torch.optim.AdamW):
        p = torch.nn.Parameter(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))
        optimizer = kind([p], lr=0.1)
        for step in range(4):
            p.grad = torch.randn(16, 16, generator=torch.Generator().manual_seed(step))
            optimizer.step()
            if step == 1:
                p.data = p.data.t()
        found.append(p.detach().clone())
    torch.testing.assert_close(*found)
