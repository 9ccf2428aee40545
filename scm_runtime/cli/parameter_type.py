"""The base class of our own types of command-line parameters: click's, for every click from 8.1 on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click import ParamType
else:

    class ParamType(click.ParamType):
        """``click.ParamType``, which can be subscripted only from click 8.4 on."""

        def __class_getitem__(cls, item: object) -> type[ParamType]:
            return cls


__all__ = ["ParamType"]
