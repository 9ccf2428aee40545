"""Checkpoint readers detect formats by contents, run no code from untrusted files, and report what is wrong with a file."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from own_networks import SHAPE, Block, Counts, Plain
from scm_export import export
from scm_export.checkpoints import Checkpoint, Program, load, load_checkpoint, save_checkpoint
from scm_export.checkpoints.header import read_header
from scm_export.checkpoints.operator_graph import OperatorGraph
from scm_export.checkpoints.torchscript import read_torchscript
from scm_export.errors import CheckpointError, CheckpointNotFoundError
from scm_runtime.errors import InvalidArgumentError, ScmError
from support import ROOT, tree

Made = tuple[Path, dict[str, Any]]
"""A checkpoint, and the keywords of ``export`` that it is exported with."""
Make = Callable[[Path], Made]

HEADER: dict[str, Any] = {"config": {"sample_shape": SHAPE}}
FACTORY = {"factory": "own_networks:plain"}


def save_exported(network: nn.Module, path: Path, dynamic: bool = True) -> None:
    batch = torch.export.Dim("batch", max=1024)
    shapes = ({0: batch}, {0: batch}) if dynamic else None
    torch.export.save(torch.export.export(network, (torch.randn(2, *SHAPE), torch.rand(2)), dynamic_shapes=shapes), path)


def test_torchscript_rounds_as_torch_does(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Counts()).save(str(tmp_path / "counts.ts"))
    network, original = read_torchscript(tmp_path / "counts.ts", trust=True)
    x, level = torch.rand(2, 3, 8, 11), torch.tensor([0.5, 1.0])
    torch.testing.assert_close(network(x, level), original(x, level))
    torch.testing.assert_close(network(x, level), Counts()(x, level))


# ----------------------------------------------------------------------------
# Detecting formats.


def test_a_file_is_known_by_what_is_in_it_not_by_its_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HEADER))
    bare = {name: tensor.clone() for name, tensor in Plain().state_dict().items()}
    save_checkpoint(load_checkpoint(tiny_checkpoint), tmp_path / "native.safetensors")
    (tmp_path / "native.safetensors").rename(tmp_path / "a")
    save_file(bare, tmp_path / "b")
    torch.save(bare, tmp_path / "c")
    torch.save(bare, tmp_path / "d", _use_new_zipfile_serialization=False)
    save_exported(Plain().eval(), tmp_path / "e.pt2")
    (tmp_path / "e.pt2").rename(tmp_path / "e")

    found = load(tmp_path / "a")
    assert isinstance(found, Checkpoint)
    assert found.family == "edm2"
    for name in "bcd":
        found = load(tmp_path / name, config=tmp_path / "config.json")
        assert isinstance(found, Checkpoint)
        assert (found.family, found.weights.keys()) == ("module", bare.keys())
    program = load(tmp_path / "e", config=tmp_path / "config.json")
    assert isinstance(program, Program)
    assert program.inputs == ("x", "level")


def test_a_program_is_read_with_its_buffers_its_constants_and_its_tied_weights(tmp_path: Path) -> None:
    class Tied(nn.Module):
        hidden: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 3, 3, padding=1)
            self.second = nn.Conv2d(3, 3, 3, padding=1)
            self.second.weight = self.first.weight
            self.norm = nn.BatchNorm2d(3)
            self.register_buffer("hidden", torch.randn(3, 1, 1), persistent=False)

        def forward(self, x: Tensor, level: Tensor) -> Tensor:
            high, low = torch.chunk(x, 2, dim=2)
            value, index = torch.cat([low, high], dim=2).max(dim=1, keepdim=True)  # an operator with two outputs
            x = torch.relu_(self.norm(self.second(self.first(x)))) + self.hidden + value * torch.tensor([1.0, -1.0, float("inf")])[:2].sum() + index
            x[:, 0] = 0.5  # torch.export keeps in-place operators
            return x * x.shape[0] + level.reshape(-1, 1, 1, 1)

    network = Tied().eval()
    network.norm.running_mean = torch.randn(3)
    save_exported(network, tmp_path / "net.pt2")
    (tmp_path / "config.json").write_text(json.dumps(HEADER))
    x, level = torch.randn(5, *SHAPE), torch.rand(5)
    with torch.no_grad():
        for trust in (False, True):
            program = load(tmp_path / "net.pt2", config=tmp_path / "config.json", trust=trust)
            assert isinstance(program, Program)
            assert isinstance(program.network, OperatorGraph)
            names = [program.network.original_names[name] for name, _ in program.network.named_parameters()]
            assert names == [name for name, _ in network.named_parameters()]
            torch.testing.assert_close(program.network(x, level), network(x, level), rtol=0, atol=0)


def test_the_documents_example_is_valid(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "checkpoint-format.md").read_text("utf-8")
    (example,) = re.findall(r"^```toml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    (tmp_path / "model.toml").write_text(example)
    header = read_header(tmp_path / "model.toml")
    assert (header.config["sample_shape"], header.sampler.parametrisation, header.conditioning[0].num_classes) == ([3, 32, 48], "edm", 10)


def test_labels_and_licences_may_have_any_spaces_and_emoji_and_a_licence_several_lines() -> None:
    labels = ["chat\u00a0noir", "\u91cd\u307f\u3000\u732b", "\U0001f468\u200d\U0001f469\u200d\U0001f467"]
    header = read_header({"config": {"sample_shape": SHAPE}, "label_names": labels, "licence": "MIT\r\n\n\u00a9\u00a02026\n\tAll of us\n"})
    assert list(header.label_names or ()) == labels


# ----------------------------------------------------------------------------
# Files that would run code.


class Evil:
    """Creates a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.mkdir, (self.target,)


