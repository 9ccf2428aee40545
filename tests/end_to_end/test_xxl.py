"""The largest published size, 1.5 billion parameters: does it load, and do the kernels draw what the function bodies draw? Takes three minutes and 9 GB."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from scm_export.exporter import export_model
from scm_export.model import ImageDecoder, Model
from scm_export.networks.edm2 import PRESETS, UNet
from scm_export.options import Options
from scm_export.parametrisation import Step, default_times, t_max
from scm_runtime import Generator
from scm_runtime.bundle.manifest import Conditioning, Source
from support import native_library

pytestmark = pytest.mark.skipif(not os.environ.get("SCM_TEST_XXL"), reason="takes three minutes and 9 GB of memory: SCM_TEST_XXL=1")


def test_xxl_gives_the_same_pixels_with_the_kernels_and_without(tmp_path: Path) -> None:
    native_library()
    torch.manual_seed(0)
    network = UNet(PRESETS["XXL"])
    torch.nn.init.ones_(network.out_gain)
    model = Model(
        family="edm2",
        step=Step(network.fold().eval(), 0.5),
        sample_shape=(4, 64, 64),
        sigma_data=0.5,
        initial_scale=0.5 * float(np.sin(t_max(0.5))),
        times=default_times(0.5),
        decoder=ImageDecoder(scale=127.5, offset=127.5),
        conditioning=(Conditioning(name="class_labels", dtype="int64", shape=(), kind="class", num_classes=1000),),
    )
    export_model(model, tmp_path / "xxl.scm", Source(file="none", sha256="0" * 64), Options(steps=(), verify=False))
    del model, network
    pixels = []
    for native_ops in (True, False):
        with Generator(tmp_path / "xxl.scm", native_ops=native_ops, verify_integrity=False) as generate:
            pixels.append(generate(207, seed=0, output_type="np").array.astype(int))
        del generate
        gc.collect()
    difference = np.abs(pixels[0] - pixels[1])
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-3
    assert pixels[0].std() > 10  # a picture, not a constant
