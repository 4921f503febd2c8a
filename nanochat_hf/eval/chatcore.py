"""ChatCORE while a model trains: the chat tasks of eval.yaml, a few questions of each.

`train_chat` calls what `chatcore_metric` returns every `chatcore_every` steps; recipes/speedrun.py and
scripts/chat_sft.py bring the two together, since training does not know evaluation.

    measure = chatcore_metric(EvalConfig(tasks=["nanochat_chatcore"]), tokenizer, folder)
    measure(model, 32)  # -> 0.21, questions of each task at most 32
"""

from collections.abc import Callable
from dataclasses import replace
from math import nan
from pathlib import Path

from ..distributed import agreed
from ..errors import InputError
from .core import centered_mean, quiet
from .generation import Generator
from .harness import EvalConfig
from .lm import LocalLM
from .tasks import Tasks


def chatcore_metric(config: EvalConfig, tokenizer, output: Path, engine: Callable | None = None) -> Callable:
    """(model in eval mode, questions per task) -> mean centered accuracy, the same on every process.

    The mean is over ChatCORE's tasks, where `config.tasks` has some, and over all its accuracies otherwise; NaN if the
    few questions of every task have one answer, so that guessing is always right. Generated
    questions are written below `output`. `engine` as in harness.evaluate; it is made once and refreshed.

    Raises:
        InputError: a task that is unknown or whose questions cannot be had, or no chat task at all.
    """
    config = replace(config, chat_stages=["sft"], num_samples=1, temperature=0.0)
    with quiet():
        tasks = Tasks(config, {"sft": ""}, Path(output))
    if not tasks.chat:
        raise InputError(f"none of {', '.join(config.tasks) or 'no tasks'} is asked in a chat")
    engines = []

    def measure(model, limit: int) -> float:
        if not engines:
            engines.append((engine or Generator)(model, tokenizer))
        elif hasattr(engines[0], "refresh"):
            engines[0].refresh()
        tasks.config = replace(config, limit=limit if limit > 0 else None)
        results = {}
        with quiet():
            lm = LocalLM(model, tokenizer, config, engines[0])
            for name in tasks.chat:
                results |= tasks.run(name, lm)[0]
        marked = {k: v for k, v in results.items() if v.get("chatcore")}
        found = centered_mean(marked or results, "ChatCORE", len(results))
        return agreed(found["value"] if found else nan)

    return measure
