"""The shape of metrics.json, and of what a resume reads from JSON files; each may have more keys.

`StageMetrics` is what tokenizer, base and chat stages write, `Evaluation` what the evaluation writes. A key may be
absent or null, as an older version wrote it, where its type says `| None`.
"""

from functools import cache
from typing import Annotated, Any, Literal, NotRequired

from annotated_types import Ge, Le
from pydantic import AfterValidator, TypeAdapter, ValidationError
from typing_extensions import TypedDict

Stage = Literal["base", "mid", "sft", "rl", "dpo"]
Number = Annotated[float, Ge(-1e100), Le(1e100)]  # whole or not; sums and squares of them stay finite
OptionalNumber = Number | None
ERROR = {"stderr": NotRequired[Annotated[float, Ge(0), Le(1e100)] | None]}


def record(name: str, numbers: str = "", **keys) -> type:
    """A TypedDict of these keys and of the numbers of these names, which may be absent or null."""
    return TypedDict(name, dict.fromkeys(numbers.split(), NotRequired[OptionalNumber]) | keys)


Result = record("Result", "n baseline tool_use", **ERROR, value=OptionalNumber, higher_is_better=NotRequired[bool])
Score = record("Score", "centered n", **ERROR, acc=OptionalNumber)
MEAN = {**ERROR, "label": str, "value": OptionalNumber, "missing": NotRequired[list[str] | None]}
Mean = record("Mean", "seconds model_seconds", per_task=NotRequired[dict[str, Score]], **MEAN)
Core = record("Core", "seconds model_seconds", per_task=dict[str, Score], **MEAN)
Example = record("Example", question=Any, expected=Any, answer=Any, correct=NotRequired[OptionalNumber | bool])
Part = record("Part", dataset=str, rows=Number, tokens=Number, bad=NotRequired[Number])  # of a mixture
Sample = record("Sample", prompt=Any, text=Any)
DEVICE = dict.fromkeys(("device", "device_type"), NotRequired[str | None])
Hardware = record("Hardware", "device_memory_bytes memory_bytes num_processes cpu_cores", **DEVICE)
Config = record("Config", dataset=NotRequired[str | list[dict[str, Any]] | None])


class Record(TypedDict, total=False):
    """What every stage writes."""

    finished: bool | None
    started: OptionalNumber
    wall_time_s: OptionalNumber
    commit: str | None
    config: Config | None
    versions: dict[str, str | None] | None
    hardware: Hardware | None


Numbers = record(
    "Numbers",
    "vocab_size bytes_per_token train_chars depth num_parameters num_matmul_parameters flops_per_token "
    "num_iterations num_epochs total_batch_size total_tokens total_flops rows tokens tokens_per_second mfu "
    "num_scaling_parameters peak_memory_bytes start_val_bpb val_bpb start_val_loss val_loss core generation_share",
)


class StageMetrics(Record, Numbers, total=False):
    weights: str | None
    optimizer: str | None
    inputs: dict[str, str | None] | None
    task: str | list[Any] | None
    mixture: list[Part] | None
    skipped_rows: list[dict[str, Any]] | None
    history: list[dict[str, OptionalNumber]] | None
    samples: list[Sample] | None
    before: dict[str, OptionalNumber] | None
    after: dict[str, OptionalNumber] | None


class Evaluation(Record, total=False):
    definition: str | None
    models: dict[Stage, str] | None
    weights: dict[Stage, str | None] | None
    results: dict[Stage, dict[str, Result]] | None
    core: dict[Stage, Core] | None
    chatcore: dict[Stage, Mean] | None
    kocore: dict[Stage, Mean] | None
    examples: dict[Stage, list[Example] | None] | None
    seconds: dict[Stage, dict[str, OptionalNumber] | None] | None
    bytes_per_token: dict[str, dict[str, OptionalNumber]] | None


def check_steps(log: list[dict]) -> list[dict]:
    for entry in log:
        if entry.get("step") is None or entry.get("time", 0.0) is None:
            raise ValueError("an entry has no step, or its time is null")
    return log


Log = Annotated[list[dict[str, OptionalNumber]], AfterValidator(check_steps)]
# measured.json in a checkpoint of base, and in one of a chat stage; what is read of transformers' trainer_state.json;
# and skipped.json beside the checkpoints of a chat stage
Measured = record("Measured", history=list[dict[str, OptionalNumber]], samples=list[Sample])
ChatMeasured = record("ChatMeasured", log=Log)
TrainerState = record("TrainerState", global_step=int, log_history=Log)
Skipped = record("Skipped", steps=list[int])

adapter = cache(TypeAdapter)


def problem(record: dict, kind: type) -> str | None:
    """What is wrong with the first key of a record that has another shape than `kind`; None if all are right."""
    try:
        adapter(kind).validate_python(record, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    else:
        return None
    value, place = record, ""
    for part in first["loc"]:  # after a place come parts that name the type of a union
        try:
            value = value[part]
        except (LookupError, TypeError):
            break
        place = f"{place}[{part}]" if isinstance(part, int) else f"{place}.{part}".lstrip(".")
    if first["type"] == "missing":
        return f"{place} has no {first['loc'][-1]}"
    if first["loc"][-1] == "[key]":
        return f"{place} is no valid key: {first['msg'].lower()}"
    text = repr(value) if value is not None else "null"
    text = text if len(text) < 80 else text[:76] + " ..."
    out_of_range = isinstance(value, int | float) and abs(value) > 1e100  # then the message has all digits of 1e100
    reason = "input should be a number from -1e100 to 1e100" if out_of_range else first["msg"]
    return f"{place} is {text}: {reason[0].lower()}{reason[1:]}"
