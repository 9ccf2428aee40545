"""The methods of a Generator that run a single graph: the text encoder, the encoder of images, or a decoder."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scm_runtime.bundle.manifest import Manifest
from scm_runtime.common.memory import memory_errors
from scm_runtime.common.runs import CancelScope, current_scope
from scm_runtime.common.shared_resource import SharedResource
from scm_runtime.engines.engine import Engine
from scm_runtime.errors import InvalidArgumentError, MissingDependencyError
from scm_runtime.inputs.arguments import CallArguments
from scm_runtime.inputs.call import read_latents
from scm_runtime.inputs.images import to_pixels
from scm_runtime.inputs.prompts import Prompts
from scm_runtime.samples import EXPORT_A_DECODER
from scm_runtime.sampling.deadline import Deadline, cancelled_at, read_deadline
from scm_runtime.sampling.loop import SamplingLoop
from scm_runtime.text.encoder import RunTextGraph, TokenInputs
from scm_runtime.text.prompt_conditioning import PromptConditioning

if TYPE_CHECKING:
    from PIL import Image


class GraphCalls:
    """Methods that need the open graphs of a Generator, and not its sampling loop."""

    manifest: Manifest
    _loop: SharedResource[SamplingLoop]
    _prompts: PromptConditioning

    def encode_prompt(self, prompts: Prompts, negative_prompt: Prompts | None = None, strict: bool = False) -> dict[str, NDArray[Any]]:
        """Encode prompts, to keep the result and pass it to calls: ``generate(**generate.encode_prompt(["a cat", "a dog"]))``.

        Equal prompts are encoded once.

        Args:
            prompts: one prompt, or N of them.
            negative_prompt: for bundles that use one: one for all prompts, or N of them. None: see ``negative_prompt`` of a call.
            strict: a prompt that is too long raises InvalidArgumentError. Otherwise its end is cut off, and a warning in the log quotes that.

        Returns:
            The conditioning by the names of the model's inputs: ``prompt_embeds``, float32 ``[N, tokens, D]``, and others such as ``pooled_prompt_embeds`` and
            ``prompt_attention_mask``. A call takes them as its arguments, or all together as its ``conditioning``.

        Raises:
            InvalidArgumentError: the bundle has no text encoder, or a prompt is not valid.
            MissingDependencyError: the package ``tokenizers``, the extra ``text``, is not installed.
            BundleError: a tokenizer or the text graph does not fit the manifest.
            GeneratorClosedError, ForkedError, OutOfMemoryError, InferenceError: as in a call.
        """
        with self._loop as loop, memory_errors("these prompts", "Encode fewer prompts at a time"):
            return self._prompts.encode(prompts, negative_prompt, strict, run_text_graph(loop.engine, None))

    def _encode_prompts(self, arguments: CallArguments) -> CallArguments:
        """Return the arguments of a call with conditioning in place of its prompts, and its deadline in place of its timeout."""
        deadline = read_deadline(arguments.get("timeout"))
        with self._loop as loop, memory_errors("the inputs of this call"):
            resolved = self._prompts.resolve(arguments, run_text_graph(loop.engine, deadline))
        return resolved if deadline is None else cast(CallArguments, {**resolved, "timeout": deadline})

    def _encode_empty_prompt(self, given: Collection[str]) -> dict[str, NDArray[Any]]:
        """Return the conditioning of the empty prompt for one sample: none if embeddings are ``given``, or if no call can have a prompt."""
        if self.manifest.text is None or set(self.manifest.text.outputs) & set(given):
            return {}
        try:
            return {name: array[0] for name, array in self.encode_prompt("").items()}
        except MissingDependencyError:
            return {}

    def encode(self, images: Image.Image | Sequence[Image.Image] | NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode images as latents.

        Args:
            images: a PIL image, a sequence of them, or uint8 ``[N, H, W, C]``, with the size and channels of the bundle's images.

        Returns:
            float32 ``[N, *sample]`` in the scale of the state: the mean if the encoder outputs a distribution. ``decode`` is the inverse.

        Raises:
            InvalidArgumentError: the bundle has no encoder, the images do not fit it, or the Generator is closed.
            InferenceError: ONNX Runtime failed.
        """
        with self._loop as loop, memory_errors("these images"):
            engine = loop.engine
            graph = engine.run(lambda: engine.graphs().optional("encode"))
            pixels = to_pixels(images, graph.shapes.get("image", (None,) * 4)[1:])
            return cast("NDArray[np.float32]", engine.run(lambda: graph(image=pixels)))

    def decode(self, latents: ArrayLike, *, preview: bool = False) -> NDArray[np.uint8]:
        """Decode latents to images.

        Args:
            latents: ``[N, *sample]`` in the scale of the state, from ``encode``, ``output_type="latent"`` or a callback.
            preview: use the small preview decoder, which may have another image size.

        Returns:
            uint8 ``[N, H, W, C]``.

        Raises:
            InvalidArgumentError: the bundle has no decoder or no preview decoder, the latents have another shape, or the Generator is closed.
            InferenceError: ONNX Runtime failed.
        """
        with self._loop as loop, memory_errors("these latents"):
            engine = loop.engine
            x = read_latents(latents, self.manifest.sample.shape)
            if not len(x):
                raise InvalidArgumentError("latents must hold at least one value, got none")
            if not preview and self.manifest.output.kind != "image":
                raise InvalidArgumentError(f"the bundle {self.manifest.name!r} has no decoder. {EXPORT_A_DECODER}")

            def run() -> NDArray[Any]:
                return (engine.graphs().optional("preview") if preview else engine.graphs().decode)(x=x)

            return cast("NDArray[np.uint8]", engine.run(run))


def run_text_graph(engine: Engine, deadline: Deadline | None) -> RunTextGraph:
    """Return a function that runs the text graph on an engine, until the deadline. It belongs to the current CancelScope, if there is one."""

    def run(inputs: TokenInputs) -> Sequence[NDArray[Any]]:
        scope = current_scope() or CancelScope()
        with nullcontext() if deadline is None else cancelled_at(deadline, scope):
            return scope.call(partial(engine.run, lambda: engine.graphs().encode_tokens(inputs)))

    return run
