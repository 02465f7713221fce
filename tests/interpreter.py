"""Imported before stylemuse: without a GPU, Triton kernels run interpreted, and are made for that when imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where the tests of kernels run."""
