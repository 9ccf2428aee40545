"""The family ``module``: a user-defined network in every supported format, compared with the network itself in eager PyTorch."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from both_ways import check_both_ways
from own_networks import CLASSES, SHAPE, TOKENS, FromDiffusers, OwnNetwork, Plain, Sensitive
from scm_export import export
from scm_export.checkpoints import Checkpoint, ConditioningSpec, SamplerSpec, load, load_checkpoint, save_checkpoint
from scm_export.errors import VerificationError
from scm_export.families import build_model, find_family
from scm_export.families.family import BuildOptions
from scm_export.ops import philox_normal
from scm_runtime import Generator

AnyModule = TypeVar("AnyModule", bound=nn.Module)

SIGMA_DATA = 0.5
TIMES = {"1": (1.5, 0.0), "2": (1.5, 0.9, 0.0)}
NAMES = ("ant", "bee", "cat", "dog", "eel")

CONFIG = f"""
family = "module"
licence = "MIT"
label_names = {json.dumps(NAMES)}

[config]
sample_shape = [3, 10, 14]
keep_fp32 = ["time_embed"]

[sampler]
parametrisation = "trigflow"
sigma_data = {SIGMA_DATA}
times = {{ 1 = [1.5, 0], 2 = [1.5, 0.9, 0] }}

[[conditioning]]
name = "class_labels"
kind = "class"
num_classes = {CLASSES}

[[conditioning]]
name = "guidance"
kind = "scalar"
default = 4.5

[[conditioning]]
name = "text"
kind = "embedding"
shape = ["tokens", {TOKENS}]

[[conditioning]]
name = "text_mask"
kind = "mask"
shape = ["tokens"]
"""


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """The original network."""
    return randomized(OwnNetwork())


def randomized(network: AnyModule) -> AnyModule:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in network.parameters():
            parameter.data = torch.randn_like(parameter) / math.sqrt(max(parameter[0].numel(), 2))
    return network.eval().requires_grad_(False)


def conditioning(n: int, tokens: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return {
        "class_labels": torch.arange(n) % CLASSES,
        "guidance": torch.linspace(1, 4, n),
        "text": torch.randn(n, tokens, TOKENS, generator=generator),
        "text_mask": (torch.arange(tokens) <= torch.arange(n)[:, None]).long(),
    }


def write_factory(network: nn.Module, path: Path) -> None:
    torch.save(network.state_dict(), path)


def write_exported(network: nn.Module, path: Path) -> None:
    batch, tokens = torch.export.Dim("batch", max=1024), torch.export.Dim("tokens", max=1024)
    inputs = {"x": torch.randn(2, *SHAPE), "level": torch.rand(2), **conditioning(2)}
    shapes = {name: {0: batch} for name in inputs} | {name: {0: batch, 1: tokens} for name in ("text", "text_mask")}
    torch.export.save(torch.export.export(network, (), inputs, dynamic_shapes=shapes), path)


@contextmanager
def deprecated() -> Iterator[None]:
    """Ignore that TorchScript is deprecated in torch 2.13: such files are still in use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def write_scripted(network: nn.Module, path: Path) -> None:
    with deprecated():
        torch.jit.script(network).save(path)


def write_traced(network: nn.Module, path: Path) -> None:
    with deprecated():
        torch.jit.trace(network, (torch.randn(2, *SHAPE), torch.rand(2), *conditioning(2).values())).save(path)


def write_pickled(network: nn.Module, path: Path) -> None:
    torch.save(copy.deepcopy(network), path)


FORMS: dict[str, tuple[str, Callable[[nn.Module, Path], None], dict[str, Any]]] = {
    "factory": ("weights.pt", write_factory, {"factory": "own_networks:own"}),
    "torch.export": ("network.pt2", write_exported, {}),
    "torch.export, trusted": ("network.pt2", write_exported, {"trust": True}),
    "scripted": ("network.pt", write_scripted, {"trust": True}),
    "traced": ("network.pt", write_traced, {"trust": True}),
    "pickled": ("network.pt", write_pickled, {"trust": True}),
}


