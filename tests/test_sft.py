"""Conversations become rows, rows teach what the assistant says, and a killed stage goes on where it stopped."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanochat_hf.errors import InputError
from nanochat_hf.run import load_json
from nanochat_hf.train import model_setup as network
from nanochat_hf.train import sft
from nanochat_hf.train.sft import ChatConfig, PackedCollator, build_packed_dataset, encode, train_chat

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

CALL = [{"type": "function", "function": {"name": "python", "arguments": {"expression": "2+3"}}}]
CHAT = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "", "tool_calls": CALL},
    {"role": "tool", "name": "python", "content": "5"},
    {"role": "assistant", "content": "2 + 3 = 5"},
]


def config(**keys) -> ChatConfig:
    keys = {"mixture": [{"dataset": "primer", "rows": 60}], "device_batch_size": 4, "num_iterations": 4, **keys}
    return ChatConfig(**keys)


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def learned(tokenizer, encoded) -> str:
    return tokenizer.decode([label for label in encoded["labels"][0] if label != -100])


def test_sft_learns_what_the_assistant_says_and_not_what_the_tool_answers(tokenizer):
    encoded = encode(tokenizer, [CHAT], assistant_only_loss=True)
    expected = "<|python_start|>2+3<|python_end|>2 + 3 = 5<|assistant_end|>"
    assert learned(tokenizer, encoded) == expected
    with_words = [CHAT[0], {**CHAT[1], "content": "So 😊"}, {**CHAT[2], "content": "좋"}, {**CHAT[3], "content": "é"}]
    assert learned(tokenizer, encode(tokenizer, [with_words], True)) == (
        "So 😊<|python_start|>2+3<|python_end|>é<|assistant_end|>"
    )
    assert tokenizer.decode(encoded["input_ids"][0]).count("<|output_start|>5<|output_end|>") == 1


def test_mid_training_learns_every_token_but_the_first_and_the_tools(tokenizer):
    encoded = encode(tokenizer, [CHAT], assistant_only_loss=False)
    text = tokenizer.decode(encoded["input_ids"][0])
    expected = text.replace("<|output_start|>5<|output_end|>", "").removeprefix("<|bos|>")
    assert learned(tokenizer, encoded) == expected and "What is 2 + 3?" in expected


@pytest.mark.parametrize("reply", ["Sure 😊", "좋아요", "好", "café", "fine 👍🏽", "plain"])
def test_all_bytes_of_a_last_character_are_learned_whatever_the_folders_template_marks(tokenizer, reply):
    tokenizer = copy.deepcopy(tokenizer)
    # A template of older folders, whose block ends with the text: transformers' mask then lacks the last bytes.
    block = "{% generation %}{{ m.content }}{% endgeneration %}{% generation %}<|assistant_end|>{% endgeneration %}"
    older = (
        "<|bos|>{% for m in messages %}{% if m.role == 'user' %}<|user_start|>{{ m.content }}<|user_end|>"
        "{% else %}<|assistant_start|>" + block + "{% endif %}{% endfor %}"
    )
    chat = [{"role": "user", "content": reply}, {"role": "assistant", "content": reply}]
    for template in (tokenizer.chat_template, older):
        tokenizer.chat_template = template
        encoded = encode(tokenizer, [chat + chat], assistant_only_loss=True)
        assert learned(tokenizer, encoded) == f"{reply}<|assistant_end|>" * 2


def test_labels_stand_under_their_own_tokens(tokenizer):
    for only in (True, False):
        encoded = encode(tokenizer, [CHAT, CHAT[:1] + CHAT[3:]], assistant_only_loss=only)
        for ids, labels in zip(encoded["input_ids"], encoded["labels"], strict=True):
            assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True)) and labels[0] == -100


def test_positions_start_anew_in_each_conversation_and_in_the_padding():
    rows = [
        {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, 3, -100, 5], "seq_lengths": [3, 2]},
        {"input_ids": [6, 7], "labels": [-100, 7]},
    ]
    batch = PackedCollator(pad=9, length=6)(rows)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]]
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 9], [6, 7, 9, 9, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5, -100], [-100, 7, -100, -100, -100, -100]]
    assert PackedCollator(pad=9, length=None)(rows)["input_ids"].shape == (2, 5)


def test_a_packed_conversation_sees_nothing_of_its_neighbours(tiny_model, tokenizer):
    tiny_model.lm_head.weight.data.normal_()  # fresh heads and projections are zero and would hide a difference
    for layer in tiny_model.model.layers:
        layer.self_attn.o_proj.weight.data.normal_(std=0.2)
    tiny_model.model.smear_lambda.data.fill_(1.0)
    ids, other = encode(tokenizer, [CHAT, CHAT[:1] + CHAT[3:]], True)["input_ids"]
    row = {"input_ids": other + ids, "labels": other + ids, "seq_lengths": [len(other), len(ids)]}
    batch = PackedCollator(tokenizer.pad_token_id, len(ids) + len(other) + 5)([row])
    packed = tiny_model(batch["input_ids"], position_ids=batch["position_ids"]).logits
    alone = tiny_model(torch.tensor([ids])).logits
    torch.testing.assert_close(packed[:, len(other) : len(other) + len(ids)], alone, atol=1e-4, rtol=1e-4)


def test_conversations_that_do_not_fit_are_counted_with_row_and_reason(tokenizer, tmp_path):
    chats = [
        {"messages": CHAT},
        {"messages": [CHAT[0], {"role": "assistant", "content": "word " * 90}]},
        {"messages": []},
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    entries = [{"dataset": str(tmp_path / "chats.jsonl")}]
    rows, made = build_packed_dataset(config(), entries, tokenizer, 64, tmp_path / "rows")
    assert len(rows) == 1 and made["rows"] == 1 and made["tokens"] == len(rows[0]["input_ids"])
    reasons = {row["row"]: row["reason"] for row in made["skipped_rows"]}
    assert reasons.keys() == {1, 2} and "a row holds 64" in reasons[1] and "no messages" in reasons[2]
    with pytest.raises(InputError, match="cannot be used"):
        build_packed_dataset(config(on_bad_example="error"), entries, tokenizer, 64, tmp_path / "refused")
    with pytest.raises(InputError, match="no conversation of the mixture fits"):
        build_packed_dataset(config(), entries, tokenizer, 8, tmp_path / "short")
    exact = made["tokens"]  # a row holds a conversation of exactly its length
    assert build_packed_dataset(config(), entries, tokenizer, exact, tmp_path / "exact")[1]["rows"] == 1
    with pytest.raises(InputError, match="no conversation of the mixture fits"):
        build_packed_dataset(config(), entries, tokenizer, exact - 1, tmp_path / "one_less")


def test_rows_are_made_once_and_found_again(tokenizer, tmp_path, monkeypatch):
    entries = [{"dataset": "primer", "rows": 20}]
    rows, made = build_packed_dataset(config(), entries, tokenizer, 128, tmp_path / "rows")
    monkeypatch.setattr(sft, "make_rows", None)
    again, found = build_packed_dataset(config(), entries, tokenizer, 128, tmp_path / "rows")
    assert again.to_list() == rows.to_list() and found == made


def test_the_result_is_a_model_folder_with_its_figures(tiny_folder, tmp_path):
    out = tmp_path / "sft"
    made = config(num_iterations=12, validation=[{"dataset": "primer", "split": "test", "rows": 20}], eval_every=6)
    train_chat(made, tiny_folder, out)
    metrics = load_json(out / "metrics.json")
    assert metrics["finished"] and metrics["rows"] + len(metrics["skipped_rows"]) == 60
    assert metrics["mixture"][0]["tokens"] == metrics["tokens"] > 1000 and metrics["tokens_per_second"] > 0
    losses = [row["train_loss"] for row in metrics["history"]]
    assert len(losses) == 12 and losses[-1] < losses[0] - 1
    assert metrics["history"][5]["val_loss"] > metrics["val_loss"] > 0
    assert metrics["history"][0]["lr_multiplier"] == 1.0 and metrics["history"][-1]["lr_multiplier"] < 0.2
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ends = tokenizer.convert_tokens_to_ids(["<|assistant_end|>", "<|python_end|>"])
    assert model.generation_config.eos_token_id == ends and model.dtype == torch.float32
    assert not (out / "state").exists() and tokenizer.chat_template and tokenizer.response_template


def test_mid_training_then_sft_in_one_process(tiny_folder, tmp_path):
    train_chat(config(assistant_only_loss=False, warmdown_ratio=0.2), tiny_folder, tmp_path / "mid")
    train_chat(config(packing=False), str(tmp_path / "mid"), tmp_path / "sft")
    first, last = (
        load_json(tmp_path / stage / "metrics.json")["history"][i] for stage, i in (("mid", -1), ("sft", 0))
    )
    assert last["train_loss"] < 6 and first["step"] == 4


def test_one_batch_of_eight_trains_like_eight_batches_of_one(tiny_folder, tmp_path):
    train_chat(config(device_batch_size=8, num_iterations=3), tiny_folder, tmp_path / "whole")
    train_chat(
        config(device_batch_size=1, total_batch_size=8 * 128, num_iterations=3), tiny_folder, tmp_path / "parts"
    )
    whole, parts = (load_json(tmp_path / name / "metrics.json")["history"] for name in ("whole", "parts"))
    assert whole[0]["grad_norm"] == pytest.approx(parts[0]["grad_norm"], rel=1e-4)
    losses = [[row["train_loss"] for row in history] for history in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # Adam makes much of a rounding error in a tiny gradient


def test_lora_trains_adapters_only_and_leaves_a_plain_model(tiny_folder, tmp_path):
    train_chat(config(lora_r=4), tiny_folder, tmp_path / "sft")
    before, after = weights(tiny_folder), weights(tmp_path / "sft")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kinds = {name.split(".")[-2] for name in changed}
    assert before.keys() == after.keys() and kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}


def test_lora_runs_in_the_dtype_of_the_device_over_float32_weights(tiny_folder, tmp_path, monkeypatch):
    """peft calls the matrices itself: on a GPU their inputs are bfloat16 and their weights are not."""
    monkeypatch.setattr(network, "compute_dtype", lambda device: torch.bfloat16)
    train_chat(config(lora_r=4), tiny_folder, tmp_path / "sft")
    after, before = weights(tmp_path / "sft"), weights(tiny_folder)
    assert all(value.dtype == torch.float32 for value in after.values())
    name = "model.layers.0.mlp.fc1.weight"
    assert not torch.equal(after[name], before[name]) and not torch.equal(after[name].bfloat16().float(), after[name])


def test_chatcore_is_measured_on_the_way_when_the_caller_can(tiny_folder, tmp_path):
    asked = []

    def measure(model, limit):
        asked.append((model.training, limit))
        return 0.25

    train_chat(config(chatcore_every=2, chatcore_max_per_task=5), tiny_folder, tmp_path / "sft", chatcore=measure)
    history = load_json(tmp_path / "sft" / "metrics.json")["history"]
    assert [row.get("chatcore") for row in history] == [None, 0.25, None, 0.25] and asked == [(False, 5)] * 2


def test_a_folder_without_a_model_is_named(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "empty")
    with pytest.raises(InputError, match="no model in"):
        train_chat(config(), str(tmp_path / "empty"), tmp_path / "sft")


def test_validation_on_rows_that_are_trained_on_is_said(tiny_folder, tmp_path, capsys):
    both = [{"dataset": "primer", "rows": 20}]
    train_chat(config(mixture=both, validation=both, num_iterations=1), tiny_folder, tmp_path / "sft")
    assert "both take rows of primer::train: its validation loss is of rows trained on" in capsys.readouterr().err


def test_the_validation_loss_is_the_mean_over_tokens_of_unequal_batches(tiny_folder, tmp_path):
    """By hand, one conversation at a time; a short and a long one are batches of their own here."""
    said = ["yes", "word " * 30, "no no", "word " * 9, "well"]
    rows = [[{"role": "user", "content": "Say it"}, {"role": "assistant", "content": text}] for text in said]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    keys = {"validation": [{"dataset": str(tmp_path / "chats.jsonl")}], "packing": False, "device_batch_size": 1}
    train_chat(config(**keys, num_iterations=2), tiny_folder, tmp_path / "sft")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sft").eval()
    encoded = encode(AutoTokenizer.from_pretrained(tmp_path / "sft"), rows, True)
    total = count = 0.0
    for ids, labels in zip(encoded["input_ids"], encoded["labels"]):
        logp = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        for position, label in enumerate(labels[1:]):
            if label != -100:
                total, count = total - logp[position, label].item(), count + 1
    metrics = load_json(tmp_path / "sft" / "metrics.json")
    assert count > 40 and metrics["val_loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_conversation_of_exactly_a_rows_length_is_kept(tokenizer, tmp_path):
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    size = len(encode(tokenizer, [CHAT], True)["input_ids"][0])
    entries = [{"dataset": str(tmp_path / "chats.jsonl")}]
    rows, made = build_packed_dataset(config(), entries, tokenizer, size, tmp_path / "rows")
    assert len(rows[0]["input_ids"]) == size and made["rows"] == 1
    with pytest.raises(InputError, match=f"max_seq_len = {size - 1} tokens"):
        build_packed_dataset(config(), entries, tokenizer, size - 1, tmp_path / "short")
