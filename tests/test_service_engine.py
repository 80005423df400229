"""The threads of a server: which requests fail together, what leaves the queue, and what is computed at most once."""

import asyncio
import os
import threading
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("orjson", reason="needs the serve extra")
from fastbert.service import engine
from fastbert.service.engine import Engine, Job, Piece, Prepared
from fastbert.service.errors import ServiceError
from fastbert.service.queue import TokenQueue
from fastbert.text.batching import end_team, use_threads

pytestmark = pytest.mark.once


class Doubler:
    """A model that doubles numbers. It can be held back, and refuses a bad number."""

    def __init__(self):
        self.batches, self.began = [], threading.Event()
        self.open = threading.Event()
        self.open.set()

    def compute(self, data):
        self.batches.append(list(data))
        self.began.set()
        assert self.open.wait(30)
        if any(number < 0 for number in data):
            raise RuntimeError("a secret of the machine")
        return [2 * number for number in data]


class Rig:
    """An engine with one queue on the running event loop."""

    def __init__(self, budget=100, bound=1000, **options):
        self.lane, self.queue = Doubler(), TokenQueue(budget, bound)
        self.engine = Engine(asyncio.get_running_loop(), [self.queue], **options)

    def job(self, *numbers, tokens=10, announced=10):
        pieces = [Piece(self.lane, number, tokens) for number in numbers]
        return Job(self.queue, lambda: Prepared(pieces, [tokens] * len(pieces)), announced)

    def ask(self, *numbers, **options):
        job = self.job(*numbers, **options)
        self.engine.submit(job)
        return job

    async def blocked(self):
        """Makes the thread compute a first job without end, so that later jobs wait."""
        self.lane.open.clear()
        job = self.ask(0)
        await asyncio.to_thread(self.lane.began.wait, 30)
        return job

    async def settled(self, jobs):
        while any(job.waiting is None and not job.is_over for job in jobs):
            await asyncio.sleep(0.001)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *error):
        self.lane.open.set()
        await asyncio.to_thread(self.engine.stop)


def run(test):
    return asyncio.run(asyncio.wait_for(test(), 60))


@pytest.mark.parametrize("workers", [1, 3])
def test_every_request_gets_its_own_answers_in_its_order(workers):
    async def test():
        async with Rig(workers=workers) as rig:
            jobs = [rig.ask(*range(i, i + i % 7 + 1), tokens=1 + i % 40) for i in range(0, 20)]
            for i, job in enumerate(jobs):
                assert await job.answer == [2 * n for n in range(i, i + i % 7 + 1)]
            assert rig.queue.tokens == 0
            assert sum(map(len, rig.lane.batches)) == sum(i % 7 + 1 for i in range(20))

    run(test)


def test_waiting_requests_are_computed_together():
    async def test():
        async with Rig(budget=100) as rig:
            first = await rig.blocked()
            jobs = [rig.ask(n) for n in range(1, 15)]
            await rig.settled(jobs)
            rig.lane.open.set()
            assert [await job.answer for job in [first, *jobs]] == [[2 * n] for n in range(15)]
            assert rig.lane.batches == [[0], list(range(1, 11)), list(range(11, 15))]

    run(test)


def test_a_bad_text_fails_alone():
    async def test():
        async with Rig() as rig:
            await rig.blocked()
            jobs = [rig.ask(n) for n in (1, 2, -3, 4, 5)]
            await rig.settled(jobs)
            rig.lane.open.set()
            found = await asyncio.gather(*(job.answer for job in jobs), return_exceptions=True)
            assert [found[i] for i in (0, 1, 3, 4)] == [[2], [4], [8], [10]]
            assert isinstance(found[2], ServiceError)
            assert found[2].kind == "failed"
            assert "secret" not in found[2].message
            assert rig.queue.tokens == 0

    run(test)


def test_a_batch_may_have_pieces_of_several_lanes():
    """Each lane gets its own, also of one request, and an error in one does not reach the other."""

    async def test():
        async with Rig() as rig:
            await rig.blocked()
            other = Doubler()
            pieces = [Piece(rig.lane, 1, 10), Piece(other, 2, 10), Piece(rig.lane, 3, 10)]
            jobs = [Job(rig.queue, lambda: Prepared(pieces, [10] * 3), 30), rig.ask(4)]
            jobs.append(Job(rig.queue, lambda: Prepared([Piece(other, -5, 10)], [10]), 10))
            rig.engine.submit(jobs[0])
            rig.engine.submit(jobs[2])
            await rig.settled(jobs)
            rig.lane.open.set()
            assert await jobs[0].answer == [2, 4, 6]
            assert await jobs[1].answer == [8]
            with pytest.raises(ServiceError):
                await jobs[2].answer
            assert sorted(n for batch in rig.lane.batches for n in batch) == [0, 1, 3, 4]

    run(test)