@pytest.fixture(params=FORMS)
def written(request: pytest.FixtureRequest, network: nn.Module, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """Write a file in one format; return the keywords for reading it."""
    name, write, options = FORMS[request.param]
    write(network, tmp_path / name)
    (tmp_path / "config.toml").write_text(CONFIG)
    return tmp_path / name, {"config": tmp_path / "config.toml", **options}


def eager_samples(network: nn.Module, seeds: list[int], times: tuple[float, ...], given: Mapping[str, Tensor]) -> Tensor:
    """Multistep consistency sampling with the original network, as in the sCM paper."""
    noise = [philox_normal(torch.tensor(seeds), draw, SHAPE) for draw in range(len(times))]
    x = SIGMA_DATA * noise[0]
    for k, (t, t_next) in enumerate(pairwise(times)):
        F = network(x / SIGMA_DATA, torch.full((len(x),), t), **given)
        x = math.cos(t_next) * (math.cos(t) * x - math.sin(t) * SIGMA_DATA * F) + math.sin(t_next) * SIGMA_DATA * noise[k + 1]
    return x


def test_every_form_samples_as_the_original(written: tuple[Path, dict[str, Any]], network: nn.Module, tmp_path: Path) -> None:
    path, options = written
    bundle = export(path, tmp_path / "out.scm", steps=(), verify=False, **options)
    assert (bundle.manifest.family, bundle.manifest.licence) == ("module", "MIT")
    assert bundle.manifest.parameters == sum(parameter.numel() for parameter in network.parameters())
    with Generator(bundle.path) as generate:
        for n in (1, 2, 3, 5):
            for steps, times in TIMES.items():
                given, seeds = conditioning(n, tokens=3 + 4 * n), list(range(n))
                arrays = {name: value.numpy() for name, value in given.items()}
                x = generate(seed=seeds, num_inference_steps=int(steps), output_type="latent", conditioning=arrays).array
                np.testing.assert_allclose(x, eager_samples(network, seeds, times, given), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("form", "dtype"), [("factory", "fp16"), ("torch.export", "bf16"), ("scripted", "fp16")])
def test_half_precision_is_verified_and_close(form: str, dtype: Any, network: nn.Module, tmp_path: Path) -> None:
    name, write, options = FORMS[form]
    write(network, tmp_path / name)
    (tmp_path / "config.toml").write_text(CONFIG)
    manifest = export(tmp_path / name, tmp_path / "out.scm", config=tmp_path / "config.toml", dtype=dtype, steps=(2,), **options).manifest
    assert manifest.verification is not None
    cases = [case for case in manifest.verification.cases if case.dtype == dtype]
    assert {case.batch_size for case in cases} >= {1, 3}
    assert all(case.psnr is None or case.psnr >= 40 for case in cases)
    check_both_ways(tmp_path / "out.scm")


def test_a_named_module_computes_in_float32(tmp_path: Path) -> None:
    network = randomized(Sensitive())
    network.time_embed.angles.weight.data.fill_(1.0)  # the same in any dtype: only the other factor matters here
    torch.save(network.state_dict(), tmp_path / "weights.pt")

    def worst_psnr(keep_fp32: list[str]) -> float:
        (tmp_path / "config.json").write_text(json.dumps({"config": {"sample_shape": SHAPE, "keep_fp32": keep_fp32}}))
        try:
            options: dict[str, Any] = {"factory": "own_networks:sensitive", "dtype": "bf16", "steps": (), "force": True}
            verification = export(tmp_path / "weights.pt", tmp_path / "out.scm", config=tmp_path / "config.json", **options).manifest.verification
        except VerificationError as error:
            verification = error.report
        assert verification is not None
        return min(math.inf if case.psnr is None else case.psnr for case in verification.cases if case.dtype == "bf16")

    assert worst_psnr(["time_*"]) > 45
    assert worst_psnr([]) < 35


def test_a_module_that_a_program_was_made_of_computes_in_float32(tmp_path: Path) -> None:
    network = randomized(Sensitive())
    batch = torch.export.Dim("batch", max=1024)
    program = torch.export.export(network.eval(), (torch.randn(2, *SHAPE), torch.rand(2)), dynamic_shapes=({0: batch}, {0: batch}))
    torch.export.save(program, tmp_path / "network.pt2")

    def worst_error(keep_fp32: list[str]) -> float:
        (tmp_path / "config.json").write_text(json.dumps({"config": {"sample_shape": SHAPE, "keep_fp32": keep_fp32}}))
        model = build_model(load(tmp_path / "network.pt2", config=tmp_path / "config.json"))
        exact = stepped(model)
        model.compute_in("bf16")
        return float((stepped(model) - exact).abs().max())

    assert worst_error(["time_embed"]) < worst_error([]) / 3


def test_a_network_of_diffusers_is_sampled_in_any_batch(tmp_path: Path) -> None:
    shape, network = (3, 8, 16), randomized(FromDiffusers())
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "config.json").write_text(json.dumps({"config": {"sample_shape": shape}, "sampler": {"parametrisation": "trigflow-negated"}}))
    options: dict[str, Any] = {"factory": "own_networks:from_diffusers", "steps": (), "verify": False}
    bundle = export(tmp_path / "weights.pt", tmp_path / "out.scm", config=tmp_path / "config.json", **options)
    with Generator(bundle.path) as generate:
        for n in (1, 3):
            x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))
            found = generate(latents=x.numpy(), timesteps=[1.2], output_type="latent").array
            F = -network(x, torch.full((n,), 1.2)).sample  # x is already divided by sigma_d
            np.testing.assert_allclose(found, SIGMA_DATA * (math.cos(1.2) * x - math.sin(1.2) * F), rtol=0, atol=1e-4)


