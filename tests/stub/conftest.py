"""These tests run on the stub only: make test-stub."""

from __future__ import annotations

from pathlib import Path

import pytest

from stub.edm2 import Dtype, Export, export_preset
from support import on_stub

if not on_stub():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def edm2_xxs(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Return a function that returns the bundle of EDM2's smallest preset in a dtype. It exports each once."""
    folder, bundles = tmp_path_factory.mktemp("edm2"), dict[Dtype, Path]()

    def exported(dtype: Dtype) -> Path:
        if dtype not in bundles:
            bundles[dtype] = export_preset("XXS", dtype, folder)
        return bundles[dtype]

    return exported
