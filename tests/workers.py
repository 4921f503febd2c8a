"""Jobs that tests run on several ranks: `accelerate launch ... tests/workers.py JOBS`, started by `launch`.

JOBS is a JSON list, done one after the other in the same processes; each is {"do": name of a function below, and its
arguments}.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def command(ranks: int, config: str, *more: str) -> list[str]:
    """accelerate launch with a file of configs/accelerate; without it for one rank."""
    if ranks == 1:
        return [sys.executable]
    path = ROOT / "configs" / "accelerate" / f"{config}.yaml"
    words = ["launch", "--config_file", str(path), "--num_processes", str(ranks), "--main_process_port", "0"]
    return [str(Path(sys.executable).parent / "accelerate"), *words, *more]


def environment(**more: str) -> dict[str, str]:
    cpu = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **cpu, **more}


def launch(ranks: int, config: str, jobs: list[dict], *words: str, ok: bool = True, **more: str):
    """Run the jobs to their end; returns the finished process, with `stdout` and `stderr`.

    words: further arguments of accelerate launch. ok: whether it must succeed. more: environment variables.
    """
    words = [*command(ranks, config, *words), __file__, json.dumps(jobs, default=str)]
    done = subprocess.run(words, env=environment(**more), capture_output=True, check=False, text=True, timeout=400)
    print(done.stdout[-3000:], done.stderr[-6000:])
    assert (done.returncode == 0) == ok
    return done


def launch_zero(ranks: int, config: str, jobs: list[dict]):
    """As `launch`, with DeepSpeed itself on the CPU."""
    more = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false", "TORCH_COMPILE_DISABLE": "1"}
    return launch(2, config, jobs, "--mixed_precision", "no", "--num_processes", str(ranks), **more)


# --- on each rank


def pretrain(
    output: str, tokenizer: str, stop_at: int | None = None, die: list | None = None, as_on_a_gpu: bool = False, **keys
) -> None:
    """stop_at: rank 0 alone gets SIGTERM after that step. die: [rank, step], that rank is killed after it.

    as_on_a_gpu: blocks whose matmuls accumulate gradients in place, as with FlashAttention-4 and quack.
    """
    from nanochat_hf.train import fused_model
    from nanochat_hf.train import pretrain as module

    if as_on_a_gpu:
        real_mlp, mask = fused_model.residual_mlp, fused_model.attention_mask

        def in_place(x, attn_out, wo, w1, *others):
            assert isinstance(w1, fused_model.Bf16Weight)
            return real_mlp(x, attn_out, wo, w1, *others)

        def reference_mask(*args, flash):
            return mask(*args)

        fused_model.uses_flash = fused_model.uses_quack = lambda x: True
        fused_model.residual_mlp, fused_model.attention_mask = in_place, reference_mask
    if die and int(os.environ.get("RANK", "0")) == die[0]:
        real = module.Pretraining.train_step

        def train_step(self):
            if self.step == die[1]:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self)

        module.Pretraining.train_step = train_step
    push = None
    if stop_at:
        keys["push_every"], push = stop_at, lambda folder, step: os.kill(os.getpid(), signal.SIGTERM)
    try:
        module.pretrain(module.PretrainConfig(**keys), tokenizer, Path(output), push=push)
    except SystemExit as stopped:
        assert stop_at and stopped.code == 128 + signal.SIGTERM


def sft(output: str, model: str, die_at: int | None = None, **keys) -> None:
    from nanochat_hf.train import sft as module
    from nanochat_hf.train import trainer

    real_zero = trainer.deepspeed_optimizer
    trainer.deepspeed_optimizer = lambda *args: (print("DeepSpeed's own Muon"), real_zero(*args))[1]
    if die_at is not None:
        real, done = module.ChatTrainer.training_step, []

        def step(self, *args, **kwargs):
            if len(done) == die_at:
                sys.exit(3)
            done.append(1)
            return real(self, *args, **kwargs)

        module.ChatTrainer.training_step = step
    module.train_chat(module.ChatConfig(**keys), model, Path(output))


def rl(output: str, model: str, **keys) -> None:
    from nanochat_hf.eval.lm_eval_model import Generator
    from nanochat_hf.train.grpo import RLConfig, train_rl

    train_rl(RLConfig(**keys), model, Path(output), engine=Generator)


def dpo(output: str, model: str, **keys) -> None:
    from nanochat_hf.train.dpo import DPOStageConfig, train_dpo

    train_dpo(DPOStageConfig(**keys), model, Path(output))


def evaluate(output: str, models: dict, **keys) -> None:
    from nanochat_hf.eval.harness import EvalConfig, evaluate

    evaluate(EvalConfig(**keys), models, Path(output))


def sync(run: str, url: str, tokenizer: str, own_disks: bool = False, die_at: int | None = None, **keys) -> None:
    """Pretrain under --sync. own_disks: each rank has a run folder of its own. die_at: raise at that step."""
    from nanochat_hf.run import Run
    from nanochat_hf.sync import syncing
    from nanochat_hf.train import pretrain as module

    rank, real = os.environ.get("RANK", "0"), module.Pretraining.train_step

    def train_step(self):
        if self.step == die_at:
            raise KeyboardInterrupt
        return real(self)

    module.Pretraining.train_step = train_step
    run = Run(f"{run}{rank if own_disks else ''}")
    try:
        with run.lock(), syncing(url, run):
            module.pretrain(module.PretrainConfig(**keys), tokenizer, run.path / "base")
    except KeyboardInterrupt:
        print(f"rank {rank} stops")
    except ValueError as error:
        print(f"rank {rank}: {error}")
    module.Pretraining.train_step = real


def reset() -> None:
    from nanochat_hf.distributed import reset_accelerate_state

    reset_accelerate_state()


def main() -> None:
    import torch

    from nanochat_hf.distributed import partial_state

    torch.set_num_threads(1)
    partial_state()
    for job in json.loads(sys.argv[1]):
        globals()[job.pop("do")](**job)
        reset()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
