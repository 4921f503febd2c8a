"""Hand-written kernels of training and decoding, each beside its reference in PyTorch and checked before use."""
