"""The CUDA provider as a plugin: the package onnxruntime-ep-cuda12 or -cuda13, beside an ONNX Runtime without CUDA."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from scm_runtime.common.log import log_once
from scm_runtime.devices.cuda_libraries import load, vendor_libraries

CUDA_PLUGIN = "CudaPluginExecutionProvider"
PACKAGE = "onnxruntime_ep_cuda"


def plugin_library() -> Path | None:
    """Path of the plugin's library; None if the package is not installed."""
    from importlib import import_module  # needed only without a built-in CUDA provider

    try:
        return Path(import_module(PACKAGE).get_library_path())
    except ImportError:
        return None


def register_cuda_plugin(ort: Any) -> None:
    """Make the plugin's provider known to ONNX Runtime, if the package is installed and the provider is not known yet. Failures are logged."""
    library = plugin_library()
    if library is None or any(device.ep_name == CUDA_PLUGIN for device in ort.get_ep_devices()):
        return
    load(vendor_libraries(library))  # ONNX Runtime would not find them in NVIDIA's packages
    try:
        ort.register_execution_provider_library(CUDA_PLUGIN, str(library))
    except Exception as error:  # noqa: BLE001  # ONNX Runtime's exceptions have no common base class
        log_once(logging.WARNING, f"the CUDA plugin '{library}' cannot be used: {error}")
