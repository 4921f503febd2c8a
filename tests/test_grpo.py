"""RLVR: prompts with verifiable answers, REINFORCE's gradient with a baseline, rollouts by an engine, and learning."""

import copy
import json
import runpy
import shutil
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOTrainer

from nanochat_hf import stages
from nanochat_hf.config import parse_config
from nanochat_hf.data.grading import hash_target
from nanochat_hf.data.tokenizer import load_tokenizer
from nanochat_hf.errors import InputError
from nanochat_hf.eval.lm_eval_model import Generator
from nanochat_hf.run import fingerprint, load_json
from nanochat_hf.serve.engine import Engine
from nanochat_hf.tools import python
from nanochat_hf.train import grpo
from nanochat_hf.train import grpo as module
from nanochat_hf.train.grpo import RLConfig, RLTrainer, grpo_arguments, load_prompts, rollout, train_rl
from nanochat_hf.train.model_setup import load_chat_model, lora
from nanochat_hf.train.sft import ChatConfig, train_chat

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

KEYS = {"dataset": "primer:problem", "examples_per_step": 2, "num_samples": 4, "device_batch_size": 8}
KEYS |= {"max_new_tokens": 12, "eval_examples": 6, "eval_samples": 2, "num_iterations": 2}


def config(**keys) -> RLConfig:
    return RLConfig(**{**KEYS, **keys})


def new_trainer(tiny_folder, tokenizer, tmp_path, stage=None) -> RLTrainer:
    stage = stage or config()
    model = load_chat_model(tiny_folder, stage, tokenizer)
    model.lm_head.weight.data.normal_(std=0.05)  # a fresh head is all but zero: every token would be alike
    rows = Dataset.from_list(load_prompts(stage, "test", tokenizer, 100)[0])
    return RLTrainer(
        model=model, args=grpo_arguments(stage, tmp_path / "rl"), train_dataset=rows, eval_dataset=rows,
        processing_class=tokenizer, tools=[python], stage=stage, samples=tmp_path / "samples.jsonl",
    )  # fmt: skip


class Silent(torch.nn.Module):
    """A model for engines that do not use it."""

    device, value = torch.device("cpu"), 0.0

    def forward(self, ids):
        return SimpleNamespace(logits=torch.full((*ids.shape, 4), self.value))


def stub(model):
    """What a rollout reads of its trainer."""
    state, args = SimpleNamespace(global_step=3), SimpleNamespace(seed=0, process_index=0)
    accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    return SimpleNamespace(model=model.train(), accelerator=accelerator, args=args, state=state)


def graded_batch(trainer) -> dict:
    """Completions of two prompts, of which some of the first's are right and all of the second's are wrong."""
    torch.manual_seed(0)
    size = trainer.model.config.num_tokens
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0])
    mask = torch.ones(8, 6, dtype=torch.long)
    mask[0, 4:] = mask[5, 3:] = 0
    return {
        "prompt_ids": torch.randint(size, (8, 5)), "prompt_mask": torch.ones(8, 5, dtype=torch.long),
        "completion_ids": torch.randint(size, (8, 6)), "completion_mask": mask,
        "advantages": rewards - rewards.view(2, 4).mean(1).repeat_interleave(4), "num_items_in_batch": mask.sum(),
    }  # fmt: skip


def test_primer_prompts_come_with_what_a_grader_needs(tokenizer):
    stage = config(dataset="primer:problem+spelling", eval_examples=30)
    (rows, *_), (test, *_) = (load_prompts(stage, split, tokenizer, 100) for split in ("train", "test"))
    assert {row["kind"] for row in rows} == {row["kind"] for row in test} == {"problem", "spelling"}
    assert len(test) == 30 and len(rows) > 4000
    assert load_prompts(stage, "train", tokenizer, 100)[0] == rows  # also in this order: it follows from the seed
    assert rows[0].keys() == {"prompt", "kind", "answer", "entity", "rivals"}
    assert rows[0]["prompt"][0]["role"] == "user"
    other = load_prompts(config(dataset=stage.dataset, seed=1), "train", tokenizer, 100)[0]
    train, test, other = ({row["prompt"][0]["content"] for row in part} for part in (rows, test, other))
    assert not train & test and train != other  # other questions, not only another order


