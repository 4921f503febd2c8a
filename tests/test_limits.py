"""Connections to the server: half requests, broken ones, too many; the test fires the timers, so no time passes."""

import asyncio
import logging
from datetime import timedelta
from importlib import import_module
from inspect import signature
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import uvicorn

from nanochat_hf.serve import limits
from nanochat_hf.serve.limits import LimitedProtocol, OncePerMinute

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"


class Connection:
    """A connection whose timers fire when the test says so, to an app that answers when it says so."""

    def __init__(self):
        self.timers, self.go, self.transport = [], asyncio.Event(), MagicMock()
        self.transport.get_extra_info.return_value = None
        self.transport.is_closing = lambda: self.closed
        loop = SimpleNamespace(call_later=self.call_later, create_task=asyncio.get_running_loop().create_task)
        state = uvicorn.server.ServerState()
        self.protocol = LimitedProtocol(
            uvicorn.Config(self.app, interface="asgi3", log_level="critical"), state, {}, loop
        )
        self.protocol.connection_made(self.transport)

    def call_later(self, seconds, function):
        self.timers.append(function)
        self.seconds = seconds
        return SimpleNamespace(cancel=lambda: function in self.timers and self.timers.remove(function))

    @property
    def sent(self) -> bytes:
        return b"".join(call.args[0] for call in self.transport.write.mock_calls)

    @property
    def closed(self) -> bool:
        return self.transport.close.called or self.transport.abort.called

    async def app(self, scope, receive, send):
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    def time_is_up(self) -> bool:
        """Whether the limit of the request's arrival ends the connection."""
        (timer,) = [timer for timer in self.timers if timer == self.protocol.end_if_waiting]
        timer()
        return self.closed


def test_half_requests_are_hung_up_on_and_there_are_only_so_many_connections(monkeypatch):
    async def run():
        for before in (None, HEAD + b"{}"):  # also as the second request of a connection
            for half in (None, HEAD[:9], HEAD + b"{"):
                connection = Connection()
                for data in filter(None, (before, half)):
                    connection.go.set() if data is before else connection.go.clear()
                    connection.protocol.data_received(data)
                    await asyncio.sleep(0)
                assert connection.sent.endswith(b"ok") == bool(before) and not connection.closed
                assert connection.time_is_up()
        connection = Connection()
        connection.protocol.data_received(HEAD + b"{}")
        assert not connection.time_is_up()  # it has come, and its answer may take longer
        connection.protocol.connection_lost(None)
        assert connection.protocol.end_if_waiting not in connection.timers
        for limit, refused in ((1, False), (0, True)):
            monkeypatch.setattr(limits, "connection_limit", lambda limit=limit: limit)
            connection = Connection()
            assert connection.seconds == 20 and connection.closed == refused
            assert connection.sent.startswith(b"HTTP/1.1 503 ") == refused

    asyncio.run(run())


