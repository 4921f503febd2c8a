"""nanochat_hf: the best ChatGPT that little money can buy, made of Hugging Face parts.

Importing the package registers the model with the Auto classes, so that `AutoModelForCausalLM.from_pretrained` and
`AutoConfig` know `model_type` "nanochat_hf" here, and makes `save_pretrained` write the code that others need to load
the folder with `trust_remote_code=True`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .model import NanoChatConfig, NanoChatForCausalLM, NanoChatModel

__version__ = "0.1.0"
__all__ = ["NanoChatConfig", "NanoChatForCausalLM", "NanoChatModel", "__version__"]

AutoConfig.register(NanoChatConfig.model_type, NanoChatConfig)
# exist_ok: the check goes by class name; the class of the same name in transformers (its `nanochat`) keeps working.
AutoModel.register(NanoChatConfig, NanoChatModel, exist_ok=True)
AutoModelForCausalLM.register(NanoChatConfig, NanoChatForCausalLM, exist_ok=True)
NanoChatConfig.register_for_auto_class()
NanoChatModel.register_for_auto_class("AutoModel")
NanoChatForCausalLM.register_for_auto_class("AutoModelForCausalLM")
