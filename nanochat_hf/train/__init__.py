"""Tensors to weights: scaling, schedule, optimizer, pretraining, fine-tuning, RL."""
