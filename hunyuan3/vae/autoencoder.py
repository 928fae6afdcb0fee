"""`AutoencoderKLConv3D`: pixels to latents and back, 16x16 pixels to one latent position (spec 9.2-9.6).

A picture is a video of one frame: encoding repeats it `ffactor_temporal` times and finds one latent frame, decoding
one latent frame gives as many pictures, of which the last one counts. All of them must be computed: the group norms
take their statistics over time, so no frame can be left out without changing the others.

Pictures of a batch go through one by one, which bounds memory and is what the reference does. Module names are those
of the checkpoint without the leading `vae.`. What was left out: the reference's splitting of convolutions larger than
2 GiB (`tile_size` serves the same end) and its multi-process decoder.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from einops import reduce, repeat
from torch import Tensor, nn

from ..callbacks import CheckCancelled, never_cancelled
from ..config import VAEConfig
from ..errors import RequestError
from .layers import AttnBlock, Conv3d, Downsample, GroupNorm, ResnetBlock, Upsample
from .tiling import Tiling, tiled_decode, tiled_encode


@dataclass(frozen=True)
class Posterior:
    """The diagonal Gaussian an encoder found, in the dtype of its parameters.

    Attributes:
        mean: `(B, C, h, w)`.
        logvar: `(B, C, h, w)`, within [-30, 20].
    """

    mean: Tensor
    logvar: Tensor

    def mode(self) -> Tensor:
        """`(B, C, h, w)`: the mean."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """`mean + exp(logvar / 2) * eps`, `(B, C, h, w)` float32 (spec 9.5).

        `eps` is drawn picture by picture, in the dtype of the mean and on the generator's device: both decide the
        numbers that a seed gives. Without a generator torch's global one is used.
        """
        shape = (1, *self.mean.shape[1:])
        device = self.mean.device if generator is None else generator.device
        draws = [torch.randn(shape, generator=generator, dtype=self.mean.dtype, device=device) for _ in self.mean]
        eps = torch.cat(draws).to(self.mean.device)
        std = torch.exp(0.5 * self.logvar.float())
        return self.mean + std * eps


class AutoencoderKLConv3D(nn.Module):
    """The autoencoder. The dtype of its parameters is the dtype of its arithmetic, see `layers`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @torch.no_grad()
    def encode(
        self, pixels: Tensor, *, tile_size: int | None = None, check_cancelled: CheckCancelled = never_cancelled
    ) -> Posterior:
        """Pictures `(B, 3, H, W)` in [-1, 1] -> the distribution of their (unscaled) latents, `h = H / 16`.

        With a `tile_size` in pixels (`config.sample_size` is the published one) larger pictures are encoded in
        overlapping tiles; this changes the numbers. Raises RequestError for sizes that are not a multiple of 16.
        """
        height, width = pixels.shape[-2:]
        factor = self.config.ffactor_spatial
        if height % factor or width % factor:
            raise RequestError(
                f"The VAE encodes sizes that are multiples of {factor}; this picture is {height}x{width}."
            )

        def moments(picture: Tensor) -> Tensor:
            frames = repeat(picture, "b c h w -> b c t h w", t=self.config.ffactor_temporal)
            return self.encoder(frames, check_cancelled)[:, :, 0]  # (1, 2 * C, h, w)

        if tile_size is None:
            found = [moments(picture) for picture in pixels.split(1)]
        else:
            tiling = Tiling.of_pixels(tile_size, factor)
            found = [tiled_encode(moments, picture, tiling, check_cancelled) for picture in pixels.split(1)]
        mean, logvar = torch.cat(found).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    @torch.no_grad()
    def decode(
        self, latents: Tensor, *, tile_size: int | None = None, check_cancelled: CheckCancelled = never_cancelled
    ) -> Tensor:
        """Unscaled latents `(B, C, h, w)` -> pictures `(B, 3, 16 h, 16 w)`, nominally in [-1, 1], not clamped.

        The result has the dtype of the parameters. `tile_size` as for `encode`.
        """

        def picture(z: Tensor) -> Tensor:
            return self.decoder(z[:, :, None], check_cancelled)[:, :, -1]  # (1, 3, H, W)

        if tile_size is None:
            return torch.cat([picture(z) for z in latents.split(1)])
        tiling = Tiling.of_pixels(tile_size, self.config.ffactor_spatial)
        return torch.cat([tiled_decode(picture, z, tiling, check_cancelled) for z in latents.split(1)])


