"""The text encoder of a model, with what the user should know if there is none."""

from __future__ import annotations

from collections.abc import Callable

from scm_export.families.family import BuildOptions
from scm_export.model import TextEncoder

NOTE = "the checkpoint has no text encoder: the bundle takes prompt_embeds, not prompts"


def read_text_encoder(options: BuildOptions, read: Callable[[], TextEncoder | None]) -> tuple[TextEncoder | None, tuple[str, ...]]:
    """Read the text encoder unless the options leave it out.

    Args:
        options: of the user.
        read: returns the encoder, or None if the checkpoint has none.

    Returns:
        The encoder or None, and the notes for :class:`~scm_export.model.Model`.

    Raises:
        Errors of ``read``.
    """
    if not options.text:
        return None, ()
    text = read()
    return text, () if text is not None else (NOTE,)
