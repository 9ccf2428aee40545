"""The paper model: what a step of an EDM2 network costs on a GPU, from its layers and published figures of the GPU. Nothing is measured."""