@pytest.mark.parametrize("answered", [False, True])
def test_a_client_that_breaks_the_protocol_is_hung_up_on_without_a_traceback(monkeypatch, answered):
    """Before and after the answer; with uvicorn alone h11 raises a LocalProtocolError."""
    errors = []
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "error", lambda *args, **options: errors.append(options))

    async def run():
        connection = Connection()
        connection.go.set()
        connection.protocol.data_received(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(2 * answered):
            await asyncio.sleep(0)
        connection.protocol.data_received(b"no chunk\r\n")
        for _ in range(3):
            await asyncio.sleep(0)
        assert connection.sent.startswith(b"HTTP/1.1 200" if answered else b"HTTP/1.1 400")
        assert connection.closed and errors == []

    asyncio.run(run())


def test_a_flood_of_broken_requests_is_one_line_of_the_log_per_minute(monkeypatch):
    start = 5.0  # soon after the machine began
    monkeypatch.setattr(limits.time, "monotonic", lambda: start)
    once, record = OncePerMinute(), logging.LogRecord("uvicorn.error", 30, "", 1, "Invalid HTTP request", (), None)
    assert [once.filter(record) for _ in range(3)] == [True, False, False]
    for seconds, passes in ((59, False), (61, True)):
        monkeypatch.setattr(limits.time, "monotonic", lambda seconds=seconds: start + seconds)
        assert once.filter(record) == passes


def test_half_of_the_descriptors_and_at_most_512_are_for_connections(monkeypatch):
    for descriptors, connections in ((100, 50), (1024, 512), (10**6, 512)):
        monkeypatch.setattr("resource.getrlimit", lambda _, descriptors=descriptors: (descriptors, 10**6))
        assert limits.connection_limit() == connections


def test_the_server_listens_where_it_was_told_with_its_limits(monkeypatch):
    configs, ran = [], []
    monkeypatch.setattr(limits.uvicorn, "Config", lambda *words, **more: configs.append((words, more)) or "config")
    monkeypatch.setattr(limits.uvicorn, "Server", lambda config: SimpleNamespace(run=lambda: ran.append(config)))
    limits.run("app", "::1", 8001)
    [(words, options)] = configs
    assert (words, ran, options["http"]) == (("app", "::1", 8001), ["config"], LimitedProtocol)
    assert options["timeout_graceful_shutdown"] == 5 and 5 < options["timeout_keep_alive"] < 20
    for name in ("uvicorn.error", "asyncio"):
        logger = logging.getLogger(name)
        assert isinstance(logger.filters.pop(), OncePerMinute)


SIZES = {  # module -> bytes, counts and seconds that its users meet
    "serve.limits": {"MAX_BODY": 2**20, "RECEIVE_TIMEOUT": 20, "KEEP_ALIVE": 15, "MAX_CONNECTIONS": 512},
    "serve.server": {"MAX_PARTS": 40_000, "RETRY_AFTER": "2"},
    "serve.decoder": {"MAX_FORCED": 512, "MAX_STOPS": 8, "PREFILL_TOKENS": 32_768},
    "serve.engine": {"MAX_BATCH_SIZE": 128, "MAX_CHUNK": 8},
    "serve.terminal_chat": {"PIPE_SECONDS": 3},
    "sandbox": {"MAX_OUTPUT": 64 * 2**10, "MEMORY_BYTES": 512 * 2**20},
    "data.chat_renderer": {"SECONDS": 10, "MEMORY_BYTES": 2**30, "MAX_CHARS": 2**24},
    "data.hub_files": {"RETRY_DELAYS": (1, 2, 4, 8, 16)},
    "data.identity": {"NUM_CONVERSATIONS": 1000, "MAX_CHARS": 2000},
    "tools": {"MAX_CHARS": 200, "MAX_VALUE": 10**100, "MAX_DIGITS": 100},
    "distributed": {"BARRIER_TIMEOUT": timedelta(minutes=30), "LONG_TIMEOUT": timedelta(hours=6)},
    "tool_loop": {"MAX_TOKENS": 512},
    "data.mixture": {"MAX_LISTED_REASONS": 1000, "MAX_WORD_CHARS": 20_000_000, "MAX_WORDS": 200_000,
                     "MAX_ROWS": 10**8, "MAX_GENERATED": 200_000},
    "data.documents": {"SINGLE_FILE_VALIDATION": 16, "JSONL_UNIT": 2**20, "HASH_LIMIT": 2**26, "CACHE_LIMIT": 2**28},
    "data.dataloader": {"CHUNK_CHARS": 2**20, "VALIDATION": {"num_shards": 8, "packing_strategy": "bfd"}},
    "data.tokenizer": {"VALIDATION_CHARS": 4_000_000},
    "model.configuration_nanochat": {"SMEAR_GATE_CHANNELS": 24, "VALUE_GATE_CHANNELS": 12, "ROPE_RANGE": 10},
    "sync": {"POLL": 1.0, "PAUSES": (1, 2, 4, 8, 16, 32, 60), "AFTER_SIGNAL": 20},
    "hub.push": {"MAX_UPLOADS": 2},
    "train.monitoring": {"NUM_SAMPLES": 4, "PROMPT_TOKENS": 8, "NEW_TOKENS": 32},
    "train.pretrain": {"HISTORY": 1000},
    "train.grpo": {"PRIMER_PROMPTS": 4000}, "optim.overview": {"SHORTEST_STEP": 0.01},
    "eval.tasks": {"NUM_SPELLING_QUESTIONS": 256},
    "run": {"LOG_SECONDS": 30},
}  # fmt: skip


DEFAULTS = {  # of functions and classes that users call -> values of what they leave out
    "serve.decoder.Request": {"max_new_tokens": 256, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0},
    "serve.engine.Engine": {"slots": 1, "tool_timeout": 5.0, "length": None, "stop_ids": None, "dtype": None},
    "serve.worker.Worker": {"max_queue_size": 64},
    "serve.worker.Completion": {"timeout": 120.0},
    "serve.server.Server": {"temperature": 0.6, "top_k": 50, "max_new_tokens": 512, "request_timeout": 120.0},
    "serve.terminal_chat.RemoteModel": {"timeout": 60.0, "retries": 2},
    "sandbox.run_sandboxed": {"tests": "", "timeout": 3.0, "memory_bytes": 512 * 2**20},
    "convert.upstream.convert": {"to": "hf", "tokenizer": None, "step": None},
    "data.dataloader.PackedLoader": {"buffer_size": 1000, "num_shards": 64, "packing_strategy": "bfd_split"},
    "data.documents.DocumentStream": {"split": "train", "rank": 0, "world_size": 1, "skip_bad_files": False},
    "data.identity.generate_with_model": {"seed": 0, "workers": 8},
    "data.mixture.Mixture": {"seed": 0, "on_bad_example": "skip"},
    "data.tokenizer.train_bpe": {"digit_group": 2, "normalization": None},
    "optim.scaling.estimate_micro_batch_size": {"bytes_per_value": 2, "kernels": True},
    "stage_configs.PretrainConfig": {
        "eval_every": 250, "eval_tokens": 80 * 524288, "core_metric_max_per_task": 500, "sample_every": 2000,
        "save_every": 1000, "save_optimizer": False, "fp8": False, "max_loss_spike": 2.0,
    },
    "stage_configs.ChatConfig": {
        "num_epochs": 1, "device_batch_size": 16, "init_lr_frac": 1.0, "warmup_ratio": 0.0, "warmdown_ratio": 0.5,
        "weight_decay": 0.0, "lora_r": 0, "lora_alpha": 32, "lora_lr": 1e-3, "chatcore_max_per_task": 32,
    },
    "stage_configs.RLConfig": {
        "examples_per_step": 16, "num_samples": 16, "max_new_tokens": 256, "temperature": 1.0, "eval_examples": 400,
        "eval_samples": 4, "warmdown_ratio": 1.0, "init_lr_frac": 0.05,
    },
    "stage_configs.DPOStageConfig": {"num_eval_pairs": 200, "examples_per_step": 32, "beta": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_is_left_out_has_these_values(name):
    module, _, name_there = name.rpartition(".")
    parameters = signature(getattr(import_module(f"nanochat_hf.{module}"), name_there)).parameters
    assert {key: parameters[key].default for key in DEFAULTS[name]} == DEFAULTS[name]


@pytest.mark.parametrize("module", SIZES)
def test_the_sizes_counts_and_seconds_that_users_meet_stay(module):
    values = import_module(f"nanochat_hf.{module}")
    assert {name: getattr(values, name) for name in SIZES[module]} == SIZES[module]
