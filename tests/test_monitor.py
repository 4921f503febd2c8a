"""What a run tells: an alarm that rings at leaps and at nothing else, evaluation that costs no compiling."""

import json
import random
from itertools import count

import pytest
import torch

from nanochat_hf.data.dataloader import VALIDATION, PackedLoader
from nanochat_hf.data.documents import DocumentStream
from nanochat_hf.data.tokenizer import token_byte_lengths
from nanochat_hf.eval.bpb import evaluate_bpb, losses_of
from nanochat_hf.train.fused_model import FusedTransformer
from nanochat_hf.train.monitoring import FIRST, Evaluator, LossSpikeDetector, line
from nanochat_hf.train.runtime import to_device


def rings(losses, nats=2.0):
    """The indices at which the alarm rings."""
    alarm = LossSpikeDetector(nats)
    return [i for i, loss in enumerate(losses) if alarm.rings(loss)]


def curve(steps, noise, seed=0):
    """A healthy run's losses: from 10.4 fast to 5, slowly to 3."""
    rng = random.Random(seed)
    return [3 + 5.4 * 0.97**i + 2 * 0.999**i + rng.gauss(0, noise) for i in range(steps)]


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5, 2.0])
def test_no_alarm_in_healthy_runs_however_noisy(noise):
    assert not rings(curve(3000, noise))


@pytest.mark.parametrize("at", [100, 500, 1500])
def test_a_leap_rings_once_and_is_no_standard_for_what_follows(at):
    losses = curve(2000, 0.05)
    losses[at] += 3.5
    assert rings(losses) == [at]
    losses[at:] = [loss + 3.5 for loss in losses[at:]]
    assert rings(losses)[: FIRST + 3] == list(range(at, at + FIRST + 3))


def test_less_than_the_limit_and_no_limit_are_silent():
    losses = curve(300, 0.01)
    losses[200] += 1.9
    assert not rings(losses) and rings(losses, nats=1.5) == [200]
    losses[250] = 50
    assert not rings(losses, nats=0)


@pytest.fixture
def evaluator(tiny_model, tokenizer, tmp_path):
    """Of a model of two layers on 2 x 3 rows of held-out text; the file gives the same text every time."""
    text = [{"text": f"Row {i} tells of {i} fish and {i * i} birds. " * 5} for i in range(600)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text))
    loads = count()

    def new_loader():
        next(loads)
        return PackedLoader(
            DocumentStream(str(tmp_path / "text.jsonl"), "validation"), tokenizer, 3, 128, **VALIDATION
        )

    made = Evaluator(FusedTransformer(tiny_model), tiny_model, tokenizer, new_loader, 2)
    made.loads = loads
    return made


def test_bits_per_byte_are_those_of_the_rows_and_are_read_once(evaluator, tiny_model, tokenizer):
    first = evaluator.bpb()
    assert evaluator.bpb() == first and next(evaluator.loads) == 1 and len(evaluator.rows) == 2
    batches = [to_device(rows, torch.device("cpu")) for rows in evaluator.rows]
    lengths = torch.tensor(token_byte_lengths(tokenizer))
    assert first == pytest.approx(evaluate_bpb(losses_of(tiny_model), batches, lengths), abs=1e-4)
    assert all(p.grad is None for p in tiny_model.parameters())


def test_samples_are_greedy_and_the_same_every_time(evaluator, tokenizer):
    samples = evaluator.samples(7)
    assert len(samples) == 3 and samples == evaluator.samples(7)
    assert all(sample["step"] == 7 and sample["prompt"] and sample["text"] for sample in samples)
    assert tokenizer.bos_token not in samples[0]["prompt"]


@pytest.mark.parametrize("alike", [True, False])
def test_evaluation_runs_the_programs_that_training_compiled(evaluator, tiny_model, monkeypatch, alike):
    programs, real = [], torch.compile

    def backend(graph, inputs):
        programs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda *args, **options: real(*args, **options | {"backend": backend}))
    torch._dynamo.reset()
    evaluator.network, evaluator.alike = FusedTransformer(tiny_model, compile=True), alike
    evaluator.batches(2)

    def train():
        ids, targets = to_device(evaluator.rows[0], torch.device("cpu"))
        evaluator.network(ids, targets).backward()
        return len(programs)

    before = train()
    evaluator.bpb()
    evaluator.samples(1)
    assert train() == len(programs)
    assert (len(programs) == before) is alike and before > 2
    torch._dynamo.reset()


def test_a_line_tells_a_steps_figures():
    point = {"step": 3, "train_loss": 4.25, "tokens_per_second": 12345.6, "mfu": 0.412, "lr": 0.0123, "momentum": 0.9}
    assert line(500, point | {"grad_norm": 0.3}) == (
        "step 3/500: loss 4.250, 12,346 tok/s, MFU 41.2%, lr 0.0123, momentum 0.900, grad norm 0.3"
    )
