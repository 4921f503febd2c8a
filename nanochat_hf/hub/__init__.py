"""Models, cards and checkpoints on the Hugging Face Hub."""
