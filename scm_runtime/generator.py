"""``Generator``: opens a bundle on a device and samples it. All other modules serve it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, NoReturn, Self, Unpack

from numpy.typing import ArrayLike

from scm_runtime.bundle.location import resolve_bundle
from scm_runtime.bundle.manifest import Dtype, Manifest
from scm_runtime.bundle.solver_tables import SolverTables
from scm_runtime.common.checks import is_int
from scm_runtime.common.memory import memory_errors
from scm_runtime.common.runs import end_thread_at_exit
from scm_runtime.common.shared_resource import SharedResource
from scm_runtime.devices.placement import resolve_device
from scm_runtime.engines.open_bundle import GeneratorInfo, open_bundle
from scm_runtime.errors import GeneratorClosedError, InvalidArgumentError
from scm_runtime.graph_calls import GraphCalls, run_text_graph
from scm_runtime.inputs.arguments import CallArguments, Callback, Labels, OutputType, Seeds
from scm_runtime.inputs.conditioning import placeholder_conditioning
from scm_runtime.inputs.prompts import Prompts
from scm_runtime.inputs.signatures import lists_arguments
from scm_runtime.samples import OnSpan, Samples
from scm_runtime.sampling.deadline import Deadline
from scm_runtime.sampling.loop import SamplingLoop
from scm_runtime.sampling.nonfinite import NonFiniteHandler, OnNonfinite, check_on_nonfinite
from scm_runtime.sampling.request import Request, read_request
from scm_runtime.sampling.scheduler import BatchScheduler, check_batching
from scm_runtime.sampling.streaming import QueuedSampling, StreamSource
from scm_runtime.text.prompt_conditioning import PromptConditioning

if TYPE_CHECKING:
    from concurrent.futures import Future


class Generator(GraphCalls, QueuedSampling):
    """Generates samples from a bundle. Any number of threads may call one Generator; calls share only the sessions."""

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
        max_queue: int | None = None,
        verify_integrity: bool = True,
    ) -> None:
        """Open a bundle.

        Args:
            bundle: a folder written by ``scm-export``; the name of an embedded bundle, ``"digits"`` (``"./digits"`` is a folder); or a repository of the
                Hugging Face hub, ``"org/name"``, which requires the extra ``hub``. If no revision is given, an existing path, and any path inside an
                existing folder, is a local bundle. From a repository only the files for the dtype are downloaded, into huggingface_hub's cache.
            revision: branch, tag or commit of the repository; None for the main branch.
            device: "cpu", "cuda" (the first GPU) or "cuda:N", which raise DeviceError if the device is not available; "auto" uses a GPU if one is
                available, otherwise the CPU, and logs why.
            dtype: precision of the graphs to run: one of the bundle's. "auto": on a GPU half precision if the bundle has it; otherwise fp32, which every
                bundle has.
            providers: for experts, instead of ``device``: ONNX Runtime's execution providers in order, by name or as (name, options).
            provider_options: options of the device's provider; with ``providers`` a list, one mapping per provider.
            session_options: attributes of ONNX Runtime's SessionOptions by name; configuration entries, whose names contain a dot; and
                "scm.float32_matmul_precision" of this package, see docs/embedding.md.
            threads: number of intra-op threads; None for one per core.
            native_ops: True requires the kernels of the native library; False runs the function bodies in the graphs, which need no library; "auto" uses
                the kernels if possible, otherwise the function bodies. ``info`` says which run, the logger ``scm_runtime`` why.
            cuda_graph: on a GPU, capture calls as CUDA graphs for some batch sizes, and pad other batches to them; False captures none and pads nothing.
            gpu_mem_limit: limit in bytes of ONNX Runtime's GPU memory arena, for each graph; None for no limit.
            stream: CUDA stream to work on instead of a new one: a handle, or an object with ``__cuda_stream__``. Not the per-thread default stream.
            on_nonfinite: what to do if samples become NaN or infinite: "raise" NonFiniteError; "warn" in the log; or compute them again in "fp32", with
                a line in the log.
            on_span: called with a ``Span`` for each call and each of its parts, after it ends: on the caller's thread, or for ``submit`` on the thread that
                computes all requests, where it delays them and must not wait for one of them.
            profile_dir: folder for ONNX Runtime's profile of every session, written when the Generator is closed.
            cache_dir: folder of optimized graphs, with which the next process opens the bundle faster. None: the folder in SCM_CACHE_DIR, or the platform's
                folder for caches; False: no cache. It holds at most SCM_CACHE_MAX_BYTES, 4 GiB by default, and is not used if it cannot be written to.
            max_batch_size: maximum number of samples that ``submit``, ``async_`` and ``stream`` compute in one evaluation. On a GPU, batches of this size
                are captured as they are.
            max_wait_ms: how long a request may wait for others to fill a batch, in milliseconds; 0 for no wait.
            max_queue: maximum number of unfinished requests of ``submit``, ``async_`` and ``stream``; another raises QueueFullError. None for no limit.
            verify_integrity: compare the SHA-256 of every file with the manifest. False saves reading large bundles; presence and sizes are always
                checked.

        Raises:
            BundleNotFoundError: there is no bundle at that path.
            HubNotFoundError: there is no such repository, revision or file; or HF_HUB_OFFLINE is set and it is not in the cache.
            HubError: the hub refuses the request or cannot be reached.
            BundleSchemaError: the manifest is malformed, or of a newer schema.
            BundleIntegrityError: a file is missing or differs from the manifest.
            InvalidArgumentError: an argument is out of range, or a revision is given for a local bundle.
            DeviceError: the device is not available; the message names what is missing.
            MissingDependencyError: ONNX Runtime, or huggingface_hub for a repository, is not installed.
            NativeOpsError: native_ops is True, and the kernels cannot be used.
            InferenceError: ONNX Runtime cannot open a graph.
        """
        max_batch_size, max_wait, max_queue = check_batching(max_batch_size, max_wait_ms, max_queue)
        on_nonfinite = check_on_nonfinite(on_nonfinite)
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
        self._solver_tables, self._prompts = SolverTables(self.folder, self.manifest), PromptConditioning(self.folder, self.manifest)
        self.info: GeneratorInfo = opened.info
        self.dtype: Dtype = opened.engine.dtype
        attributes = {"bundle": self.info.bundle, "device": self.info.device, "dtype": self.dtype}
        nonfinite = NonFiniteHandler(opened.engine, on_nonfinite, opened.open_fp32)
        self._runs = opened.runs
        self._loop = SharedResource(SamplingLoop(opened.engine, nonfinite, self._runs, self.manifest, attributes, on_span), SamplingLoop.close)
        self._max_batch_size, self._scheduler = max_batch_size, BatchScheduler(max_batch_size, max_wait, max_queue)
        self._keep_batch_size(max_batch_size)
        weakref.finalize(self, self._scheduler.stop_when_idle).atexit = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self.close(wait=kind is None)

    def __repr__(self) -> str:
        return f"Generator({os.fspath(self.folder)!r}, device={self.info.device!r}, dtype={self.dtype!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a Generator holds open sessions and cannot be pickled: make one in each process, Generator({os.fspath(self.folder)!r})")

    def _check_process(self) -> None:
        """Raise ForkedError in a forked child of the process that made this Generator: no thread here would work on a future."""
        self._loop.check_process()

    @property
    def closed(self) -> bool:
        """True if calls are refused. Some may still run."""
        return self._loop.closed

    def close(self, *, wait: bool = False) -> None:
        """End the running calls, and free the sessions, their threads and their memory.

        Runs of ONNX Runtime are terminated within their current step. On a GPU, what is enqueued is finished: a call of up to four evaluations and 256
        samples times evaluations, or two steps of others. Unfinished calls and requests of ``submit`` raise GeneratorClosedError, as later
        calls do. ``close`` returns when nothing of this Generator runs any more, but waits only briefly for callbacks of the user.

        It may be called more than once, and from a callback: there it does not wait, and the call that the callback belongs to ends like the others. A
        ``with`` block that ends without an exception closes with ``wait=True``.

        Args:
            wait: terminate nothing: let running calls and all requests of ``submit`` finish, and wait for the requests.
        """
        if not wait:
            self._terminate()
            if not (self._loop.is_forked or self._loop.is_held_by_this_thread or self._scheduler.is_current_thread):
                self._runs.wait()
                self._scheduler.join_after_close()
            return
        self._loop.close()
        if not self._loop.is_forked:
            self._scheduler.finish()

    def _terminate(self) -> None:
        """Refuse calls, and terminate those that run. Returns at once."""
        self._loop.close()
        if not self._loop.is_forked:
            self._runs.terminate()
            self._scheduler.close()

    def __call__(
        self,
        class_labels: Labels | None = None,
        *,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        sampler: str | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        prompt: Prompts | None = None,
        negative_prompt: Prompts | None = None,
        strict_prompt: bool = False,
        prompt_embeds: ArrayLike | None = None,
        prompt_attention_mask: ArrayLike | None = None,
        pooled_prompt_embeds: ArrayLike | None = None,
        negative_prompt_embeds: ArrayLike | None = None,
        negative_prompt_attention_mask: ArrayLike | None = None,
        negative_pooled_prompt_embeds: ArrayLike | None = None,
        conditioning: Mapping[str, ArrayLike] | None = None,
        seed: Seeds | None = None,
        batch_size: int | None = None,
        latents: ArrayLike | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: Callback | None = None,
        timeout: float | None = None,
    ) -> Samples:
        """Generate a batch of N samples.

        N is the length of the conditioning, seeds and latents that are given per sample, which must agree; otherwise ``batch_size``, or 1. Single values
        are used for all samples.

        Args:
            class_labels: class indices or label names, for the input of that name or the bundle's only input of kind "class". None: class ``seed modulo
                number of classes``, so that consecutive seeds show all classes.
            num_inference_steps: number of steps; the bundle must have times for it. Default: 2, or the smallest number the bundle has times for; for
                diffusion models 32, or the largest.
            timesteps: the times of the steps instead, decreasing, in the manifest's ``time_unit`` (TrigFlow: radians). The end time is added.
            sampler: the sampler. None: the one the bundle was exported for, ``manifest.solver``. Bundles of diffusion models have more, ``manifest.samplers``:
                "dpm-solver-2s" and "heun" evaluate the network twice per step except the last, 63 times for 32 steps.
            guidance_scale: for models that have it as an input.
            prompt: for text-to-image models whose bundle has a text encoder: one prompt for all samples, or a list with one per sample. Requires the extra
                ``text``. The encoder is opened by the first prompt; ``encode_prompt`` encodes prompts that are used often.
            negative_prompt: in the same way, for models that use one; "" or, if the model was trained so, zeros by default.
            strict_prompt: a prompt that is too long raises InvalidArgumentError. Otherwise its end is cut off, and a warning in the log quotes that.
            prompt_embeds: instead of a prompt: ``[tokens, D]`` for all samples or ``[N, tokens, D]``, from ``encode_prompt`` or from the model's text encoder
                elsewhere. Any real dtype; converted to float32.
            prompt_attention_mask: 1 or True for valid tokens, ``[tokens]`` or ``[N, tokens]``; by default all are valid.
            pooled_prompt_embeds, negative_prompt_embeds, negative_prompt_attention_mask, negative_pooled_prompt_embeds: in the same way, for models that
                have these inputs.
            conditioning: other inputs of the model by their names in the manifest, for which there is no argument here.
            seed: one integer in [-2^63, 2^63), for the samples seed, seed + 1, …; or a list with one seed per sample. None: random, and reported in
                ``Samples.seeds``. A sample depends only on its own seed, not on its batch.
            batch_size: N.
            latents: float ``[N, *sample]``, standard normal: replaces the initial noise. As in diffusers, it is scaled here.
            output_type: "pil" also makes the PIL images before the call returns; "np" returns only pixels; "latent" skips the decoder; "dlpack" leaves the
                pixels on the device, for ``torch.from_dlpack(out.array)``. A bundle without decoder returns latents for all four.
            callback_on_step_end: called on the caller's thread after each step as ``callback(generator, step, t, {"latents": x})``, with t the time at the
                start of the step and x float32 ``[N, *sample]``. It may return a dict whose "latents" replace x, or False to end the call.
            timeout: time limit in seconds, which includes waiting for other calls; None for no limit. At its end the running step is terminated; on a GPU
                what is enqueued is finished, see ``close``. Callbacks are not interrupted.

        Returns:
            The samples, with their seeds, conditioning and timings.

        Raises:
            InvalidArgumentError: an argument is out of range, of the wrong shape, or conflicts with another.
            GeneratorClosedError: the Generator is closed, or was closed during the call.
            ForkedError: the Generator was made before this process was forked.
            GenerationCancelledError: the callback returned False.
            GenerationTimeoutError: the call was not finished within ``timeout``.
            MissingDependencyError: a prompt is given, and the package ``tokenizers`` is not installed.
            NonFiniteError: samples became NaN or infinite; see ``on_nonfinite``.
            OutOfMemoryError: the batch does not fit into memory.
            InferenceError: ONNX Runtime failed in a graph.
            BundleError: a graph returned another shape than the manifest declares.
        """
        arguments = CallArguments(
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sampler=sampler,
            guidance_scale=guidance_scale,
            prompt=prompt,
            negative_prompt=negative_prompt,
            strict_prompt=strict_prompt,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            conditioning=conditioning,
            seed=seed,
            batch_size=batch_size,
            latents=latents,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            timeout=timeout,
        )
        with self._loop as loop:
            return loop.sample(self._read_request(class_labels, arguments, loop))

    @lists_arguments(CallArguments)
    def submit(self, class_labels: Labels | None = None, **arguments: Unpack[CallArguments]) -> Future[Samples]:
        """Queue a call, and return without waiting for it. The arguments are those of a call. Queued requests are computed together, even at different steps.

        Prompts are encoded first, in the calling thread. Use ``async_``, or ``encode_prompt`` beforehand, where that takes too long.

        Up to ``max_batch_size`` samples share an evaluation; a larger request runs alone. The samples are those of a call, bit for bit if the device
        computes a sample the same way in every batch. PIL images are made when ``Samples.images`` is first read.

        ``cancel()`` of the future works until the samples are ready. The running step is terminated if no other request shares it, except what is enqueued
        on a GPU, see ``close``; otherwise the request takes part in no further step. ``callback_on_step_end`` and callbacks of the future run on the thread
        that computes all requests, or after ``timeout`` on the one that ends all requests at theirs: they delay the others, and must not wait for one of them.

        Returns:
            A future. Its ``result()`` raises what a call raises: GeneratorClosedError if the Generator is closed before the samples are ready, except with
            ``close(wait=True)``; and ``concurrent.futures.CancelledError`` after ``cancel()``.

        Raises:
            InvalidArgumentError, GeneratorClosedError, ForkedError: immediately, as in a call.
            QueueFullError: ``max_queue`` requests are not finished.
        """
        loop = self._loop.acquire()
        try:
            return self._scheduler.add_request(loop, self._read_request(class_labels, arguments, loop), self._loop.release)
        except BaseException:
            self._loop.release()
            raise

    def _read_request(self, class_labels: Labels | None, arguments: CallArguments, loop: SamplingLoop | None = None) -> Request:
        """Return the request of a call. Without a loop the arguments are only checked: prompts are not encoded."""

        def encode_prompts(arguments: CallArguments, deadline: Deadline | None) -> CallArguments:
            return self._prompts.resolve(arguments, None if loop is None else run_text_graph(loop.engine, deadline))

        with memory_errors("the inputs of this call"):
            return read_request(self.manifest, self._solver_tables, class_labels, arguments, encode_prompts, callback_owner=self)

    def _stream_source(self) -> StreamSource:
        self._loop.check()
        return StreamSource(
            self.manifest, lambda arguments: self._read_request(None, arguments), self._check_process, batch_size=self._max_batch_size, prefetch=1
        )

    def warmup(
        self,
        batch_sizes: Sequence[int] = (1,),
        *,
        num_inference_steps: int | None = None,
        sampler: str | None = None,
        conditioning: Mapping[str, ArrayLike] | None = None,
    ) -> tuple[int, ...]:
        """Generate and drop samples, so that the first real call is as fast as later ones: memory is allocated and CUDA graphs are captured.

        Batches of these sizes are captured as they are. Others are padded to a captured size, see docs/embedding.md. What is captured are calls with this
        number of steps and sampler that return pixels. The first call of another kind captures graphs of its own: with another number of steps, with
        ``latents`` or ``output_type="latent"``, with a callback, or a request of ``submit`` that joins others at a later step.

        Args:
            batch_sizes: batch sizes of the calls to come.
            num_inference_steps: as in a call. A CUDA graph is for one number of steps.
            sampler: as in a call.
            conditioning: values for inputs with dynamic dimensions, such as the length of a text, in the sizes to come. Other inputs get placeholders. With a
                text encoder in the bundle, an empty prompt is encoded unless these are its outputs, which also opens the encoder.

        Returns:
            The batch sizes that are captured as CUDA graphs now, in increasing order; none on a CPU.

        Raises:
            InvalidArgumentError, OutOfMemoryError, InferenceError: as in a call.
        """
        sizes = list(batch_sizes) if isinstance(batch_sizes, Sequence) else []
        if not sizes or not all(is_int(size) and size >= 1 for size in sizes):
            raise InvalidArgumentError(f"batch_sizes must be a list of integers of at least 1, got {batch_sizes!r}")
        with self._loop as loop:
            engine = loop.engine
            encoded = self._encode_empty_prompt(conditioning or {})
            for size in sorted(set(sizes), reverse=True):  # the largest first: it allocates the memory for all
                self._keep_batch_size(size)
                values = placeholder_conditioning(self.manifest.conditioning, range(size)) | encoded | dict(conditioning or {})
                self(seed=0, batch_size=size, num_inference_steps=num_inference_steps, sampler=sampler, conditioning=values, output_type="np")
            return engine.run(lambda: engine.captured_batch_sizes)

    def _keep_batch_size(self, batch_size: int) -> None:
        """Capture batches of this size as they are, if the device captures any."""
        with self._loop as loop:
            if loop.engine.asynchronous:
                loop.engine.run(partial(loop.engine.keep_batch_size, batch_size))
