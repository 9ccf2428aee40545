"""Error messages name the arguments of Python functions. For a command line, this module puts the names of the flags in their place."""

from __future__ import annotations

import re

import click

ARGUMENTS = {"steps": "num_inference_steps", "labels": "class_labels"}  # arguments of options that have another name
ALSO_WORDS = {"prompt_embeds"}  # the name of an array in a file, too: a flag only at the beginning of a message


QUOTED = re.compile(r"(?<!\w)('[^'\n]*'|\"[^\"\n]*\")")  # an apostrophe inside of a word opens no quotation


def with_flag_names(message: str, command: click.Command) -> str:
    """Replace names of arguments by the command's flags: at the beginning, in ``name='value'``, and elsewhere if the names cannot be English words.

    Other text in quotes, such as a path, stays as it is.
    """
    flags = [(ARGUMENTS.get(option.name, option.name), option) for option in command.params if isinstance(option, click.Option) and option.name is not None]
    for name, option in flags:
        message = re.sub(rf"\b{name}='([^']*)'", rf"{option.opts[-1]} \1", message)
    parts = QUOTED.split(message)
    for name, option in flags:
        parts[::2] = [_with_flag(part, name, option, is_first=i == 0) for i, part in enumerate(parts[::2])]
    return re.sub(r", or None( for [^,.;:]*)?(?=[,.;:])", "", "".join(parts))


def _with_flag(text: str, name: str, option: click.Option, *, is_first: bool) -> str:
    flag = option.opts[-1]
    if flag.startswith("--no-"):
        return re.sub(rf"\b{name}=False\b", flag, text)
    if option.is_flag:
        text = re.sub(rf"\b{name}=True\b", flag, text)
        if option.secondary_opts:
            text = re.sub(rf"\b{name}=False\b", option.secondary_opts[-1], text)
    text = re.sub(rf"(^|, ){name}(?=: \d)", rf"\1{flag}", text)  # in a list of lengths
    if ("_" not in name and name != "timesteps") or name in ALSO_WORDS:
        return re.sub(rf"^{name}(?=[ :])(?! of )", flag, text) if is_first else text  # not in "out of memory"
    return re.sub(rf"(?<![\w'-]){name}\b(?!=)", flag, text)
