"""Triton is absent on macOS, on Windows and beside CPU builds of torch: kernels' files import, and references run."""

import subprocess
import sys

CODE = """
import importlib, pkgutil, sys
sys.modules["triton"] = None
import torch
import oribi.kernels
for found in pkgutil.iter_modules(oribi.kernels.__path__, "oribi.kernels."):
    importlib.import_module(found.name)
from oribi.kernels.dispatch import use_triton
assert not use_triton(torch.zeros(1))
"""


def test_every_kernel_file_imports_without_triton():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
