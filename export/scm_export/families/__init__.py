"""Families of models: each turns a checkpoint into a :class:`~scm_export.model.Model`. How to add one: docs/adding-a-family.md."""

from scm_export.checkpoints import Loaded
from scm_export.errors import CheckpointError
from scm_export.families import consistency, edm2, latent_consistency, module, sana_sprint, sd_distilled
from scm_export.families.family import BuildOptions, Family
from scm_export.model import Model
from scm_runtime.common.memory import MORE_MEMORY, is_out_of_memory, out_of_memory_error
from scm_runtime.common.message_text import first_line
from scm_runtime.errors import InvalidArgumentError, ScmError

__all__ = ["FAMILIES", "BuildOptions", "Family", "build_model", "find_family"]

FAMILIES: dict[str, Family] = {
    "edm2": edm2.FAMILY,
    "sana-sprint": sana_sprint.FAMILY,
    "module": module.FAMILY,
    "consistency": consistency.FAMILY,
    "sd-distilled": sd_distilled.FAMILY,
    "latent-consistency": latent_consistency.FAMILY,
}


def find_family(loaded: Loaded, name: str | None = None) -> str:
    """Return the name of the family that a checkpoint belongs to: ``name`` if given, else the first family that recognizes it.

    Raises:
        InvalidArgumentError: there is no family of this name.
        CheckpointError: no family recognizes the checkpoint; the message lists what each family expects.
    """
    if name is not None:
        if name not in FAMILIES:
            raise InvalidArgumentError(f"family must be one of {', '.join(FAMILIES)}, got {name!r}")
        return name
    for known, family in FAMILIES.items():
        if family.recognizes(loaded):
            return known
    looked_for = "".join(f"\n  {known}: {family.looks_for}" for known, family in FAMILIES.items())
    raise CheckpointError(f"{loaded.describe()} belongs to no known family. Looked for:{looked_for}\n--family chooses one anyway.")


def build_model(loaded: Loaded, options: BuildOptions | None = None, family: str | None = None) -> Model:
    """Build the model of a checkpoint.

    Raises:
        CheckpointError: the checkpoint belongs to no family, or its configuration or weights do not fit its family.
        InvalidArgumentError: an option does not fit the model, or there is no such family.
        OutOfMemoryError: the model does not fit into memory.
    """
    name = find_family(loaded, family)
    try:
        return FAMILIES[name].build(loaded, options or BuildOptions())
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError, MemoryError) as error:
        if isinstance(error, ScmError):
            raise
        if is_out_of_memory(error):
            raise out_of_memory_error(f"the model of {loaded.describe()}", error, MORE_MEMORY) from error
        # Configurations have values of any type and size, which the classes of diffusers and torch check late or never.
        what = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(
            f"no model of the family {name} can be built from {loaded.describe()} ({what}). "
            "Check its configuration. If it is correct, this is a bug in scm-export: please report it."
        ) from error
