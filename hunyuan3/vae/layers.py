"""Blocks of the VAE: residual, attention, and the space-to-depth resamplings with a shortcut (spec 9.1).

Shapes are `(B, C, T, H, W)`. Every convolution is 3-D, because the checkpoint is that of a video autoencoder.

Precision is decided by the parameters' dtype alone, without autocast (spec 7.5, 9.6). Convolutions and attention run
in the dtype of their weights; group norms and swish run in float32; sums follow torch's promotion. With float32
parameters all of this is plain float32, with float16 or bfloat16 ones it is the arithmetic that autocast would do.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

NORM_GROUPS = 32
NORM_EPS = 1e-6
# A group norm needs its input in float32. At 1024x1024 the last stage of the decoder holds 512 M values, so the
# float32 copies are made for an eighth of the groups at a time. Groups are independent: the result is the same.
NORM_PARTS = 8


class Conv3d(nn.Conv3d):
    """A same-size convolution (odd kernel, zero padding) that runs in the dtype of its weight."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class GroupNorm(nn.GroupNorm):
    """Group norm over `(C / 32, T, H, W)`, computed in float32, optionally followed by swish (`x * sigmoid(x)`)."""

    def __init__(self, channels: int) -> None:
        super().__init__(NORM_GROUPS, channels, eps=NORM_EPS)

    def forward(self, x: Tensor, dtype: torch.dtype, swish: bool = False) -> Tensor:
        """`x (B, C, T, H, W)` of any float dtype -> the same shape, rounded to `dtype` at the very end."""
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        for x_part, out_part, weight, bias in zip(
            x.chunk(NORM_PARTS, 1),
            out.chunk(NORM_PARTS, 1),
            self.weight.chunk(NORM_PARTS),
            self.bias.chunk(NORM_PARTS),
            strict=True,
        ):
            h = F.group_norm(x_part.float(), NORM_GROUPS // NORM_PARTS, weight.float(), bias.float(), self.eps)
            out_part.copy_(F.silu(h, inplace=True) if swish else h)
        return out


class ResnetBlock(nn.Module):
    """`x + conv2(swish(norm2(conv1(swish(norm1(x))))))`.

    A change of width would need a `nin_shortcut`; no level of this architecture changes width inside a block.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(channels)
        self.conv1 = Conv3d(channels, channels)
        self.norm2 = GroupNorm(channels)
        self.conv2 = Conv3d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, T, H, W)` -> the same shape, in the wider of the dtypes of `x` and the weights."""
        h = self.norm1(x, self.conv1.weight.dtype, swish=True)
        h = self.conv1(h)
        h = self.norm2(h, self.conv2.weight.dtype, swish=True)
        h = self.conv2(h)
        return x + h


class AttnBlock(nn.Module):
    """Single-head attention of every position of every frame to all of them (scale `C ** -0.5`), with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)
        self.q = Conv3d(channels, channels, kernel=1)
        self.k = Conv3d(channels, channels, kernel=1)
        self.v = Conv3d(channels, channels, kernel=1)
        self.proj_out = Conv3d(channels, channels, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, T, H, W)` -> the same shape, in the wider of the dtypes of `x` and the weights."""
        t, h, w = x.shape[2:]
        normed = self.norm(x, self.q.weight.dtype)
        q, k, v = (rearrange(project(normed), "b c t h w -> b 1 (t h w) c") for project in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)  # (B, 1, T*H*W, C)
        out = rearrange(out, "b 1 (t h w) c -> b c t h w", t=t, h=h, w=w)
        return x + self.proj_out(out)


class Downsample(nn.Module):
    """Halves height and width (and time): a convolution and a shortcut, both packed by space-to-depth.

    `factor = 4` positions (8 with time) become channels in the order `(r_t, r_h, r_w, c)`, `c` fastest. The shortcut
    packs the input itself and averages runs of `in * factor / out` consecutive channels.
    """

    def __init__(self, in_channels: int, out_channels: int, temporal: bool) -> None:
        super().__init__()
        self.strides = {"rt": 2 if temporal else 1, "rh": 2, "rw": 2}
        factor = 8 if temporal else 4
        assert out_channels % factor == 0 and in_channels * factor % out_channels == 0
        self.run = in_channels * factor // out_channels
        self.conv = Conv3d(in_channels, out_channels // factor)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in, T, H, W)` -> `(B, out, T / rt, H / 2, W / 2)`."""
        h = rearrange(self.conv(x), "b c (t rt) (h rh) (w rw) -> b (rt rh rw c) t h w", **self.strides)
        pattern = "b (c run) (t rt) (h rh) (w rw) -> b (rt rh rw c) t h w"
        return h + reduce(x, pattern, "mean", run=self.run, **self.strides)


class Upsample(nn.Module):
    """Doubles height and width (and time): a convolution and a shortcut, both unpacked by depth-to-space.

    The inverse packing of `Downsample`. The shortcut repeats each input channel `factor * out / in` times first;
    here it is added before the unpacking, by broadcasting, so that the repeated input never exists.
    """

    def __init__(self, in_channels: int, out_channels: int, temporal: bool) -> None:
        super().__init__()
        self.strides = {"rt": 2 if temporal else 1, "rh": 2, "rw": 2}
        factor = 8 if temporal else 4
        assert in_channels % factor == 0 and out_channels * factor % in_channels == 0
        self.run = out_channels * factor // in_channels
        self.conv = Conv3d(in_channels, out_channels * factor)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in, T, H, W)` -> `(B, out, T * rt, H * 2, W * 2)`."""
        h = rearrange(self.conv(x), "b (c run) t h w -> b c run t h w", run=self.run)
        h = h + x[:, :, None]  # (B, in, run, T, H, W)
        return rearrange(h, "b (rt rh rw c) run t h w -> b (c run) (t rt) (h rh) (w rw)", **self.strides)
