"""The model: what is trained. Its files stand alone, because they are uploaded to the Hub beside every checkpoint.

Importing it registers the classes with transformers' Auto classes and installs the text pipeline. `save_pretrained`
then also writes the code with which others load the folder (`trust_remote_code=True`).
"""

from transformers import AutoModel, AutoModelForCausalLM
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_nanochat import NanoChatConfig, NanoChatHFConfig
from .generation_nanochat import NanoChatHFTextGenerationPipeline
from .modeling_nanochat import NanoChatForCausalLM, NanoChatHFForCausalLM, NanoChatHFModel, NanoChatModel
from .modeling_nanochat import NanoChatHFPreTrainedModel as NanoChatPreTrainedModel

__all__ = ["NanoChatConfig", "NanoChatForCausalLM", "NanoChatHFConfig", "NanoChatHFForCausalLM", "NanoChatHFModel"]
__all__ += ["NanoChatModel", "NanoChatPreTrainedModel"]

AutoModel.register(NanoChatConfig, NanoChatModel)
AutoModelForCausalLM.register(NanoChatConfig, NanoChatForCausalLM)
PIPELINE_REGISTRY.supported_tasks["text-generation"]["impl"] = NanoChatHFTextGenerationPipeline
NanoChatConfig.register_for_auto_class()
NanoChatModel.register_for_auto_class("AutoModel")
NanoChatForCausalLM.register_for_auto_class("AutoModelForCausalLM")
