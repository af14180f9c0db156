"""The kernels without a GPU: their tests run in Triton's interpreter, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from packaging.version import Version

from oribi.kernels import dispatch

FOLDER = Path(__file__).parent
# Triton 3.6's interpreter turns a loop's bound into an int in a way that NumPy refuses since 2.4
LOOPS_FAIL = (
    dispatch.triton is not None
    and Version(dispatch.triton.__version__) < Version("3.7")
    and Version(numpy.__version__) >= Version("2.4")
)


@pytest.mark.slow
@pytest.mark.skipif(LOOPS_FAIL, reason="the interpreter of Triton below 3.7 needs NumPy below 2.4")
@pytest.mark.skipif(dispatch.triton is None, reason="Triton is not installed")
@pytest.mark.skipif(dispatch.INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.parametrize(
    ("files", "chosen", "least"),
    [
        (["test_decode_attention.py", "test_nf4_linear.py"], "", 60),
        (["test_triton.py", "test_flash_attention.py", "test_blocked_attention.py"], "", 110),
        (["test_gated_delta.py"], "the_kernels_equal", 8),
        pytest.param(["test_experts.py"], "grouped or bits", 12, marks=pytest.mark.long),
        pytest.param(["test_ggml_blocks.py"], "bits or group", 19, marks=pytest.mark.long),
        pytest.param(["test_block_linear.py"], "", 60, marks=pytest.mark.long),
        pytest.param(
            ["test_fp8.py", "test_causal_conv.py", "test_output_gate.py", "test_adamw.py"],
            "the_kernel or nearest or two_dtypes or torch_adamw_with or finite",
            42,
            marks=pytest.mark.long,
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_kernels_agree_with_truth_in_the_interpreter(files, chosen, least):
    places = [str(FOLDER / file) for file in files]
    command = [sys.executable, "-m", "pytest", *places, "-k", chosen, "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    passed = (
        int(re.search(r"(\d+) passed", run.stdout)[1]) if "passed" in run.stdout else run.stdout.count(".")
    )
    assert passed >= least
    assert "skipped" not in run.stdout
