"""The names of the image files that ``scm-runtime generate`` writes: the option ``-o``."""

from __future__ import annotations

import os
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scm_runtime.errors import InvalidArgumentError
from scm_runtime.samples import image_format_of

FIELDS = ("seed", "index")
NAME_IN_FOLDER = "{seed:06d}.png"


@dataclass(frozen=True)
class OutputPattern:
    """Where images are written to."""

    name: str
    """Path of one image file; or, if each sample gets a file, a format string with the fields ``seed`` and ``index``."""
    file_per_sample: bool
    shown: str
    """The option's value as the user wrote it."""

    @staticmethod
    def read(out: str) -> OutputPattern:
        """Parse a path, a path with {seed} or {index}, or a folder, which ends with a slash. Raises InvalidArgumentError."""
        if out.endswith("/"):
            return OutputPattern(out.replace("{", "{{").replace("}", "}}") + NAME_IN_FOLDER, file_per_sample=True, shown=out)
        try:
            parsed = [(name, form, conversion) for _, name, form, conversion in string.Formatter().parse(out) if name is not None]
            fields = {name for name, _, _ in parsed}
            integers = all(conversion is None and re.fullmatch(r"(0?[0-9]{1,2})?d?", form or "") for _, form, conversion in parsed)
        except ValueError:  # an unmatched brace
            fields, integers = {""}, True
        pattern = OutputPattern(out, bool(fields), out)
        try:
            if not fields <= set(FIELDS):
                raise ValueError(f"there is no field {{{min(fields - set(FIELDS))}}}")
            if not integers:  # two samples might get the same name
                raise ValueError("a field has a format that is not for integers")
            path = pattern.path(0, 0)
        except (LookupError, ValueError, AttributeError) as error:
            raise InvalidArgumentError(
                f"cannot name files by {out!r}: {error}. Use the fields {{seed}} and {{index}}, with formats for integers such as {{index:05d}}; "
                "write a literal brace twice."
            ) from error
        if os.path.isdir(out):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
            raise InvalidArgumentError(f"'{out}' is a folder. Name an image file in it, or write '{out}/' for one file per image.")
        if not path.suffix:
            raise InvalidArgumentError(
                f"'{out}' has no image file's ending. End it in .png or .jpg, for instance, or write '{out}/' for a folder with one file per image."
            )
        image_format_of(path)
        return pattern

    def path(self, index: int, seed: int) -> Path:
        """File of one sample; the file of all samples if there are no fields."""
        return Path(self.name.format(index=index, seed=seed))

    def check(self, seeds: Sequence[int]) -> None:
        """Raise InvalidArgumentError if two samples with these seeds would get the same file."""
        if self.file_per_sample and len({self.path(index, seed) for index, seed in enumerate(seeds)}) < len(seeds):
            raise InvalidArgumentError(
                f"seed has one value twice, and {self.path(0, seeds[0])} can hold one image: put {{index}} into the name, as in '{{index}}.png'"
            )
