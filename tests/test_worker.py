"""Worker threads: many requests at once, a bounded queue, stop strings, time limits, and a model that breaks."""

import asyncio
import threading
import time

import pytest
import torch
from talker import QUESTIONS, talker, talker_folder  # noqa: F401
from transformers import AutoModelForCausalLM

import nanochat_hf.serve.worker
from nanochat_hf.errors import InputError
from nanochat_hf.serve.engine import Engine, Request, StreamChunk
from nanochat_hf.serve.worker import Completion, QueueFullError, Worker, WorkerDiedError


@pytest.fixture
def worker(talker):  # noqa: F811
    made = Worker(lambda: Engine(*talker, slots=2), max_queue_size=3)
    made.start()
    made.ready.wait()
    yield made
    made.close()
    assert not made.is_alive()


def prompt(worker, text="Hello"):
    return worker.engine.encode([{"role": "user", "content": text}])


async def never():
    return False


def ask(worker, text="Hello", stops=(), max_seconds=60.0, **options):
    """(text, why it ended) of one answer."""

    async def run():
        answer = Completion(
            [worker], Request(prompt(worker, text), **{"max_new_tokens": 120, **options}), stops, max_seconds
        )
        pieces = await answer.whole(never)
        return "".join(piece for piece in pieces if piece.kind == "text"), answer.finish_reason

    return asyncio.run(run())


def test_answers_at_the_same_time_do_not_mix(worker):
    async def run():
        answers = [Completion([worker], Request(prompt(worker, text), 120)) for text in QUESTIONS]
        return await asyncio.gather(*(answer.whole(never) for answer in answers))

    found = ["".join(piece for piece in pieces if piece.kind == "text") for pieces in asyncio.run(run())]
    assert found == [parts[-1][1] for parts in QUESTIONS.values()] and worker.load == 0


def test_a_full_queue_refuses_at_once_and_recovers(worker):
    async def run():
        answers = [Completion([worker], Request(prompt(worker), 120)) for _ in range(5)]  # 2 rows and 3 that wait
        with pytest.raises(QueueFullError):
            Completion([worker], Request(prompt(worker)))
        await asyncio.gather(*(answer.whole(never) for answer in answers))

    asyncio.run(run())
    assert ask(worker)[1] == "stop"


@pytest.mark.parametrize("stop,text", [("**", "안녕하세요! I am a "), ("quite a", "talk for "), ("zzz", "at all.")])
def test_stop_strings_cut_the_text_also_across_tokens(worker, stop, text):
    found, reason = ask(worker, stops=[stop])
    assert found.endswith(text) and stop not in found and reason == "stop"


def test_text_held_back_for_a_stop_string_is_given_out_at_the_end(worker):
    assert ask(worker, stops=["all.X"])[0].endswith("at all.")


def test_a_time_limit_cuts_the_answer_and_frees_the_row(worker):
    slow, real = threading.Event(), worker.engine.advance
    worker.engine.advance = lambda: (slow.wait(0.05), real())[1]
    text, reason = ask(worker, max_seconds=0.3)
    assert reason == "length" and len(text) < 20
    worker.engine.advance = real
    assert ask(worker, "What is 5 + 6?") == ("It is 11.", "stop")


def test_all_rows_of_a_turn_wake_the_loop_once(worker):
    worker.wake_ups = 0

    async def run():
        loop = asyncio.get_running_loop()
        real = loop.call_soon_threadsafe

        def counted(*args):
            worker.wake_ups += 1
            return real(*args)

        loop.call_soon_threadsafe = counted
        with worker.wake:  # both are in the inbox before the worker looks: they run in the same turns
            answers = [Completion([worker], Request(prompt(worker), 40)) for _ in range(2)]
        await asyncio.gather(*(answer.whole(never) for answer in answers))

    asyncio.run(run())
    assert worker.wake_ups == 40  # two rows of forty tokens: a turn wakes the loop once


def test_a_stream_left_early_frees_the_row_and_its_timer(worker):
    async def run():
        answer = Completion([worker], Request(prompt(worker), 200))
        batches = answer.batches()
        tokens, _ = await anext(batches)
        await batches.aclose()
        return answer, tokens

    answer, tokens = asyncio.run(run())
    assert tokens and answer.request.cancelled and answer.ended.done() and answer.timer.cancelled()


def test_a_reader_slower_than_the_model_gets_everything(worker):
    async def run():
        answer = Completion([worker], Request(prompt(worker), 120))
        found, said = [], ""
        async for tokens, pieces in answer.batches():
            found += tokens
            said += "".join(pieces)
            await asyncio.sleep(0.05)
        return answer, found, said

    answer, found, said = asyncio.run(run())
    assert found == answer.request.tokens and said == QUESTIONS["Hello"][0][1]


