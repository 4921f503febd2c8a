"""Tensors to weights: pretraining, mid-training, SFT, RL, DPO."""