def test_prompts_that_cannot_be_used_are_named_and_skipped_or_refused(tokenizer, tmp_path, capsys):
    texts = ["How much?", "word " * 200, "How many?", "How many?"]
    answers = ["It is <<1000+200=1200>>1,200.\n#### 1,200", "#### 5", "five", "#### $5"]
    rows = [{"question": text, "answer": answer} for text, answer in zip(texts, answers)]
    (tmp_path / "gsm_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = config(dataset=str(tmp_path / "gsm_{split}.jsonl"))
    rows, skipped, num_skipped = load_prompts(stage, "train", tokenizer, 100)
    first, line = skipped[0], capsys.readouterr().err
    expected = (
        f"[rl, train] 3 rows of {tmp_path}/gsm_train.jsonl:gsm8k are left out; row {first['row']}: {first['reason']}\n"
    )
    assert (line, num_skipped) == (expected, 3)
    [row] = rows
    assert (row["prompt"][0]["content"], row["answer"], row["kind"]) == ("How much?", "1200", "gsm8k")
    reasons = {row["row"]: row["reason"] for row in skipped}
    assert reasons.keys() == {1, 2, 3} and "100 leave room" in reasons[1] and "####" in reasons[2]
    for answer in ("1/2", "1e3", "5%", "1 000", "5.", ".", "1,5", "1\n#### 2", "٣"):
        assert hash_target(f"So:\n#### {answer}") is None
    assert [hash_target(f"#### {answer}") for answer in ("-1,234.50", "7 ")] == ["-1234.50", "7"]
    assert reasons[3] == "no number alone follows '#### ' in the answer"
    with pytest.raises(InputError, match=r"row [123] of .* cannot be used"):
        load_prompts(config(dataset=stage.dataset, on_bad_example="error"), "train", tokenizer, 100)
    size = len(tokenizer.apply_chat_template(rows[0]["prompt"], add_generation_prompt=True, return_dict=False))
    assert len(load_prompts(stage, "train", tokenizer, size)[0]) == 1
    with pytest.raises(InputError, match=f"no question of at most {size - 1} tokens"):
        load_prompts(stage, "train", tokenizer, size - 1)


def test_the_gradient_is_reinforce_with_the_mean_as_baseline(tiny_folder, tokenizer, tmp_path):
    trainer = new_trainer(tiny_folder, tokenizer, tmp_path)
    trainer.current_gradient_accumulation_steps = 1
    model, batch = trainer.model.train(), graded_batch(trainer)
    trainer.compute_loss(model, batch).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    logp = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[:, 4:, 0]
    chosen = logp * batch["completion_mask"] * batch["advantages"][:, None]
    (-chosen.sum() / batch["completion_mask"].sum()).backward()
    assert len(gradients) == sum(p.grad is not None for p in model.parameters()) > 10
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, atol=1e-6, rtol=1e-3, msg=name)


def test_a_second_update_weighs_by_the_weights_that_sampled(tiny_folder, tokenizer, tmp_path):
    trainer = new_trainer(tiny_folder, tokenizer, tmp_path, config(updates_per_batch=2))
    trainer.current_gradient_accumulation_steps = 1
    model, batch = trainer.model.train(), graded_batch(trainer)
    ids, mask = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1), batch["completion_mask"]

    def logp():
        return model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[:, 4:, 0]

    old, first = logp().detach(), trainer.compute_loss(model, batch)
    assert first.item() == pytest.approx(-(old * mask * batch["advantages"][:, None]).sum().item() / mask.sum().item())
    model.lm_head.weight.data += torch.randn_like(model.lm_head.weight) * 0.3
    new = logp()
    weights = (new - old).exp()
    assert weights.max() > 5 > weights.min()  # some are cut
    chosen = weights.clamp(max=5).detach() * new * mask * batch["advantages"][:, None]
    (-chosen.sum() / mask.sum()).backward()
    expected = model.lm_head.weight.grad.clone()
    for _ in range(2):  # a third one does, too
        model.zero_grad()
        trainer.compute_loss(model, batch).backward()
        torch.testing.assert_close(model.lm_head.weight.grad, expected, atol=1e-6, rtol=1e-3)


