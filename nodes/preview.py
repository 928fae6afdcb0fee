"""The picture that shows while it is drawn: the predicted clean latent through one small linear map."""

import json
import logging
from pathlib import Path

import comfy.model_management as mm
import folder_paths
import latent_preview
import torch
from comfy.latent_formats import LatentFormat

from ..hunyuan3.errors import OutOfBudgetError
from ..hunyuan3.placement.out_of_memory import is_out_of_memory, let_go
from ..hunyuan3.vae.preview import PreviewFactors, fit_preview
from .io_types import ModelHandle
from .memory import bring_to_device
from .progress import NodeProgress, check_cancelled

_log = logging.getLogger(__name__)

PREVIEW_MODES = ("auto", "off")
_ENLARGED = 4  # a latent pixel stands for 16 x 16 pixels; a page shows previews at their own size

PreviewImage = tuple[str, object, int]
"""What ComfyUI's progress hook takes: (format, PIL picture, largest side)."""


class StepPreviewer:
    """Makes a preview of each step: with the method that ComfyUI was started with, else with our own map.

    Once memory has run out for one, the run goes on without.
    """

    def __init__(self, model: ModelHandle, factors: PreviewFactors) -> None:
        self.vae = model.model.folder.config.vae
        latent_format = _latent_format(self.vae.latent_channels, factors)
        chosen = latent_preview.get_previewer(model.model.options.device, latent_format)
        self.previewer = chosen or latent_preview.Latent2RGBPreviewer(
            latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias
        )
        self.off = False

    def __call__(self, predicted_clean: torch.Tensor) -> PreviewImage | None:
        """Predicted clean latents (B, C, h, w), scaled -> a preview of the first; None when there are none any more."""
        if self.off:
            return None
        try:
            return self._preview(predicted_clean)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            _log.warning("Hunyuan Image 3: out of memory for a preview, the run goes on without (%s)", error)
            let_go(error)
        self.off = True
        mm.soft_empty_cache()
        return None

    def _preview(self, predicted_clean: torch.Tensor) -> PreviewImage:
        latents = self.vae.unscale(predicted_clean[:1].float())
        kind, picture, largest = self.previewer.decode_latent_to_preview_image("JPEG", latents)
        side = max(picture.size)
        if side * _ENLARGED <= largest:
            picture = picture.resize((picture.width * _ENLARGED, picture.height * _ENLARGED))
        return kind, picture, largest


def previewer_for(model: ModelHandle, mode: str, progress: NodeProgress) -> StepPreviewer | None:
    """The previewer of a run, or None when previews are off or there is no memory to prepare them.

    Fits the map the first time a VAE is met.
    """
    if mode == "off":
        return None
    try:
        return _previewer(model, progress)
    except Exception as error:
        # OutOfBudgetError: memory ran out twice for the VAE's weights. When it comes to decoding, more will be free.
        if not is_out_of_memory(error) and not isinstance(error, OutOfBudgetError):
            raise
        _log.warning("Hunyuan Image 3: no memory to prepare previews, the run goes without (%s)", error)
        let_go(error)
    mm.soft_empty_cache()
    return None


def _previewer(model: ModelHandle, progress: NodeProgress) -> StepPreviewer:
    path = Path(folder_paths.get_user_directory()) / "hunyuan3" / "previews" / f"{model.model.vae_fingerprint()}.json"
    factors = _read(path, model.model.folder.config.vae.latent_channels)
    if factors is None:
        bring_to_device(model.vae, 0, progress)
        progress.text("prepare previews (once per VAE)")
        factors = fit_preview(model.model.vae(), check_cancelled)
        _write(path, factors)
    return StepPreviewer(model, factors)


def _latent_format(channels: int, factors: PreviewFactors) -> LatentFormat:
    """Our latents (unscaled) as ComfyUI's preview code wants them described."""
    latent_format = LatentFormat()
    latent_format.latent_channels = channels
    latent_format.latent_rgb_factors = factors.weight.tolist()
    latent_format.latent_rgb_factors_bias = factors.bias.tolist()
    return latent_format


def _read(path: Path, channels: int) -> PreviewFactors | None:
    """The factors kept in a file; None if there are none yet or the file is damaged: they are fitted again."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        factors = PreviewFactors(torch.tensor(data["weight"]), torch.tensor(data["bias"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    fits = factors.weight.shape == (channels, 3) and factors.bias.shape == (3,)
    return factors if fits else None


def _write(path: Path, factors: PreviewFactors) -> None:
    """Keeps the factors for the next time. A drawing does not fail for want of a place to do so."""
    data = {"weight": factors.weight.tolist(), "bias": factors.bias.tolist()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data), encoding="utf-8")
    except OSError as error:
        _log.warning("Hunyuan Image 3: previews are prepared again next time, %s cannot be written (%s)", path, error)
