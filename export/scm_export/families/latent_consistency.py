"""The family ``latent-consistency``: latent consistency models (arXiv 2310.04378) from a folder of diffusers' LatentConsistencyModelPipeline.

The state is Stable Diffusion's, ``sqrt(alpha_t) latents + sqrt(1 - alpha_t) noise``. Times are training timesteps, which are integers; 0 is the end,
without noise. The text encoder is CLIP's.
"""

from __future__ import annotations

from scm_export.checkpoints import DiffusersFolder, Loaded
from scm_export.errors import CheckpointError
from scm_export.families.diffusers_networks import find_component, make_scheduler
from scm_export.families.family import BuildOptions, Family
from scm_export.families.few_step_model import few_step_model
from scm_export.families.few_step_schedulers import CLASSES
from scm_export.families.text_unets import UNET
from scm_export.model import Model

PIPELINES = ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline")
SCHEDULER = CLASSES["lcm"]
STEPS = (1, 2, 4, 8)


def recognizes_latent_consistency(loaded: Loaded) -> bool:
    if not isinstance(loaded, DiffusersFolder):
        return False
    return loaded.pipeline in PIPELINES or (loaded.find(SCHEDULER) is not None and loaded.find(UNET) is not None)


def build_latent_consistency(loaded: Loaded, options: BuildOptions) -> Model:
    """Build the Model of a folder of LatentConsistencyModelPipeline.

    Raises:
        CheckpointError: the folder holds another model, lacks a component, or its weights do not fit its configuration.
        InvalidArgumentError: the network cannot generate images of the requested size.
    """
    folder, component = find_component(loaded, "latent-consistency", UNET)
    scheduler = make_scheduler(folder, SCHEDULER)
    if folder.config(component).get("time_cond_proj_dim") is None:
        raise CheckpointError(
            f"the {UNET} of {folder.describe()} must have time_cond_proj_dim, the embedding of the guidance scale, as distilled U-Nets have; "
            "this one has none. A model for LCM-LoRA is exported with --family sd-distilled."
        )
    return few_step_model("latent-consistency", folder, component, ("lcm", scheduler), options, steps=STEPS)


FAMILY = Family(
    looks_for=f"a diffusers folder of {PIPELINES[0]}: a {UNET} with a {SCHEDULER}",
    recognizes=recognizes_latent_consistency,
    build=build_latent_consistency,
    takes_lora=True,
    dtype="fp16",
)
