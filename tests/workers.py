"""What the tests with several processes run in each of them: `accelerate launch ... tests/workers.py JOBS`.

JOBS is a JSON list of jobs, done one after the other in the same processes; each is {"do": name of a function below,
and its arguments}. `launch` starts them.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def command(partial_state: int, config: str, *more: str) -> list[str]:
    """accelerate launch with one of this project's config files; "python" for one process."""
    if partial_state == 1:
        return [sys.executable]
    path = ROOT / "configs" / "accelerate" / f"{config}.yaml"
    words = ["launch", "--config_file", str(path), "--num_processes", str(partial_state), "--main_process_port", "0"]
    return [str(Path(sys.executable).parent / "accelerate"), *words, *more]


def environment(**more: str) -> dict[str, str]:
    return {
        **os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT), **more,
    }  # fmt: skip


def launch(partial_state: int, config: str, jobs: list[dict], timeout: float = 400, **more: str):
    """Run the jobs to their end; -> the finished process, with `stdout` and `stderr`."""
    words = [*command(partial_state, config), __file__, json.dumps(jobs, default=str)]
    done = subprocess.run(words, env=environment(**more), capture_output=True, check=False, text=True, timeout=timeout)
    print(done.stdout[-3000:], done.stderr[-6000:])
    return done


# --------------------------------------------------------------------------------------------------- in each process


def pretrain(
    output: str, tokenizer: str, stop_at: int | None = None, die: list | None = None, as_on_a_gpu: bool = False, **keys
) -> None:
    """stop_at: the main process alone hears SIGTERM in that step. die: [rank, step], that rank is killed after it.

    as_on_a_gpu: blocks whose products add to the gradients by themselves, as with FlashAttention-4 and quack.
    """
    from nanochat_hf.train import fused_model as fast
    from nanochat_hf.train import pretrain as module

    if as_on_a_gpu:
        real_mlp = fast.residual_mlp

        def by_products(x, seen, wo, w1, *others):
            assert isinstance(w1, fast.Weight)
            return real_mlp(x, seen, wo, w1, *others)

        fast.uses_flash, fast.fused, fast.residual_mlp = lambda x: True, lambda x: True, by_products
    rank = int(os.environ.get("RANK", "0"))
    if die and rank == die[0]:
        real, done = module.Pretraining.train_step, []

        def step(self):
            done.append(1)
            if len(done) > die[1]:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self)

        module.Pretraining.train_step = step
    hooks = {}
    if stop_at:
        keys["push_every"] = stop_at
        hooks["push"] = lambda folder, step: os.kill(os.getpid(), signal.SIGTERM)
    try:
        module.pretrain(module.PretrainConfig(**keys), tokenizer, Path(output), **hooks)
    except SystemExit as stopped:
        assert stop_at and stopped.code == 128 + signal.SIGTERM
    fresh()


def count(output: str, tokenizer: str, accumulations: list[int], **keys) -> None:
    """The names and numbers of communications in the second step, by micro-batches of a step."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from nanochat_hf.optim import muon_adamw as optim
    from nanochat_hf.train import pretrain as module

    order, counted = [], {}
    names = {"orthogonalise": "compute", "all_gather": "send"}
    for name, word in names.items():
        real = getattr(optim, name)
        setattr(optim, name, lambda *a, real=real, word=word, **k: (order.append(word), real(*a, **k))[1])
    real_finish = optim.MuonAdamW._finish
    optim.MuonAdamW._finish = lambda *a, **k: (order.append("apply"), real_finish(*a, **k))[1]
    for accumulation in accumulations:
        run = module.Pretraining(
            module.PretrainConfig(**keys, total_batch_size=2 * 2 * 64 * accumulation), tokenizer, Path(output), None,
            None, None,
        )  # fmt: skip
        assert run.accumulation == accumulation
        run.train_step()
        order.clear()
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            run.train_step()
        events = [event.name for event in recorded.events() if event.name.startswith("gloo:")]
        counted[accumulation] = {name: events.count(name) for name in sorted(set(events))}
        owned = sum(owner is not None for owner in run.optimizer.optimizer.owners().values())
        run.loader.close()
        fresh()
    if torch.distributed.get_rank() == 0:
        Path(output).mkdir(parents=True, exist_ok=True)
        (Path(output) / "count.json").write_text(json.dumps({"counted": counted, "order": order, "owned": owned}))


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
    fresh()


def rl(output: str, model: str, trl: bool = False, **keys) -> None:
    """`trl`: let TRL generate, and not an engine of ours."""
    from nanochat_hf.eval.lm_eval_model import Generator
    from nanochat_hf.train.grpo import RLConfig, train_rl

    train_rl(RLConfig(**keys), model, Path(output), engine=None if trl else Generator)
    fresh()


def dpo(output: str, model: str, **keys) -> None:
    from nanochat_hf.train.dpo import DPOStageConfig, train_dpo

    train_dpo(DPOStageConfig(**keys), model, Path(output))
    fresh()


def evaluate(output: str, models: dict, **keys) -> None:
    from nanochat_hf.eval.harness import EvalConfig, evaluate

    evaluate(EvalConfig(**keys), models, Path(output))
    fresh()


def wait(output: str, missing: int, seconds: float) -> None:
    """All but one rank meet; each writes down what happened to it."""
    from datetime import timedelta

    from accelerate import PartialState

    from nanochat_hf.distributed import BarrierTimeoutError, main_process_first, monitored_barrier

    rank, said = PartialState(cpu=True).process_index, []
    monitored_barrier("the start")
    monitored_barrier("the start")
    with main_process_first("the order") as main:
        said.append(f"{main} {time.time()}")
        time.sleep(0.5)
    try:
        with main_process_first("a failure") as main:
            if main:
                raise ValueError("of the main process")
    except ValueError as error:  # InputError is one
        said.append(str(error))
    try:
        if rank != missing:
            monitored_barrier("the end", timedelta(seconds=seconds))
    except BarrierTimeoutError as error:
        said.append(str(error))
    Path(output, f"{rank}.json").write_text(json.dumps(said))
    time.sleep(seconds + 1 if rank == 0 else 0)  # it holds the store


def fresh() -> None:
    from nanochat_hf.distributed import reset_accelerate_state

    reset_accelerate_state()


def main() -> None:
    import torch

    from nanochat_hf.distributed import partial_state

    torch.set_num_threads(1)
    partial_state()
    for job in json.loads(sys.argv[1]):
        globals()[job.pop("do")](**job)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
