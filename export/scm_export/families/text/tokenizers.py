"""Reads the tokenizer of a folder with transformers' class, and converts it to the format of Hugging Face's tokenizers."""

from __future__ import annotations

from typing import Any

from scm_export.checkpoints import DiffusersFolder
from scm_export.errors import CheckpointError
from scm_export.families.diffusers_networks import quiet
from scm_export.families.text.encoders import WITHOUT_TEXT, check_class, import_transformers
from scm_runtime.bundle.text_spec import TextTokenizer
from scm_runtime.common.message_text import first_line

# All files that transformers' tokenizers read.
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "spiece.model"),
)
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")  # read tokenizer.json as it is


def read_tokenizer(folder: DiffusersFolder, component: str, classes: tuple[str, ...]) -> Any:
    """Create the tokenizer of a component, an instance of transformers' class that the folder names.

    Args:
        folder: holds the component.
        component: such as ``tokenizer_2``.
        classes: names of the classes that are allowed, besides the generic ones.

    Raises:
        CheckpointError: the class is another one, its files are missing or damaged, or it has no padding token.
        MissingDependencyError: transformers is not installed.
    """
    name = check_class(folder, component, (*classes, *GENERIC))
    transformers, path = import_transformers(), folder.path / component
    found = folder.files(component, FILES)
    if not set(found) & {path / file for file in ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model")}:
        raise CheckpointError(f"'{path}' has no vocabulary: expected tokenizer.json, vocab.json or spiece.model. Download the folder again. {WITHOUT_TEXT}")
    try:
        with quiet("transformers"):
            tokenizer = getattr(transformers, name).from_pretrained(path, local_files_only=True, trust_remote_code=False)
            tokenizer.padding_side = "right"
            tokenizer.backend_tokenizer.to_str()
    except Exception as error:
        raise CheckpointError(f"transformers {transformers.__version__} cannot read the tokenizer in '{path}': {first_line(error)}. {WITHOUT_TEXT}") from error
    if tokenizer.pad_token_id is None:
        raise CheckpointError(f"the tokenizer in '{path}' has no padding token. Download the folder again. {WITHOUT_TEXT}")
    return tokenizer


def tokenizers_file(tokenizer: Any) -> bytes:
    """Return the contents of ``tokenizer.json``, without truncation and padding: the manifest has those."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend.to_str(pretty=False).encode()


def describe_tokenizer(tokenizer: Any, vocab_size: int, file: str, input_ids: str, max_length: int, **options: Any) -> TextTokenizer:
    """Describe a tokenizer for the manifest.

    Args:
        tokenizer: from :func:`read_tokenizer`.
        vocab_size: rows of the encoder's embedding.
        file: name of the tokenizer's file in the bundle.
        input_ids: name of the input of the text graph.
        max_length: tokens per prompt.
        options: further fields of :class:`~scm_runtime.bundle.manifest.TextTokenizer`.

    Raises:
        CheckpointError: the tokenizer has ids that the encoder does not.
    """
    largest = max((*tokenizer.get_vocab().values(), tokenizer.pad_token_id))
    if largest >= vocab_size:
        raise CheckpointError(
            f"the tokenizer in '{tokenizer.name_or_path}' has ids up to {largest}, its text encoder only {vocab_size} embeddings: they belong to different "
            f"models. Download the folder again. {WITHOUT_TEXT}"
        )
    return TextTokenizer(
        file=file,
        input_ids=input_ids,
        max_length=max_length,
        pad_token_id=int(tokenizer.pad_token_id),
        padding_side="right",
        vocab_size=vocab_size,
        **options,
    )


def tokenize(tokenizer: Any, prompts: list[str], max_length: int) -> Any:
    """Tokenize as diffusers' pipelines do. Returns ``input_ids`` and ``attention_mask``, int64 ``[N, max_length]``."""
    return tokenizer(prompts, padding="max_length", max_length=max_length, truncation=True, add_special_tokens=True, return_tensors="pt")