def test_a_client_that_left_frees_the_row(worker, monkeypatch):
    monkeypatch.setattr(nanochat_hf.serve.worker, "HANG_UP_CHECK", 0.02)
    real, asked = worker.engine.advance, []

    def advance():  # the answer would never end by itself
        time.sleep(0.005)
        return real() if all(request.cancelled for request in list(worker.callbacks)) else []

    async def gone():
        asked.append(True)
        return len(asked) > 2

    async def run():
        answer = Completion([worker], Request(prompt(worker), 200))
        await asyncio.wait_for(answer.whole(gone), 10)
        return answer.request

    worker.engine.advance = advance
    request, end = asyncio.run(run()), time.monotonic() + 10
    while worker.load and time.monotonic() < end:
        time.sleep(0.01)
    worker.engine.advance = real
    assert (request.finish_reason, worker.load, len(asked)) == ("cancelled", 0, 3)


def test_a_broken_model_fails_the_answer_under_way_and_refuses_the_next(talker):  # noqa: F811
    worker = Worker(lambda: Engine(*talker))
    worker.start()
    worker.ready.wait()

    def explode():
        raise MemoryError("no memory left")

    worker.engine.advance = explode
    with pytest.raises(WorkerDiedError, match="no memory left"):
        ask(worker)
    with pytest.raises(WorkerDiedError, match="not running: no memory left"):
        ask(worker)
    worker.join(5)


def test_a_model_that_cannot_be_loaded_is_told_to_whoever_waits():
    def fail():
        raise ValueError("no such model")

    worker = Worker(fail)
    worker.start()
    assert worker.ready.wait(5) and "no such model" in str(worker.error)


def test_the_worker_with_less_to_do_gets_the_request(talker):  # noqa: F811
    workers = [Worker(lambda: Engine(*talker, slots=1)) for _ in range(2)]
    for worker in workers:
        worker.start()
        worker.ready.wait()

    async def run():
        answers = [Completion(workers, Request(prompt(workers[0]), 60)) for _ in range(4)]
        used = [answer.worker for answer in answers]
        await asyncio.gather(*(answer.whole(never) for answer in answers))
        return used

    used = asyncio.run(run())
    assert used.count(workers[0]) == used.count(workers[1]) == 2
    for worker in workers:
        worker.close()


def test_replicas_load_one_after_another_since_loading_changes_torch_for_all_threads(talker_folder, talker):  # noqa: F811
    def load():
        return Engine(AutoModelForCausalLM.from_pretrained(talker_folder, dtype=torch.bfloat16), talker[1])

    workers = [Worker(load) for _ in range(6)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            assert worker.ready.wait(60) and worker.error is None
        assert torch.get_default_dtype() == torch.float32
        for worker in workers:
            assert {parameter.dtype for parameter in worker.engine.model.parameters()} == {torch.bfloat16}
    finally:
        torch.set_default_dtype(torch.float32)
        for worker in workers:
            worker.close()


def test_a_gpu_needs_no_number(monkeypatch, talker):  # noqa: F811
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for device in ("cuda", "cuda:3"):
        worker = Worker(lambda: Engine(*talker), device)
        worker.start()
        assert worker.ready.wait(5) and worker.error is None
        worker.close()
    assert chosen == [0, 3]


def test_a_broken_replica_is_passed_over_while_another_runs(worker):
    def fail():
        raise MemoryError("no memory left")

    broken = Worker(fail)
    broken.start()
    broken.join(5)

    async def run():
        answers = [Completion([broken, worker], Request(prompt(worker), 120)) for _ in range(3)]
        await asyncio.gather(*(answer.whole(never) for answer in answers))
        return [(answer.worker, answer.finish_reason) for answer in answers]

    assert broken.broken and not worker.broken
    assert asyncio.run(run()) == [(worker, "stop")] * 3


def test_requests_may_come_while_ended_ones_are_taken_out(worker):
    class Slow(Request):
        """Looking at `finish` takes as long as a busy machine may take between two threads."""

        @property
        def finish(self):
            time.sleep(0.002)
            return self.how

        @finish.setter
        def finish(self, how):
            self.how = how

    async def run():
        first = Completion([worker], Slow(prompt(worker), 120))
        later = []
        for _ in range(4):
            await asyncio.sleep(0.005)
            later.append(Completion([worker], Slow(prompt(worker), 5)))
        await asyncio.gather(*(answer.whole(never) for answer in (first, *later)))

    asyncio.run(run())
    assert worker.error is None and worker.load == 0


def test_a_prompt_that_cannot_be_run_is_refused_and_the_worker_goes_on(worker):
    async def run():
        with pytest.raises(InputError, match="the prompt is empty"):
            Completion([worker], Request([]))

    asyncio.run(run())
    assert ask(worker, "What is 5 + 6?") == ("It is 11.", "stop")


def test_text_held_back_for_a_stop_string_comes_before_the_call_that_follows_it(worker):
    async def run():
        completion = Completion([worker], Request(prompt(worker), 1), ["bc"])
        chunks = [StreamChunk("a b"), StreamChunk("1+1", "call"), StreamChunk("c")]
        return [(part, part.kind) for chunk in chunks for part in completion.cut(chunk)]

    assert asyncio.run(run()) == [("a ", "text"), ("b", "text"), ("1+1", "call"), ("c", "text")]


def test_a_very_long_stop_string_does_not_hold_up_the_loop(worker):
    start = time.monotonic()
    assert ask(worker, stops=["a" * 1_000_000])[0].endswith("at all.")
    assert time.monotonic() - start < 5
