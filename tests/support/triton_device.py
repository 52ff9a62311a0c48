"""Where the cases of the Triton kernels run: on a CUDA device, or on the CPU in Triton's interpreter.

The interpreter is chosen when a kernel is defined, hence for a whole process: ``test_triton.py`` starts one that runs
the cases with TRITON_INTERPRET=1. Without it they are tests of the device, marked as such.
"""

from __future__ import annotations

import pytest
import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = "cpu" if INTERPRETED else "cuda"

on_the_device = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="neither a device nor the interpreter"
    ),
]
"""Marks of a module of cases."""
