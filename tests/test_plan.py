"""Every line of `nanochat plan` for two recipes and two devices: each number follows from docs/costs.md by hand.

cpu-demo: 6.29e6 FLOPs per token on 2 cores of 5e10 per second are 15.9K tokens per second, 1.4336M tokens 90 s.
d12 on two A100: .518 x 2 x 312e12 / 759,696,048 = 425.5K tokens per second; 1.321e9 tokens are 3,105 s, $1.73
at $2, and 2 x 400 W for that time .69 kWh. Bytes without kernels: 42 x 64 sequences x 2,048 x 768 x 12 = 50.7e9,
weights 3.9e9, logits 1.07e9, and .3e9. SFT: half of the first for 32 sequences, and 1.8 per parameter. RL: 8
sequences of 1,024 tokens 3.2e9, logits .5e9, and 10.2 per parameter.
"""

import os
import shlex

import pytest

from nanochat_hf import cli

WORDS = "--gpus 2 --gpu A100 --node-hourly-rate 2 --stages tokenizer,base,sft,rl,dpo,eval rl.num_iterations=7 "
WORDS += "dpo.lora_r=8 sft.num_epochs=2.5 sft.packing=false sft.total_batch_size=64 rl.max_new_tokens=512 "
WORDS += "base.save_every=0"
DATA = ["base.keep_checkpoints=5", "base.dataset=[{dataset: primer}, {dataset: x/y, weight: 2}]"]
PLANS = {
    ("cpu-demo", "--gpu", "CPU", "--stages", "base,rl"): """\
pretraining on CPU
  model        1.3M parameters: 4 layers, width 128, 4 heads
  steps        1.4M tokens: 700 steps x 2,048 tokens, 9.0e12 FLOPs
  time         1 min 30 s at 15.9K tok/s (projected, roughly); without evaluations

base
  data         primer
  batch        16 sequences per step (ranks 1 x micro-batch 16 x accumulation 1), 128 tokens each
  optimizer    Muon, learning rate 0.04; AdamW, 0.3 (embedding), 0.00801 (head), 0.5 (scalars)
  checkpoints  every 200 steps; the last 2 are kept
  precision    float32

rl
  data         primer:problem
  steps        100
  batch        256 sequences per step (ranks 1 x micro-batch 256 x accumulation 1)
  optimizer    Muon, learning rate 0.002; AdamW, 0.03 (embedding), 0.000801 (head), 0.05 (scalars)
  checkpoints  every 20 steps; the last 2 are kept
""",
    ("d12", *WORDS.split(), *DATA): """\
pretraining on 2 x A100
  model        286.3M parameters: 12 layers, width 768, 6 heads
  steps        1.3B tokens: 2,520 steps x 524,288 tokens, 1.0e18 FLOPs
  time         51 min 45 s at 425.5K tok/s (projected in bf16 at an MFU of 0.52, from d24 on one
               H200 without the fast kernels); without evaluations
  cost         $1.73 at $2.00 per hour
  energy       at most 0.7 kWh: GPUs of 400 W
  memory       about 56 of 80 GB per GPU

tokenizer
  data         karpathy/climbmix-400b-shuffle
  vocabulary   32,768 tokens

base
  data         primer, x/y
  batch        256 sequences per step (ranks 2 x micro-batch 64 x accumulation 2), 2,048 tokens each
  optimizer    Muon, learning rate 0.02; AdamW, 0.3 (embedding), 0.008 (head), 0.5 (scalars)
  checkpoints  at the end, or when interrupted; the last 5 are kept
  sharding     replicated parameters, ZeRO-1-style sharded optimizer state
  precision    bfloat16

sft
  data         HuggingFaceTB/smol-smoltalk, cais/mmlu, openai/gsm8k, recipes/identity.yaml
  steps        2.5 x the data
  batch        64 sequences per step (ranks 2 x micro-batch 32 x accumulation 1)
  optimizer    Muon, learning rate 0.016; AdamW, 0.24 (embedding), 0.0064 (head), 0.4 (scalars)
  checkpoints  every 300 steps; the last 2 are kept
  memory       about 31 of 80 GB per GPU

rl
  data         openai/gsm8k
  steps        7
  batch        256 sequences per step (ranks 2 x micro-batch 8 x accumulation 16)
  optimizer    Muon, learning rate 0.001; AdamW, 0.015 (embedding), 0.0004 (head), 0.025 (scalars)
  checkpoints  every 60 steps; the last 2 are kept
  memory       about 11 of 80 GB per GPU

dpo
  data         HuggingFaceH4/ultrafeedback_binarized
  steps        1 x the data
  batch        32 sequences per step (ranks 2 x micro-batch 4 x accumulation 4)
  optimizer    AdamW, learning rate 0.001, on LoRA adapters of rank 8
  checkpoints  every 200 steps; the last 2 are kept

eval
  data         karpathy/climbmix-400b-shuffle
  tasks        nanochat_chatcore, CORE
""",
}  # fmt: skip


@pytest.mark.parametrize("words", PLANS, ids=lambda words: words[0])
def test_every_line_of_a_plan(words, capsys, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    cli.dispatch("plan", list(words))
    assert capsys.readouterr().out == PLANS[words]


TWO_NODES = "base.total_batch_size=786432 sft.total_batch_size=786432"
PARTS = {  # d24 of the README; two nodes; a name with a space; steps of 3 us, which nothing measured was
    "d24 --gpus 8 --gpu H200 base.fp8=false": "5.8B tokens: 5,568 steps x 1,048,576 tokens, 2.8e19 FLOPs|1 h 39 min "
    "at 975.9K tok/s (projected in bf16|$39.88 at $24.00 per hour|at most 9.3 kWh|ranks 8 x micro-batch 32|1.4B param",
    f"d24 --gpus 12 --gpu A100 --node-hourly-rate 10 {TWO_NODES}": "at $20.00",
    "d12 --gpu 'RTX 4090' base.depth=14 base.device_batch_size=1": "pretraining on 1 x RTX 4090|about 6.9 of 24 GB",
    "d12 --gpu H200 base.dataset=/of/another/machine": "\n  data         /of/another/machine\n",
    "d12 --gpu H200 sft.max_seq_len=1024": "512 sequences per step (ranks 1 x micro-batch 32 x accumulation 16)\n",
    "d24 --gpu H100 base.depth=28 base.fp8=false": "micro-batch 8 x accumulation 64",  # 16 need 96 %
    "cpu-demo eval.dataset=null --gpu H200": "\neval\n  tasks        nanochat_demo\n",
    "cpu-demo --gpus 8 --gpu H200": "time         not known, nor is the cost|less than 1 of 141 GB per GPU",
}


@pytest.mark.parametrize("words", PARTS)
def test_a_plan_has_these_figures_in_short_lines(words, capsys):
    cli.dispatch("plan", shlex.split(words))
    text = capsys.readouterr().out
    assert [part for part in PARTS[words].split("|") if part not in text] == []
    assert max(map(len, text.splitlines())) <= 100 and ("not known" in text) != ("  cost " in text)
