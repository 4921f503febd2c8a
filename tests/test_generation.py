"""Batched generation: equal to transformers' own when no tool is called, and the tool's answer inside when one is."""

from types import SimpleNamespace

import pytest
import torch

from nanochat_hf.eval.lm_eval_model import Generator, _pick


class Script:
    """A model that says one given text after any prompt, whatever tokens a tool puts in between."""

    def __init__(self, tokenizer, text, model):
        self.words = tokenizer(text, add_special_tokens=False)["input_ids"]
        self.config, self.device, self.tokenizer = model.config, torch.device("cpu"), tokenizer
        self.generation_config = SimpleNamespace(eos_token_id=tokenizer.eos_token_id)
        self.said = 0

    def __call__(self, ids, **kwargs):
        output_start, output_end = self.tokenizer.convert_tokens_to_ids(["<|output_start|>", "<|output_end|>"])
        token = ids[0, -1].item()
        inside = token == output_start or (getattr(self, "inside", False) and token != output_end)
        waiting = self.said and self.words[self.said - 1] == self.tokenizer.convert_tokens_to_ids("<|python_end|>")
        self.inside = inside
        if not inside and not (waiting and token != output_end):
            self.said += 1
        logits = torch.zeros(ids.shape[0], 1, len(self.tokenizer))
        logits[..., self.words[min(self.said, len(self.words)) - 1]] = 1
        return SimpleNamespace(logits=logits)


def test_greedy_answers_equal_those_of_transformers(lively_model, tokenizer):
    prompts = [[tokenizer.bos_token_id, *range(5, 5 + n)] for n in (3, 9, 17)]
    ours = Generator(lively_model, tokenizer, tool=None).generate(prompts, max_new_tokens=12)
    lively_model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    for prompt, [answer] in zip(prompts, ours):
        whole = lively_model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert answer == whole[0, len(prompt) :].tolist()


def test_answers_do_not_depend_on_what_is_generated_beside_them(lively_model, tokenizer):
    prompts = [[tokenizer.bos_token_id, *range(5, 5 + n)] for n in (2, 30, 7, 4, 12)]
    alone = [Generator(lively_model, tokenizer).generate([p], max_new_tokens=20)[0] for p in prompts]
    assert Generator(lively_model, tokenizer, rows=4).generate(prompts, max_new_tokens=20) == alone


def test_the_tool_runs_inside_the_answer(tiny_model, tokenizer):
    text = "Let me see: <|python_start|>12*12<|python_end|> So it is 144.<|assistant_end|>"
    model = Script(tokenizer, text, tiny_model)
    [[answer]] = Generator(model, tokenizer, rows=1).generate([[tokenizer.bos_token_id, 5]], max_new_tokens=99)
    said = tokenizer.decode(answer)
    assert "<|python_start|>12*12<|python_end|><|output_start|>144<|output_end|> So it is 144." in said
    assert said.endswith("<|assistant_end|>")


def test_an_error_of_the_tool_is_shown_to_the_model(tiny_model, tokenizer):
    model = Script(tokenizer, "<|python_start|>1/0<|python_end|>Sorry.<|assistant_end|>", tiny_model)
    [[answer]] = Generator(model, tokenizer, rows=1).generate([[tokenizer.bos_token_id]], max_new_tokens=99)
    assert "{'error': 'division by zero'}<|output_end|>Sorry." in tokenizer.decode(answer)


def test_an_end_of_call_without_a_start_calls_nothing(tiny_model, tokenizer):
    generator = Generator(tiny_model, tokenizer, tool=lambda expression: pytest.fail("called"))
    row = SimpleNamespace(tokens=[], forced=[], call=None, done=False)
    generator._push(row, tokenizer.convert_tokens_to_ids("<|python_end|>"), 9)
    assert row.tokens and not row.forced and not row.done


def test_samples_differ_and_a_seed_repeats_them_in_any_company(lively_model, tokenizer):
    prompts = [[tokenizer.bos_token_id, *range(7, 7 + n)] for n in (2, 5, 3)]

    def draw(prompts, seed, rows=128, samples=1):
        options = {"num_samples": samples, "max_new_tokens": 8, "temperature": 1.0, "top_k": 50}
        return Generator(lively_model, tokenizer, rows).generate(prompts, seed=seed, **options)

    several = draw(prompts, 10, samples=4)
    assert all(len({tuple(answer) for answer in answers}) > 1 for answers in several)
    assert draw(prompts, 10, rows=5, samples=4) == several != draw(prompts, 22, samples=4)
    assert draw(prompts[1:], [15, 21]) == [several[1][1:2], several[2][3:4]]


def test_tokens_are_sampled_as_often_as_they_are_likely():
    logits = torch.tensor([[0.0, -torch.inf, 1.0, 2.0]]).expand(4000, 4)
    draws = (torch.arange(4000) + 0.5) / 4000
    for temperature, top_k in ((1.0, 0), (0.5, 0), (1.0, 2)):
        expected = logits[0] / temperature
        if top_k:
            expected = expected.masked_fill(expected < 1, -torch.inf)
        found = torch.tensor(_pick(logits, draws, temperature, top_k)).bincount(minlength=4) / 4000
        assert torch.allclose(found, expected.softmax(0), atol=1e-3)
    assert _pick(torch.tensor([[0.0, 3.0], [5.0, 1.0]]), draws[:2], 0.0, 0) == [1, 0]
    assert _pick(torch.tensor([[-torch.inf, 0.0, -torch.inf]] * 2), torch.tensor([0.0, 1 - 2**-24]), 1.0, 0) == [1, 1]
