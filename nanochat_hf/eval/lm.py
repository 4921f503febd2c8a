"""lm-eval's model class with our scoring and generation: what `evaluate` hands to lm-eval's evaluator.

    model, tokenizer = load("runs/d12/sft", "auto", torch.device("cuda"))
    lm = LocalLM(model, tokenizer, EvalConfig(), Generator(model, tokenizer))

Any task of lm-eval runs on it. It differs from `--model hf` in speed, in tools that run inside generated answers, and
in text that cannot spell a special token.
"""

import time

import torch
from accelerate.utils import gather_object
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from ..data.tokenizer import load_tokenizer, strip_special_tokens
from ..distributed import meet, processes
from ..errors import InputError
from .score import score
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
        state = processes()
        self._rank, self._world_size = state.process_index, state.num_processes
        self.options, self.engine, self.num_cropped, self.model_seconds = config, engine, 0, 0.0

    def all_gather(self, tensor):
        return torch.tensor(gather_object([tensor.item()])) if self.world_size > 1 else tensor

    def gather_object(self, obj, dst=0):
        return gather_object([obj]) if self.world_size > 1 else [obj]

    def barrier(self):
        meet("a task")

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
        answers = score(self.model, pairs, self.options.batch_tokens)
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
