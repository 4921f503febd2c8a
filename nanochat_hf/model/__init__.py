"""The model: what is trained. Stands alone, because its files are uploaded to the Hub beside every checkpoint."""

from .configuration_nanochat import NanoChatConfig, NanoChatHFConfig
from .modeling_nanochat import NanoChatForCausalLM, NanoChatHFForCausalLM, NanoChatHFModel, NanoChatModel
from .modeling_nanochat import NanoChatHFPreTrainedModel as NanoChatPreTrainedModel

__all__ = ["NanoChatConfig", "NanoChatForCausalLM", "NanoChatHFConfig", "NanoChatHFForCausalLM", "NanoChatHFModel"]
__all__ += ["NanoChatModel", "NanoChatPreTrainedModel"]
