"""The embedded world of the demo: text, conversations and test questions, made from a seed."""
