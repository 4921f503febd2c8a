"""A run folder with the metrics.json of every stage and nothing else: the fixture `run` of the report's tests."""

import json

import pytest

COMMON = {
    "finished": True,
    "commit": "abcdef1234",
    "dirty": True,
    "started": 1.0,
    "versions": {"torch": "2.13.0", "deepspeed": None},
    "hardware": {
        "device": "Toaster", "num_processes": 2, "cpu_cores": 4, "memory_bytes": 8 * 2**30, "system": "Linux",
    },
}  # fmt: skip


def result(value, **more):
    return {"value": value, "stderr": 0.01, "n": 200, "baseline": None, "higher_is_better": True, **more}


@pytest.fixture(name="run")
def finished_run(tmp_path):
    def write(stage, **numbers):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "metrics.json").write_text(json.dumps({**COMMON, **numbers}))

    write("tokenizer", vocab_size=1024, bytes_per_token=2.5, wall_time_s=10)
    history = [{"step": s, "train_loss": 5 - s / 10, **({"val_bpb": 2 - s / 40} if s % 2 else {})} for s in range(9)]
    samples = [{"prompt": "The owl", "text": "is *big* | and\n<b>old"}] * 2
    write("base", depth=4, num_parameters=1_234_567, wall_time_s=100, mfu=None, history=history, samples=samples)
    mixture = [{"dataset": "primer", "rows": 3000, "tokens": 90_000}]
    write("sft", num_iterations=30, num_epochs=0.75, rows=3000, tokens=90_000, wall_time_s=50, mixture=mixture)
    rl = [{"step": s, "reward": s / 10} for s in range(5)]
    write("rl", history=rl, before={"arithmetic": 0.5}, after={"arithmetic": 0.75}, wall_time_s=40)
    core = {"value": 0.01, "stderr": 0.02, "label": "2/22 tasks", "tasks": "2/22", "missing": ["squad"], "limit": 50}
    core |= {"seconds": 4.0, "model_seconds": 3.0, "long_prompts": 7}
    core["per_task"] = {"piqa": {"acc": 0.6, "centered": 0.2, "stderr": 0.1, "n": 50}}
    write(
        "eval",
        wall_time_s=3400,
        models={stage: stage for stage in ("base", "sft", "rl")},
        results={
            "base": {"val_bpb": result(1.1, stderr=None, higher_is_better=False)},
            "sft": {"facts": result(0.93), "counting": result(0.8, baseline=0.25, tool_use=0.99, **{"pass@2": 0.9})},
            "rl": {"counting": result(0.85, tool_use=0.0)},  # it calls no tool any more
        },
        core={"base": core},
        bytes_per_token={"korean": {"ours": 1.5, "GPT-2": None}},
        examples={
            "rl": [
                {"question": "2+2?", "expected": "4", "answer": "4", "correct": 1.0},
                {"question": "3+3?", "expected": "6", "answer": "5", "correct": 0.25},
            ]
        },  # one of four is right
    )
    return tmp_path
