"""Muon and AdamW, who updates what, and the numbers that follow from the depth."""
