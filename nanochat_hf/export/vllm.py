"""vLLM takes a stage's folder as it is, by a plugin: `pip install --no-deps -e .` in vLLM's environment.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). It makes the model of
vllm_nanochat.py and the tool parser of vllm_tool_parser.py known by name, and imports neither.
"""

from pathlib import Path

from ..errors import InputError


def register() -> None:
    """Registers model and tool parser with vLLM; one warning if its version has another interface."""
    from vllm.logger import init_logger

    try:
        from vllm.model_executor.models.registry import ModelRegistry
        from vllm.tool_parsers import ToolParserManager

        ToolParserManager.register_lazy_module("nanochat", f"{__package__}.vllm_tool_parser", "NanoChatToolParser")
        ModelRegistry.register_model("NanoChatHFForCausalLM", f"{__package__}.vllm_nanochat:NanoChatForVllm")
    except (ImportError, AttributeError) as error:
        init_logger(__name__).warning("nanochat_hf runs in vLLM 0.32; this version has another interface: %s", error)


def write(source: Path, folder: Path) -> list[str]:
    """Raises InputError: there is nothing to write."""
    plugin = "pip install --no-deps -e . in vLLM's environment"
    raise InputError(f"vLLM takes the folder itself, by a plugin: {plugin}, then vllm serve {source}")


def add(folder: Path) -> list[str]:
    """Adds nothing; returns a line for the card."""
    return ["serve:    vllm serve {folder}  # with nanochat_hf in vLLM's environment"]
