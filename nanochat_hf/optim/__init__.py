"""Muon and AdamW, sharded over the ranks, and the hyperparameters that follow from the depth."""
