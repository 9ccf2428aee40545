"""``Generator``: the sampling loop, and nothing of any model's mathematics.

    x = noise(seeds, draw=0) * initial_scale
    for k, (t, t_next) in enumerate(pairs(times)):
        x = step(x, t, t_next, noise(seeds, draw=k + 1), conditioning)
    image = decode(x)

Noise, step and decode are graphs of the bundle.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scm_runtime.arguments import Labels, Seeds, gather_conditioning, read_latents, resolve_call
from scm_runtime.bundle import Dtype, Manifest, check_files, read_manifest
from scm_runtime.errors import InvalidArgumentError
from scm_runtime.graphs import Graphs
from scm_runtime.images import to_pixels
from scm_runtime.location import find
from scm_runtime.native import Library, check_native_ops, open_with_kernels
from scm_runtime.samples import EXPORT_A_DECODER, PICTURE_CHANNELS, Samples, Timings
from scm_runtime.session import check_threads, load_onnxruntime

if TYPE_CHECKING:
    from PIL import Image

Callback = Callable[["Generator", int, float, dict[str, NDArray[np.float32]]], Mapping[str, Any] | None]


@dataclass(frozen=True)
class GeneratorInfo:
    """What a Generator runs, and on what."""

    bundle: str
    """Its name in the manifest."""
    dtype: str
    """Of the graphs: "fp32", "fp16" or "bf16"."""
    device: str
    """So far always "cpu"."""
    provider: str
    """ONNX Runtime's name of what runs the step graph: "CPUExecutionProvider"."""
    onnxruntime: str
    """Its version."""
    native_ops: bool
    """Whether the library's kernels run; else the function bodies in the graphs do."""
    native_ops_version: str | None
    """Of the library, where its kernels run."""
    native_ops_reason: str | None
    """Why they do not run, and what would mend it."""