def rezipped(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Rewrite an archive with changed contents."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, change(name, data))


def exported_with(
    change: Callable[[dict[str, Any]], object], file: str = "models/model.json", network: Callable[[], nn.Module] = Plain, **options: Any
) -> Make:
    """Copy a .pt2 file with one of its JSON files changed."""

    def make(folder: Path) -> Made:
        path = folder / "net.pt2"
        save_exported(network().eval(), path)

        def edit(name: str, data: bytes) -> bytes:
            if not name.endswith(file):
                return data
            raw = json.loads(data)
            change(raw)
            return json.dumps(raw).encode()

        rezipped(path, edit)
        return path, {**described(folder, HEADER), **options}

    return make


def node(raw: dict[str, Any]) -> Any:
    """Return the program's last operator."""
    return raw["graph_module"]["graph"]["nodes"][-1]


WEIGHTS = "data/weights/model_weights_config.json"


def described(folder: Path, header: dict[str, Any]) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(header))
    return {"config": folder / "config.json"}


def test_what_torch_would_run_of_a_program_is_not_even_read(tmp_path: Path) -> None:
    """torch.export.load evaluates sizes and guards, imports classes named by a pytree, and unpickles the sample inputs."""
    code = f"__import__('pathlib').Path({str(tmp_path / 'ran')!r}).mkdir()"

    def poison(raw: dict[str, Any]) -> None:
        for value in raw["graph_module"]["graph"]["tensor_values"].values():
            value["sizes"] = [{"as_expr": {"expr_str": code, "hint": {"as_int": 2}}} if "as_expr" in size else size for size in value["sizes"]]
        raw["guards_code"] = [code]
        raw["range_constraints"] = {code: {"min_val": 1, "max_val": 9}}
        for entry in raw["graph_module"]["module_call_graph"]:
            if entry["signature"]:
                entry["signature"]["in_spec"] = entry["signature"]["in_spec"].replace("builtins.tuple", "antigravity.tuple")

    path, options = exported_with(poison)(tmp_path)
    torch.save(Evil(tmp_path / "ran"), tmp_path / "evil.pt")
    evil = (tmp_path / "evil.pt").read_bytes()
    rezipped(path, lambda name, data: evil if "sample_inputs" in name else data)
    network = load(path, **options)
    assert isinstance(network, Program)
    assert network.network(torch.randn(3, *SHAPE), torch.rand(3)).shape == (3, *SHAPE)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(CheckpointError, match=r"cannot be loaded by torch\.export\.load"):
        load(path, trust=True, **options)
    assert (tmp_path / "ran").exists(), "the file is as hostile as the test says"


