"""``--decoder module:function``: a user's own decoder from latents to pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import guided_networks
from scm_export import cli, export
from scm_export.errors import CheckpointError
from scm_runtime import Generator, InvalidArgumentError, ScmError

MEAN, STD = (0.1, -0.2, 0.3), (0.5, 1.5, 2.0)
CONFIG = {"config": {"sample_shape": guided_networks.SHAPE}, "conditioning": [{"name": "y", "kind": "class", "num_classes": 4}]}


def levels(latents: Tensor) -> Any:
    with torch.no_grad():
        pixels = guided_networks.decoder()(latents) * 127.5 + 127.5
    return pixels.permute(0, 2, 3, 1).round().clamp(0, 255).to(torch.uint8).numpy()


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("decoder", ["guided_networks:decoder", guided_networks.decoder()])
def test_samples_are_decoded_by_the_users_network(decoder: Any, statistics: bool, tmp_path: Path) -> None:
    sampler = {"sampler": {"latent_mean": MEAN, "latent_std": STD}} if statistics else {}
    done = export(guided_networks.Labelled(), tmp_path / "own.scm", config={**CONFIG, **sampler}, decoder=decoder, steps=(1,))
    assert done.manifest.output.shape == (12, 12, 3)
    with Generator(tmp_path / "own.scm") as generate:
        latents = torch.from_numpy(generate([1, 2], seed=3, output_type="latent").array) / 0.5
        found = generate([1, 2], seed=3, output_type="np").array
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in ((MEAN, STD) if statistics else ((0.0,) * 3, (1.0,) * 3)))
    assert np.abs(found.astype(int) - levels(latents * std + mean)).max() <= 1
    assert len(np.unique(found)) > 20


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"decoder": "guided_networks:decodr"}, InvalidArgumentError, "did you mean 'decoder'"),
        ({"decoder": "no_such_module:decoder"}, InvalidArgumentError, "decoder: there is no module 'no_such_module'"),
        ({"decoder": "guided_networks:guide"}, CheckpointError, "raised TypeError"),
        ({"decoder": "guided_networks:flat_decoder"}, CheckpointError, r"must return pixels, a tensor \[N, C, H, W\] .* got \[2, 108\]"),
        ({"decoder": "guided_networks:failing_decoder"}, CheckpointError, r"the decoder Conv2d cannot be called with latents of \[2, 3, 6, 6\]"),
        ({"decoder": "guided_networks:decoder", "with_encoder": True}, CheckpointError, "excludes --with-encoder"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(options: dict[str, Any], error: type[ScmError], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        export(guided_networks.Labelled(), tmp_path / "own.scm", config=CONFIG, **options)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_takes_it_too(tmp_path: Path) -> None:
    torch.save(guided_networks.Labelled().state_dict(), tmp_path / "weights.pt")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    options = ["--config", str(tmp_path / "config.json"), "--factory", "guided_networks:Labelled", "--decoder", "guided_networks:decoder", "--dry-run"]
    result = CliRunner(catch_exceptions=False).invoke(cli.main, [str(tmp_path / "weights.pt"), *options])
    assert result.exit_code == 0, result.output
    assert "a network of 0.00 M parameters: the" in result.stdout