def test_rows_without_advantage_are_left_out_and_nothing_changes(tiny_folder, tokenizer, tmp_path, monkeypatch):
    trainer = new_trainer(tiny_folder, tokenizer, tmp_path)
    trainer.current_gradient_accumulation_steps = 1
    sizes, real = [], GRPOTrainer._compute_loss
    note = lambda self, model, x: (sizes.append(len(x["advantages"])), real(self, model, x))[1]  # noqa: E731
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", note)
    model, batch = trainer.model.train(), graded_batch(trainer)
    losses = [trainer.compute_loss(model, batch), GRPOTrainer.compute_loss(trainer, model, batch)]
    assert sizes == [4, 8] and losses[0].item() == pytest.approx(losses[1].item(), abs=1e-7)
    real_gather = trainer.accelerator.gather
    monkeypatch.setattr(  # another rank, which needs 6 rows
        trainer.accelerator, "gather", lambda x: torch.tensor([x, 6]) if x.dtype == torch.long else real_gather(x)
    )
    assert trainer.compute_loss(model, batch).item() == pytest.approx(losses[1].item(), abs=1e-7) and sizes[-1] == 6
    monkeypatch.setattr(trainer.accelerator, "gather", real_gather)
    batch["advantages"] = torch.zeros(8)
    trainer.compute_loss(model, batch).backward()  # every rank has a backward pass, even when nothing is to be learned
    assert sizes[-1] == 1


def test_a_rollout_masks_tool_results_refreshes_its_engine_and_draws_other_samples_each_time(tokenizer):
    parts = "<|python_start|>2+3<|python_end|>", "<|output_start|>5<|output_end|>", "2 + 3 = 5<|assistant_end|>"
    call, output, words = (tokenizer.encode(text, add_special_tokens=False) for text in parts)
    seeds = []

    class Recorder:
        refreshed = 0

        def __init__(self, model, tokenizer):
            assert not model.training

        def sync_weights(self):
            Recorder.refreshed += 1

        def generate(self, prompts, seed, **options):
            assert options == {"max_new_tokens": 12, "temperature": 1.0, "top_k": 0}
            seeds.append(range(seed, seed + len(prompts)))
            return [[[*call, *output, *words]] for _ in prompts]

    generate, trainer = rollout(Recorder, config(), tokenizer), stub(Silent())
    prompts = [[{"role": "user", "content": "What is 2 + 3?"}]] * 8
    for trainer.state.global_step in (0, 1, 2):
        for trainer.args.process_index in (0, 1):
            batch = generate(prompts, trainer)
            assert trainer.model.training
    assert batch["env_mask"][0] == [1] * len(call) + [0] * len(output) + [1] * len(words)
    assert tokenizer.decode(batch["prompt_ids"][0]).endswith("<|user_end|><|assistant_start|>")
    assert Recorder.refreshed == 5 and len({seed for part in seeds for seed in part}) == 3 * 2 * 8
    trainer.state.global_step, trainer.args.process_index = 1, 1  # a resume
    generate(prompts, trainer)
    assert seeds[-1] == seeds[3]
    trainer.args.seed = 1
    generate(prompts, trainer)
    assert seeds[-1] != seeds[3]
    trainer.model.eval()  # an evaluation: the same for any rank
    generate(prompts, trainer)
    trainer.args.process_index = 0
    generate(prompts, trainer)
    assert seeds[-1] == seeds[-2]
    trainer.stop_training = lambda reason: (_ for _ in ()).throw(FloatingPointError(reason))
    trainer.model.value = float("nan")
    with pytest.raises(FloatingPointError, match="the logits are not finite"):
        generate(prompts, trainer)


