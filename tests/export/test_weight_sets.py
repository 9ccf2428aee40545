"""Training checkpoints with several sets of weights: which one is exported, and which messages appear."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from own_networks import SHAPE, Plain
from scm_export import Options, cli, export, plan
from scm_export.checkpoints import load
from scm_export.checkpoints.header import read_header
from scm_export.errors import CheckpointError
from scm_export.families import build_model
from scm_export.ops import philox_normal
from scm_runtime import Generator
from scm_runtime.bundle.manifest import Source, read_manifest
from scm_runtime.cli import main as scm_runtime
from scm_runtime.errors import InvalidArgumentError, ScmError
from support import ROOT
from training_checkpoints import AVERAGE, HEADER, RAW, SIGMA_DATA, T, network, same, save, taken, weights


def training_state(**sets: object) -> dict[str, object]:
    """Return what training scripts save: the sets of weights, and everything else."""
    trained = Plain()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    trained.conv.weight.sum().backward()
    optimizer.step()
    return {
        **sets,
        "opt": optimizer.state_dict(),
        "scaler": {"scale": 65536.0, "growth_tracker": 7},
        "rng": {"cpu": torch.get_rng_state(), "numpy": np.random.RandomState(0).get_state()},
        "epoch": np.int64(3),
    }


def scm_export(*arguments: object, code: int = 0) -> tuple[str, str]:
    result = CliRunner(catch_exceptions=False).invoke(cli.main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def eager_pixels(seed: int, seeds: list[int]) -> np.ndarray[Any, Any]:
    """Generate pixels with one step of a consistency model, as in the paper."""
    x = SIGMA_DATA * philox_normal(torch.tensor(seeds), 0, SHAPE)
    F: Any = network(seed)(x / SIGMA_DATA, torch.full((len(seeds),), T))
    data = math.cos(T) * x - math.sin(T) * SIGMA_DATA * F
    return np.asarray((data * 127.5 + 127.5).round().clamp(0, 255).permute(0, 2, 3, 1))


def test_a_training_checkpoint_is_exported_from_its_moving_average(tmp_path: Path) -> None:
    args = argparse.Namespace(lr=np.float64(1e-4), out=Path("runs/1"), betas=np.array([0.9, 0.99]))
    path = save(tmp_path, training_state(model=weights(RAW), ema=weights(AVERAGE), args=args))
    config = ("--config", tmp_path / "config.json", "--factory", "own_networks:plain")
    shown, said = scm_export(path, "-o", tmp_path / "out.scm", *config)
    assert "using the moving average under 'ema', one of 2 sets of weights" in said
    assert "--weights" in said
    assert "weights: 'ema'" in shown
    manifest = read_manifest(tmp_path / "out.scm")
    assert manifest.source.weights == "ema"
    assert "weights 'ema'" in " ".join(CliRunner().invoke(scm_runtime, ["inspect", str(tmp_path / "out.scm")]).stdout.split())

    seeds = [0, 1, 2]
    with Generator(tmp_path / "out.scm") as generate:
        pixels = generate(seed=seeds, num_inference_steps=1).array.astype(int)
    assert np.abs(pixels - eager_pixels(AVERAGE, seeds)).max() <= 1
    assert np.abs(pixels - eager_pixels(RAW, seeds)).mean() > 5, "the two sets draw different pictures"

    shown, _ = scm_export(path, *config, "--weights", "model", "--dry-run")
    assert "weights set 'model'" in " ".join(shown.split())
    assert same(taken(path, weights="model")[0], RAW)


@pytest.mark.parametrize(
    "key",
    [
        *("ema", "EMA", "ema_model", "model_ema", "model-ema", "ema_state_dict", "state_dict_ema", "net_ema", "netEMA", "EMAModel", "ema_0.9999", "averaged"),
        *("average_model", "shadow_params", "swa_model", "ema.shadow", "ema.state_dict", "state.ema", "callbacks.EMACallback.ema_state_dict"),
    ],
)
def test_the_only_moving_average_is_taken(key: str, tmp_path: Path) -> None:
    content: Any = weights(AVERAGE)
    for part in reversed(["ema_0.9999"] if key == "ema_0.9999" else key.split(".")):
        content = {part: content, "decay": 0.999}
    content.pop("decay")
    found, said = taken(save(tmp_path, training_state(model=weights(RAW), **content)))
    assert same(found, AVERAGE)
    assert f"using the moving average under {key!r}, one of 2 sets of weights (choose another with --weights KEY)" in said


@pytest.mark.parametrize(
    "keys",
    [("model", "schema"), ("model", "discriminator"), ("model", "non_ema"), ("generator", "cinema"), ("generator", "discriminator_ema"), ("net", "avg_grad")],
)
def test_without_a_moving_average_nothing_is_guessed(keys: tuple[str, str], tmp_path: Path) -> None:
    path = save(tmp_path, training_state(**{key: weights(seed) for seed, key in enumerate(keys)}))
    with pytest.raises(CheckpointError) as refused:
        taken(path)
    message = str(refused.value)
    assert "run.pt' holds 2 sets of weights, and none of them is named as a moving average" in message
    for key in keys:
        assert re.search(rf"^  --weights {key} +2 tensors, 84 parameters$", message, re.MULTILINE)
    assert "torch.save" not in message
    assert same(taken(path, weights=keys[1])[0], 1)


def test_of_several_moving_averages_none_is_guessed(tmp_path: Path) -> None:
    path = save(tmp_path, training_state(model=weights(RAW), **{"ema_0.999": weights(2), "ema_0.9999": weights(3)}))
    with pytest.raises(CheckpointError, match=r"holds 2 moving averages among its 3 sets of weights") as refused:
        taken(path)
    assert re.search(r"^  --weights ema_0\.999 +2 tensors, 84 parameters$", str(refused.value), re.MULTILINE)
    found, said = taken(path, weights="ema_0.9999")
    assert same(found, 3)
    assert said == ["using the tensors under 'ema_0.9999'"]


def test_several_sets_under_one_moving_average_are_several_averages(tmp_path: Path) -> None:
    path = save(tmp_path, {"model": weights(RAW), "ema": {"0.999": weights(2), "0.9999": weights(3)}})
    with pytest.raises(CheckpointError, match=r"holds 2 moving averages among its 3 sets of weights"):
        taken(path)


def test_numbers_beside_the_tensors_of_an_average_are_left_out(tmp_path: Path) -> None:
    path = save(tmp_path, {"model": weights(RAW), "ema": {**weights(AVERAGE), "decay": 0.999, "updates": 7, "name": "fast"}})
    assert same(taken(path)[0], AVERAGE)


@pytest.mark.parametrize(
    "average",
    [
        {"decay": 0.9, "num_updates": 5, "shadow_params": [torch.zeros(3, 2)], "collected_params": []},  # torch_ema, score_sde
        [torch.zeros(3, 2)],
        (torch.zeros(3, 2), torch.zeros(3)),
        [{"conv.weight": torch.zeros(3, 2)}],
    ],
)
def test_an_average_without_names_is_not_passed_over_in_silence(average: object, tmp_path: Path) -> None:
    path = save(tmp_path, {"model": weights(RAW), "ema": average})
    with pytest.raises(CheckpointError, match=r"keeps a moving average under 'ema[.\w]*' in a form without names") as refused:
        taken(path)
    assert re.search(r"^  --weights model +2 tensors", str(refused.value), re.MULTILINE)
    assert same(taken(path, weights="model")[0], RAW)


def test_the_state_of_a_class_of_averages_is_its_weights(tmp_path: Path) -> None:
    average = Plain().eval()
    average.load_state_dict(weights(AVERAGE))
    states = {
        "torch": AveragedModel(average).state_dict(),
        "ema-pytorch": {
            "initted": torch.tensor(True),
            "step": torch.tensor(3),
            **{f"online_model.{name}": tensor for name, tensor in weights(RAW).items()},
            **{f"ema_model.{name}": tensor for name, tensor in weights(AVERAGE).items()},
        },
        "one dict": {f"{prefix}.{name}": tensor for prefix, seed in (("model", RAW), ("ema_model", AVERAGE)) for name, tensor in weights(seed).items()},
        "LitEma": {**weights(AVERAGE), "decay": torch.tensor(0.999), "num_updates": torch.tensor(5)},
    }
    (tmp_path / "config.json").write_text(json.dumps({"config": {"sample_shape": SHAPE}}))
    for state in states.values():
        path = save(tmp_path, {"model": weights(RAW), "ema": state})
        model = build_model(load(path, config=tmp_path / "config.json", factory="own_networks:plain"))
        found: dict[str, Tensor] = {name.rpartition("network.")[2]: tensor for name, tensor in model.step.named_parameters()}
        assert same(found, AVERAGE)


def test_a_set_is_chosen_by_its_dotted_key(tmp_path: Path) -> None:
    path = save(tmp_path, {"ema": weights(1), "averages": {"slow": weights(2), "fast": weights(3)}})
    assert same(taken(path, weights="averages.fast")[0], 3)


def test_two_names_of_one_set_are_two_sets(tmp_path: Path) -> None:
    state = weights(AVERAGE)
    found, said = taken(save(tmp_path, {"model": state, "ema": state}))
    assert same(found, AVERAGE)
    assert "under 'ema', one of 2 sets" in said[0]


def test_states_of_optimizers_and_of_random_numbers_are_no_weights(tmp_path: Path) -> None:
    scores = {"callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_k_models": {"a.ckpt": torch.tensor(0.1)}}}}
    found, said = taken(save(tmp_path, {**training_state(net=weights(RAW)), **scores}))
    assert same(found, RAW)
    assert said == ["using the tensors under 'net'"]


@pytest.mark.parametrize("key", ["state_dict", "weights", None])
def test_the_key_of_the_only_set_is_recorded(key: str | None, tmp_path: Path) -> None:
    path = save(tmp_path, weights(RAW) if key is None else {key: weights(RAW)})
    options = Options(config=path.parent / "config.json", factory="own_networks:plain", verify=False)
    assert plan(path, options=options).source.weights == key


def test_a_manifest_without_a_key_stays_as_it_was() -> None:
    source = {"file": "a.pt", "sha256": "b"}
    assert msgspec.convert(source, Source).weights is None
    assert msgspec.to_builtins(Source(file="a.pt", sha256="b")) == source


# ----------------------------------------------------------------------------
# Unknown keys, files with a single set, and files without a config.


def written(name: str, make: Callable[[Path], object], **options: object) -> Any:
    return pytest.param(name, make, options, id=name)


def exported_program(path: Path) -> None:
    batch = torch.export.Dim("batch", max=64)
    torch.export.save(torch.export.export(network(RAW), (torch.randn(2, *SHAPE), torch.rand(2)), dynamic_shapes=({0: batch}, {0: batch})), path)


def diffusers_folder(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text('{"_class_name": "UNet2DModel"}')


def safetensors(path: Path) -> None:
    from safetensors.torch import save_file

    save_file(weights(RAW), path)


@pytest.mark.parametrize(
    ("name", "make", "options"),
    [
        written("run.pt", lambda path: torch.save(weights(RAW), path), config="config.json", factory="own_networks:plain"),
        written("run.safetensors", safetensors, config="config.json", factory="own_networks:plain"),
        written("run.pt2", exported_program, config="config.json"),
        written("native.pt", lambda path: torch.save({"format": "scm-checkpoint", "version": 1}, path)),
        written("whole.pt", lambda path: torch.save(network(RAW), path), config="config.json", trust=True),
        written("folder", diffusers_folder),
    ],
)
def test_a_file_without_a_choice_says_so(name: str, make: Callable[[Path], object], options: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps(HEADER))
    with pytest.raises(InvalidArgumentError, match=rf"{name}' .*leave out (the )?weights"):
        export(name, "out.scm", weights="ema", **options)
    assert not (tmp_path / "out.scm").exists()


@pytest.mark.parametrize("key", ["emma", "ema.conv", "", "epoch", "opt", "model.", "\x1b[2J"])
def test_an_unknown_key_lists_those_there_are(key: str, tmp_path: Path) -> None:
    path = save(tmp_path, training_state(model=weights(RAW), ema=weights(AVERAGE)))
    with pytest.raises(InvalidArgumentError) as refused:
        taken(path, weights=key)
    message = str(refused.value)
    assert f"weights must be the key of one of the sets of weights in '{path}', got {key!r}" in message
    assert re.search(r"^  --weights ema +2 tensors, 84 parameters$", message, re.MULTILINE)
    assert ("did you mean 'ema'?" in message) == (key in ("emma", "ema.conv"))
    assert "\x1b" not in message


def test_strange_keys_are_shown_as_they_can_be_given(tmp_path: Path) -> None:
    path = save(tmp_path, {"a b": weights(1), "\x1b[2J\ud800": weights(2), 7: weights(3)})
    with pytest.raises(CheckpointError) as refused:
        taken(path)
    listed = re.findall(r"^  --weights ('[^']*'|\S+) +2 tensors", str(refused.value), re.MULTILINE)
    assert listed == ["'a b'", r"'\x1b[2J\ud800'", "7"]
    for seed, key in enumerate(listed, 1):
        assert same(taken(path, weights=key.strip("'"))[0], seed)


def test_the_key_of_the_set_that_is_used_is_escaped_once(tmp_path: Path) -> None:
    _, said = taken(save(tmp_path, {"重み\x1b": weights(1), "epoch": 3}))
    assert said == [r"using the tensors under '重み\x1b'"]


def test_a_crowd_of_sets_is_cut_short(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as refused:
        taken(save(tmp_path, {f"expert{n}": weights(n) for n in range(25)}))
    assert str(refused.value).count("\n") < 30
    assert "and 5 more" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("run.pt", lambda path: torch.save(weights(RAW), path)),
        ("training.pt", lambda path: torch.save(training_state(model=weights(RAW), ema=weights(AVERAGE)), path)),
        ("run.safetensors", safetensors),
        ("run.pt2", exported_program),
    ],
)
def test_the_config_that_an_error_prints_exports(name: str, make: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / name)
    _, error = scm_export(name, code=1)
    assert "--config FILE.toml" in error
    assert ("--factory package.module:function" in error) == (name != "run.pt2")
    assert "docs/checkpoint-format.md" in error
    start = error.index('family = "module"')
    block = error[start:]
    (tmp_path / "model.toml").write_text(block)
    header = read_header(tmp_path / "model.toml")
    assert header.config == {"sample_shape": [3, 32, 32]}
    for choice in ("trigflow", "trigflow-negated", "edm", "flow", "x0", "class_labels", "[[conditioning]]"):
        assert choice in block
    (tmp_path / "model.toml").write_text(re.sub(r"^# (?=\[\[|\w+ = )", "", block, flags=re.MULTILINE))
    assert [(item.name, item.kind, item.num_classes) for item in read_header(tmp_path / "model.toml").conditioning] == [("class_labels", "class", 10)]

    (tmp_path / "model.toml").write_text(block)
    factory = () if name == "run.pt2" else ("--factory", "own_networks:plain")
    if name not in ("run.pt", "run.pt2"):  # the others differ only in how their weights are found
        scm_export(name, "--config", "model.toml", *factory, "--dry-run")
        return
    scm_export(name, "-o", "out.scm", "--config", "model.toml", *factory, "--no-verify", "--steps", "")
    with Generator("out.scm") as generate:
        assert generate(seed=1, num_inference_steps=1).array.shape == (1, 32, 32, 3)


def test_the_config_names_the_inputs_of_a_program(tmp_path: Path) -> None:
    class Conditioned(nn.Module):
        def forward(self, x: Tensor, level: Tensor, guidance: Tensor, y: Tensor) -> Tensor:
            return x * (level + guidance + y)[:, None, None, None]

    batch = torch.export.Dim("batch", max=64)
    inputs = (torch.randn(2, *SHAPE), torch.rand(2), torch.rand(2), torch.rand(2))
    torch.export.save(torch.export.export(Conditioned(), inputs, dynamic_shapes=({0: batch},) * 4), tmp_path / "net.pt2")
    with pytest.raises(CheckpointError) as refused:
        load(tmp_path / "net.pt2")
    assert re.findall(r'^# name = "(\w+)"', str(refused.value), re.MULTILINE) == ["guidance", "y"]


def test_a_factory_alone_asks_for_the_config_and_no_more(tmp_path: Path) -> None:
    with pytest.raises(ScmError, match=r"give .*--config FILE\.toml") as refused:
        load(save(tmp_path, weights(RAW)), factory="own_networks:plain")
    assert "--factory package" not in str(refused.value)


def test_the_documents_describe_the_choice() -> None:
    for document in ("docs/exporting.md", "docs/checkpoint-format.md"):
        assert "--weights" in (ROOT / document).read_text("utf-8")