# ----------------------------------------------------------------------------
# Configs and forms of networks. Nothing is exported.


@pytest.fixture
def plain(tmp_path: Path) -> Callable[..., Any]:
    """Return a function that builds the model of a small network from saved weights, keywords of ``load``, header fields and options."""

    def build(weights: object = None, header: Mapping[str, Any] | None = None, options: BuildOptions | None = None, **keywords: Any) -> Any:
        torch.save(randomized(Plain()).state_dict() if weights is None else weights, tmp_path / "weights.pt")
        (tmp_path / "config.json").write_text(json.dumps({"config": {"sample_shape": SHAPE}, **(header or {})}))
        loaded = load(tmp_path / "weights.pt", config=tmp_path / "config.json", factory="own_networks:plain", **keywords)
        return build_model(loaded, options)

    return build


def stepped(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, *SHAPE, generator=generator), torch.tensor([1.2, 0.4])
    y: Tensor = model.step(x, t, torch.zeros(2), x, {})
    return y


def expected_step(sign: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, *SHAPE, generator=generator), torch.tensor([1.2, 0.4])
    F: Any = sign * randomized(Plain())(x / SIGMA_DATA, t)
    y: Tensor = t.cos()[:, None, None, None] * x - t.sin()[:, None, None, None] * SIGMA_DATA * F
    return y


