"""nanochat_hf: the best ChatGPT that little money can buy, made of Hugging Face parts.

Importing the package registers `model_type` "nanochat_hf" with the Auto classes; `save_pretrained` then writes the
code with which others load the folder (`trust_remote_code=True`). It also sets peft's default LoRA targets for these
models, and makes `pipeline("text-generation")` end their texts at the end mark; texts of other models do not change.
"""

from contextlib import suppress

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.pipelines import PIPELINE_REGISTRY

from .model import NanoChatConfig, NanoChatForCausalLM, NanoChatModel
from .model.generation_nanochat import NanoChatHFTextGenerationPipeline

__version__ = "0.1.0"
__all__ = ["NanoChatConfig", "NanoChatForCausalLM", "NanoChatModel", "__version__"]

AutoConfig.register(NanoChatConfig.model_type, NanoChatConfig)
AutoModel.register(NanoChatConfig, NanoChatModel)
AutoModelForCausalLM.register(NanoChatConfig, NanoChatForCausalLM)
PIPELINE_REGISTRY.supported_tasks["text-generation"]["impl"] = NanoChatHFTextGenerationPipeline
NanoChatConfig.register_for_auto_class()
NanoChatModel.register_for_auto_class("AutoModel")
NanoChatForCausalLM.register_for_auto_class("AutoModelForCausalLM")
with suppress(ImportError):  # peft is not needed to run a model
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS

    # Every matrix of attention and MLP; the head stays as it is. `nanochat`: an export.
    for model_type in (NanoChatConfig.model_type, "nanochat"):
        LORA_TARGETS.setdefault(model_type, ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"])