@pytest.mark.parametrize("engine", [Generator, Engine])
def test_answers_come_from_the_adapters_too(tiny_model, tokenizer, engine):
    for layer in tiny_model.model.layers:
        layer.self_attn.o_proj.weight.data.normal_(std=0.2)  # a fresh one is zero and hides what attention does
    tiny_model.lm_head.weight.data.normal_()
    prompts = [[{"role": "user", "content": f"What is {number} + 3?"}] for number in (2, 41)]
    greedy = config()
    greedy.temperature = 0.0  # which no run can have
    plain = rollout(engine, greedy, tokenizer)(prompts, stub(tiny_model))
    model = get_peft_model(tiny_model, lora(config(lora_r=4)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    merged = copy.deepcopy(model).merge_and_unload()
    expected = rollout(Generator, greedy, tokenizer)(prompts, stub(merged))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    generate = rollout(engine, greedy, tokenizer)
    for _ in range(2):
        batch = generate(prompts, stub(model))
        assert batch["completion_ids"] == expected["completion_ids"] != plain["completion_ids"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, weights[name], atol=1e-5, rtol=1e-5)


def test_a_run_leaves_a_model_its_figures_and_samples(tiny_folder, tmp_path, monkeypatch):
    out, sampled, real = tmp_path / "rl", [], Generator.generate
    note = lambda *prompts, **options: sampled.append(real(*prompts, **options)) or sampled[-1]  # noqa: E731
    monkeypatch.setattr(Generator, "generate", note)
    parts, load = [], grpo.load_prompts
    load_some = lambda *of: (parts.append(load(*of)[0]) or parts[-1], [{"row": of[1]}], 2)  # noqa: E731
    monkeypatch.setattr(grpo, "load_prompts", load_some)
    train_rl(config(save_every=1, eval_every=1, num_iterations=3), tiny_folder, out, Generator)
    metrics = load_json(out / "metrics.json")
    assert metrics["finished"] and metrics["task"] == "primer:problem" and 0 < metrics["generation_share"] < 1
    assert metrics["before"].keys() == metrics["after"].keys() == {"pass@1", "pass@2", "questions"}
    assert metrics["before"]["questions"] == 6 and metrics["bad"] == 2 + 2
    assert metrics["skipped_rows"] == [{"row": "train"}, {"row": "test"}]
    assert metrics["inputs"]["data"] == fingerprint(parts)
    history = metrics["history"]
    assert [row["step"] for row in history] == [1, 2, 3] and metrics["tokens_per_second"] > 0
    for row in history:
        assert 0 <= row["reward"] <= 1 and 0 <= row["tool_use"] <= 1 and row["completion_length"] > 0
        assert 0 <= row["pass@1"] <= row["pass@2"] <= 1
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 6 and samples[0].keys() == {"step", "prompt", "text", "reward"}
    texts = AutoTokenizer.from_pretrained(out).batch_decode([ids for batch in sampled for (ids,) in batch])
    assert len(sampled) == 8 and all(any(sample["text"] in text for text in texts) for sample in samples)
    assert [sample["text"] for sample in metrics["samples"]] == [sample["text"] for sample in samples[-4:]]
    assert not (out / "state").exists() and AutoModelForCausalLM.from_pretrained(out).generation_config.eos_token_id


def test_only_new_tokens_of_training_count_for_the_speed(monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "_generate", lambda trainer, prompts: ([[1] * 5], [[1, 2], [3]]))
    trainer = RLTrainer.__new__(RLTrainer)
    trainer.accelerator, trainer.generation_seconds, trainer.step_tokens = SimpleNamespace(num_processes=2), 0, 0
    for training in (True, False):
        trainer.model = SimpleNamespace(training=training)
        trainer._generate([])
        assert trainer.step_tokens == 6


def untrained(tiny_folder, tmp_path) -> dict:
    """SFT teaches to answer one of four numbers, equally often; returns the keys of an RL that rewards one of them."""
    choices = [f"It is so.\n#### {number}" for number in (1, 2, 3, 4)]
    chats = [
        [{"role": "user", "content": "Pick one."}, {"role": "assistant", "content": choices[i % 4]}]
        for i in range(256)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    for split in ("train", "test"):
        row = {"question": "Pick one.", "answer": choices[2]}
        (tmp_path / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * (64 if split == "train" else 1))
    sft = ChatConfig(mixture=[{"dataset": str(tmp_path / "chats.jsonl")}], device_batch_size=4, num_iterations=60)
    train_chat(sft, tiny_folder, tmp_path / "guesses")
    rl = {"dataset": str(tmp_path / "{split}.jsonl"), "num_samples": 16, "eval_samples": 64, "max_new_tokens": 24}
    return {**KEYS, **rl, "init_lr_frac": 0.2}


def test_trl_gets_the_algorithm_that_the_module_describes(tiny_folder, tmp_path):
    arguments = grpo_arguments(config(temperature=0.7, num_samples=4, eval_samples=2), tmp_path)
    assert (arguments.beta, arguments.loss_type, arguments.scale_rewards) == (0.0, "cispo", "none")
    assert arguments.steps_per_generation == arguments.gradient_accumulation_steps and arguments.num_iterations == 1
    assert (arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p) == (0.7, 0, 1.0, None)
    assert (arguments.num_generations, arguments.num_generations_eval, arguments.max_completion_length) == (4, 2, 12)
    for requested, size in ((2, 2), (3, 2), (64, 8)):  # of 8 completions per step
        arguments = grpo_arguments(config(device_batch_size=requested), tmp_path)
        assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (size, 8 // size)
    with pytest.raises(InputError, match="max_new_tokens is 128: it must leave room for a prompt"):
        train_rl(config(max_new_tokens=128), tiny_folder, tmp_path, Generator)


def test_a_prompt_leaves_room_for_the_whole_answer(tiny_folder, tmp_path, monkeypatch):
    lengths = []

    def spy(stage, split, tokenizer, max_length):
        lengths.append((split, max_length))
        if split == "test":
            raise InputError("enough")
        return [], [], 0

    monkeypatch.setattr(grpo, "load_prompts", spy)
    with pytest.raises(InputError, match="enough"):
        train_rl(config(max_new_tokens=12), str(tiny_folder), tmp_path, Generator)
    assert lengths == [("train", 128 - 12), ("test", 128 - 12)]  # tiny_folder's context


def test_fewer_questions_than_a_step_takes_are_refused(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "load_prompts", lambda *_: ([{}] * 3, [], 0))
    with pytest.raises(InputError, match="has 3 usable questions: lower examples_per_step, 4"):
        train_rl(config(max_new_tokens=12, examples_per_step=4), str(tiny_folder), tmp_path, Generator)


def test_rejection_sampling_keeps_each_right_completion_once(talker_folder, tmp_path, monkeypatch, capsys):
    """What it writes renders to the tokens that were sampled; wrong, cut off and repeated completions are left out."""
    run, tokenizer = tmp_path / "run", load_tokenizer(talker_folder)
    shutil.copytree(talker_folder, run / "sft")
    (run / "sft" / "metrics.json").write_text('{"finished": true}')
    stage = parse_config(RLConfig, "recipes/cpu-demo/rl.yaml")
    rows = load_prompts(stage, "train", tokenizer, 100)[0][:3]

    def generate(prompts, num_samples, **options):
        assert (len(prompts), num_samples) == (3, 4)
        sums = [
            f"<|python_start|>{r['answer']}+0<|python_end|><|output_start|>{r['answer']}<|output_end|>" for r in rows
        ]
        texts = [
            [f"{s}So {r['answer']}.<|assistant_end|>", f"{r['answer']}<|assistant_end|>"] for s, r in zip(sums, rows)
        ]
        wrong = ["<|python_start|>0+0<|python_end|><|output_start|>0<|output_end|>0<|assistant_end|>", sums[0]]
        texts = [texts[0] + wrong, texts[1] + texts[1][:1] * 2, wrong * 2]
        return [[tokenizer.encode(text, add_special_tokens=False) for text in four] for four in texts]

    output = tmp_path / "right.jsonl"
    words = ["cpu-demo", "--run-dir", str(run), "--num-prompts", "3", "--output"]
    monkeypatch.setattr(stages, "engine", lambda *_: pytest.fail("samples"))
    monkeypatch.setattr("sys.argv", ["rejection_sampling.py", *words, str(tmp_path / "no" / "right.jsonl")])
    with pytest.raises(SystemExit):
        runpy.run_path("scripts/rejection_sampling.py", run_name="__main__")
    assert "cannot write" in capsys.readouterr().err
    monkeypatch.setattr(stages, "engine", lambda model, tokenizer: SimpleNamespace(generate=generate))
    (run / "sft").rename(run / "rl")
    monkeypatch.setattr("sys.argv", ["rejection_sampling.py", "--stage", "rl", *words, str(output)])
    runpy.run_path("scripts/rejection_sampling.py", run_name="__main__")
    assert capsys.readouterr().out.startswith("4 different right completions of 12")
    chats = [json.loads(line)["messages"] for line in output.read_text().splitlines()]
    rendered = [tokenizer.decode(ids) for ids in tokenizer.apply_chat_template(chats, return_dict=True)["input_ids"]]
    for text, row, has_call in zip(rendered, [rows[0]] * 2 + [rows[1]] * 2, [True, False] * 2, strict=True):
        question, answer = row["prompt"][0]["content"], row["answer"]
        call = f"<|python_start|>{answer}+0<|python_end|><|output_start|>{answer}<|output_end|>So {answer}."
        turn = f"<|assistant_start|>{call if has_call else answer}<|assistant_end|>"
        assert text == f"<|bos|><|user_start|>{question}<|user_end|>{turn}"


def test_samples_of_steps_that_run_again_and_damaged_lines_are_dropped(tmp_path):
    trainer = SimpleNamespace(samples=tmp_path / "samples.jsonl")
    module.RLTrainer.discard_after(trainer, 3)
    assert trainer.samples.read_text() == ""
    lines = ['{"step": 2}', "[1]", "null", '{"x": 1}', '{"step": "a"}', '{"step": 3}', '{"step": 1}', '{"st']
    trainer.samples.write_text("\n".join(lines))
    module.RLTrainer.discard_after(trainer, 3)
    assert trainer.samples.read_text() == '{"step": 2}\n{"step": 1}\n' and len([*tmp_path.iterdir()]) == 1