def scripted(folder: Path) -> Made:
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.script(Block(3)).save(folder / "net.pt")
    return folder / "net.pt", described(folder, HEADER)


def pickled(content: object, **options: Any) -> Make:
    def make(folder: Path) -> Made:
        torch.save(content, folder / "net.pt")
        return folder / "net.pt", {**described(folder, HEADER), **options}

    return make


def evil_state(folder: Path) -> Made:
    torch.save({"state_dict": Plain().state_dict(), "callbacks": Evil(folder / "ran")}, folder / "net.ckpt")
    return folder / "net.ckpt", {**described(folder, HEADER), **FACTORY}


def conditional() -> nn.Module:
    class Conditional(Plain):
        def forward(self, x: Tensor, level: Tensor) -> Tensor:
            y: Tensor = torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))
            return y

    return Conditional()


# ----------------------------------------------------------------------------
# Files that are damaged or would exhaust the memory.


def bomb(folder: Path) -> Made:
    with zipfile.ZipFile(folder / "net.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("net/data.pkl", b"\x80\x02}.")
        with archive.open("net/data/0", "w") as entry:
            for _ in range(300):
                entry.write(bytes(1 << 20))
    return folder / "net.pt", {}


def overlapping(folder: Path) -> Made:
    """Create an archive of many entries that share the same bytes: each size is valid, but their sum exceeds the file."""
    path, options = bare(folder)
    with zipfile.ZipFile(path, "a") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        archive.filelist += [largest] * 1000
        archive.comment = b"so that the directory is written again"
    return path, options