class Generator:
    """Draws samples from a bundle. One Generator may be called from several threads; calls share nothing but the sessions."""

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        revision: str | None = None,
        dtype: Dtype = "fp32",
        threads: int | None = None,
        native_ops: bool | Literal["auto"] = "auto",
        verify_integrity: bool = True,
    ) -> None:
        """Open a bundle.

        Args:
            bundle: a folder written by ``scm-export``; the name of an embedded bundle, ``"digits"``; or a repository of the Hugging Face hub,
                ``"org/name"``, which takes the extra ``hub``. What exists as a path is a path; so is what lies in a folder that exists, unless
                a revision is given. Of a repository the files that the dtype needs are fetched, into huggingface_hub's cache.
            revision: of a repository: branch, tag or commit; None for the main branch.
            dtype: which of the bundle's graphs to run; every bundle has fp32, the fastest on a CPU.
            threads: threads inside an operator; None for one a core.
            native_ops: True runs the kernels of scm-runtime's native library; False the function bodies in the graphs, which need no library;
                "auto" the kernels where they can be used, and else the bodies. ``info`` says which run, the logger ``scm_runtime`` why.
            verify_integrity: compare the SHA-256 of every file with the manifest. False saves the reading of large bundles;
                presence and sizes are checked all the same.

        Raises:
            BundleNotFoundError: no bundle there.
            HubNotFoundError: no such repository, revision or file; or HF_HUB_OFFLINE is set, and it is not in the cache.
            HubError: the hub refuses, or cannot be reached.
            BundleSchemaError: its manifest is malformed or of a newer schema.
            BundleIntegrityError: a file is missing, or not the one the manifest describes.
            InvalidArgumentError: threads, native_ops or dtype out of range, or a revision of what is no repository.
            MissingDependencyError: ONNX Runtime is not installed, or huggingface_hub, where it is needed.
            NativeOpsError: native_ops is True, and the kernels cannot be used.
            InferenceError: ONNX Runtime refuses a graph.
        """
        threads, native_ops = check_threads(threads), check_native_ops(native_ops)
        found = find(bundle, revision)
        self.folder = found.folder
        self.manifest: Manifest = read_manifest(self.folder)
        if dtype not in self.manifest.dtypes:
            raise InvalidArgumentError(f"dtype must be one of this bundle's, {', '.join(self.manifest.dtypes)}; got {dtype!r}")
        names = self.manifest.files if found.repository is None else self.manifest.files_for(dtype)
        found.fetch(names)
        check_files(self.folder, self.manifest, names, hashes=verify_integrity)
        self.dtype: Dtype = dtype

        def open_graphs(library: Library | None) -> Graphs:
            return Graphs(self.folder, self.manifest, dtype, threads=threads, library=library.path if library else None)

        graphs, kernels = open_with_kernels(self.manifest, native_ops, open_graphs)
        self._opened: Graphs | None = graphs
        self.info = GeneratorInfo(
            bundle=self.manifest.name,
            dtype=dtype,
            device="cpu",
            provider=graphs.step.provider,
            onnxruntime=load_onnxruntime().__version__,
            native_ops=kernels.library is not None,
            native_ops_version=kernels.library.facts.version if kernels.library else None,
            native_ops_reason=kernels.reason,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Generator({os.fspath(self.folder)!r}, dtype={self.dtype!r})"

    def close(self) -> None:
        """Give the sessions and their memory back, once calls that run have ended. Later calls raise InvalidArgumentError; closing twice is allowed."""
        self._opened = None

    def __call__(
        self,
        class_labels: Labels | None = None,
        *,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        prompt_embeds: ArrayLike | None = None,
        prompt_attention_mask: ArrayLike | None = None,
        conditioning: Mapping[str, ArrayLike] | None = None,
        seed: Seeds | None = None,
        batch_size: int | None = None,
        latents: ArrayLike | None = None,
        output_type: Literal["pil", "np", "latent"] = "pil",
        callback_on_step_end: Callback | None = None,
    ) -> Samples:
        """Draw a batch of N samples.

        N is the length of whichever of the conditioning, seed and latents are for several samples (they must agree), or batch_size, or 1.
        Single values serve all samples.

        Args:
            class_labels: class indices or label names. None: class ``seed modulo number of classes``, so that consecutive seeds show all classes.
            num_inference_steps: a count the bundle has times for; 2 by default, or its smallest count if it has none for 2.
            timesteps: the times themselves instead, in the manifest's ``time_unit`` (TrigFlow: radians), one a step and decreasing; the end time is added.
            guidance_scale: for models that take one as an input.
            prompt_embeds: for models of text: ``[tokens, D]`` for all samples or ``[N, tokens, D]``, from the model's text encoder, which is not part of
                the bundle. Any real dtype; it becomes float32.
            prompt_attention_mask: 1 or True for the tokens that count, ``[tokens]`` or ``[N, tokens]``; all by default.
            conditioning: the model's inputs by their names in the manifest, where they have no argument of their own here.
            seed: one integer in [-2^63, 2^63): the samples get seed, seed + 1, …; or a list, one a sample. None: drawn at random,
                reported in ``Samples.seeds``. A sample depends on its own seed alone, not on the batch it is drawn in.
            batch_size: N.
            latents: float ``[N, *sample]``, standard normal: takes the place of the first draw of noise (as in diffusers, it is scaled here).
            output_type: "pil" makes the pictures before the call returns, "np" leaves them at pixels, "latent" leaves out the decoder.
                A bundle that was made without a decoder gives latents for all three.
            callback_on_step_end: called as ``callback(generator, step, t, {"latents": x})`` after the step from time t, with x float32 ``[N, *sample]``;
                it may return a dict whose "latents" take the place of x.

        Returns:
            The samples, with their seeds, conditioning and timings.

        Raises:
            InvalidArgumentError: an argument is out of range, of the wrong shape, or does not fit the others; or the Generator is closed.
            InferenceError: ONNX Runtime failed in a graph.
        """
        graphs = self._graphs()
        start = time.perf_counter()
        call = resolve_call(
            self.manifest,
            conditioning=gather_conditioning(
                conditioning,
                class_labels=class_labels,
                guidance_scale=guidance_scale,
                prompt_embeds=prompt_embeds,
                prompt_attention_mask=prompt_attention_mask,
            ),
            seed=seed,
            batch_size=batch_size,
            latents=latents,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            output_type=output_type,
        )
        clock = _Clock()
        seeds, manifest = call.seeds, self.manifest

        def noise(draw: int, scale: float) -> NDArray[np.float32]:
            return cast(NDArray[np.float32], graphs.noise(seeds=seeds, draw=np.array(draw, np.int64), scale=np.array(scale, np.float32)))

        with clock("noise"):
            x = noise(0, manifest.initial_scale) if call.latents is None else call.latents * np.float32(manifest.initial_scale)
        for k, (t, t_next) in enumerate(pairwise(call.times)):
            with clock("noise"):
                fresh = noise(k + 1, 1.0)
            with clock("step"):
                times = {name: np.full(len(seeds), value, np.float32) for name, value in (("t", t), ("t_next", t_next))}
                x = graphs.step(x=x, **times, noise=fresh, **call.conditioning)
            if callback_on_step_end is not None:
                x = self._call_back(callback_on_step_end, k, t, x)
        array: NDArray[Any] = x
        if output_type != "latent":
            with clock("decode"):
                array = graphs.decode(x=x)
        samples = Samples(
            array=array,
            seeds=tuple(seeds.tolist()),
            conditioning=call.conditioning,
            timings=Timings(
                noise=sum(clock.spans["noise"]),
                steps=tuple(clock.spans["step"]),
                decode=sum(clock.spans["decode"]),
                total=time.perf_counter() - start,
            ),
            has_decoder=manifest.output.kind == "image",
        )
        if output_type == "pil" and samples.has_decoder and array.shape[-1] in PICTURE_CHANNELS:
            samples.images  # noqa: B018 - made now, so that the caller's first look is free
        return samples

    def encode(self, images: Image.Image | Sequence[Image.Image] | NDArray[np.uint8]) -> NDArray[np.float32]:
        """Latents of pictures.

        Args:
            images: a PIL image, several of them, or uint8 ``[N, H, W, C]``, of the size and the channels of the bundle's pictures.

        Returns:
            float32 ``[N, *sample]`` in the state's scale: the mean where the encoder is a distribution. ``decode`` brings them back.

        Raises:
            InvalidArgumentError: the bundle has no encoder, the images do not fit it, or the Generator is closed.
            InferenceError: ONNX Runtime failed.
        """
        graph = self._graphs().optional("encode")
        return cast(NDArray[np.float32], graph(image=to_pixels(images, graph.shapes.get("image", (None,) * 4)[1:])))

    def decode(self, latents: ArrayLike, *, preview: bool = False) -> NDArray[np.uint8]:
        """Pictures of latents.

        Args:
            latents: ``[N, *sample]`` in the state's scale: of ``encode``, of ``output_type="latent"`` or of a callback.
            preview: by the small decoder, in its own size.

        Returns:
            uint8 ``[N, H, W, C]``.

        Raises:
            InvalidArgumentError: the bundle has no decoder, or none for previews; the latents are of another shape; or the Generator is closed.
            InferenceError: ONNX Runtime failed.
        """
        graphs = self._graphs()
        x = read_latents(latents, self.manifest.sample.shape)
        if not len(x):
            raise InvalidArgumentError("latents must hold at least one value, got none")
        if not preview and self.manifest.output.kind != "image":
            raise InvalidArgumentError(f"the bundle {self.manifest.name!r} has no decoder. {EXPORT_A_DECODER}")
        return cast(NDArray[np.uint8], (graphs.optional("preview") if preview else graphs.decode)(x=x))

    def _graphs(self) -> Graphs:
        graphs = self._opened  # read once: another thread may close the Generator
        if graphs is None:
            raise InvalidArgumentError("this Generator is closed: make a new one")
        return graphs

    def _call_back(self, callback: Callback, k: int, t: float, x: NDArray[np.float32]) -> NDArray[np.float32]:
        returned = callback(self, k, t, {"latents": x})
        if returned is None:
            return x
        if not isinstance(returned, Mapping):
            raise InvalidArgumentError(f"callback_on_step_end must return None or a dict with 'latents', got {type(returned).__name__}")
        replaced = returned.get("latents", x)
        try:
            changed = np.ascontiguousarray(replaced, np.float32)
        except (TypeError, ValueError) as error:
            raise InvalidArgumentError(f"callback_on_step_end must return latents that are an array of numbers, got {type(replaced).__name__}") from error
        if changed.shape != x.shape:
            raise InvalidArgumentError(f"callback_on_step_end must return latents of the shape {list(x.shape)}, got {list(changed.shape)}")
        return changed


class _Clock:
    """Collects spans of wall time by name."""

    def __init__(self) -> None:
        self.spans: dict[str, list[float]] = {"noise": [], "step": [], "decode": []}

    def __call__(self, name: str) -> Self:
        self.name, self.start = name, 0.0
        return self

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.spans[self.name].append(time.perf_counter() - self.start)
