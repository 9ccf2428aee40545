"""SCM_OPS_MAX_ISA limits the instruction sets of the CPU kernels: with each of them, images are within rounding of the golden ones."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support import CONVOLUTION_ISAS, native_library, run_python

GOLDEN = Path(__file__).parents[1] / "golden" / "digits-1-step.png"

# Arguments: the value of scm.float32_matmul_precision, and the file to write.
GENERATE = """
import sys
import numpy as np
from scm_runtime import Generator
with Generator("digits", device="cpu", native_ops=True, cache_dir=False, session_options={"scm.float32_matmul_precision": sys.argv[1]}) as generate:
    names = "zero one two three four five six seven eight nine".split()
    np.save(sys.argv[2], generate(names, seed=0, num_inference_steps=1, output_type="np").array)
"""


def environment(max_isa: str) -> dict[str, str]:
    return {**os.environ, "SCM_OPS_MAX_ISA": max_isa}


@pytest.mark.parametrize("max_isa", ["generic", *CONVOLUTION_ISAS])
def test_golden_digits(max_isa: str, tmp_path: Path) -> None:
    native_library()
    run_python(GENERATE, "high", tmp_path / "digits.npy", env=environment(max_isa))
    images = np.load(tmp_path / "digits.npy")
    golden = np.array(Image.open(GOLDEN)).astype(int)
    np.testing.assert_allclose(np.concatenate(images[..., 0], axis=1).astype(int), golden, atol=2)


def test_an_unknown_instruction_set_is_an_error(tmp_path: Path) -> None:
    native_library()
    done = run_python(GENERATE, "high", tmp_path / "digits.npy", env=environment("avx3"), check=False)
    assert done.returncode
    assert "SCM_OPS_MAX_ISA must be one of generic, avx2, avx512, avx512_bf16, amx, or not set, got avx3" in done.stderr
