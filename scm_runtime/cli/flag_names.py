"""Error messages name the arguments of Python functions. For a command line, this module puts the names of the flags in their place."""

from __future__ import annotations

import re

import click

ARGUMENTS = {"steps": "num_inference_steps", "labels": "class_labels"}  # arguments of options that have another name
ALSO_WORDS = {"prompt_embeds"}  # the name of an array in a file, too: a flag only at the beginning of a message


def with_flag_names(message: str, command: click.Command) -> str:
    """Replace names of arguments by the command's flags: at the beginning, in ``name='value'``, and elsewhere if the names cannot be English words."""
    for option in command.params:
        if not isinstance(option, click.Option) or option.name is None:
            continue
        name, flag = ARGUMENTS.get(option.name, option.name), option.opts[-1]
        if flag.startswith("--no-"):
            message = re.sub(rf"\b{name}=False\b", flag, message)
            continue
        if option.is_flag:
            message = re.sub(rf"\b{name}=True\b", flag, message)
            if option.secondary_opts:
                message = re.sub(rf"\b{name}=False\b", option.secondary_opts[-1], message)
        message = re.sub(rf"\b{name}='([^']*)'", rf"{flag} \1", message)
        is_word = ("_" not in name and name != "timesteps") or name in ALSO_WORDS
        message = re.sub(rf"(^|, ){name}(?=: \d)", rf"\1{flag}", message)  # in a list of lengths
        message = re.sub(rf"^{name}(?=[ :])" if is_word else rf"(?<![\w'-]){name}\b(?!=)", flag, message)
    return re.sub(r", or None( for [^,.;:]*)?(?=[,.;:])", "", message)
