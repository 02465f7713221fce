"""Tensors in, tensors out: every operation with its plain-torch reference; imports nothing of ours."""
