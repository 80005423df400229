"""The queue of a model: limits in tokens, short requests before long ones, and long ones never wait forever."""

import random

import pytest

from fastbert.service.queue import SHARE, Full, TokenQueue, Waiting

pytestmark = pytest.mark.once


def put(queue, *lengths, owner=None):
    request = Waiting(lengths, owner)
    queue.put(request)
    return request


def test_batches_are_bounded_in_tokens_and_keep_the_order():
    queue = TokenQueue(budget=100, bound=10_000)
    requests = [put(queue, 30) for _ in range(7)]
    taken = []
    while batch := queue.next_batch():
        assert sum(request.lengths[number] for request, number in batch) <= 100
        taken += batch
    assert taken == [(request, 0) for request in requests]
    assert queue.tokens == len(queue) == 0


def test_a_piece_longer_than_a_batch_goes_alone():
    queue = TokenQueue(budget=100, bound=10_000)
    long, short = put(queue, 250), put(queue, 10)
    assert queue.next_batch() == [(long, 0)]
    assert queue.next_batch() == [(short, 0)]
    pieces = put(queue, 250, 250)
    assert queue.next_batch() == [(pieces, 0)]
    assert queue.next_batch() == [(pieces, 1)]
    assert queue.next_batch() == []


def test_short_requests_overtake_long_ones_and_batches_are_filled():
    queue = TokenQueue(budget=100, bound=10_000)
    long = put(queue, *[20] * 50)
    queue.next_batch()
    short = put(queue, 25)
    batch = queue.next_batch()
    assert (short, 0) in batch
    assert sum(request.lengths[number] for request, number in batch) == 85  # one of 25 and three of 20
    assert [number for request, number in batch if request is long] == [5, 6, 7]


@pytest.mark.parametrize("short", [25, 90])
@pytest.mark.parametrize("length", [5, 25, 60, 100], ids=["within the share", "the share", "more", "a batch"])
def test_long_requests_never_starve(length, short):
    """Short requests arrive faster than they are computed; still every piece of two long requests is taken in time."""
    budget = 100
    queue = TokenQueue(budget, bound=10**9)
    long = [put(queue, *[length] * 20) for _ in range(2)]
    before = batches = 0
    seen = []
    while len(seen) < 40:
        for _ in range(12):
            put(queue, short)
        batches += 1
        for request, number in queue.next_batch():
            if request in long:
                seen.append((request, number))
                before += length
                assert batches <= -(-SHARE * before // budget) + 2
    assert seen == [(request, number) for request in long for number in range(20)]


def test_long_requests_do_not_starve_a_text_that_fills_a_batch():
    """Beside the share of long requests there is never enough room for it; the two take turns."""
    queue = TokenQueue(budget=100, bound=10**9)
    put(queue, *[20] * 1000)
    texts = [put(queue, 90) for _ in range(10)]
    taken = [request for _ in range(20) for request, _ in queue.next_batch() if request in texts]
    assert taken == texts


def test_short_requests_keep_most_of_every_batch_while_long_ones_wait():
    queue = TokenQueue(budget=100, bound=10**9)
    long = put(queue, *[25] * 1000)
    for _ in range(400):
        put(queue, 25)
    of_long = sum(request is long for _ in range(100) for request, _ in queue.next_batch())
    assert of_long == 100  # a quarter


def test_credit_is_not_kept_for_a_later_request():
    """Two pieces are taken because nothing else waits, not by their credit; the next long request starts without."""
    queue = TokenQueue(budget=100, bound=10**9)
    put(queue, 90, 90)
    assert len(queue.next_batch()) == len(queue.next_batch()) == 1
    long = put(queue, 90, 90)
    for _ in range(40):
        put(queue, 25)
    batches = [queue.next_batch() for _ in range(4)]
    assert [any(request is long for request, _ in batch) for batch in batches] == [False, False, False, True]


def test_the_limit_includes_announced_tokens():
    queue = TokenQueue(budget=100, bound=300)
    queue.announce(200)
    put(queue, 100)
    with pytest.raises(Full) as full:
        put(queue, 1)
    assert not full.value.never
    with pytest.raises(Full):
        queue.announce(1)
    queue.withdraw(200)
    put(queue, 200)
    assert queue.tokens == 300
    with pytest.raises(Full) as full:
        put(queue, 301)
    assert full.value.never
    assert queue.tokens == 300
    queue.next_batch()
    assert queue.tokens == 200


def test_cancelled_requests_leave_the_queue_at_once():
    queue = TokenQueue(budget=100, bound=10_000)
    long, short, other = put(queue, *[20] * 20), put(queue, 20), put(queue, 21)
    queue.next_batch()
    waiting = queue.tokens
    left = long.tokens
    queue.remove(long)
    assert queue.tokens == waiting - left
    queue.remove(long)
    queue.remove(short)  # it is already in a batch
    assert queue.tokens == waiting - left
    assert other.tokens == short.tokens == 0
    assert queue.next_batch() == []


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_events_keeps_the_counts(seed):
    """Every piece is taken once or cancelled, and the tokens are counted exactly."""
    draw = random.Random(seed)
    queue = TokenQueue(budget=64, bound=2000)
    waiting, given_up, taken = [], [], set()
    for _ in range(2000):
        event = draw.random()
        if event < 0.5:
            try:
                waiting.append(put(queue, *[draw.randint(1, 90) for _ in range(draw.choice([1, 1, 2, 9]))]))
            except Full:
                assert queue.tokens > 1000
        elif event < 0.6 and waiting:
            given_up.append(waiting.pop(draw.randrange(len(waiting))))
            queue.remove(given_up[-1])
        else:
            batch = queue.next_batch()
            assert not taken & {(id(r), n) for r, n in batch}
            assert len(batch) < 2 or sum(r.lengths[n] for r, n in batch) <= queue.budget
            taken |= {(id(r), n) for r, n in batch}
        left = sum(sum(r.lengths[r.taken :]) for r in waiting)
        assert queue.tokens == left <= queue.bound
    while queue.next_batch():
        pass
    assert queue.tokens == len(queue) == 0
    assert all(r.taken == len(r.lengths) for r in waiting)