def test_a_text_that_cannot_be_tokenised_fails_alone():
    async def test():
        async with Rig() as rig:

            def refuse():
                raise ServiceError("tokenizer", "no text")

            bad = Job(rig.queue, refuse, 30)
            good = rig.ask(1)
            rig.engine.submit(bad)
            assert await good.answer == [2]
            with pytest.raises(ServiceError, match="no text"):
                await bad.answer
            assert rig.queue.tokens == 0

    run(test)


def test_a_panic_in_tokenising_ends_no_thread():
    """A panic of a library in Rust is no Exception."""

    class Panic(BaseException):
        pass

    async def test():
        async with Rig() as rig:

            def panics():
                raise Panic("a secret")

            for _ in range(3):  # more than there are threads
                bad = Job(rig.queue, panics, 30)
                rig.engine.submit(bad)
                with pytest.raises(ServiceError, match="failed on this request \\(Panic\\)"):
                    await bad.answer
            assert rig.engine.is_alive
            assert await rig.ask(1).answer == [2]

    run(test)


def test_an_overloaded_server_says_so_at_once():
    async def test():
        async with Rig(budget=100, bound=50) as rig:
            await rig.blocked()
            jobs = [rig.ask(n) for n in range(1, 6)]
            with pytest.raises(ServiceError) as error:
                rig.ask(6)
            assert error.value.kind == "overloaded"
            assert 1 <= error.value.retry_after < 60
            await rig.settled(jobs)
            assert rig.queue.tokens == 50
            rig.lane.open.set()
            assert [await job.answer for job in jobs] == [[2 * n] for n in range(1, 6)]
            with pytest.raises(ServiceError) as error:
                rig.ask(7, announced=51)
            assert error.value.kind == "too_large"
            late = rig.ask(1, 2, 3, 4, 5, 6, announced=10)  # 60 tokens, which is known only after tokenising
            with pytest.raises(ServiceError) as error:
                await late.answer
            assert error.value.kind == "too_large"
            assert rig.queue.tokens == 0

    run(test)


def test_cancelled_requests_are_not_computed():
    async def test():
        async with Rig(budget=10) as rig:
            await rig.blocked()
            jobs = [rig.ask(n) for n in (1, 2, 3)]
            await rig.settled(jobs)
            rig.engine.give_up(jobs[1])
            assert rig.queue.tokens == 20
            rig.lane.open.set()
            assert await jobs[2].answer == [6]
            assert rig.lane.batches == [[0], [1], [3]]
            assert not jobs[1].answer.done()

    run(test)


def test_requests_cancelled_before_they_are_tokenised_are_not_computed():
    async def test():
        async with Rig() as rig:
            await rig.blocked()
            entered, go = threading.Event(), threading.Event()

            def slow():
                entered.set()
                go.wait(30)
                return Prepared([Piece(rig.lane, 9, 10)], [10])

            job = Job(rig.queue, slow, 10)
            rig.engine.submit(job)
            await asyncio.to_thread(entered.wait, 30)
            rig.engine.give_up(job)
            go.set()
            rig.lane.open.set()
            assert await rig.ask(1).answer == [2]
            assert rig.lane.batches[-1] == [1]
            while rig.engine._preparing:
                await asyncio.sleep(0.001)
            assert rig.queue.tokens == 0

    run(test)


def test_stopping_finishes_accepted_requests():
    async def test():
        async with Rig(budget=10) as rig:
            await rig.blocked()
            jobs = [rig.ask(n) for n in range(1, 9)]
            rig.lane.open.set()
            await asyncio.to_thread(rig.engine.stop)
            assert [await job.answer for job in jobs] == [[2 * n] for n in range(1, 9)]
            with pytest.raises(ServiceError) as error:
                rig.ask(1)
            assert error.value.kind == "not_ready"

    run(test)


def test_a_tokenised_request_wakes_an_idle_thread():
    async def test():
        async with Rig() as rig:
            entered, go = threading.Event(), threading.Event()

            def slow():
                entered.set()
                assert go.wait(30)
                return Prepared([Piece(rig.lane, 4, 10)], [10])

            first = await rig.blocked()  # so that another thread tokenises
            job = Job(rig.queue, slow, 10)
            rig.engine.submit(job)
            await asyncio.to_thread(entered.wait, 30)
            rig.lane.open.set()
            assert await first.answer == [0]
            while not rig.engine._idle:
                await asyncio.sleep(0.001)
            go.set()
            assert await asyncio.wait_for(job.answer, 30) == [8]

    run(test)


