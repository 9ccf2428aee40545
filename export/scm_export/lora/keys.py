"""The names of tensors in LoRA files: kohya's, PEFT's and diffusers' layouts.

====================  ==================================================================================
kohya                 ``lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight``, ``….alpha``
PEFT                  ``base_model.model.down_blocks.0.attentions.0.proj_in.lora_A.weight``
diffusers             ``unet.down_blocks.0.attentions.0.proj_in.lora_A.weight`` or ``….lora.down.weight``
diffusers until 0.21  ``unet.….attn1.processor.to_q_lora.down.weight``
====================  ==================================================================================
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Component = Literal["denoiser", "text_encoder", "text_encoder_2"]
DENOISER: Component = "denoiser"
TEXT_ENCODER: Component = "text_encoder"
TEXT_ENCODER_2: Component = "text_encoder_2"
COMPONENTS: tuple[Component, ...] = (DENOISER, TEXT_ENCODER, TEXT_ENCODER_2)

PEFT_MODEL = "base_model.model."
PREFIXES: dict[str, Component] = {
    "lora_unet_": DENOISER,
    "lora_transformer_": DENOISER,
    "lora_te_": TEXT_ENCODER,
    "lora_te1_": TEXT_ENCODER,
    "lora_te2_": TEXT_ENCODER_2,
    "unet.": DENOISER,
    "transformer.": DENOISER,
    "diffusion_model.": DENOISER,
    "text_encoder.": TEXT_ENCODER,
    "text_encoder_2.": TEXT_ENCODER_2,
}

_LORA = r"(?:[._]lora(?:_linear_layer)?)"
_FACTOR = re.compile(rf"(?P<layer>.+?){_LORA}[._](?P<factor>A|B|down|up)(?:\.\w+)?\.weight")  # PEFT may add the adapter's name, "default"
_ALPHA = re.compile(rf"(?P<layer>.+?){_LORA}?\.alpha")
_DORA = re.compile(r".+\.(?:dora_scale|lora_magnitude_vector)(?:\..+)?")
_OTHER_METHOD = re.compile(r".+\.(?:hada_w|lokr_w|lora_mid|oft_|diff|w_norm|b_norm|lora_embedding_|lora_B\b.*\.bias)")


class Key(NamedTuple):
    """What a tensor's name says."""

    component: Component
    layer: str
    """Name of the layer in its network, with dots or, in kohya's layout, underscores."""
    role: Literal["down", "up", "alpha"]


def parse_key(name: str) -> Key:
    """Split the name of a tensor.

    Raises:
        ValueError: it is in no known layout, or of another method than LoRA.
    """
    if _DORA.fullmatch(name):
        raise ValueError("belongs to DoRA, which is not supported. Merge the file into the model with the program that made it, or train it without DoRA")
    if (found := _FACTOR.fullmatch(name)) is not None:
        role: Literal["down", "up", "alpha"] = "down" if found["factor"] in ("A", "down") else "up"
    elif (found := _ALPHA.fullmatch(name)) is not None:
        role = "alpha"
    elif _OTHER_METHOD.match(name):
        raise ValueError("is not a factor of a LoRA: LoHa, LoKr, OFT, Tucker decompositions, and changes of embeddings, biases or norms are not supported")
    else:
        raise ValueError("is not a name in the layouts of kohya, PEFT or diffusers, such as 'unet.….to_q.lora_A.weight'")
    component, layer = split_component(found["layer"])
    return Key(component, layer, role)


def split_component(name: str) -> tuple[Component, str]:
    """Remove the prefix of the component from a layer's name. Without a prefix, it is the denoising network's unless it begins as a text encoder's."""
    name = name.removeprefix(PEFT_MODEL)
    for prefix, component in PREFIXES.items():
        if name.startswith(prefix):
            return component, name.removeprefix(prefix)
    return (TEXT_ENCODER if name.startswith("text_model.") else DENOISER), name
