"""The right completions of RL's prompts, as conversations for SFT: the baseline that RL must beat.

    python scripts/rejection_sampling.py cpu-demo --num-prompts 1600

Samples as RL does, by the recipe's rl.yaml. Equal completions count once, cut off ones never. (RFT, arXiv:2308.01825.)
"""

import re

from nanochat_hf.config import Count, Parser, Place, parse_config
from nanochat_hf.errors import guarded
from nanochat_hf.run import Run, save_jsonl, writing
from nanochat_hf.stage_configs import RLConfig, find_recipe

CALL = re.compile(r"(.*?)<\|python_start\|>(.*?)<\|python_end\|><\|output_start\|>(.*?)<\|output_end\|>", re.DOTALL)


def messages_of(text: str) -> list[dict]:
    """An assistant's turn, decoded with its special tokens, as messages."""
    messages = []
    for content, expression, result in CALL.findall(text):
        call = {"type": "function", "function": {"name": "python", "arguments": {"expression": expression}}}
        messages.append({"role": "assistant", "content": content, "tool_calls": [call]})
        messages.append({"role": "tool", "name": "python", "content": result})
    return [*messages, {"role": "assistant", "content": CALL.sub("", text).removesuffix("<|assistant_end|>")}]


def main() -> None:
    parser = Parser(__doc__)
    parser.option("recipe", Place, help="its rl.yaml says what is asked, and how")
    parser.option("--run-dir", Place, help="run folder of the model that samples (default: runs/RECIPE)")
    parser.option("--stage", Place, default="sft", help="its stage: rl to teach a smaller model")
    parser.option("--num-prompts", Count, default=1000, help="prompts, of the first in RL's order")
    parser.option("--output", Place, default="right.jsonl", help="file to write")
    arguments = parser.parse_args()
    config = parse_config(RLConfig, find_recipe(arguments.recipe) / "rl.yaml")
    model = Run(arguments.run_dir or f"runs/{find_recipe(arguments.recipe).name}").model(arguments.stage)
    from nanochat_hf import stages  # with the large libraries
    from nanochat_hf.train.grpo import correctness, load_prompts, load_source

    tokenizer, network = load_source(str(model), config)
    rows = load_prompts(config, "train", tokenizer, network.config.max_position_embeddings - config.max_new_tokens)[0]
    rows, grade, right = rows[: arguments.num_prompts], correctness(tokenizer), {}  # right: a row for each
    with writing(arguments.output), open(arguments.output, "a"):  # refused before the work
        pass
    prompts = [tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True, return_dict=False) for r in rows]
    options = {"seed": config.seed, "max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
    answers = stages.engine(network.eval(), tokenizer).generate(prompts, config.num_samples, **options)
    for row, samples in zip(rows, answers, strict=True):
        columns = {name: [value] * len(samples) for name, value in row.items()}
        rewards = grade(columns.pop("prompt"), samples, **columns)
        for text, reward in zip(tokenizer.batch_decode(samples), rewards):
            if reward and text.endswith("<|assistant_end|>"):
                right[row["prompt"][-1]["content"], text] = {"messages": row["prompt"] + messages_of(text)}
    save_jsonl(arguments.output, right.values())
    print(f"{len(right):,} different right completions of {len(rows) * config.num_samples:,}: {arguments.output}")


if __name__ == "__main__":
    guarded(main)
