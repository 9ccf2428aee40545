"""A text-to-image bundle written without the exporter, small enough to recompute its samples in NumPy. It has an encoder and a preview decoder.

Every input changes the output. Height and width differ, so that a test notices if they are swapped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from scm_runtime.bundle.checksums import sha256
from scm_runtime.bundle.manifest import MANIFEST, WEIGHTS, Conditioning, FileEntry, Manifest, OutputSpec, SampleSpec, Source, read_manifest

SAMPLE_SHAPE, IMAGE_SHAPE, PREVIEW_SHAPE = (2, 4, 6), (8, 12, 3), (4, 6, 3)
WIDTH = 5  # length of an embedding vector
TIMES: dict[str, tuple[float, ...]] = {"1": (1.5, 0.0), "2": (1.5, 1.0, 0.0)}
INITIAL_SCALE = 0.5
GUIDANCE, SCORE = 4.5, 6.0  # default values of the conditioning

HEADER = '<ir_version: 9, opset_import: ["": 20]>'

NOISE = """noise (int64[batch] seeds, int64 draw, float scale) => (float[batch,2,4,6] noise) {
    s = Cast<to=1>(seeds)
    shape = Constant<value_ints=[-1, 1, 1, 1]>()
    s4 = Reshape(s, shape)
    a = Constant<value_float=1.7>()
    sa = Mul(s4, a)
    zero = Constant<value_float=0.0>()
    size = Constant<value_float=48.0>()
    one = Constant<value_float=1.0>()
    index = Range(zero, size, one)
    plane = Constant<value_ints=[1, 2, 4, 6]>()
    i4 = Reshape(index, plane)
    d = Cast<to=1>(draw)
    p = Add(sa, i4)
    q = Add(p, d)
    z = Sin(q)
    noise = Mul(z, scale)
}"""

# x / 2 + 0.1 t + t_next noise + guidance_scale text + 0.01 score, where text is the mean embedding of the unmasked tokens times the weights
STEP = """step (float[batch,2,4,6] x, float[batch] t, float[batch] t_next, float[batch,2,4,6] noise, float[batch,tokens,5] prompt_embeds,
        int64[batch,tokens] prompt_attention_mask, float[batch] guidance_scale, float[batch] score) => (float[batch,2,4,6] x_next) {
    m = Cast<to=1>(prompt_attention_mask)
    last = Constant<value_ints=[-1]>()
    m3 = Unsqueeze(m, last)
    em = Mul(prompt_embeds, m3)
    middle = Constant<value_ints=[1]>()
    total = ReduceSum<keepdims=0>(em, middle)
    count = ReduceSum<keepdims=0>(m3, middle)
    pooled = Div(total, count)
    text = MatMul(pooled, weights)
    column = Constant<value_ints=[-1, 1]>()
    g = Reshape(guidance_scale, column)
    gt = Mul(g, text)
    channels = Constant<value_ints=[-1, 2, 1, 1]>()
    gt4 = Reshape(gt, channels)
    one = Constant<value_ints=[-1, 1, 1, 1]>()
    t4 = Reshape(t, one)
    n4 = Reshape(t_next, one)
    s4 = Reshape(score, one)
    half = Constant<value_float=0.5>()
    tenth = Constant<value_float=0.1>()
    hundredth = Constant<value_float=0.01>()
    a = Mul(x, half)
    b = Mul(t4, tenth)
    c = Mul(n4, noise)
    d = Mul(s4, hundredth)
    ab = Add(a, b)
    abc = Add(ab, c)
    abcd = Add(abc, d)
    x_next = Add(abcd, gt4)
}"""

PREVIEW_BODY = """
    first = Constant<value_ints=[0]>()
    second = Constant<value_ints=[1]>()
    c0 = Gather<axis=1>(x, first)
    c1 = Gather<axis=1>(x, second)
    both = Add(c0, c1)
    rgb = Concat<axis=1>(c0, c1, both)
    scale = Constant<value_float=32.0>()
    offset = Constant<value_float=128.0>()
    scaled = Mul(rgb, scale)
    moved = Add(scaled, offset)
    rounded = Round(moved)
    low = Constant<value_float=0.0>()
    high = Constant<value_float=255.0>()
    clipped = Clip(rounded, low, high)
    pixels = Cast<to=2>(clipped)
    small = Transpose<perm=[0, 2, 3, 1]>(pixels)