def test_stopping_waits_for_requests_being_tokenised():
    async def test():
        async with Rig() as rig:
            entered, go = threading.Event(), threading.Event()

            def slow():
                entered.set()
                assert go.wait(30)
                return Prepared([Piece(rig.lane, 4, 10)], [10])

            await rig.blocked()  # so that another thread tokenises
            job = Job(rig.queue, slow, 10)
            rig.engine.submit(job)
            await asyncio.to_thread(entered.wait, 30)
            stopped = asyncio.create_task(asyncio.to_thread(rig.engine.stop))
            rig.lane.open.set()
            while not rig.engine._stopped or rig.engine._busy:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            go.set()
            assert await job.answer == [8]
            await stopped

    run(test)


@pytest.mark.parametrize("workers", [1, 2])
def test_others_do_not_wait_while_long_texts_are_tokenised(workers):
    """An idle model thread tokenised a text of 2 MB itself, in seconds in which it computed nothing."""

    async def test():
        async with Rig(workers=workers) as rig:
            release = threading.Event()

            def long(number):
                assert release.wait(30)
                return Prepared([Piece(rig.lane, number, 10)], [10])

            slow = [Job(rig.queue, lambda n=n: long(n), 10, engine.LONG + 1) for n in range(1, 4)]
            for job in slow:
                rig.engine.submit(job)
            assert await rig.ask(4).answer == [8]
            assert rig.engine.requests_waiting() == 2  # and one is being tokenised
            stopping = asyncio.create_task(asyncio.to_thread(rig.engine.stop))
            await asyncio.sleep(0.01)
            release.set()
            assert [await job.answer for job in slow] == [[2], [4], [6]]
            await stopping

    run(test)


def test_others_do_not_wait_while_a_long_answer_is_made():
    """The answer of thousands of windows took seconds in the model's thread."""

    async def test():
        async with Rig() as rig:
            release = threading.Event()

            def finish(found):
                assert release.wait(30)
                return found

            slow = Job(rig.queue, lambda: Prepared([Piece(rig.lane, 1, 10)], [10], 0, finish, True), 10)
            rig.engine.submit(slow)
            while not rig.lane.batches:
                await asyncio.sleep(0.001)
            assert await rig.ask(2).answer == [4]
            stopping = asyncio.create_task(asyncio.to_thread(rig.engine.stop))
            await asyncio.sleep(0.01)
            release.set()
            assert await slow.answer == [2]
            await stopping

    run(test)


def test_the_tokenising_thread_ends_if_it_wakes_first():
    """An idle engine gets a job and is stopped before the model's thread wakes: the tokenising thread wakes alone."""

    async def test():
        async with Rig() as rig:
            rigged = rig.engine
            while not rigged._idle:
                await asyncio.sleep(0.001)
            job = Job(rig.queue, lambda: Prepared([Piece(rig.lane, 5, 10)], [10]), 10)
            with rigged._lock:
                rig.queue.announce(10)
                rigged._unprepared.append(job)
                rigged._stopped = True
                rigged._for_tokeniser.notify()
            assert await asyncio.wait_for(job.answer, 10) == [10]
            (tokenising,) = (thread for thread in rigged._threads if thread.name == "tokenise")
            await asyncio.to_thread(tokenising.join, 10)
            assert not tokenising.is_alive()

    run(test)


def test_an_error_outside_the_model_fails_only_its_batch():
    """If it ended the thread, every later request would stay without an answer."""

    async def test():
        faults = [ZeroDivisionError("a secret of the machine")]

        def on_batch(pieces, tokens):
            if faults:
                raise faults.pop()

        async with Rig(on_batch=on_batch) as rig:
            with pytest.raises(ServiceError) as error:
                await rig.ask(1).answer
            assert error.value.kind == "failed"
            assert "secret" not in error.value.message
            assert await rig.ask(2).answer == [4]
            assert rig.engine.is_alive
            assert rig.queue.tokens == 0

    run(test)


def test_free_threads_share_the_batches_of_one_request():
    """A thread that takes a batch wakes the next one while more batches wait, so that all compute at once."""

    async def test():
        async with Rig(budget=10, workers=3) as rig:
            while len(rig.engine._idle) < 3:
                await asyncio.sleep(0.001)
            rig.lane.open.clear()
            job = rig.ask(1, 2, 3)
            while len(rig.lane.batches) < 3:
                await asyncio.sleep(0.001)
            rig.lane.open.set()
            assert await job.answer == [2, 4, 6]

    run(test)


