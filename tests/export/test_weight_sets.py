"""Training checkpoints with several sets of weights: which one is exported, what is said of it, and what lies beside them."""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import re
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from own_networks import SHAPE, Plain
from scm_export import cli, export
from scm_export.checkpoints import Program, load
from scm_export.checkpoints.header import read_header
from scm_export.exporter import Options, plan
from scm_export.ops import philox_normal
from scm_runtime import Generator
from scm_runtime.bundle import Source, read_manifest
from scm_runtime.cli import main as scm_runtime
from scm_runtime.errors import CheckpointError, InvalidArgumentError, ScmError
from support import ROOT, tree

SIGMA_DATA, T = 0.5, 1.2
HEADER = {"config": {"sample_shape": SHAPE}, "sampler": {"sigma_data": SIGMA_DATA, "times": {"1": [T, 0]}}}


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Plain().eval().requires_grad_(False)


def weights(seed: int) -> dict[str, Tensor]:
    return network(seed).state_dict()


RAW, AVERAGE = 1, 2  # seeds


def training_state(**sets: object) -> dict[str, object]:
    """What training scripts save: the sets of weights, and everything else."""
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


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint, and the config that describes its network."""

    def write(content: object, name: str = "run.pt") -> Path:
        torch.save(content, tmp_path / name)
        (tmp_path / "config.json").write_text(json.dumps(HEADER))
        return tmp_path / name

    return write


def taken(path: Path, **options: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The weights that are read, and what is said."""
    said: list[str] = []
    program = load(path, config=path.parent / "config.json", factory="own_networks:plain", progress=said.append, **options)
    assert isinstance(program, Program)
    assert program.weights is not None
    return program.weights, said


def same(found: dict[str, Tensor], seed: int) -> bool:
    expected = weights(seed)
    return found.keys() == expected.keys() and all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def scm_export(*arguments: object, code: int = 0) -> tuple[str, str]:
    result = CliRunner(catch_exceptions=False).invoke(cli.main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def eager_pixels(seed: int, seeds: list[int]) -> np.ndarray[Any, Any]:
    """One step of a consistency model, as its paper writes it."""
    x = SIGMA_DATA * philox_normal(torch.tensor(seeds), 0, SHAPE)
    F: Any = network(seed)(x / SIGMA_DATA, torch.full((len(seeds),), T))
    data = math.cos(T) * x - math.sin(T) * SIGMA_DATA * F
    return np.asarray((data * 127.5 + 127.5).round().clamp(0, 255).permute(0, 2, 3, 1))


def test_a_training_checkpoint_is_exported_from_its_moving_average(save: Callable[..., Path], tmp_path: Path) -> None:
    args = argparse.Namespace(lr=np.float64(1e-4), out=Path("runs/1"), betas=np.array([0.9, 0.99]))
    path = save(training_state(model=weights(RAW), ema=weights(AVERAGE), args=args))
    config = ("--config", tmp_path / "config.json", "--factory", "own_networks:plain")
    shown, said = scm_export(path, "-o", tmp_path / "out.scm", *config)
    assert "taking the moving average under 'ema', one of 2 sets of weights" in said
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
    scm_export(path, "-o", tmp_path / "raw.scm", *config, "--weights", "model", "--no-verify", "--steps", "")
    assert read_manifest(tmp_path / "raw.scm").source.weights == "model"
    with Generator(tmp_path / "raw.scm") as generate:
        assert np.abs(generate(seed=seeds, num_inference_steps=1).array.astype(int) - eager_pixels(RAW, seeds)).max() <= 1


@pytest.mark.parametrize(
    "key",
    [
        *("ema", "EMA", "ema_model", "model_ema", "model-ema", "ema_state_dict", "state_dict_ema", "net_ema", "netEMA", "EMAModel", "ema_0.9999", "averaged"),
        *("average_model", "shadow_params", "swa_model", "ema.shadow", "ema.state_dict", "state.ema", "callbacks.EMACallback.ema_state_dict"),
    ],
)
def test_the_only_moving_average_is_taken(key: str, save: Callable[..., Path]) -> None:
    content: Any = weights(AVERAGE)
    for part in reversed(["ema_0.9999"] if key == "ema_0.9999" else key.split(".")):
        content = {part: content, "decay": 0.999}
    content.pop("decay")
    found, said = taken(save(training_state(model=weights(RAW), **content)))
    assert same(found, AVERAGE)
    assert f"taking the moving average under {key!r}, one of 2 sets of weights (--weights KEY takes another)" in said


@pytest.mark.parametrize("keys", [("model", "schema"), ("model", "discriminator"), ("model", "non_ema"), ("generator", "cinema")])
def test_without_a_moving_average_nothing_is_guessed(keys: tuple[str, str], save: Callable[..., Path]) -> None:
    path = save(training_state(**{key: weights(seed) for seed, key in enumerate(keys)}))
    with pytest.raises(CheckpointError) as refused:
        taken(path)
    message = str(refused.value)
    assert "run.pt' holds 2 sets of weights, and none of them is named as a moving average" in message
    for key in keys:
        assert re.search(rf"^  --weights {key} +2 tensors, 84 parameters$", message, re.MULTILINE)
    assert "torch.save" not in message
    assert same(taken(path, weights=keys[1])[0], 1)


def test_of_several_moving_averages_none_is_guessed(save: Callable[..., Path]) -> None:
    path = save(training_state(model=weights(RAW), **{"ema_0.999": weights(2), "ema_0.9999": weights(3)}))
    with pytest.raises(CheckpointError, match=r"holds 2 moving averages among its 3 sets of weights") as refused:
        taken(path)
    assert re.search(r"^  --weights ema_0\.999 +2 tensors, 84 parameters$", str(refused.value), re.MULTILINE)
    found, said = taken(path, weights="ema_0.9999")
    assert same(found, 3)
    assert said == ["taking the tensors under 'ema_0.9999'"]


def test_a_set_is_chosen_by_its_dotted_key(save: Callable[..., Path]) -> None:
    path = save({"ema": weights(1), "averages": {"slow": weights(2), "fast": weights(3)}})
    assert same(taken(path, weights="averages.fast")[0], 3)


def test_two_names_of_one_set_are_two_sets(save: Callable[..., Path]) -> None:
    state = weights(AVERAGE)
    found, said = taken(save({"model": state, "ema": state}))
    assert same(found, AVERAGE)
    assert "under 'ema', one of 2 sets" in said[0]


def test_states_of_optimizers_and_of_random_numbers_are_no_weights(save: Callable[..., Path]) -> None:
    scores = {"callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_k_models": {"a.ckpt": torch.tensor(0.1)}}}}
    found, said = taken(save({**training_state(net=weights(RAW)), **scores}))
    assert same(found, RAW)
    assert said == ["taking the tensors under 'net'"]


