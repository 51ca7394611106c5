"""Triton's interpreter is asked for before any of these tests imports triton, which `torch._dynamo` does."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, triton's own among them