class Encoder(nn.Module):
    """Frames -> mean and log-variance of the latents, as channels."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        spatial, temporal = _halvings(config)
        self.moments = 2 * config.latent_channels
        self.conv_in = Conv3d(config.in_channels, widths[0])
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            wider = widths[min(level + 1, len(widths) - 1)]
            last = level >= spatial
            resample = None if last else Downsample(width, wider, temporal=level >= spatial - temporal)
            self.down.append(Level(width, config.layers_per_block, downsample=resample))
        self.mid = Mid(widths[-1])
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = Conv3d(widths[-1], self.moments)

    def forward(self, frames: Tensor, check_cancelled: CheckCancelled = never_cancelled) -> Tensor:
        """`(B, 3, T, H, W)` -> `(B, 2 * C, T / 4, H / 16, W / 16)`, in the dtype of the parameters.

        1. Convolve in; 2. every level: blocks, then halve; 3. middle; 4. norm, swish, convolve out; 5. add the
        features before the norm, averaged over runs of channels.
        """
        x = self.conv_in(frames)
        for block in (*_blocks(self.down), *self.mid.children()):
            check_cancelled()
            x = block(x)
        h = self.conv_out(self.norm_out(x, self.conv_out.weight.dtype, swish=True))
        return h + reduce(x, "b (c run) t h w -> b c t h w", "mean", c=self.moments)


class Decoder(nn.Module):
    """Latents -> frames. Level 0 is the deepest."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        spatial, temporal = _halvings(config)
        self.run = widths[0] // config.latent_channels
        self.conv_in = Conv3d(config.latent_channels, widths[0])
        self.mid = Mid(widths[0])
        self.up = nn.ModuleList()
        for level, width in enumerate(widths):
            narrower = widths[min(level + 1, len(widths) - 1)]
            resample = Upsample(width, narrower, temporal=level < temporal) if level < spatial else None
            self.up.append(Level(width, config.layers_per_block + 1, upsample=resample))
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = Conv3d(widths[-1], config.out_channels)

    def forward(self, z: Tensor, check_cancelled: CheckCancelled = never_cancelled) -> Tensor:
        """`(B, C, T, h, w)` -> `(B, 3, 4 T, 16 h, 16 w)`, in the dtype of the parameters.

        1. Convolve in and add the repeated latents, in float32: this makes the whole residual stream float32, an
        all-float16 one can overflow (spec 9.6); 2. middle; 3. every level: blocks, then double; 4. norm, swish,
        convolve out.
        """
        x = self.conv_in(z) + repeat(z.float(), "b c t h w -> b (c run) t h w", run=self.run)
        for block in (*self.mid.children(), *_blocks(self.up)):
            check_cancelled()
            x = block(x)
        return self.conv_out(self.norm_out(x, self.conv_out.weight.dtype, swish=True))


class Level(nn.Module):
    """The blocks of one resolution, then the way to the next, if there is one.

    Like `Mid` it only gives names to its blocks. `Encoder` and `Decoder` run them: a forward here would keep its
    input alive (2 GiB in the last level at 1024x1024) while its blocks have long gone on.
    """

    def __init__(
        self, width: int, blocks: int, downsample: Downsample | None = None, upsample: Upsample | None = None
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(width) for _ in range(blocks))
        self.downsample = downsample
        self.upsample = upsample


class Mid(nn.Module):
    """The middle: block, attention, block, in the order of registration."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(width)
        self.attn_1 = AttnBlock(width)
        self.block_2 = ResnetBlock(width)


def _blocks(levels: Iterable[Level]) -> Iterator[nn.Module]:
    """The blocks of all levels in the order in which they run."""
    for level in levels:
        yield from level.block
        yield from (resample for resample in (level.downsample, level.upsample) if resample is not None)


def _halvings(config: VAEConfig) -> tuple[int, int]:
    """How often the encoder halves height and width, and time."""
    return config.ffactor_spatial.bit_length() - 1, config.ffactor_temporal.bit_length() - 1
