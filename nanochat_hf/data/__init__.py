"""Text to tensors (tokenizer, corpus, packing, loader) and messages (primer, conversations, answers)."""
