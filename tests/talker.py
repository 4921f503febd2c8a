"""A model that has learned four conversations by heart, for the tests of serving: real weights, real tool calls.

conftest.py makes its session fixtures known: `talker` (model, tokenizer), `talker_folder`, which looks like a finished
SFT stage, and `chat_folder`.
"""

import shutil

import pytest
import torch

from nanochat_hf.run import save_json
from nanochat_hf.tool_loop import ship

QUESTIONS = {
    "What is 12 * 34?": [("python", "12*34"), ("python_output", "408"), ("text", "It is 408.")],
    "What is 5 + 6?": [("python", "5+6"), ("python_output", "11"), ("text", "It is 11.")],
    "What is 1 / 0?": [("python", "1/0"), ("python_output", "{'error': 'division by zero'}"), ("text", "No.")],
    "Hello": [("text", "안녕하세요! I am a **small** model — 🙂 and I talk for quite a while about nothing at all.")],
}


def rows():
    """The conversations as messages."""
    for question, parts in QUESTIONS.items():
        content = [{"type": kind, "text": text} for kind, text in parts]
        yield [{"role": "user", "content": question}, {"role": "assistant", "content": content}]


def train(tokenizer):
    """A two-layer model of width 64 that answers the four questions (AdamW, about two seconds)."""
    from nanochat_hf.model import NanoChatConfig, NanoChatForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256}
    sizes |= {"vocab_size": -(-len(tokenizer) // 64) * 64, "num_tokens": len(tokenizer), "sliding_window": 33}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = NanoChatForCausalLM(NanoChatConfig(**sizes, **special))
    ids = [tokenizer.apply_chat_template(row, return_dict=False) for row in rows()]
    longest = max(len(row) for row in ids)
    batch = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    labels = torch.tensor([row + [-100] * (longest - len(row)) for row in ids])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(400):
        loss = model(input_ids=batch, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.055:  # the rest is the first tokens of the questions, which nothing predicts
            break
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 20)
    return model.eval()


@pytest.fixture(scope="session")
def talker(tokenizer):
    return train(tokenizer), tokenizer


@pytest.fixture(scope="session")
def talker_folder(talker, tmp_path_factory):
    """runs/<name>/sft of a run whose other stages are missing."""
    model, tokenizer = talker
    folder = tmp_path_factory.mktemp("run") / "sft"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_json(folder / "metrics.json", {"finished": True, "tokens": 1000, "wall_time_s": 2.0})
    return folder


@pytest.fixture(scope="session")
def chat_folder(talker_folder, tmp_path_factory):
    """The talker as a chat stage leaves it, with the code that answers its calls."""
    folder = tmp_path_factory.mktemp("chat") / "sft"
    shutil.copytree(talker_folder, folder)
    ship(folder)
    return folder