def test_requests_to_an_idle_engine_are_computed_by_one_thread(monkeypatch):
    """Each thread that computes a batch alone has a team of OpenMP threads, and more teams than processors are slow.
    Another thread ends its team after it computed alone, and when nothing waits."""

    async def test():
        async with Rig(budget=10, workers=3, threads=3) as rig:
            compute = rig.lane.compute

            def noted(data):
                computed.append((data[0], threading.current_thread().name))
                return compute(data)

            rig.lane.compute = noted
            while len(rig.engine._idle) < 3:
                await asyncio.sleep(0.001)
            for number in range(4):
                await rig.ask(number).answer
                while len(rig.engine._idle) < 3:
                    await asyncio.sleep(0.001)
            entered, go = threading.Event(), threading.Event()

            def slow():
                entered.set()
                assert go.wait(30)
                return Prepared([Piece(rig.lane, 5, 10)], [10])

            job = Job(rig.queue, slow, 10)
            rig.engine.submit(job)
            await asyncio.to_thread(entered.wait, 30)
            await rig.ask(4).answer
            go.set()
            await job.answer
            assert computed == [(number, "model-0") for number in range(4)] + [(4, "model-1"), (5, "model-0")]
            while len(rig.engine._idle) < 3:
                await asyncio.sleep(0.001)
            assert ended == ["model-1"]
            rig.lane.open.clear()
            job = rig.ask(6, 7, 8)
            while len(computed) < 9:
                await asyncio.sleep(0.001)
            rig.lane.open.set()
            await job.answer
            while len(rig.engine._idle) < 3:
                await asyncio.sleep(0.001)
            assert sorted(ended) == ["model-1", "model-1", "model-2"]

    computed, ended = [], []
    monkeypatch.setattr(engine, "end_team", lambda: ended.append(threading.current_thread().name))
    run(test)


def test_a_request_whose_thread_found_a_batch_instead_is_tokenised_by_another_idle_thread():
    """Otherwise the request would wait until that batch is computed."""

    async def test():
        async with Rig(workers=3) as rig:
            while len(rig.engine._idle) < 3:
                await asyncio.sleep(0.001)
            rig.lane.open.clear()
            first, second = rig.job(1, announced=0), rig.job(2, announced=0)
            rig.engine._preparing += 1
            rig.engine._prepare(first)  # as in the tokenising thread, which then looks for idle threads too late
            with rig.engine._lock:
                rig.engine._unprepared.append(second)
                rig.engine._wake_worker()
            until = time.monotonic() + 10
            while len(rig.lane.batches) < 2 and time.monotonic() < until:
                await asyncio.sleep(0.001)
            assert sorted(rig.lane.batches) == [[1], [2]]
            rig.lane.open.set()
            assert await asyncio.gather(first.answer, second.answer) == [[2], [4]]

    run(test)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's list of threads")
def test_a_call_ends_a_team_of_threads():
    """While the calling thread goes on. (A team also ends with its thread.)"""

    def tasks():
        return set(os.listdir("/proc/self/task"))

    def work():
        use_threads(3)
        before = tasks()
        torch.zeros(2**20, dtype=torch.float32, device="cpu").add_(1)
        team = tasks() - before
        end_team()
        until = time.monotonic() + 10
        while team & tasks() and time.monotonic() < until:
            time.sleep(0.001)
        found.append((len(team), len(team & tasks())))

    found = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(2, 0)]


def test_retry_after_is_below_a_minute():
    async def test():
        async with Rig(bound=50) as rig:
            await rig.blocked()
            await rig.settled([rig.ask(1, tokens=40)])
            for rate, wanted in ((0.001, 59), (20.0, 2), (19.0, 3), (1e9, 1)):
                rig.engine.rate = rate
                with pytest.raises(ServiceError) as error:
                    rig.ask(2, announced=41)
                assert error.value.headers() == [(b"retry-after", b"%d" % wanted)]

    run(test)


def test_small_batches_do_not_make_clients_wait_longer():
    """After the warm-up, a batch of three tokens, and after single short texts, the estimate was a tenth of what full
    batches give: a queue that was empty in a second sent its clients away for 20."""

    async def test():
        async with Rig(budget=100, bound=200) as rig:
            for _ in range(3):
                await rig.ask(1, tokens=3).answer
            assert rig.engine.rate == 0.0
            await rig.ask(1, tokens=25).answer
            assert rig.engine.rate > 0.0

    run(test)


def test_models_take_turns():
    async def test():
        lane, queues = Doubler(), [TokenQueue(10, 1000), TokenQueue(10, 1000)]
        engine = Engine(asyncio.get_running_loop(), queues)
        lane.open.clear()
        jobs = []
        for number, queue in [(0, 0), *((n, n % 2) for n in range(2, 8))]:
            pieces = [Piece(lane, number, 10)]
            jobs.append(Job(queues[queue], lambda pieces=pieces: Prepared(pieces, [10]), 10))
            engine.submit(jobs[-1])
            if number == 0:
                await asyncio.to_thread(lane.began.wait, 30)
        while sum(queue.waiting for queue in queues) < 60:
            await asyncio.sleep(0.001)
        lane.open.set()
        await asyncio.gather(*(job.answer for job in jobs))
        assert [n % 2 for (n,) in lane.batches[1:]] in ([0, 1] * 3, [1, 0] * 3)
        await asyncio.to_thread(engine.stop)

    run(test)
