"""Bits per byte against computation by hand."""

import math
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from nanochat_hf.data.tokenizer import token_byte_lengths
from nanochat_hf.eval import bpb
from nanochat_hf.eval.bpb import bits_per_byte, evaluate_bpb, held_out_bpb, losses_of

LENGTHS = torch.tensor([2, 1, 3, 0])  # id 3 is special; an ignored target must not count as id 0


def test_ranks_share_the_rows(tiny_model, tokenizer, monkeypatch):
    rows = []
    count = lambda losses, batches, lengths: rows.append(sum(len(inputs) for inputs, _ in batches))  # noqa: E731
    monkeypatch.setattr(bpb, "evaluate_bpb", count)
    for rank in (0, 1):
        state = SimpleNamespace(process_index=rank, num_processes=2)
        monkeypatch.setattr(bpb, "partial_state", lambda state=state: state)
        assert held_out_bpb(tiny_model, tokenizer, "primer", 5 * 128)["n"] == 5 * 128
    assert rows == [3, 2]
    monkeypatch.setattr(bpb, "LONGEST", 32)
    held_out_bpb(tiny_model, tokenizer, "primer", 5 * 128)
    assert rows[2] == 5 * 4 // 2  # of 32 tokens


@pytest.mark.parametrize("batches,nats,num_bytes", [
    ([([[1.0, 2.0], [50.0, 3.0]], [[1, 2], [3, 0]])], 6, 6),  # special tokens count nowhere
    ([([[1.0, 7.0], [7.0, 3.0]], [[1, -100], [-100, 0]])], 4, 3),  # ignored targets neither
    ([([[1.0, 1.0]], [[2, 2]]), ([[1.0]], [[1]])], 3, 7),  # batches are weighted by their bytes
])  # fmt: skip
def test_loss_is_divided_by_the_bytes_of_its_tokens(batches, nats, num_bytes):
    losses = iter([losses for losses, _ in batches])
    pairs = [(torch.tensor(targets),) * 2 for _, targets in batches]
    value = evaluate_bpb(lambda inputs, targets: torch.tensor(next(losses)), pairs, LENGTHS)
    assert value == pytest.approx(nats / (math.log(2) * num_bytes))


def test_no_bytes_is_infinite_and_not_a_crash():
    assert evaluate_bpb(lambda inputs, targets: torch.ones(1, 1), [(torch.tensor([[3]]),) * 2], LENGTHS) == math.inf
    assert evaluate_bpb(None, [], LENGTHS) == bits_per_byte(1.0, 0) == math.inf


def test_a_uniform_model_costs_the_entropy_of_its_vocabulary(tiny_model, tokenizer):
    torch.nn.init.zeros_(tiny_model.lm_head.weight)
    ids = torch.tensor([tokenizer("The cat sat on the mat.").input_ids])
    inputs, targets = ids[:, :-1], ids[:, 1:]
    value = evaluate_bpb(losses_of(tiny_model), [(inputs, targets)], torch.tensor(token_byte_lengths(tokenizer)))
    num_bytes = len(tokenizer.decode(targets[0]).encode())
    assert value == pytest.approx(targets.numel() * math.log2(len(tokenizer)) / num_bytes, rel=1e-5)


def test_held_out_text_does_not_depend_on_the_batch_size(tiny_model, tokenizer):
    sizes = (1536, 1 << 16)  # 3 and 16 rows
    one, many = (held_out_bpb(tiny_model, tokenizer, "primer", 2100, batch_tokens=n) for n in sizes)
    assert one["n"] == many["n"] == 2048
    assert one["value"] == pytest.approx(many["value"], rel=1e-6)
    assert 3 < one["value"] < 9  # untrained: 9 bits per token of 1 to 3 bytes


def test_nothing_is_computed_for_a_tokenizer_that_is_not_byte_level(tiny_model):
    plain = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    plain.normalizer = normalizers.Replace(" ", "▁")
    plain.train_from_iterator(["the owl sees the cat"] * 9, trainers.BpeTrainer(special_tokens=["<unk>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<unk>")
    assert held_out_bpb(tiny_model, tokenizer, "primer", 2048) is None


def test_held_out_text_is_that_of_the_validation_split_alone(lively_model, tokenizer, tmp_path):
    """Training text changes nothing, and the bits per byte of the two differ."""
    texts = ["zqx 7! " * 40, "The cat sat on the mat. " * 12]

    def measure(name, train, validation):
        (tmp_path / name).mkdir()
        for file, text in (("train-00000-of-00001", train), ("validation-00000-of-00001", validation)):
            pq.write_table(pa.table({"text": [text] * 20}), tmp_path / name / f"{file}.parquet")
        return held_out_bpb(lively_model, tokenizer, str(tmp_path / name), 512)["value"]

    expected = measure("same", texts[1], texts[1])
    assert measure("one", texts[0], texts[1]) == expected
    assert measure("other", texts[1], texts[0]) != pytest.approx(expected, rel=0.01)
