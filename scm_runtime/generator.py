"""``Generator``: the public face. It checks what it is given, opens a bundle on a device, and draws."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, Unpack, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scm_runtime.bundle.location import resolve_bundle
from scm_runtime.bundle.manifest import Dtype, Manifest
from scm_runtime.bundle.solver_tables import SolverTables
from scm_runtime.common.checks import is_int
from scm_runtime.common.runs import end_thread_at_exit
from scm_runtime.common.shared_resource import Usage
from scm_runtime.devices.placement import resolve_device
from scm_runtime.engines.info import GeneratorInfo
from scm_runtime.engines.open_bundle import open_bundle
from scm_runtime.errors import GeneratorClosedError, InvalidArgumentError
from scm_runtime.inputs.arguments import CallArguments, Callback, OutputType
from scm_runtime.inputs.call import Labels, Seeds, read_latents
from scm_runtime.inputs.conditioning import placeholder_conditioning
from scm_runtime.inputs.images import to_pixels
from scm_runtime.samples import EXPORT_A_DECODER, Samples
from scm_runtime.sampling.batching import Batcher, check_batching
from scm_runtime.sampling.loop import Sampler
from scm_runtime.sampling.nonfinite import Guard, OnNonfinite, check_policy
from scm_runtime.sampling.request import read_request
from scm_runtime.sampling.streaming import Queued
from scm_runtime.tracing import OnSpan

if TYPE_CHECKING:
    from concurrent.futures import Future

    from PIL import Image

CAPTURE_RUNS = 3  # two to take memory, one to capture a CUDA graph


class Generator(Queued):
    """Draws samples from a bundle. Any number of threads may call one Generator; calls share nothing but the sessions."""

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: Dtype | Literal["auto"] = "auto",
        providers: Sequence[str | tuple[str, Mapping[str, object]]] | None = None,
        provider_options: Mapping[str, object] | Sequence[Mapping[str, object]] | None = None,
        session_options: Mapping[str, object] | None = None,
        threads: int | None = None,
        native_ops: bool | Literal["auto"] = "auto",
        cuda_graph: bool = True,
        gpu_mem_limit: int | None = None,
        stream: object | None = None,
        on_nonfinite: OnNonfinite = "raise",
        on_span: OnSpan | None = None,
        profile_dir: str | os.PathLike[str] | None = None,
        cache_dir: str | os.PathLike[str] | Literal[False] | None = None,
        max_batch_size: int = 8,
        max_wait_ms: float = 0.0,
        verify_integrity: bool = True,
    ) -> None:
        """Open a bundle.

        Args:
            bundle: a folder written by ``scm-export``; the name of an embedded bundle, ``"digits"``; or a repository of the Hugging Face hub,
                ``"org/name"``, which takes the extra ``hub``. What exists as a path is a path; so is what lies in a folder that exists, unless
                a revision is given. Of a repository the files that the dtype needs are fetched, into huggingface_hub's cache.
            revision: of a repository: branch, tag or commit; None for the main branch.
            device: "cpu", "cuda" (the first GPU) or "cuda:N", had or an error; "auto" takes a GPU where one can be had, else the CPU, and logs why.
            dtype: which of the bundle's graphs to run. "auto": on a GPU half precision where the bundle has it, elsewhere fp32, which every bundle has.
            providers: for experts, in place of a device: ONNX Runtime's execution providers in order, by name or as (name, options).
            provider_options: of the device's provider; with ``providers`` a list, one a provider.
            session_options: attributes of ONNX Runtime's SessionOptions by name, and configuration entries, whose names have a dot;
                and our own "scm.float32_matmul_precision", docs/embedding.md.
            threads: threads inside an operator; None for one a core.
            native_ops: True runs the kernels of scm-runtime's native library; False the function bodies in the graphs, which need no library;
                "auto" the kernels where they can be used, and else the bodies. ``info`` says which run, the logger ``scm_runtime`` why.
            cuda_graph: on a GPU, capture what runs again and again, per batch size; False never does.
            gpu_mem_limit: bytes that ONNX Runtime's arena of each graph may take of a GPU; None for all there is.
            stream: of CUDA, to work on instead of one of our own: a handle, or an object with ``__cuda_stream__``. Not the per-thread default stream.
            on_nonfinite: what to do about samples that turn into NaN or infinity: "raise" NonFiniteError; "warn" in the log; or "fp32", do
                them again in it, silently but for a line in the log.
            on_span: called with a ``Span`` for each call and each of its parts, after it: in the caller's thread, or in the one that computes what was
                submitted, where it holds up the others and must not wait for one of them.
            profile_dir: a folder for ONNX Runtime's profile of every session, written when the Generator is closed.
            cache_dir: a folder that keeps optimised graphs, so that the next process opens them faster. None: the one SCM_CACHE_DIR names, or else the
                platform's folder for caches; False: none. At most SCM_CACHE_MAX_BYTES, 4 GiB by default, and nothing where it cannot be written.
            max_batch_size: samples that ``submit``, ``async_`` and ``stream`` compute in one evaluation.
            max_wait_ms: how long a request may wait for others to share it, where fewer wait; 0 for not at all.
            verify_integrity: compare the SHA-256 of every file with the manifest. False saves the reading of large bundles;
                presence and sizes are checked all the same.

        Raises:
            BundleNotFoundError: no bundle there.
            HubNotFoundError: no such repository, revision or file; or HF_HUB_OFFLINE is set, and it is not in the cache.
            HubError: the hub refuses, or cannot be reached.
            BundleSchemaError: its manifest is malformed or of a newer schema.
            BundleIntegrityError: a file is missing, or not the one the manifest describes.
            InvalidArgumentError: an argument is out of range, or a revision of what is no repository.
            DeviceError: the device cannot be had; the message names what is missing.
            MissingDependencyError: ONNX Runtime is not installed, or huggingface_hub, where it is needed.
            NativeOpsError: native_ops is True, and the kernels cannot be used.
            InferenceError: ONNX Runtime refuses a graph.
        """
        max_batch_size, max_wait = check_batching(max_batch_size, max_wait_ms)
        policy = check_policy(on_nonfinite)
        if on_span is not None and not callable(on_span):
            raise InvalidArgumentError(f"on_span must be a function of a Span, or None, got {on_span!r}")
        try:
            opened = open_bundle(
                resolve_bundle(bundle, revision),
                resolve_device(device, providers, provider_options),
                dtype=dtype,
                session_options=session_options,
                threads=threads,
                native_ops=native_ops,
                cuda_graph=cuda_graph,
                gpu_mem_limit=gpu_mem_limit,
                stream=stream,
                profile_dir=profile_dir,
                cache_dir=cache_dir,
                verify_integrity=verify_integrity,
            )
        except GeneratorClosedError as error:
            end_thread_at_exit(error)
            raise
        self.folder: Path = opened.folder
        self.manifest: Manifest = opened.manifest
        self._schedules = SolverTables(self.folder, self.manifest)
        self.info: GeneratorInfo = opened.info
        self.dtype: Dtype = opened.engine.dtype
        attributes = {"bundle": self.info.bundle, "device": self.info.device, "dtype": self.dtype}
        guard = Guard(opened.engine, policy, opened.open_fp32)
        self._runs = opened.runs
        self._usage = Usage(Sampler(opened.engine, guard, self._runs, self.manifest, attributes, on_span), Sampler.close)
        self._max_batch_size, self._batcher = max_batch_size, Batcher(max_batch_size, max_wait)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self.close(wait=kind is None)

    def __repr__(self) -> str:
        return f"Generator({os.fspath(self.folder)!r}, device={self.info.device!r}, dtype={self.dtype!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a Generator holds open sessions and cannot be pickled: make one in each process, Generator({os.fspath(self.folder)!r})")

    def _check_process(self) -> None:
        """Raise ForkedError if this process was forked from the one that made it: there is nobody here who would work on a future."""
        self._usage.check_process()

    @property
    def closed(self) -> bool:
        """Whether calls are refused, though some may still run."""
        return self._usage.ended

    def close(self, *, wait: bool = False) -> None:
        """End the calls that run, and give the sessions, their threads and their memory back.

        What runs in ONNX Runtime is terminated, within its step. Calls and requests of ``submit`` that have not come to their end raise
        GeneratorClosedError, as later calls do. It returns when nothing of this Generator runs any more; but for a callback of the user's
        it does not wait long.

        Closing twice is allowed, and so is closing from a callback: there it waits for nothing, and the call that the callback belongs to
        ends as the others do. The end of a ``with`` block that no exception ends closes with ``wait=True``.

        Args:
            wait: terminate nothing: let the calls that run and all requests of ``submit`` come to their end, and wait for the requests.
        """
        if not wait:
            self._terminate()
            if not (self._usage.foreign or self._usage.inside or self._batcher.is_current):
                self._runs.wait()
                self._batcher.join()
            return
        self._usage.end()
        if not self._usage.foreign:
            self._batcher.finish()

    def _terminate(self) -> None:
        """Refuse calls, and terminate what runs; waits for nothing."""
        self._usage.end()
        if not self._usage.foreign:
            self._runs.terminate()
            self._batcher.close()

    def __call__(
        self,
        class_labels: Labels | None = None,
        *,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        sampler: str | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        prompt_embeds: ArrayLike | None = None,
        prompt_attention_mask: ArrayLike | None = None,
        conditioning: Mapping[str, ArrayLike] | None = None,
        seed: Seeds | None = None,
        batch_size: int | None = None,
        latents: ArrayLike | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: Callback | None = None,
    ) -> Samples:
        """Draw a batch of N samples.

        N is the length of whichever of the conditioning, seed and latents are for several samples (they must agree), or batch_size, or 1.
        Single values serve all samples.

        Args:
            class_labels: class indices or label names. None: class ``seed modulo number of classes``, so that consecutive seeds show all classes.
            num_inference_steps: a count the bundle has times for; 2 by default, or its smallest count if it has none for 2. Of a diffusion model's
                32 or as many as there are.
            timesteps: the times themselves instead, in the manifest's ``time_unit`` (TrigFlow: radians), one a step and decreasing; the end time is added.
            sampler: how steps are made. None: what the bundle was exported for, ``manifest.solver``. Bundles of diffusion models have others,
                ``manifest.samplers``: "dpm-solver-2s" and "heun" evaluate the network twice a step but the last, 63 times for 32 steps.
            guidance_scale: for models that take one as an input.
            prompt_embeds: for models of text: ``[tokens, D]`` for all samples or ``[N, tokens, D]``, from the model's text encoder, which is not part of
                the bundle. Any real dtype; it becomes float32.
            prompt_attention_mask: 1 or True for the tokens that count, ``[tokens]`` or ``[N, tokens]``; all by default.
            conditioning: the model's inputs by their names in the manifest, where they have no argument of their own here.
            seed: one integer in [-2^63, 2^63): the samples get seed, seed + 1, …; or a list, one a sample. None: drawn at random,
                reported in ``Samples.seeds``. A sample depends on its own seed alone, not on the batch it is drawn in.
            batch_size: N.
            latents: float ``[N, *sample]``, standard normal: takes the place of the first draw of noise (as in diffusers, it is scaled here).
            output_type: "pil" makes the pictures before the call returns, "np" leaves them at pixels, "latent" leaves out the decoder, "dlpack" leaves
                the pixels on the device: ``torch.from_dlpack(out.array)``. A bundle that was made without a decoder gives latents for all four.
            callback_on_step_end: called in the caller's thread as ``callback(generator, step, t, {"latents": x})`` after the step that began at time t, with x
                float32 ``[N, *sample]``; it may return a dict whose "latents" take the place of x, or False, which ends the call.

        Returns:
            The samples, with their seeds, conditioning and timings.

        Raises:
            InvalidArgumentError: an argument is out of range, of the wrong shape, or does not fit the others.
            GeneratorClosedError: the Generator is closed, or was while the call ran.
            ForkedError: it was made before this process was forked.
            GenerationCancelledError: the callback returned False.
            NonFiniteError: samples turned into NaN or infinity; see ``on_nonfinite``.
            OutOfMemoryError: the batch does not fit.
            InferenceError: ONNX Runtime failed in a graph.
        """
        arguments = CallArguments(
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sampler=sampler,
            guidance_scale=guidance_scale,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            conditioning=conditioning,
            seed=seed,
            batch_size=batch_size,
            latents=latents,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
        )
        with self._usage as loop:
            return loop.sample(read_request(self, class_labels, arguments))

    def submit(self, class_labels: Labels | None = None, **arguments: Unpack[CallArguments]) -> Future[Samples]:
        """Queue a call, with the arguments of a call, and return at once. Requests that wait are computed together, also such as are at different steps.

        Up to ``max_batch_size`` samples share an evaluation; a larger request runs alone. The samples are those of a call, to the bit where the
        device computes a batch as it computes its parts. Pictures are made when ``Samples.images`` is first looked at.

        ``cancel()`` of the future works until the samples are there: the request stops before its next step. ``callback_on_step_end`` runs in the thread
        that computes all requests: it holds up the others, and must not wait for one of them. So do callbacks of the future.

        Returns:
            A future. Its ``result()`` raises what a call raises: GeneratorClosedError if the Generator is closed before the samples are there, unless
            by ``close(wait=True)``; and ``concurrent.futures.CancelledError`` after ``cancel()``.

        Raises:
            InvalidArgumentError, GeneratorClosedError, ForkedError: at once, as a call does.
        """
        sampler = self._usage.enter()
        try:
            return self._batcher.submit(sampler, read_request(self, class_labels, arguments), self._usage.leave)
        except BaseException:
            self._usage.leave()
            raise

    def _streaming(self) -> tuple[Generator, int, int]:
        self._usage.check()
        return self, self._max_batch_size, 1

    def warmup(
        self,
        batch_sizes: Sequence[int] = (1,),
        *,
        num_inference_steps: int | None = None,
        sampler: str | None = None,
        conditioning: Mapping[str, ArrayLike] | None = None,
    ) -> None:
        """Draw samples of these batch sizes and drop them, so that the first real call is as fast as the second: memory is taken, CUDA graphs are captured.

        Args:
            batch_sizes: those that calls will have.
            num_inference_steps: as in a call; one number of steps warms all.
            sampler: as in a call.
            conditioning: for the inputs whose size is free, such as a text's length: values of the sizes to come. Others are made up.

        Raises:
            InvalidArgumentError, OutOfMemoryError, InferenceError: as a call does.
        """
        sizes = list(batch_sizes) if isinstance(batch_sizes, Sequence) else []
        if not sizes or not all(is_int(size) and size >= 1 for size in sizes):
            raise InvalidArgumentError(f"batch_sizes must be a list of integers of at least 1, got {batch_sizes!r}")
        for size in sorted(set(sizes), reverse=True):  # the largest takes the memory at once
            values = placeholder_conditioning(self.manifest.conditioning, range(size)) | dict(conditioning or {})
            for _ in range(CAPTURE_RUNS if self.info.device.startswith("cuda") else 1):
                self(seed=0, batch_size=size, num_inference_steps=num_inference_steps, sampler=sampler, conditioning=values, output_type="np")

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
        with self._usage as sampler:
            engine = sampler.engine
            graph = engine.run(lambda: engine.graphs().optional("encode"))
            pixels = to_pixels(images, graph.shapes.get("image", (None,) * 4)[1:])
            return cast("NDArray[np.float32]", engine.run(lambda: graph(image=pixels)))

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
        with self._usage as sampler:
            engine = sampler.engine
            x = read_latents(latents, self.manifest.sample.shape)
            if not len(x):
                raise InvalidArgumentError("latents must hold at least one value, got none")
            if not preview and self.manifest.output.kind != "image":
                raise InvalidArgumentError(f"the bundle {self.manifest.name!r} has no decoder. {EXPORT_A_DECODER}")

            def run() -> NDArray[Any]:
                return (engine.graphs().optional("preview") if preview else engine.graphs().decode)(x=x)

            return cast("NDArray[np.uint8]", engine.run(run))