@pytest.mark.parametrize("how", ["tensor", "tuple", "dict", "nested"])
def test_the_first_of_what_a_network_returns_counts(plain: Callable[..., Any], how: str) -> None:
    model = plain(header={"config": {"sample_shape": SHAPE, "arguments": {"how": how}}})
    torch.testing.assert_close(stepped(model), expected_step(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_what_wrappers_put_before_names_is_taken_off(plain: Callable[..., Any], prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    weights = {f"{prefix}{name}": tensor.half() for name, tensor in randomized(Plain()).state_dict().items()}
    torch.testing.assert_close(stepped(plain(weights)), expected_step(), rtol=0, atol=2e-2)
    assert f"removed the prefix {prefix!r}" in caplog.text


@pytest.mark.parametrize("key", ["state_dict", "ema", "model"])
def test_the_only_tensors_of_a_training_state_are_taken(plain: Callable[..., Any], key: str) -> None:
    said: list[str] = []
    optimizer = {"exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    model = plain({"epoch": 3, key: randomized(Plain()).state_dict(), "optimizer": optimizer}, progress=said.append)
    torch.testing.assert_close(stepped(model), expected_step(), rtol=0, atol=1e-6)
    assert said == [f"using the tensors under {key!r}"]


def test_a_parametrisation_given_goes_before_the_configs(plain: Callable[..., Any]) -> None:
    model = plain(header={"sampler": {"parametrisation": "flow"}}, parametrisation="trigflow-negated")
    torch.testing.assert_close(stepped(model), expected_step(-1.0), rtol=0, atol=1e-6)


def test_the_factory_is_looked_for_in_the_current_folder(plain: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in_the_current_folder.py").write_text("from own_networks import Plain as make\n")
    monkeypatch.chdir(tmp_path)
    torch.save(randomized(Plain()).state_dict(), "weights.pt")
    Path("config.json").write_text(json.dumps({"config": {"sample_shape": SHAPE}}))
    model = build_model(load("weights.pt", config="config.json", factory="in_the_current_folder:make"))
    torch.testing.assert_close(stepped(model), expected_step(), rtol=0, atol=1e-6)


def test_three_channels_are_pixels_and_more_need_a_decoder(plain: Callable[..., Any]) -> None:
    sampler = {"pixel_scale": 100.0, "pixel_offset": 120.0}
    assert plain(header={"sampler": sampler}).decode(torch.full((1, *SHAPE), 0.5)).unique().tolist() == [170]
    assert plain(options=BuildOptions(latents=True)).output.kind == "latent"


def test_a_scm_checkpoint_may_be_of_an_own_network(tmp_path: Path, network: nn.Module) -> None:
    items = (
        ConditioningSpec(name="class_labels", kind="class", num_classes=CLASSES, label_names=NAMES),
        ConditioningSpec(name="guidance", kind="scalar", default=1.0),
        ConditioningSpec(name="text", kind="embedding", shape=("tokens", TOKENS)),
        ConditioningSpec(name="text_mask", kind="mask", shape=("tokens",)),
    )
    for ending in (".pt", ".safetensors"):
        path = tmp_path / f"own{ending}"
        checkpoint = Checkpoint(
            family="module", config={"sample_shape": SHAPE}, sampler=SamplerSpec(solver="ddim"), conditioning=items, weights=network.state_dict()
        )
        save_checkpoint(checkpoint, path)
        loaded = load(path, factory="own_networks:own")
        assert find_family(loaded) == "module"
        model = build_model(loaded)
        assert [(item.name, item.dtype, item.shape) for item in model.conditioning][2:] == [
            ("text", "float32", ("tokens", TOKENS)),
            ("text_mask", "int64", ("tokens",)),
        ]
        assert model.conditioning[0].label_names == NAMES


def test_bare_edm2_weights_are_the_checkpoint_that_a_config_makes_of_them(tiny_checkpoint: Path, tmp_path: Path) -> None:
    whole = load_checkpoint(tiny_checkpoint)
    torch.save({f"module.{name}": tensor for name, tensor in whole.weights.items()}, tmp_path / "ema.pth", _use_new_zipfile_serialization=False)
    header = {"family": "edm2", "config": whole.config, "label_names": whole.label_names}
    (tmp_path / "config.json").write_text(json.dumps(header))
    original = build_model(load(tiny_checkpoint))
    model = build_model(load(tmp_path / "ema.pth", config=tmp_path / "config.json"))
    x, t = torch.randn(2, *model.sample_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([1.2, 0.4])
    labels = {"class_labels": torch.tensor([1, 3])}
    with torch.no_grad():
        torch.testing.assert_close(model.step(x, t, 0 * t, x, labels), original.step(x, t, 0 * t, x, labels), rtol=0, atol=0)
    assert model.conditioning == original.conditioning
