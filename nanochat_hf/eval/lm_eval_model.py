"""lm-eval's model class with our loglikelihoods and batched generation: what `evaluate` gives to lm-eval's evaluator.

    model, tokenizer = load("runs/d12/sft", "auto", torch.device("cuda"))
    lm = LocalLM(model, tokenizer, EvalConfig(), Generator(model, tokenizer))

Compared to `--model hf` it is faster, runs the python tool inside generated answers, and encodes text that spells a
special token as text. `serve.engine.Engine` has the `generate` of `Generator` and is much faster on a GPU.
"""

import time
from itertools import count

import torch
from accelerate.utils import gather_object
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import DynamicCache

from ..data.tokenizer import load_tokenizer, refuse_other_model, strip_special_tokens
from ..distributed import monitored_barrier, partial_state
from ..errors import InputError
from ..kernels.decode import sample_next_token
from ..loading import load_model
from ..tool_loop import MARKS, ToolResultProcessor
from .loglikelihood import loglikelihoods

REPACK = 0.75  # finished rows leave the batch when fewer than this share still run: copying the cache costs, too


class LocalLM(HFLM):
    """lm-eval's model; each rank of the process group computes a share of the requests.

    `config`: an `EvalConfig` with batch sizes and sampling; `engine` has the `generate` of `Generator`. `is_chat`:
    whether the requests are rendered by the chat template, else special tokens in them are what somebody wrote.
    """

    is_chat = True

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
        try:
            return super().apply_chat_template(plain, add_generation_prompt)
        except Exception as error:  # a template may do anything
            raise InputError(f"the chat template of this model fails: {' '.join(str(error).split())[:200]}") from None

    def tok_encode(self, string, *args, **kwargs):
        return super().tok_encode(string if self.is_chat else strip_special_tokens(string), *args, **kwargs)

    def loglikelihood(self, requests, disable_tqdm=True):
        return super().loglikelihood(requests, disable_tqdm=True)  # the log has a line per task

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        pairs = []
        for request in requests:
            if hasattr(request, "context"):  # CORE's task class has cropped it already
                pairs.append((request.context, request.continuation))
                continue
            _, context, continuation = request
            pairs.append((self._crop(context, max(self.max_length + 1 - len(continuation), 1)), continuation))
        start = time.time()
        scores = loglikelihoods(self.model, pairs, self.options.batch_tokens)
        self.model_seconds += time.time() - start
        return scores

    def generate_until(self, requests, disable_tqdm=False):
        answers, options = [""] * len(requests), [normalize_gen_kwargs(request.args[1]) for request in requests]
        by_length: dict[int, list[int]] = {}
        for number, given in enumerate(options):
            by_length.setdefault(self.options.max_new_tokens or given["max_gen_toks"], []).append(number)
        for length, numbers in by_length.items():
            longest_prompt = max(self.max_length - length, self.max_length // 2)
            outputs = self.engine.generate(
                [self._crop(self.tok_encode(requests[number].args[0]), longest_prompt) for number in numbers],
                max_new_tokens=min(length, self.max_length - longest_prompt),
                temperature=self.options.temperature,
                top_k=self.options.top_k,
                seed=[self._seed(requests[number], number) for number in numbers],
            )
            for number, [ids] in zip(numbers, outputs):
                text = self.tokenizer.decode(ids, skip_special_tokens=False)
                for end in filter(None, [*options[number]["until"], self.tokenizer.eos_token]):
                    text = text.split(end)[0]
                answers[number] = text
        return answers

    def _crop(self, ids, length: int):
        """The last `length` tokens; counts the prompts that lose some."""
        self.num_cropped += len(ids) > length
        return ids[-length:]

    def _seed(self, request, number: int) -> int:
        """The seed of an answer depends on its question and sample number only: the same on any number of ranks."""
        return self.options.seed + request.doc_id * request.repeats + number % request.repeats


def load(folder: str, dtype: str, device: torch.device):
    """Returns the model in eval mode on `device`, and its tokenizer. Raises InputError if that is impossible."""
    bf16 = dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda")
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, torch.bfloat16 if bf16 else torch.float32, device)
    refuse_other_model(tokenizer, model.config)
    return model, tokenizer


