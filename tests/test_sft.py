"""SFT: which tokens have a loss, how conversations are packed, and what a run leaves behind."""

import json
import os
import re
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanochat_hf.errors import InputError
from nanochat_hf.run import load_json
from nanochat_hf.train import checkpoint, model_setup, sft
from nanochat_hf.train.sft import ChatConfig, PackedCollator, build_packed_dataset, encode, pad_to_multiple, train_chat
from nanochat_hf.train.trainer import load_source

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

CALL = [{"type": "function", "function": {"name": "python", "arguments": {"expression": "2+3"}}}]
CHAT = [
    {"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "", "tool_calls": CALL},
    {"role": "tool", "name": "python", "content": "5"}, {"role": "assistant", "content": "2 + 3 = 5"},
]  # fmt: skip
PLAIN = [CHAT[0], CHAT[3]]


def config(**keys) -> ChatConfig:
    keys = {"mixture": [{"dataset": "primer", "rows": 60}], "device_batch_size": 4, "num_iterations": 4, **keys}
    return ChatConfig(**keys)


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def history(folder) -> list[dict]:
    return load_json(folder / "metrics.json")["history"]


def learned(tokenizer, chat, assistant_only_loss=True) -> str:
    [(ids, labels)] = encode(tokenizer, [chat], assistant_only_loss)
    assert labels[0] == -100 and all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    return tokenizer.decode(labels[labels != -100])


@pytest.fixture
def entries(tmp_path):
    """(conversations) -> mixture of a file of them."""

    def write(*chats: list[dict]) -> list[dict]:
        (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
        return [{"dataset": str(tmp_path / "chats.jsonl")}]

    return write


def test_the_loss_of_sft_is_on_assistant_tokens_that_of_mid_training_on_all_and_neither_on_tool_results(tokenizer):
    assert learned(tokenizer, CHAT) == "<|python_start|>2+3<|python_end|>2 + 3 = 5<|assistant_end|>"
    chat = [CHAT[0], {**CHAT[1], "content": "So 😊"}, {**CHAT[2], "content": "좋"}, {**CHAT[3], "content": "é"}]
    assert learned(tokenizer, chat) == "So 😊<|python_start|>2+3<|python_end|>é<|assistant_end|>"
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert "<|output_start|>5<|output_end|>" in text and "What is 2 + 3?" in text
    expected = text.removeprefix("<|bos|>").replace("<|output_start|>5<|output_end|>", "")
    assert learned(tokenizer, CHAT, assistant_only_loss=False) == expected


def test_positions_restart_in_each_conversation_and_in_the_padding():
    rows = [
        {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, 3, -100, 5], "seq_lengths": [3, 2]},
        {"input_ids": [6, 7], "labels": [-100, 7]},
    ]
    batch = PackedCollator(pad=9, length=6)(rows)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]]
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 9], [6, 7, 9, 9, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5, -100], [-100, 7, -100, -100, -100, -100]]
    assert PackedCollator(pad=9, length=None)(rows)["input_ids"].shape == (2, 5)


def test_conversations_that_do_not_fit_are_counted_with_row_and_reason(tokenizer, tmp_path, entries):
    mixture = entries(CHAT, [CHAT[0], {"role": "assistant", "content": "word " * 90}], [])

    def build(length, **keys):
        return build_packed_dataset(config(**keys), mixture, tokenizer, length, tmp_path / "rows")

    rows, summary = build(64)
    size = len(encode(tokenizer, [CHAT], True)[0][0])
    assert len(rows) == summary["rows"] == 1 and summary["tokens"] == len(rows[0]["input_ids"]) == size
    reasons = {row["row"]: row["reason"] for row in summary["skipped_rows"]}
    assert reasons.keys() == {1, 2} and "a sequence holds 64" in reasons[1] and "no messages" in reasons[2]
    assert build(size)[1]["rows"] == 1  # a conversation of exactly the length fits
    for length, keys, words in (
        (64, {"on_bad_example": "error"}, "cannot be used"),
        (size - 1, {}, f"no conversation of the mixture fits into max_seq_len = {size - 1} tokens"),
    ):
        with pytest.raises(InputError, match=words):
            build(length, **keys)


def test_packing_keeps_every_token_once_and_several_processes_encode_alike(tokenizer, tmp_path, monkeypatch):
    mixture = [{"dataset": "primer", "rows": 60}]
    rows, summary = build_packed_dataset(config(), mixture, tokenizer, 128, tmp_path / "rows")
    assert sum(len(row["input_ids"]) for row in rows) == summary["tokens"] > 1000
    assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) <= 128 for row in rows)
    assert sum(len(row["seq_lengths"]) for row in rows) == summary["rows"] > len(rows)
    apart, _ = build_packed_dataset(config(packing=False), mixture, tokenizer, 128, tmp_path / "apart")
    assert len(apart) == summary["rows"]
    monkeypatch.setattr(sft, "PARALLEL_FROM", 10)
    monkeypatch.setattr(sft, "ENCODE_BATCH", 7)
    again, other = build_packed_dataset(config(), mixture, tokenizer, 128, tmp_path / "parallel")
    assert again.to_list() == rows.to_list() and other == summary
    _, changed = build_packed_dataset(config(seed=1), mixture, tokenizer, 128, tmp_path / "changed")
    assert changed["content"] != summary["content"]


