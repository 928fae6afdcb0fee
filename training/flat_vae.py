"""The package's VAE for pictures alone: the same graph with 2-D convolutions, fit to be trained.

With a temporal factor of 1 a picture is one frame between two frames of zero padding, so of each 3x3x3 kernel only the
middle temporal tap ever meets a pixel. Training runs on that tap alone, a third of the arithmetic; `volumetric` puts it
back between zeros, and the package's own modules then compute the same numbers.
"""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from hunyuan3.config import VAEConfig
from hunyuan3.vae.autoencoder import Decoder, Encoder
from hunyuan3.vae.layers import NORM_EPS, NORM_GROUPS, Conv3d, GroupNorm


class FlatVAE(nn.Module):
    """The package's `Encoder` and `Decoder` with convolutions and norms exchanged for differentiable 2-D ones.

    Parameters are float32; convolutions, attention and the residual streams run in `compute`. Raises ValueError for a
    config with a temporal factor: there the outer taps act.
    """

    def __init__(self, config: VAEConfig, compute: torch.dtype = torch.float32) -> None:
        super().__init__()
        if config.ffactor_temporal != 1:
            raise ValueError(f"ffactor_temporal is {config.ffactor_temporal}; only a factor of 1 can be trained flat.")
        self.config = config
        self.compute = compute
        self.encoder = _flattened(Encoder(config), compute)
        self.decoder = _flattened(Decoder(config), compute)
        # The package keeps the decoder's stream in float32; memory traffic bounds training, so it is narrowed here.
        self.decoder.mid.block_1.register_forward_pre_hook(lambda _module, args: (args[0].to(compute),))
        for module in self.modules():
            if isinstance(module, FlatConv) and module.kernel_size == (3, 3):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
        for name, module in self.named_modules():
            if name.endswith((".conv2", ".proj_out")):  # a block begins as the identity
                nn.init.zeros_(module.weight)

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures `(B, 3, H, W)` in [-1, 1] -> mean and log-variance `(B, C, H / 16, W / 16)`, float32, unscaled."""
        mean, logvar = self.encoder(pixels[:, :, None])[:, :, 0].float().chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Unscaled latents `(B, C, h, w)` -> pictures `(B, 3, 16 h, 16 w)`, float32, nominally in [-1, 1]."""
        return self.decoder(latents[:, :, None])[:, :, 0].float()


class FlatConv(nn.Conv2d):
    """`layers.Conv3d` on a single frame: `(B, C, 1, H, W)` in and out, in the dtype `compute`."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, compute: torch.dtype) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        self.compute = compute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.to(self.compute), self.bias.to(self.compute)
        return F.conv2d(x.squeeze(2).to(self.compute), weight, bias, padding=self.padding).unsqueeze(2)


class FlatGroupNorm(nn.GroupNorm):
    """`layers.GroupNorm` as one fused call: statistics in float32, values in the dtype `compute`."""

    def __init__(self, channels: int, compute: torch.dtype) -> None:
        super().__init__(NORM_GROUPS, channels, eps=NORM_EPS)
        self.compute = compute

    def forward(self, x: torch.Tensor, _dtype: torch.dtype, swish: bool = False) -> torch.Tensor:
        h = F.group_norm(x.squeeze(2).to(self.compute), NORM_GROUPS, self.weight, self.bias, self.eps)
        return (F.silu(h) if swish else h).unsqueeze(2)


def volumetric(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A `FlatVAE`'s state as the package's 3-D modules take it: each 3x3 kernel as the middle of a 3x3x3 one."""
    return {name: _volumetric(tensor) if tensor.ndim == 4 else tensor for name, tensor in state.items()}


def _volumetric(kernel: torch.Tensor) -> torch.Tensor:
    depth = kernel.shape[-1]
    volume = kernel.new_zeros(*kernel.shape[:2], depth, depth, depth)
    volume[:, :, depth // 2] = kernel
    return volume


def _flattened(module: nn.Module, compute: torch.dtype) -> nn.Module:
    """The same module, its convolutions and norms exchanged in place."""
    for name, child in module.named_children():
        if isinstance(child, Conv3d):
            flat = FlatConv(child.in_channels, child.out_channels, child.kernel_size[0], compute)
            setattr(module, name, flat)
        elif isinstance(child, GroupNorm):
            setattr(module, name, FlatGroupNorm(child.num_channels, compute))
        else:
            _flattened(child, compute)
    return module
