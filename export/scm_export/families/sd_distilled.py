"""The family ``sd-distilled``: Stable Diffusion 1.x, 2.x and XL distilled to one to eight steps, with the scheduler that its model card names.

SD-Turbo and SDXL-Turbo, SDXL-Lightning, Hyper-SD, DMD2, PCM, TCD, and LCM-LoRA merged into the weights: folders of diffusers' StableDiffusionPipeline and
StableDiffusionXLPipeline, folders of a U-Net, and ``.safetensors`` files in the original layout of Stable Diffusion.
"""

from __future__ import annotations

from typing import Any

from scm_export.checkpoints import DiffusersFolder, Loaded
from scm_export.choices import SCHEDULER_NAMES, SchedulerName
from scm_export.errors import CheckpointError
from scm_export.families.diffusers_networks import find_component, scheduler_from_config
from scm_export.families.family import BuildOptions, Family
from scm_export.families.few_step_model import few_step_model
from scm_export.families.few_step_schedulers import CLASSES
from scm_export.families.text_unets import TIME_IDS, UNET
from scm_export.model import Model

NAME = "sd-distilled"
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")

# Settings of the schedulers that Stable Diffusion was trained with, for checkpoints without a scheduler.
TRAINING = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def recognizes_sd_distilled(loaded: Loaded) -> bool:
    return isinstance(loaded, DiffusersFolder) and loaded.pipeline in (*PIPELINES, "") and loaded.find(UNET) is not None


def build_sd_distilled(loaded: Loaded, options: BuildOptions) -> Model:
    """Build the Model of a Stable Diffusion U-Net with a scheduler for few steps.

    Raises:
        CheckpointError: the checkpoint holds another model, lacks a component, or its weights do not fit its configuration.
        InvalidArgumentError: the network cannot generate images of the requested size.
    """
    folder, component = find_component(loaded, NAME, UNET)
    _check_refiner(folder, component)
    return few_step_model(NAME, folder, component, _make_scheduler(folder, options), options, added=(None, "text_time"))


def _make_scheduler(folder: DiffusersFolder, options: BuildOptions) -> tuple[SchedulerName, Any]:
    """Return the scheduler that the options name, with the settings of the folder's as far as it has them; else the folder's own. Raises CheckpointError."""
    found = folder.classes.get("scheduler")
    name = options.scheduler or next((name for name, kind in CLASSES.items() if kind == found), None)
    if name is None:
        what = "has no scheduler" if found is None else f"has a {found}, which is not for few steps"
        raise CheckpointError(f"{folder.describe()} {what}. Give the one that the model card names with --scheduler {'|'.join(SCHEDULER_NAMES)}.")
    config = TRAINING if found is None else folder.config("scheduler")
    if options.scheduler in ("euler", "euler-ancestral", "ddim"):
        config = {**config, "timestep_spacing": "trailing"}
    if options.scheduler == "ddim":
        config = {"clip_sample": False, **config}  # DDIMScheduler's default is for pixels
    if options.prediction_type is not None:
        config = {**config, "prediction_type": options.prediction_type}
    return name, scheduler_from_config(folder, CLASSES[name], config)


REFINER_POOLED = 1280  # of SDXL's refiner, which has five time_ids


def _check_refiner(folder: DiffusersFolder, component: str) -> None:
    """Raise CheckpointError for SDXL's refiner, whose time_ids are others."""
    config, encoder = folder.config(component), folder.find("CLIPTextModelWithProjection")
    if config.get("addition_embed_type") != "text_time":
        return
    inputs, feature = config.get("projection_class_embeddings_input_dim"), config.get("addition_time_embed_dim") or 0
    sizes = TIME_IDS * feature
    # Without an encoder, the refiner is known by the sizes of its inputs.
    projected = folder.config(encoder).get("projection_dim") if encoder is not None else inputs if inputs == REFINER_POOLED + 5 * feature else None
    if folder.index.get("requires_aesthetics_score") or (projected is not None and projected + sizes != inputs):
        raise CheckpointError(
            f"the {UNET} of {folder.describe()} must have {TIME_IDS} time_ids, as in StableDiffusionXLPipeline. SDXL's refiner has others: it is not supported."
        )


FAMILY = Family(
    looks_for=f"a diffusers folder of {' or '.join(PIPELINES)}, or a .safetensors file in the original layout: a {UNET}",
    recognizes=recognizes_sd_distilled,
    build=build_sd_distilled,
    dtype="fp16",
    takes_lora=True,
)
