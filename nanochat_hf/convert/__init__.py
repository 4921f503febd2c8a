"""Checkpoints of karpathy/nanochat and of transformers in and out."""