def test_padding_rows_have_no_loss():
    rows = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[-100, 2]], "seq_lengths": [[2]]})
    padded = pad_to_multiple(rows, 4, pad=9)
    assert padded.to_list() == [*rows.to_list(), *[{"input_ids": [9], "labels": [-100], "seq_lengths": [1]}] * 3]
    assert [len(pad_to_multiple(padded, multiple, pad=9)) for multiple in (2, 3)] == [4, 6]


def test_a_wrong_validation_set_is_noticed_before_the_mixture_is_encoded(tiny_folder, tmp_path):
    with pytest.raises(InputError, match="no split 'dev'"):
        train_chat(config(validation=[{"dataset": "primer", "split": "dev"}]), tiny_folder, tmp_path / "sft")
    assert not (tmp_path / "sft" / "state" / "rows").exists()


def test_the_result_is_a_model_folder_with_its_figures(tiny_folder, tmp_path, monkeypatch):
    out, held_out = tmp_path / "sft", [{"dataset": "primer", "split": "test", "rows": 20}]
    saved, real = [], checkpoint.write_manifest
    monkeypatch.setattr(checkpoint, "write_manifest", lambda folder: saved.append(folder.name) or real(folder))
    train_chat(config(num_iterations=12, validation=held_out, eval_every=6), tiny_folder, out)
    assert saved == ["checkpoint-12"]  # none for the evaluation after six steps
    metrics = load_json(out / "metrics.json")
    assert metrics["finished"] and metrics["rows"] + len(metrics["skipped_rows"]) == 60
    assert metrics["mixture"][0]["tokens"] == metrics["tokens"] > 1000 and metrics["tokens_per_second"] > 0
    losses = [row["train_loss"] for row in metrics["history"]]
    assert len(losses) == 12 and losses[-1] < losses[0] - 1
    assert metrics["start_val_loss"] > metrics["history"][5]["val_loss"] > metrics["val_loss"] > 0
    # 6 steps at the peak, then 6, 5 ... 1 sixths of it
    multipliers = [row["lr_multiplier"] for row in metrics["history"]]
    assert multipliers == pytest.approx([1.0] * 7 + [5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ends = tokenizer.convert_tokens_to_ids(["<|assistant_end|>", "<|python_end|>"])
    assert model.generation_config.eos_token_id == ends and model.dtype == torch.float32
    assert not (out / "state").exists() and tokenizer.chat_template and tokenizer.response_template
    os.umask(mask := os.umask(0))
    assert {path.stat().st_mode & 0o777 for path in out.iterdir() if path.is_file()} == {0o666 & ~mask}


def test_mid_training_then_sft_in_one_process(tiny_folder, tokenizer, tmp_path, monkeypatch, entries):
    collators, sizes, real = [], [], sft.ChatTrainer.enable_fused_forward

    def note(self, most):
        real(self, most)
        sizes.append((most, self.args.per_device_eval_batch_size, self.fused))

    monkeypatch.setattr(sft, "PackedCollator", lambda *of: collators.append(of) or PackedCollator(*of))
    monkeypatch.setattr(sft.ChatTrainer, "enable_fused_forward", note)
    examples, pair = ["누구세요?", "What is 2 + 3?"], [{**PLAIN[0], "content": "a"}, {**PLAIN[1], "content": "b"}]
    keys = {"assistant_only_loss": False, "warmdown_ratio": 0.2, "examples": examples}
    train_chat(config(**keys, validation=entries(*[pair] * 30)), tiny_folder, tmp_path / "mid")
    unpacked = {"packing": False, "total_batch_size": 8, "max_seq_len": 128}  # conversations, two micro-batches
    train_chat(config(**unpacked, attn_implementation="sdpa"), str(tmp_path / "mid"), tmp_path / "sft")
    # 18 pairs of 7 tokens in a sequence of the validation, and its padding
    assert sizes == [(4 * (18 + 1), 4, True), (4 * (1 + 1), 4, False)]
    assert collators == [(tokenizer.pad_token_id, 128), (tokenizer.pad_token_id, None)]
    assert AutoTokenizer.from_pretrained(tmp_path / "sft").init_kwargs["examples"] == examples
    assert history(tmp_path / "sft")[0]["train_loss"] < 6 and history(tmp_path / "mid")[-1]["step"] == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_trains_adapters_only_in_the_devices_dtype_and_leaves_float32(tiny_folder, tmp_path, monkeypatch, dtype):
    """peft calls the matrices itself: on a GPU their inputs are bfloat16 and their weights are not."""
    shown = []
    monkeypatch.setattr(model_setup, "compute_dtype", lambda device: dtype)
    _, model = load_source(tiny_folder, config(lora_r=4))
    assert model.model(torch.tensor([[1, 2]])).last_hidden_state.dtype == dtype
    monkeypatch.setattr("nanochat_hf.train.trainer.Progress.update", lambda *words: shown.append(words[2:]))
    train_chat(config(lora_r=4), tiny_folder, tmp_path / "sft")
    assert "lr 0.0005," in shown[-1][0]  # the adapters' 0.001, half decayed
    before, after = weights(tiny_folder), weights(tmp_path / "sft")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kinds = {name.split(".")[-2] for name in changed}
    assert before.keys() == after.keys() and kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}
    assert all(value.dtype == torch.float32 for value in after.values())
    value = after["model.layers.0.mlp.fc1.weight"]
    assert not torch.equal(value.bfloat16().float(), value)


def test_chatcore_is_measured_and_validation_on_rows_of_the_mixture_is_said(tiny_folder, tmp_path, capsys):
    calls = []

    def measure(model, limit):
        calls.append((model.training, limit))
        return 0.25

    both = [{"dataset": "primer", "rows": 20}]
    keys = {"mixture": both, "validation": both, "chatcore_every": 2, "chatcore_max_per_task": 5}
    train_chat(config(**keys), tiny_folder, tmp_path / "sft", chatcore=measure)
    output = capsys.readouterr()
    assert "both take rows of primer::train: its validation loss is of rows trained on" in output.err
    number = re.search(r"training: (\d+) sequences\n", output.out)[1]
    assert f"data         primer: {number} sequences\n" in output.out  # without those that only make up whole steps
    assert [row.get("chatcore") for row in history(tmp_path / "sft")] == [None, 0.25, None, 0.25]
    assert calls == [(False, 5)] * 2


def test_the_validation_loss_is_the_mean_over_tokens_of_unequal_batches(tiny_folder, tmp_path, entries):
    """By hand, one conversation at a time; a short and a long one are batches of their own here."""
    replies = ["yes", "word " * 30, "no no", "word " * 9, "well"]
    chats = [[{"role": "user", "content": "Say it"}, {"role": "assistant", "content": text}] for text in replies]
    keys = {"validation": entries(*chats), "packing": False, "device_batch_size": 1, "num_iterations": 2}
    train_chat(config(**keys), tiny_folder, tmp_path / "sft")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sft").eval()
    total = count = 0.0
    for ids, labels in encode(AutoTokenizer.from_pretrained(tmp_path / "sft"), chats, True):
        logp = model(torch.tensor([ids.tolist()])).logits[0, :-1].log_softmax(-1)
        for position, label in enumerate(labels[1:]):
            if label != -100:
                total, count = total - logp[position, label].item(), count + 1
    val_loss = load_json(tmp_path / "sft" / "metrics.json")["val_loss"]
    assert count > 40 and val_loss == pytest.approx(total / count, rel=1e-5)


def test_a_batch_of_padding_alone_leaves_the_validation_loss_as_it_is():
    trainer, none = sft.ChatTrainer.__new__(sft.ChatTrainer), torch.full((1, 4), -100)
    batches = [{"labels": none}, {"labels": torch.arange(4)[None]}]
    trainer.model, trainer._prepare_inputs, trainer.log = torch.nn.Linear(1, 1), dict, dict
    trainer.accelerator = SimpleNamespace(device="cpu", reduce=lambda sums, how: sums)
    trainer.get_eval_dataloader = lambda: batches
    trainer.compute_loss = lambda model, batch: torch.tensor(float("nan") if batch["labels"] is none else 2.0)
    assert trainer.evaluate() == {"eval_loss": 2.0}


def test_a_packed_conversation_does_not_attend_to_its_neighbors(lively_model, tokenizer):
    lively_model.model.smear_lambda.data.fill_(1.0)
    (ids, _), (other, _) = encode(tokenizer, [CHAT, PLAIN], True)
    ids, other = ids.tolist(), other.tolist()
    row = {"input_ids": other + ids, "labels": other + ids, "seq_lengths": [len(other), len(ids)]}
    batch = PackedCollator(tokenizer.pad_token_id, len(ids) + len(other) + 5)([row])
    packed = lively_model(batch["input_ids"], position_ids=batch["position_ids"]).logits
    alone = lively_model(torch.tensor([ids])).logits
    torch.testing.assert_close(packed[:, len(other) : len(other) + len(ids)], alone, atol=1e-4, rtol=1e-4)


def test_one_batch_of_eight_trains_like_eight_batches_of_one(tiny_folder, tmp_path):
    train_chat(config(device_batch_size=8, num_iterations=3), tiny_folder, tmp_path / "whole")
    train_chat(config(device_batch_size=1, total_batch_size=1024, num_iterations=3), tiny_folder, tmp_path / "parts")
    whole, parts = history(tmp_path / "whole"), history(tmp_path / "parts")
    assert whole[0]["grad_norm"] == pytest.approx(parts[0]["grad_norm"], rel=1e-4)
    losses = [[row["train_loss"] for row in rows] for rows in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # Adam makes much of a rounding error in a tiny gradient