class Generator:
    """Batched generation with the model's forward; the results of tool calls are forced into the answers."""

    def __init__(self, model, tokenizer, batch_size: int = 128, run_tools: bool = True):
        self.model, self.batch_size = model, batch_size
        has_tools = run_tools and set(MARKS) <= set(tokenizer.get_vocab())
        self.results = ToolResultProcessor(tokenizer) if has_tools else None
        eos = getattr(model.generation_config, "eos_token_id", None)
        stops = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id, tokenizer.bos_token_id}
        self.stops = stops - {None, self.results and self.results.end}

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

        max_new_tokens includes tool results. temperature 0 is greedy, top_k 0 samples among all tokens. seed: of the
        first answer, the next ones count up; or a list, one per answer. An answer depends on its own seed, not on the
        rest of the batch.
        """
        prompts = [prompt for prompt in prompts for _ in range(num_samples)]
        seeds = seed if isinstance(seed, list) else range(seed, seed + len(prompts))
        order, answers = sorted(range(len(prompts)), key=lambda number: -len(prompts[number])), [[]] * len(prompts)
        for begin in range(0, len(order), self.batch_size):
            numbers = order[begin : begin + self.batch_size]
            samplers = [torch.Generator().manual_seed(seeds[number]) for number in numbers]
            draws = torch.stack([torch.rand(max_new_tokens, generator=sampler) for sampler in samplers])
            batch = self._generate_batch([prompts[number] for number in numbers], draws, temperature, top_k)
            for number, answer in zip(numbers, batch):
                answers[number] = answer
        return [answers[i : i + num_samples] for i in range(0, len(answers), num_samples)]

    @torch.inference_mode()
    def _generate_batch(self, prompts: list[list[int]], draws: torch.Tensor, temperature: float, top_k: int):
        """Answers to prompts of one batch; draws (B, max_new_tokens): uniform numbers, one per token to sample."""
        device, width, max_new_tokens = self.model.device, max(map(len, prompts)), draws.shape[1]
        # Padding on the left: the next token of every row is in the same column.
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        positions, draws = (mask.cumsum(-1) - 1).clamp(min=0), draws.to(device)
        cache, answers = DynamicCache(config=self.model.config), [[] for _ in prompts]
        sampling = [torch.full(draws.shape[:1], value, device=device) for value in (float(temperature), top_k, 1.0)]
        rows = list(answers)  # of the batch; finished ones leave it now and then
        for step in count():
            inputs = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
            logits = self.model(ids, logits_to_keep=1, **inputs).logits[:, -1].float()  # (rows, V)
            tokens = sample_next_token(logits, draws[:, step], *(values[: len(rows)] for values in sampling))
            for row, token in zip(rows, tokens.tolist()):
                if not self._is_finished(row, max_new_tokens):
                    has_call = self.results and self.results.end in row
                    forced = self.results.next(row) if has_call else None  # a token of the call's result
                    row.append(token if forced is None else forced)
            running = [i for i, row in enumerate(rows) if not self._is_finished(row, max_new_tokens)]
            if not running:
                return answers
            if len(running) < REPACK * len(rows):
                rows, index = [rows[i] for i in running], torch.tensor(running, device=device)
                cache.reorder_cache(index)
                mask, positions, draws = mask[index], positions[index], draws[index]
            ids = torch.tensor([row[-1:] for row in rows], device=device)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            positions = positions[:, -1:] + 1

    def _is_finished(self, answer: list[int], max_new_tokens: int) -> bool:
        return bool(answer) and (answer[-1] in self.stops or len(answer) >= max_new_tokens)