def compressed(folder: Path) -> Made:
    path, options = bare(folder)
    rezipped(path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    return path, options


def short_storage(folder: Path) -> Made:
    path, options = bare(folder)
    rezipped(path, lambda name, data: data[:8] if name.endswith("data/0") else data)
    return path, options


def truncated(make: Make) -> Make:
    def cut(folder: Path) -> Made:
        path, options = make(folder)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        return path, options

    return cut


def foreign_zip(folder: Path) -> Made:
    with zipfile.ZipFile(folder / "thesis.zip", "w") as archive:
        archive.writestr("thesis/chapter1.tex", "years of work")
    return folder / "thesis.zip", {}


def nan(folder: Path) -> Made:
    network = Plain().eval()
    network.conv.weight.data[1] = float("nan")
    save_exported(network, folder / "net.pt2")
    return folder / "net.pt2", described(folder, HEADER)


# ----------------------------------------------------------------------------
# Configs, factories, and programs that do not fit them.


def bare(folder: Path, header: dict[str, Any] | None = None, **options: Any) -> Made:
    torch.save(Plain().state_dict(), folder / "weights.pt")
    return folder / "weights.pt", {**described(folder, HEADER if header is None else header), **FACTORY, **options}


def header(change: dict[str, Any]) -> Make:
    return lambda folder: bare(folder, {**HEADER, **change})


def config(text: str, name: str = "config.toml") -> Make:
    def make(folder: Path) -> Made:
        (folder / name).write_text(text)
        return bare(folder, config=folder / name)

    return make


def factory(name: str, arguments: dict[str, Any] | None = None) -> Make:
    return lambda folder: bare(folder, {"config": {"sample_shape": SHAPE, "arguments": arguments or {}}}, factory=name)


def program(network: Callable[[], nn.Module] = Plain, dynamic: bool = True, train: bool = False, **change: Any) -> Make:
    def make(folder: Path) -> Made:
        save_exported(network().train(train), folder / "net.pt2", dynamic)
        options = change.pop("options", {})
        return folder / "net.pt2", {**described(folder, {**HEADER, **change}), **options}

    return make


def native(folder: Path, **options: Any) -> Made:
    torch.save({"format": "scm-checkpoint", "version": 1}, folder / "native.pt")
    return folder / "native.pt", options


def diffusers_folder(folder: Path) -> Made:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    return folder / "model", {**described(folder, HEADER), "parametrisation": "flow"}


class Dropping(Plain):
    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return nn.functional.dropout(self.conv(x), 0.1, self.training)


DOCUMENT = "docs/checkpoint-format.md"
TRUST = "--trust loads it anyway"
AGAIN = "Copy or save it again"

ROWS: list[tuple[str, Make, type[ScmError], str, str]] = [
    # Files that only trusted loading can open.
    ("TorchScript", scripted, CheckpointError, "is a TorchScript program", TRUST),
    ("a pickled module", pickled(Plain()), CheckpointError, "wants to run code (own_networks.Plain)", TRUST),
    ("code beside a state dict", evil_state, CheckpointError, "wants to run code (getattr", TRUST),
    ("os.system", exported_with(lambda raw: node(raw).update(target="torch.os.system")), CheckpointError, "the operator 'torch.os.system'", TRUST),
    ("eval", exported_with(lambda raw: node(raw).update(target="builtins.eval")), CheckpointError, "the operator 'builtins.eval'", TRUST),
    ("a dunder", exported_with(lambda raw: node(raw).update(target="torch.ops.aten.__class__")), CheckpointError, "operator 'torch.ops.aten.__cl", TRUST),
    ("reads a file", exported_with(lambda raw: node(raw).update(target="torch.ops.aten.from_file.default")), CheckpointError, "aten.from_file", TRUST),
    ("writes a file", exported_with(lambda raw: node(raw).update(target="torch.ops.aten.save.default")), CheckpointError, "aten.save", TRUST),
    ("a custom operator", exported_with(lambda raw: node(raw).update(target="torch.ops.mine.op.default")), CheckpointError, "torch.ops.mine.op", TRUST),
    ("a branch", exported_with(lambda raw: None, network=conditional), CheckpointError, "holds the operator 'torch.ops.higher_order.cond'", TRUST),
    ("a pickled weight", exported_with(lambda raw: raw["config"]["conv.bias"].update(use_pickle=True), WEIGHTS), CheckpointError, "'conv.bias'", TRUST),
    ("a newer format", exported_with(lambda raw: raw["schema_version"].update(major=9)), CheckpointError, "has version 9 of the format", TRUST),
    # Damage, and bombs.
    ("a zip bomb", bomb, CheckpointError, "refused as a zip bomb", "save it again"),
    ("overlapping entries", overlapping, CheckpointError, "refused as a zip bomb", "save it again"),
    ("compressed tensors", compressed, CheckpointError, "holds compressed tensors", "Save it again"),
    ("another zip", foreign_zip, CheckpointError, "it holds chapter1.tex", "torch.export.save"),
    ("a short storage", short_storage, CheckpointError, "shape and storage of a tensor disagree, 324 bytes required, 8 stored", AGAIN),
    ("a truncated program", truncated(program()), CheckpointError, "net.pt2' is not a readable .pt2 file: truncated", AGAIN),
    (
        "a shape beyond its storage",
        exported_with(lambda raw: raw["config"]["conv.bias"]["tensor_meta"].update(sizes=[{"as_int": 4}]), WEIGHTS),
        CheckpointError,
        "shape and storage of conv.bias disagree: shape [4]",
        "3 elements stored",
    ),
    (
        "strides beyond their storage",
        exported_with(lambda raw: raw["config"]["conv.bias"]["tensor_meta"].update(strides=[{"as_int": 2}]), WEIGHTS),
        CheckpointError,
        "shape and storage of conv.bias disagree: shape [3], strides [2]",
        "3 elements stored",
    ),
    (
        "65 dimensions",
        exported_with(lambda raw: raw["config"]["conv.bias"]["tensor_meta"].update(sizes=[{"as_int": 1}] * 65, strides=[{"as_int": 0}] * 65), WEIGHTS),
        CheckpointError,
        "conv.bias must have at most 64 dimensions, got 65",
        "Export it again",
    ),
    (
        "a negative stride",
        exported_with(lambda raw: raw["config"]["conv.bias"]["tensor_meta"].update(strides=[{"as_int": -1}]), WEIGHTS),
        CheckpointError,
        "shape and storage of conv.bias disagree",
        "strides [-1]",
    ),
    (
        "a missing value",
        exported_with(lambda raw: raw["graph_module"]["graph"].pop("nodes")),
        CheckpointError,
        "missing required field `nodes`",
        "Save it again",
    ),
    ("NaN in a program", nan, CheckpointError, "got NaN or infinity in conv.weight", "weights must be finite"),
    # Configs.
    ("no config", lambda folder: bare(folder, config=None), CheckpointError, "not how it is sampled", "--config FILE.toml"),
    ("program without config", program(options={"config": None}), CheckpointError, "not how it is sampled", DOCUMENT),
    ("missing config", lambda folder: bare(folder, config=folder / "no.toml"), CheckpointNotFoundError, "no.toml': No such file", DOCUMENT),
    ("another ending", config("", "config.yaml"), CheckpointError, "config.yaml'", "must end in .toml or .json"),
    ("not TOML", config("[config\nsample_shape = 3"), CheckpointError, "is not valid TOML", "line 1"),
    ("not JSON", config("{", "other.json"), CheckpointError, "is not valid JSON", "truncated"),
    ("an unknown key", header({"licences": "MIT"}), CheckpointError, "unknown field `licences`", "did you mean 'licence'?"),
    ("in the sampler", header({"sampler": {"parametrization": "edm"}}), CheckpointError, "`parametrization` in [sampler]", "did you mean 'parametrisation'?"),
    ("in the config", header({"config": {"sampleshape": SHAPE}}), CheckpointError, "unknown field `sampleshape`", "did you mean 'sample_shape'?"),
    (
        "in the conditioning",
        header({"conditioning": [{"name": "c", "kind": "class", "classes": 3}]}),
        CheckpointError,
        "`classes` in [conditioning]",
        "did you mean 'num_classes'?",
    ),
    ("like no known key", header({"sampler": {"qqq": 1}}), CheckpointError, "unknown field `qqq` in [sampler]", "known are parametrisation, solver"),
    ("no sample_shape", header({"config": {}}), CheckpointError, "missing required field `sample_shape`", DOCUMENT),
    ("a negative size", header({"config": {"sample_shape": [3, -1, 8]}}), CheckpointError, "Expected `int` >= 1", "sample_shape"),
    ("a wrong type", header({"sampler": {"sigma_data": "half"}}), CheckpointError, "Expected `float`, got `str`", "sampler.sigma_data"),
    (
        "a wrong choice",
        header({"sampler": {"parametrisation": "v"}}),
        CheckpointError,
        "must be one of trigflow, trigflow-negated, edm, flow, x0, got 'v'",
        "sampler.parametrisation",
    ),
    ("rising times", header({"sampler": {"times": {"1": [0, 1]}}}), CheckpointError, "got [0.0, 1.0] for 1 steps", "decreasing"),
    ("a class without classes", header({"conditioning": [{"name": "c", "kind": "class"}]}), CheckpointError, "of kind 'class'", "must give num_classes"),
    ("a name of the step's", header({"conditioning": [{"name": "x", "kind": "scalar"}]}), CheckpointError, "got 'x'", "must have other names"),
    ("no name", header({"conditioning": [{"name": "My C", "kind": "scalar"}]}), CheckpointError, "got 'My C'", "lower-case letters"),
    ("two of a name", header({"conditioning": [{"name": "c", "kind": "scalar"}] * 2}), CheckpointError, "got c, c", "must have different names"),
    ("a label of two lines", header({"label_names": ["a\nb"]}), CheckpointError, r"got 'a\nb'", "label_names must have at most 1000 characters and no control"),
    ("a label that reorders", header({"label_names": ["a\u202eb"]}), CheckpointError, r"got 'a\u202eb'", "no control characters or line breaks"),
    ("a licence with an escape", header({"licence": "MIT\n\x1b[2J"}), CheckpointError, r"got 'MIT\n\x1b[2J'", "licence must have at most 1000 characters"),
    ("labels without classes", header({"label_names": ["a"]}), CheckpointError, "got 0", "label_names need one conditioning of kind 'class'"),
    ("conditioning of another", header({"family": "edm2", "conditioning": [{"name": "c", "kind": "scalar"}]}), CheckpointError, "'edm2'", "leave it out"),
    ("unknown module", header({"config": {"sample_shape": SHAPE, "keep_fp32": ["con"]}}), CheckpointError, "got 'con'", "did you mean 'conv'?"),
    ("unknown module of a program", program(config={"sample_shape": SHAPE, "keep_fp32": ["con"]}), CheckpointError, "got 'con'", "did you mean 'conv'?"),
    ("one statistic", header({"sampler": {"latent_mean": [0, 0, 0]}}), CheckpointError, "got one of them", "given together"),
    (
        "config for a scm-checkpoint",
        lambda folder: native(folder, **described(folder, HEADER)),
        InvalidArgumentError,
        "is a scm-checkpoint",
        "leave out the config",
    ),
    ("parametrisation for a folder", diffusers_folder, InvalidArgumentError, "is a diffusers folder", "leave out config, parametrisation"),
    ("unknown parametrisation", lambda folder: bare(folder, parametrisation="v"), InvalidArgumentError, "got 'v'", "must be one of trigflow"),
    (
        "times that edm has no sigma for",
        lambda folder: bare(folder, {**HEADER, "sampler": {"times": {"1": [1.5708, 0]}}}, parametrisation="edm"),
        InvalidArgumentError,
        "got [1.5708, 0.0]",
        "must be below pi/2",
    ),
    # Factories.
    ("no colon", factory("own_networks.plain"), InvalidArgumentError, "got 'own_networks.plain'", "must be package.module:function"),
    ("no module", factory("own_network:plain"), InvalidArgumentError, "there is no module 'own_network'", "Run scm-export in the folder that holds it"),
    ("no submodule", factory("own_networks.sub:plain"), InvalidArgumentError, "own_networks.sub", "Run scm-export in the folder"),
    ("no function", factory("own_networks:plane"), InvalidArgumentError, "own_networks has no 'plane'", "did you mean 'plain'?"),
    ("not a function", factory("own_networks:NOT_A_FUNCTION"), InvalidArgumentError, "got int", "must be a function"),
    ("raises", factory("own_networks:raising"), CheckpointError, "raised KeyError: 'no such width'", "own_networks:raising"),
    ("wrong arguments", factory("own_networks:plain", {"width": 3}), CheckpointError, "raised TypeError", "with the arguments width of [config.arguments]"),
    ("returns no module", factory("own_networks:a_state_dict"), CheckpointError, "got OrderedDict", "must return a torch.nn.Module"),
    ("other weights", factory("own_networks:sensitive"), CheckpointError, "missing: time_embed.angles.weight", "wrong shape"),
    ("other shapes", factory("own_networks:plain", {"channels": 4}), CheckpointError, "conv.weight must have [4, 3, 3, 3], got [3, 3, 3, 3]", "wrong shape"),
    ("no factory", lambda folder: bare(folder, factory=None), CheckpointError, "has only weights", "give --factory package.module:function"),
    ("factory for a program", program(options=FACTORY), InvalidArgumentError, "holds its network", "leave out the factory"),
    ("factory for edm2", header({"family": "edm2"}), InvalidArgumentError, "is of the family 'edm2'", "user-defined networks"),
    (
        "returns nothing",
        factory("own_networks:plain", {"how": "nothing"}),
        CheckpointError,
        "it must return a tensor, got NoneType",
        "cannot be called as network(x",
    ),
    # Networks that do not match the config.
    (
        "a static batch",
        program(dynamic=False),
        CheckpointError,
        "was exported for one batch size (x has the shape [2, 3, 10, 14])",
        "torch.export.Dim('batch')",
    ),
    ("training mode", program(Dropping, train=True), CheckpointError, "was exported in training mode", "Call .eval()"),
    (
        "inputs that the program lacks",
        program(conditioning=[{"name": "c", "kind": "scalar"}]),
        CheckpointError,
        "takes x, level: the state",
        "the [[conditioning]] of the config, got c",
    ),
    (
        "arguments that the network lacks",
        header({"conditioning": [{"name": "c", "kind": "scalar"}]}),
        CheckpointError,
        "unexpected keyword argument 'c'",
        "cannot be called as network(x, level, c=)",
    ),
    ("another number of channels", header({"config": {"sample_shape": [1, 8, 8]}}), CheckpointError, "[2, 1, 8, 8]", "cannot be called as network(x, level)"),
    ("another output", program(lambda: Plain(channels=6)), CheckpointError, "got [2, 6, 10, 14]", "must return a tensor with the shape of x, [2, 3, 10, 14]"),
    ("latents without a decoder", header({"config": {"sample_shape": [5, 8, 8]}}), CheckpointError, "missing decoder", "--latents"),
    ("a size", lambda folder: bare(folder, size=(8, 8)), CheckpointError, "leave out the size", "sample_shape of its config"),
]


@pytest.mark.parametrize(("make", "error", "got", "cure"), [pytest.param(*row[1:], id=row[0]) for row in ROWS])
def test_bad_input(make: Make, error: type[ScmError], got: str, cure: str, tmp_path: Path) -> None:
    path, options = make(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(ScmError) as caught:
        export(path, tmp_path / "out.scm", verify=False, steps=(), **options)
    assert type(caught.value) is error
    assert got in str(caught.value)
    assert cure in str(caught.value)
    assert tree(tmp_path) == before, "nothing is run, nothing is left"


def test_what_cannot_be_traced_is_said(tmp_path: Path) -> None:
    path, options = bare(tmp_path, factory="own_networks:data_dependent")
    with pytest.raises(ScmError, match=r"the network of step cannot be traced"):
        export(path, tmp_path / "out.scm", verify=False, steps=(), **options)
    assert not (tmp_path / "out.scm").exists()


def test_a_module_that_is_not_importable_cannot_be_trusted_into_being(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vanishing.py").write_text("from own_networks import Plain\nclass Vanishing(Plain): pass\n")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        import vanishing  # type: ignore[import-not-found]  # written above

        torch.save(vanishing.Vanishing(), tmp_path / "net.pt")
    (tmp_path / "config.json").write_text(json.dumps(HEADER))
    monkeypatch.delitem(__import__("sys").modules, "vanishing")
    with pytest.raises(CheckpointError, match=r"cannot be loaded even with --trust: .*vanishing.*folder of the code"):
        load(tmp_path / "net.pt", config=tmp_path / "config.json", trust=True)
    monkeypatch.chdir(tmp_path)
    assert isinstance(load(tmp_path / "net.pt", config=tmp_path / "config.json", trust=True), Program)