"""

PREVIEW = f"preview (float[batch,2,4,6] x) => (uint8[batch,4,6,3] image) {{{PREVIEW_BODY}    image = Identity(small)\n}}"

DECODE = f"""decode (float[batch,2,4,6] x) => (uint8[batch,8,12,3] image) {{{PREVIEW_BODY}
    spread = Constant<value_ints=[-1, 4, 1, 6, 1, 3]>()
    spaced = Reshape(small, spread)
    doubled = Constant<value_ints=[1, 1, 2, 1, 2, 1]>()
    tiled = Tile(spaced, doubled)
    full = Constant<value_ints=[-1, 8, 12, 3]>()
    image = Reshape(tiled, full)
}}"""

LATENT = "decode (float[batch,2,4,6] x) => (float[batch,2,4,6] latents) { latents = Identity(x) }"

ENCODE = """encode (uint8[batch,8,12,3] image) => (float[batch,2,4,6] x) {
    f = Cast<to=1>(image)
    offset = Constant<value_float=128.0>()
    scale = Constant<value_float=32.0>()
    centred = Sub(f, offset)
    scaled = Div(centred, scale)
    spread = Constant<value_ints=[-1, 4, 2, 6, 2, 3]>()
    blocks = Reshape(scaled, spread)
    within = Constant<value_ints=[2, 4]>()
    mean = ReduceMean<keepdims=0>(blocks, within)
    two = Constant<value_ints=[0, 1]>()
    kept = Gather<axis=3>(mean, two)
    x = Transpose<perm=[0, 3, 1, 2]>(kept)
}"""


# ----------------------------------------------------------------------------
# Variants of the graphs that are slow for some inputs, to test what happens while a graph runs.

SLOW_GUIDANCE, SLOW_SCORE = 1100.0, 3100.0  # inputs that make SLOW_STEP slow: see there


def spin(amount: str) -> str:
    """Return graph statements that loop ``amount`` million times and define ``nothing``, which is 0. A hundred million iterations take minutes."""
    return f"""
    million = Constant<value_float=1000000.0>()
    laps = Mul({amount}, million)
    trips = Cast<to=7>(laps)
    go = Constant<value_int=1>()
    going = Cast<to=9>(go)
    none = Constant<value_float=0.0>()
    spun = Loop(trips, going, none) <body = spin (int64 lap, bool on, float value) => (bool still, float next) {{
        still = Identity(on)
        unit = Constant<value_float=1.0>()
        next = Add(value, unit)
    }}>
    nothing = Mul(spun, none)
"""


# With SLOW_GUIDANCE a step takes minutes in a loop of short operators. With SLOW_SCORE it takes about a second in a single operator.
SLOW_STEP = STEP.replace(
    "    x_next = Add(abcd, gt4)\n",
    f"""
    thousand = Constant<value_float=1000.0>()
    guided = ReduceMax<keepdims=0>(guidance_scale)
    guided_over = Sub(guided, thousand)
    guided_above = Relu(guided_over){spin("guided_above")}
    hundred = Constant<value_float=100.0>()
    score_over = Sub(score, hundred)
    score_above = Relu(score_over)
    side = ReduceMax<keepdims=1>(score_above)
    length = Cast<to=7>(side)
    sides = Concat<axis=0>(length, length)
    square = Expand(side, sides)
    product = MatMul(square, square)
    total_product = ReduceSum<keepdims=0>(product)
    nothing_too = Mul(total_product, none)
    both_nothing = Add(nothing, nothing_too)
    whole = Add(abcd, gt4)
    x_next = Add(whole, both_nothing)
""",
)

# These graphs loop a million times per unit of their largest input value.
SLOW_ENCODE = ENCODE.replace(
    "f = Cast<to=1>(image)", f"value_of = Cast<to=1>(image)\n    most = ReduceMax<keepdims=0>(value_of){spin('most')}    f = Add(value_of, nothing)"
)
SLOW_PREVIEW, SLOW_DECODE = (
    text.replace("rgb = Concat", f"most = ReduceMax<keepdims=0>(x){spin('most')}    colors = Concat").replace(
        "scaled = Mul(rgb, scale)", "rgb = Add(colors, nothing)\n    scaled = Mul(rgb, scale)"
    )
    for text in (PREVIEW, DECODE)
)


# Arguments of calls of a bundle with SLOW_STEP.
EMBEDS = np.ones((2, WIDTH), np.float32)
FAST: dict[str, Any] = {"prompt_embeds": EMBEDS, "seed": 1, "output_type": "latent"}
LONG_LOOP: dict[str, Any] = {**FAST, "guidance_scale": SLOW_GUIDANCE}
LONG_OPERATOR: dict[str, Any] = {**FAST, "conditioning": {"score": SLOW_SCORE}, "num_inference_steps": 1}


def weights() -> NDArray[np.float32]:
    """Return the only weight matrix of the bundle: float32, ``[WIDTH, 2]``."""
    return np.linspace(-0.2, 0.3, WIDTH * 2, dtype=np.float32).reshape(WIDTH, 2)


def write_text_bundle(
    folder: Path,
    *,
    decoder: bool = True,
    extras: Iterable[str] = ("encode", "preview"),
    name: str = "text",
    gain: float = 1.0,
    graphs: Mapping[str, str] | None = None,
) -> Path:
    """Write the bundle and return its folder.

    Args:
        decoder: Include a decoder. Without one the output is latents.
        extras: Optional graphs to include.
        gain: Factor of the weights, so that two revisions of the bundle can differ.
        graphs: Graphs that replace the usual ones, by name, such as ``{"step": SLOW_STEP}``.
    """
    folder.mkdir(parents=True)
    (folder / WEIGHTS).write_bytes((weights() * np.float32(gain)).tobytes() + bytes(64))
    texts = {"noise": NOISE, "step.fp32": STEP, "decode.fp32": DECODE if decoder else LATENT}
    texts |= {f"{extra}.fp32": {"encode": ENCODE, "preview": PREVIEW}[extra] for extra in extras}
    for graph, text in (texts | {graph if graph == "noise" else f"{graph}.fp32": text for graph, text in (graphs or {}).items()}).items():
        model = onnx.parser.parse_model(HEADER + text)
        if graph.startswith("step"):
            model.graph.initializer.append(external_tensor("weights", [WIDTH, 2]))
        (folder / f"{graph}.onnx").write_bytes(model.SerializeToString())
    conditioning = (
        Conditioning(name="prompt_embeds", kind="embedding", dtype="float32", shape=("tokens", WIDTH)),
        Conditioning(name="prompt_attention_mask", kind="mask", dtype="int64", shape=("tokens",)),
        Conditioning(name="guidance_scale", kind="scalar", dtype="float32", default=GUIDANCE),
        Conditioning(name="score", kind="scalar", dtype="float32", default=SCORE),
    )
    manifest = Manifest(
        schema_version=1,
        name=name,
        producer="tests",
        family="toy",
        licence=None,
        source=Source(file="none", sha256="0" * 64),
        parameters=WIDTH * 2,
        sample=SampleSpec(shape=SAMPLE_SHAPE),
        output=OutputSpec(kind="image", shape=IMAGE_SHAPE) if decoder else OutputSpec(kind="latent", shape=SAMPLE_SHAPE),
        sigma_data=0.5,
        initial_scale=INITIAL_SCALE,
        times=TIMES,
        conditioning=conditioning,
        dtypes=("fp32",),
        weights_dtype="fp32",
        opset=20,
        ops={},
        files={path.name: FileEntry(size=path.stat().st_size, sha256=sha256(path)) for path in sorted(folder.iterdir())},
    )
    manifest.validate()
    (folder / MANIFEST).write_bytes(manifest.to_json())
    return folder


def replace_file(folder: Path, name: str, data: bytes) -> Path:
    """Replace a file of a bundle, with its size and checksum in the manifest. Returns the bundle's folder."""
    (folder / name).write_bytes(data)
    manifest = read_manifest(folder)
    manifest.files[name] = FileEntry(size=len(data), sha256=sha256(folder / name))
    (folder / MANIFEST).write_bytes(manifest.to_json())
    return folder


