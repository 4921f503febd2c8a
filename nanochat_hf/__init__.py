"""nanochat_hf: train a small ChatGPT with Hugging Face libraries.

Importing the package takes no time, but registers `model_type` "nanochat_hf" with the Auto classes. They import the
model when a folder of ours is loaded. Importing the model installs our text pipeline, which ends texts at the end
mark. Importing peft adds the default LoRA targets of these models.
"""

import importlib
import sys
from importlib.machinery import PathFinder

__version__ = "0.1.0"
__all__ = ["NanoChatConfig", "NanoChatForCausalLM", "NanoChatModel", "__version__"]


def __getattr__(name: str):
    """The model's classes, imported when they are first used (PEP 562)."""
    if name.startswith("NanoChat"):
        return getattr(importlib.import_module(f"{__name__}.model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _register_config(auto) -> None:
    """Name our config class to transformers' own lazy mapping, which then takes it from this module."""
    auto.CONFIG_MAPPING._mapping["nanochat_hf"] = "NanoChatHFConfig"
    auto.CONFIG_MAPPING._modules["nanochat_hf"] = sys.modules[__name__]


def _install_pipeline(_) -> None:
    if f"{__name__}.model" not in sys.modules:  # else that is what imports the pipelines
        importlib.import_module(f"{__name__}.model")


def _set_lora_targets(constants) -> None:
    """Every matrix of attention and MLP; the head stays as it is. `nanochat`: an export."""
    for model_type in ("nanochat_hf", "nanochat"):
        targets = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        targets.setdefault(model_type, ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"])


_AFTER_IMPORT = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.pipelines": _install_pipeline,
    "peft.utils.constants": _set_lora_targets,
}


class _AfterImport:
    """An import hook: calls the functions of _AFTER_IMPORT with their module, after it was loaded."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target) if name in _AFTER_IMPORT else None
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                _AFTER_IMPORT[name](module)

            spec.loader.exec_module = exec_module
        return spec


for _name, _function in _AFTER_IMPORT.items():
    if _name in sys.modules:
        _function(sys.modules[_name])
sys.meta_path.insert(0, _AfterImport)
