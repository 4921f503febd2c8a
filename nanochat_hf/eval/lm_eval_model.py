"""lm-eval's model class with our scoring and generation: what `evaluate` hands to lm-eval's evaluator.

    model, tokenizer = load("runs/d12/sft", "auto", torch.device("cuda"))
    lm = LocalLM(model, tokenizer, EvalConfig(), Generator(model, tokenizer))

Any task of lm-eval runs on it. It differs from `--model hf` in speed, in tools that run inside generated answers, and
in text that cannot spell a special token.

Batched generation for any causal LM of transformers, with the python tool running inside the answer.

The plain way, for evaluation on any machine and any model; `serve.engine.Engine` has the same `generate` and is much
faster for nanochat models on a GPU, so `evaluate` takes either. A call stands between <|python_start|> and
<|python_end|>; its result is put into the row as <|output_start|> ... <|output_end|>, and the model goes on.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import torch
from accelerate.utils import gather_object
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, DynamicCache

from ..data.tokenizer import load_tokenizer, plain_backend, strip_special_tokens
from ..distributed import monitored_barrier, partial_state
from ..errors import InputError
from ..tools import calculate
from .loglikelihood import loglikelihoods
from .weights import first_non_finite


class LocalLM(HFLM):
    """lm-eval's model with our scoring and generation, each rank of the process group taking a share of the rows.

    Args:
        model: causal LM of transformers, in eval mode.
        tokenizer: its tokenizer.
        config: an `EvalConfig`: batch sizes and sampling.
        engine: has `generate(prompts, num_samples, max_new_tokens=, temperature=, top_k=, seed=)`; None where nothing
            is generated.
    """

    def __init__(self, model, tokenizer, config, engine=None):
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=config.batch_size)
        state = partial_state()
        self._rank, self._world_size = state.process_index, state.num_processes
        self.options, self.engine, self.num_cropped, self.model_seconds = config, engine, 0, 0.0

    def all_gather(self, tensor):
        return torch.tensor(gather_object([tensor.item()])) if self.world_size > 1 else tensor

    def gather_object(self, obj, dst=0):
        return gather_object([obj]) if self.world_size > 1 else [obj]

    def barrier(self):
        monitored_barrier("a task")

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        plain = [{**message, "content": strip_special_tokens(message["content"])} for message in chat_history]
        return super().apply_chat_template(plain, add_generation_prompt)

    def loglikelihood(self, requests, disable_tqdm=True):
        return super().loglikelihood(requests, disable_tqdm=True)  # a line for each task says enough

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        pairs = []
        for request in requests:
            if hasattr(request, "context"):  # CORE's, which knows its own limit
                pairs.append((request.context, request.continuation))
                continue
            _, context, continuation = request
            keep = max(self.max_length + 1 - len(continuation), 1)
            self.num_cropped += len(context) > keep
            pairs.append((context[-keep:], continuation))
        began = time.time()
        answers = loglikelihoods(self.model, pairs, self.options.batch_tokens)
        self.model_seconds += time.time() - began
        return answers

    def generate_until(self, requests, disable_tqdm=False):
        answers: list[str] = [""] * len(requests)
        by_length: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            room = self.options.max_new_tokens or request.args[1].get("max_gen_toks", 256)
            by_length.setdefault(room, []).append(number)
        for room, numbers in by_length.items():
            keep = max(self.max_length - room, self.max_length // 2)
            prompts = [self.tok_encode(requests[number].args[0]) for number in numbers]
            self.num_cropped += sum(len(prompt) > keep for prompt in prompts)
            found = self.engine.generate(
                [prompt[-keep:] for prompt in prompts],
                max_new_tokens=min(room, self.max_length - keep),
                temperature=self.options.temperature,
                top_k=self.options.top_k,
                seed=[self.seed_of(requests[number], number) for number in numbers],
            )
            for number, [ids] in zip(numbers, found):
                text = self.tokenizer.decode(ids, skip_special_tokens=False)
                for end in [*requests[number].args[1].get("until", []), self.tokenizer.eos_token]:
                    text = text.split(end)[0]
                answers[number] = text
        return answers

    def seed_of(self, request, number: int) -> int:
        """Of an answer, by its question and which of the answers to that it is: the same on any number of ranks."""
        return self.options.seed + request.doc_id * request.repeats + number % request.repeats


def load(folder: str, dtype: str, device: torch.device):
    """Model in eval mode on `device`, and its tokenizer."""
    if dtype not in ("auto", "float32", "bfloat16"):
        raise InputError(f"dtype must be auto, float32 or bfloat16, not {dtype!r}")
    kind = torch.bfloat16 if dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda") else torch.float32
    tokenizer = load_tokenizer(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
    except (OSError, ValueError) as error:
        raise InputError(f"no model in {folder}: {str(error).splitlines()[0]}") from None
    if name := first_non_finite(model.named_parameters()):
        raise InputError(f"the weights of {folder} are not finite (NaN or infinity in {name}): nothing to measure")
    return model.to(device).eval(), tokenizer


MARKS = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")
REPACK = 0.75  # drop finished rows from the batch when fewer than this share still run: copying the cache costs, too


@dataclass
class _Row:
    number: int  # of the answer
    tokens: list[int] = field(default_factory=list)
    forced: deque[int] = field(default_factory=deque)
    call: list[int] | None = None  # the tokens since <|python_start|>
    done: bool = False


class Generator:
    """Answers many prompts at once.

    Args:
        model: a causal LM in eval mode.
        tokenizer: its tokenizer; without the four marks of tool calls it generates plainly.
        rows: prompts generated together.
        tool: expression -> result; what it raises as ValueError is shown to the model as an error.
    """

    def __init__(self, model, tokenizer, rows: int = 128, tool: Callable[[str], str] | None = calculate):
        self.model, self.tokenizer, self.rows, self.tool = model, tokenizer, rows, tool
        known = tokenizer.get_vocab()
        self.marks = [known.get(name) for name in MARKS]
        if None in self.marks:
            self.tool = None
        eos = getattr(model.generation_config, "eos_token_id", None)
        stops = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id, tokenizer.bos_token_id]
        self.stops = {token for token in stops if token is not None and token != self.marks[1]}

    def generate(
        self,
        prompts: list[list[int]],
        num_samples: int = 1,
        seed: int | list[int] = 0,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
    ) -> list[list[list[int]]]:
        """`num_samples` answers to each prompt of token ids, as lists of new ids, a stop token included.

        max_new_tokens counts tool results, too. temperature 0 is greedy; top_k 0 keeps all tokens. seed is the first
        answer's, and those of the others follow, or a list of all: the same seed gives the same answer, whatever else
        is generated beside it.
        """
        jobs = sorted(range(len(prompts) * num_samples), key=lambda job: -len(prompts[job // num_samples]))
        answers: list[list[int]] = [[] for _ in jobs]
        seeds = seed if isinstance(seed, list) else range(seed, seed + len(jobs))
        for begin in range(0, len(jobs), self.rows):
            rows = [_Row(job) for job in jobs[begin : begin + self.rows]]
            samplers = [torch.Generator().manual_seed(seeds[row.number]) for row in rows]
            draws = torch.stack([torch.rand(max_new_tokens, generator=sampler) for sampler in samplers])
            asked = [prompts[row.number // num_samples] for row in rows]
            for row in self._run(rows, asked, draws, max_new_tokens, temperature, top_k):
                answers[row.number] = row.tokens
        return [answers[i : i + num_samples] for i in range(0, len(answers), num_samples)]

    @torch.inference_mode()
    def _run(self, rows: list[_Row], prompts: list[list[int]], draws, max_new_tokens, temperature, top_k):
        device, width = self.model.device, max(map(len, prompts))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, prompt in enumerate(prompts):  # padding on the left: every row's next token is in the same column
            ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache, finished, draws = DynamicCache(config=self.model.config), [], draws.to(device)
        for step in count():
            inputs = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
            logits = self.model(ids, logits_to_keep=1, **inputs).logits[:, -1].float()  # (rows, V)
            for row, token in zip(rows, _pick(logits, draws[:, step], temperature, top_k)):
                if not row.done:
                    self._push(row, token, max_new_tokens)
            running = [i for i, row in enumerate(rows) if not row.done]
            if not running:
                return finished + rows
            if len(running) < REPACK * len(rows):
                finished += [row for row in rows if row.done]
                rows, kept = [rows[i] for i in running], torch.tensor(running, device=device)
                cache.reorder_cache(kept)
                mask, positions, draws = mask[kept], positions[kept], draws[kept]
            ids = torch.tensor([[row.tokens[-1]] for row in rows], device=device)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            positions = positions[:, -1:] + 1

    def _push(self, row: _Row, sampled: int, max_new_tokens: int) -> None:
        """Add the next token to a row: a waiting one of a tool result, else the sampled one."""
        own = not row.forced
        token = sampled if own else row.forced.popleft()
        row.tokens.append(token)
        if own and self.tool:
            if token == self.marks[0]:
                row.call = []
            elif token == self.marks[1]:
                if row.call is not None:
                    row.forced.extend(self._answer(row.call))
                row.call = None
            elif row.call is not None:
                row.call.append(token)
        row.done = (own and token in self.stops) or len(row.tokens) >= max_new_tokens

    def _answer(self, call: list[int]) -> list[int]:
        try:
            result = self.tool(self.tokenizer.decode(call))
        except ValueError as error:
            result = str({"error": str(error)})  # as TRL's tool loop writes it, so as it was in training
        ids = plain_backend(self.tokenizer).encode(result, add_special_tokens=False).ids
        return [self.marks[2], *ids, self.marks[3]]


def _pick(logits: torch.Tensor, draws: torch.Tensor, temperature: float, top_k: int) -> list[int]:
    """The next token of each row of logits (B, V), by the row's own number (B,) between 0 and 1."""
    if temperature == 0:
        return logits.argmax(-1).tolist()
    if top_k:
        lowest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    reached = (logits / temperature).softmax(-1).cumsum(-1)
    return torch.searchsorted(reached, draws[:, None] * reached[:, -1:], right=True)[:, 0].tolist()
