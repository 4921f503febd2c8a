"""Worker threads: many requests at once, stop strings, time limits; test_server has a full queue and lost clients."""

import asyncio
from types import SimpleNamespace

import pytest
import torch
from talker import QUESTIONS

from nanochat_hf.errors import InputError
from nanochat_hf.serve import text_of
from nanochat_hf.serve import worker as workers
from nanochat_hf.serve.engine import Engine, Request
from nanochat_hf.serve.worker import LOAD_LOCK, Completion, Worker, open_workers


@pytest.fixture
def start():
    """start(make_engine, ...) gives a worker that has loaded; all are closed at the end."""
    workers = []

    def start(make_engine, *args, **options):
        workers.append(Worker(make_engine, *args, **options))
        workers[-1].start()
        assert workers[-1].ready.wait(60)
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()
        assert not worker.is_alive()


@pytest.fixture
def worker(talker, start):
    return start(lambda: Engine(*talker, slots=2), max_queue_size=3)


def request(worker, text="Hello", max_new_tokens=120):
    return Request(worker.engine.encode([{"role": "user", "content": text}]), max_new_tokens)


def gather(completions):
    return asyncio.gather(*(completion.read() for completion in completions))


def ask(worker, text="Hello", stop=(), timeout=60.0):
    """(text, finish reason) of one completion."""

    async def run():
        completion = Completion([worker], request(worker, text), stop, timeout)
        answer = text_of(await completion.read())
        while worker.load:  # until the engine has closed the request, too
            await asyncio.sleep(0.01)
        return answer, completion.finish_reason

    return asyncio.run(run())


def explode():
    raise MemoryError("no memory left")


def test_answers_at_the_same_time_do_not_mix(worker):
    async def run():
        return await gather([Completion([worker], request(worker, text)) for text in QUESTIONS])

    texts = [text_of(chunks) for chunks in asyncio.run(run())]
    assert texts == [parts[-1][1] for parts in QUESTIONS.values()] and worker.load == 0


@pytest.mark.parametrize(
    "stop,text",
    [
        (["**"], "안녕하세요! I am a "),
        (["quite a", "for quite"], "talk "),  # the first in the text
        (["zzz", ""], "at all."),
        (["all.X"], "at all."),
    ],
)
def test_stop_strings_cut_the_text_also_across_tokens(worker, stop, text):
    answer, reason = ask(worker, stop=stop)
    assert answer.endswith(text) and reason == "stop"


def test_a_time_limit_cuts_the_answer_and_frees_the_slot(worker):
    real, worker.engine.advance = worker.engine.advance, lambda: []  # nothing comes before the limit
    completion = []

    async def run():
        completion.append(Completion([worker], request(worker), timeout=0.01))
        return text_of(await asyncio.wait_for(completion[0].read(), 60)), completion[0].finish_reason

    assert asyncio.run(run()) == ("", "length") and completion[0].request.cancelled
    worker.engine.advance = real
    assert ask(worker, "What is 5 + 6?") == ("It is 11.", "stop")


def test_an_answer_that_is_complete_outlives_its_worker_and_each_gpu_has_a_worker(worker, monkeypatch):
    async def run():
        completion = Completion([worker], request(worker))
        while not completion.request.finish_reason:
            await asyncio.sleep(0.01)
        monkeypatch.setattr(worker, "error", MemoryError("later"))
        return text_of(await completion.read())

    assert asyncio.run(run()) == QUESTIONS["Hello"][0][1]
    devices, makers = [], []
    engine = SimpleNamespace(encode=list, warm_up=list)
    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(workers, "load_tokenizer", str)
    monkeypatch.setattr(workers.Engine, "from_pretrained", lambda _, device, slots: devices.append(device) or engine)
    monkeypatch.setattr(workers, "Worker", lambda make, *_: makers.append(make) or SimpleNamespace(start=list))
    workers.open_workers("x", 1, 1)
    assert [make() for make in makers] == [engine] * 2 and devices == ["cuda:0", "cuda:1"]


def test_a_reader_slower_than_the_model_gets_everything(worker):
    async def run():
        completion, all_tokens, text = Completion([worker], request(worker)), [], ""
        async for tokens, chunks in completion.batches():
            all_tokens += tokens
            text += "".join(chunks)
            await asyncio.sleep(0.01)
        return completion.request.tokens == all_tokens, text

    assert asyncio.run(run()) == (True, QUESTIONS["Hello"][0][1])


def test_a_worker_that_cannot_load_says_why_and_others_get_its_requests(worker, start):
    broken = start(explode)
    assert "no memory left" in str(broken.error)

    async def run():
        completions = [Completion([broken, worker], request(worker)) for _ in range(3)]
        await gather(completions)
        return [(completion.worker, completion.finish_reason) for completion in completions]

    assert asyncio.run(run()) == [(worker, "stop")] * 3


def test_the_worker_with_the_least_load_gets_the_request(talker, start):
    workers = [start(lambda: Engine(*talker)) for _ in range(2)]

    async def run():
        completions = [Completion(workers, request(workers[0], max_new_tokens=20)) for _ in range(4)]
        await gather(completions)
        return [completion.worker for completion in completions]

    assert [asyncio.run(run()).count(worker) for worker in workers] == [2, 2]


def test_replicas_load_one_after_another_since_loading_changes_torch_for_all_threads(talker, start):
    locked = []
    start(lambda: locked.append(LOAD_LOCK.locked()) or Engine(*talker))
    assert locked == [True] and not LOAD_LOCK.locked()


def test_a_gpu_needs_no_number(monkeypatch, talker, start):
    devices = []
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for device in ("cuda", "cuda:3", "cuda:4"):  # the last one does not exist: loading refuses it
        assert start(lambda: Engine(*talker), device).error is None
    assert devices == [0, 3]


def test_a_prompt_that_cannot_be_run_is_refused_and_the_worker_goes_on(worker):
    async def run():
        with pytest.raises(InputError, match="the prompt is empty"):
            Completion([worker], Request([]))

    asyncio.run(run())
    assert worker.load == 0 and ask(worker, "What is 5 + 6?") == ("It is 11.", "stop")


def test_a_worker_has_the_slots_and_the_queue_that_were_asked_for(talker_folder):
    (worker,) = open_workers(str(talker_folder), 3, 5, "cpu")
    assert worker.ready.wait(60) and worker.error is None
    assert (worker.engine.decoder.slots, worker.capacity) == (3, 8)
    worker.close()
