"""Text to tensors (documents, tokenizer, data loader), and conversations (mixtures, transforms, grading)."""
