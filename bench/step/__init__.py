"""A decoding step: its latency and parts, its floor, its kernels and their launches."""
