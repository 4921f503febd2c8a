"""Evaluate the finished stages of a run, or any causal LM of the Hub, with lm-eval.

    python scripts/run_evals.py cpu-demo
    accelerate launch scripts/run_evals.py d24 --stages sft,rl
    python scripts/run_evals.py d12 --run-dir runs/gpt2 --model openai-community/gpt2

`--key value` overrides a key of the YAML, for example `--core_bundle ~/eval_bundle --core_max_per_task 100`.
"""

from nanochat_hf.cli import main

if __name__ == "__main__":
    main("eval")