@pytest.mark.parametrize("key", ["state_dict", "weights", None])
def test_the_key_of_the_only_set_is_recorded(key: str | None, save: Callable[..., Path]) -> None:
    path = save(weights(RAW) if key is None else {key: weights(RAW)})
    options = Options(config=path.parent / "config.json", factory="own_networks:plain", verify=False)
    assert plan(path, options=options).source.weights == key


def test_a_manifest_without_a_key_stays_as_it_was() -> None:
    source = {"file": "a.pt", "sha256": "b"}
    assert msgspec.convert(source, Source).weights is None
    assert msgspec.to_builtins(Source(file="a.pt", sha256="b")) == source


# ----------------------------------------------------------------------------
# What lies beside the weights.


@pytest.mark.parametrize(
    "beside",
    [
        pytest.param(argparse.Namespace(lr=0.1, inner=argparse.Namespace(data=[Path("a"), None])), id="Namespace"),
        *(pytest.param(scalar(3), id=scalar.__name__) for scalar in (np.float64, np.float32, np.float16, np.int64, np.int32, np.uint8, np.bool_, np.str_)),
        *(pytest.param(np.ones(n, kind), id=f"array {kind} {n}") for n in (0, 3) for kind in ("float64", "float32", "int64", "uint32", "bool", "complex64")),
        pytest.param(np.ones((2, 3), order="F"), id="array in Fortran's order"),
        pytest.param(np.random.RandomState(0).get_state(), id="random state"),
        *(pytest.param(kind("a/b"), id=kind.__name__) for kind in (pathlib.Path, pathlib.PurePosixPath, pathlib.PureWindowsPath)),
        pytest.param(OrderedDict(a=1), id="OrderedDict"),
        pytest.param(defaultdict(list, a=[1]), id="defaultdict"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_a_training_run_saves_beside_the_weights_is_passed_over(beside: object, zipped: bool, tmp_path: Path) -> None:
    torch.save({"ema": weights(AVERAGE), "beside": beside}, tmp_path / "run.pt", _use_new_zipfile_serialization=zipped)
    (tmp_path / "config.json").write_text(json.dumps(HEADER))
    assert same(taken(tmp_path / "run.pt")[0], AVERAGE)


def test_a_set_of_weights_may_be_a_defaultdict(save: Callable[..., Path]) -> None:
    assert same(taken(save({"ema": defaultdict(dict, weights(AVERAGE)), "model": weights(RAW)}))[0], AVERAGE)


class Named(argparse.Namespace):
    """A class of the user's own."""


class Attack:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize(
    ("beside", "named"),
    [
        (lambda folder: Attack(os.mkdir, str(folder / "ran")), "posix.mkdir"),
        (lambda folder: argparse.Namespace(lr=Attack(os.mkdir, str(folder / "ran"))), "posix.mkdir"),
        (lambda folder: Attack(Path.mkdir, folder / "ran"), "getattr"),
        (lambda folder: np.array([Attack(os.mkdir, str(folder / "ran"))], dtype=object), "posix.mkdir"),
        (lambda folder: defaultdict(os.getcwd), "posix.getcwd"),
        (lambda folder: Named(lr=0.1), r"\S*test_weight_sets\.Named"),
    ],
)
def test_code_beside_the_weights_is_still_refused_by_name(beside: Callable[[Path], object], named: str, save: Callable[..., Path], tmp_path: Path) -> None:
    path = save({"ema": weights(AVERAGE), "beside": beside(tmp_path)})
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=rf"wants to run code \({named}\)"):
        taken(path)
    assert tree(tmp_path) == before


def raw_pickle(path: Path, state: object, *opcodes: bytes) -> None:
    """A checkpoint {"ema": weights, "beside": what the opcodes leave on the stack}."""
    torch.save({"ema": state, "beside": "HERE"}, path)
    rezip(path, lambda data: data.replace(text("HERE"), b"".join(opcodes)))


def rezip(path: Path, change: Callable[[bytes], bytes]) -> None:
    """The archive with another pickle."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


NAMESPACE, ORDERED = b"cargparse\nNamespace\n", b"ccollections\nOrderedDict\n"

HOSTILE: dict[str, tuple[tuple[bytes, ...], str | None]] = {
    # The opcodes, and what the message names; None: it is read, and nothing comes of it.
    "a shell under pathlib": ((b"cpathlib\nos.system\n", text("mkdir ran"), b"\x85R"), "pathlib.os.system"),
    "a method of a path": ((b"cpathlib\nPath.mkdir\n", text("ran"), b"\x85R"), "pathlib.Path.mkdir"),
    "a shell under argparse": ((b"cargparse\n_os.system\n", text("mkdir ran"), b"\x85R"), "argparse._os.system"),
    "a reader of files under NumPy": ((b"cnumpy\nfromfile\n", text("run.pt"), b"\x85R"), "numpy.fromfile"),
    "a path that is called": ((b"cpathlib\nPosixPath\n", text("ran"), b"\x85R)R"), ""),
    "the method of a namespace": ((NAMESPACE, b")\x81}", text("__class__"), b"cos\nsystem\nsb"), "os.system"),
    "a namespace's attributes": ((NAMESPACE, b")\x81}(", *(text(n) + ORDERED for n in ("__setstate__", "__class__", "items", "__dict__")), b"ub"), None),
    "a namespace's slots": ((NAMESPACE, b")\x81}}", text("__class__"), ORDERED, b"s\x86b"), None),
    "a class with attributes": ((NAMESPACE, b"}", text("__new__"), ORDERED, b"sb"), ""),
    "arguments of any kind": ((NAMESPACE, b"((lNI1\nt\x81"), ""),
    "arguments that it never takes": ((NAMESPACE, b"(", text("a"), b"N}t\x81"), None),
    "a state that is a number": ((NAMESPACE, b")\x81K\x01b"), None),
    "a dtype that is none": ((b"cnumpy\ndtype\n", text("no dtype"), b"N\x86R"), None),
    "an array of a terabyte": ((b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\n", b"\x8a\x06\0\0\0\0\0\x01\x85", text("b"), b"\x87R"), None),
    "an ordered dict whose methods are replaced": ((ORDERED, b")R}(", *(text(n) + NAMESPACE for n in ("items", "keys", "get", "values")), b"ub"), None),
    "namespaces in namespaces": ((*(1000 * (NAMESPACE + b")\x81}" + text("a"),)), b"N", *(1000 * (b"sb",))), None),
    "dicts in dicts": ((*(1000 * (b"}" + text("a"),)), b"N", *(1000 * (b"s",))), None),
    "tuples in tuples": ((b")", 100_000 * b"\x85"), None),
    "a dict in itself": ((b"}r\xff\0\0\0(", *(text(f"k{n}") + b"j\xff\0\0\0" for n in range(300)), b"u"), None),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_stands_beside_the_weights_is_inert(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opcodes, named = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    raw_pickle(tmp_path / "run.pt", weights(AVERAGE), *opcodes)
    (tmp_path / "config.json").write_text(json.dumps(HEADER))
    before = tree(tmp_path)
    if named is None:
        assert same(taken(tmp_path / "run.pt")[0], AVERAGE)
    else:
        with pytest.raises(CheckpointError, match=rf"wants to run code \({named}\)" if named else "is not a readable .pt file"):
            taken(tmp_path / "run.pt")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("method", ["items", "keys", "values", "get", "__getitem__", "_metadata"])
def test_a_file_cannot_replace_the_methods_of_the_weights(method: str, save: Callable[..., Path]) -> None:
    """The state that a pickle gives an OrderedDict becomes its attributes, which go before its methods."""
    state: Any = OrderedDict(weights(AVERAGE))
    outer: Any = OrderedDict(ema=state)
    for changed in (state, outer):
        setattr(changed, method.upper(), argparse.Namespace)  # which, called, is an object that is not what the method returns
    path = save(outer)
    rezip(path, lambda data: data.replace(text(method.upper()), text(method)))
    assert same(taken(path)[0], AVERAGE)
    with pytest.raises(CheckpointError, match="not how it is sampled"):
        load(path)


def test_attributes_that_a_file_gives_its_tensors_are_dropped(save: Callable[..., Path]) -> None:
    state = weights(AVERAGE)
    for name, tensor in state.items():
        state[name] = nn.Parameter(tensor)
        for method in ("to", "detach", "is_contiguous", "numel"):
            setattr(state[name], method, argparse.Namespace)
    found, _ = taken(save({"ema": state}))
    assert same(found, AVERAGE)
    assert all(type(tensor) is Tensor and not vars(tensor) for tensor in found.values())


# ----------------------------------------------------------------------------
# Keys that are not there, files without a choice, and files without a config.


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
def test_an_unknown_key_lists_those_there_are(key: str, save: Callable[..., Path]) -> None:
    path = save(training_state(model=weights(RAW), ema=weights(AVERAGE)))
    with pytest.raises(InvalidArgumentError) as refused:
        taken(path, weights=key)
    message = str(refused.value)
    assert f"weights must be the key of one of the sets of weights in '{path}', got {key!r}" in message
    assert re.search(r"^  --weights ema +2 tensors, 84 parameters$", message, re.MULTILINE)
    assert ("did you mean 'ema'?" in message) == (key in ("emma", "ema.conv"))
    assert "\x1b" not in message


def test_strange_keys_are_shown_as_they_can_be_given(save: Callable[..., Path]) -> None:
    path = save({"a b": weights(1), "\x1b[2J\ud800": weights(2), 7: weights(3)})
    with pytest.raises(CheckpointError) as refused:
        taken(path)
    listed = re.findall(r"^  --weights ('[^']*'|\S+) +2 tensors", str(refused.value), re.MULTILINE)
    assert listed == ["'a b'", r"'\x1b[2J\ud800'", "7"]
    for seed, key in enumerate(listed, 1):
        assert same(taken(path, weights=key.strip("'"))[0], seed)


def test_a_crowd_of_sets_is_cut_short(save: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError) as refused:
        taken(save({f"expert{n}": weights(n) for n in range(500)}))
    assert str(refused.value).count("\n") < 30
    assert "and 480 more" in str(refused.value)


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


def test_a_factory_alone_asks_for_the_config_and_no_more(save: Callable[..., Path]) -> None:
    with pytest.raises(ScmError, match=r"give .*--config FILE\.toml") as refused:
        load(save(weights(RAW)), factory="own_networks:plain")
    assert "--factory package" not in str(refused.value)


def test_the_documents_describe_the_choice() -> None:
    for document in ("README.md", "docs/checkpoint-format.md"):
        assert "--weights" in (ROOT / document).read_text("utf-8")
