"""ComfyUI's IMAGE tensors as the core's pictures."""

import torch
from PIL import Image

from ..hunyuan3.errors import RequestError


def pictures_of(image: torch.Tensor, name: str) -> list[Image.Image]:
    """IMAGE (B, H, W, 3 or 4) in [0, 1] -> B upright RGB pictures; an alpha channel is dropped.

    Raises RequestError naming the input if it is empty or holds numbers that are not finite.
    """
    if image.ndim != 4 or image.shape[-1] not in (3, 4) or not image.numel():
        raise RequestError(
            f"{name} has the shape {list(image.shape)}; an IMAGE is [batch, height, width, 3], not empty."
        )
    if not torch.isfinite(image).all():
        raise RequestError(f"{name} holds numbers that are not finite (NaN or infinity).")
    pixels = (image[..., :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    return [Image.fromarray(picture.numpy()) for picture in pixels]