def external_tensor(name: str, dims: list[int], **changed: str) -> onnx.TensorProto:
    """Return a tensor whose data is external, at offset 0 of the weights file; ``changed`` are other values of ``location``, ``offset`` and ``length``."""
    tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=dims, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in ({"location": WEIGHTS, "offset": "0", "length": str(4 * int(np.prod(dims)))} | changed).items():
        tensor.external_data.add(key=key, value=value)
    return tensor


# ----------------------------------------------------------------------------
# The same graphs in NumPy.


def noise(seeds: NDArray[np.int64], draw: int) -> NDArray[np.float32]:
    """Compute the noise graph at scale 1: noise ``[N, *SAMPLE_SHAPE]`` for the given index of the draw."""
    index = np.arange(np.prod(SAMPLE_SHAPE), dtype=np.float32).reshape(1, *SAMPLE_SHAPE)
    drawn: NDArray[np.float32] = np.sin(seeds.astype(np.float32).reshape(-1, 1, 1, 1) * np.float32(1.7) + index + np.float32(draw))
    return drawn


def sample(seeds: Any, embeds: Any, mask: Any = None, guidance: Any = GUIDANCE, score: Any = SCORE, steps: int = 2, gain: float = 1.0) -> NDArray[np.float32]:
    """Compute the whole sampler up to the latents ``[N, *SAMPLE_SHAPE]``. Each argument is one value for all samples or one per sample."""
    seeds = np.asarray(seeds, np.int64)
    embeds = np.broadcast_to(np.asarray(embeds, np.float32), (len(seeds), *np.shape(embeds)[-2:]))
    counts = np.broadcast_to(np.float32(1) if mask is None else np.asarray(mask, np.float32), embeds.shape[:2])[..., None]
    text = (embeds * counts).sum(1) / counts.sum(1) @ (weights() * np.float32(gain))
    guided = (np.reshape(np.asarray(guidance, np.float32), (-1, 1)) * text)[:, :, None, None]
    x = noise(seeds, 0) * np.float32(INITIAL_SCALE)
    for k, (t, t_next) in enumerate(pairwise(TIMES[str(steps)])):
        x = x / 2 + 0.1 * t + t_next * noise(seeds, k + 1) + 0.01 * np.reshape(np.asarray(score, np.float32), (-1, 1, 1, 1)) + guided
    return x.astype(np.float32)


def preview(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Compute the preview graph: uint8 images ``[N, *PREVIEW_SHAPE]``."""
    rgb = np.stack([x[:, 0], x[:, 1], x[:, 0] + x[:, 1]], axis=-1)
    return np.clip(np.round(rgb * np.float32(32) + 128), 0, 255).astype(np.uint8)


def decode(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Compute the decode graph: uint8 images ``[N, *IMAGE_SHAPE]``."""
    return preview(x).repeat(2, axis=1).repeat(2, axis=2)
