"""The model: what is trained. Stands alone, because its files are uploaded to the Hub beside every checkpoint."""

from .configuration_nanochat import NanoChatConfig
from .modeling_nanochat import NanoChatForCausalLM, NanoChatModel, NanoChatPreTrainedModel

__all__ = ["NanoChatConfig", "NanoChatForCausalLM", "NanoChatModel", "NanoChatPreTrainedModel"]
