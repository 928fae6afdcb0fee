"""HunyuanImage-3.0's transformer: text in and out as tokens, pictures in and out as latents, one stack for both.

B rows, T positions, D hidden size, C latent channels, h x w latent grid. Rows of one call share their geometry
(spec 4.6: the unconditional row is as long as the conditional one), so positions and attention runs are given once.
"""

from collections.abc import Callable

import torch
from torch import nn

from ..config import ModelConfig
from ..ops.attention import AttentionPlan
from ..types import Grid
from .block import Block
from .kv_cache import KVCache
from .layers import RMSNorm, TimestepEmbedder
from .patch import FinalLayer, PatchEmbed

OnLayer = Callable[[int, torch.Tensor], None]
"""Called with (layer index, its input) before each layer, and once more with (num_layers, the stack's output)."""


class Hunyuan3Transformer(nn.Module):
    """The decoder stack with its embedders and heads; knows nothing of files, tokenizers or loops.

    All on one device, or with runs of layers on others (`layer_devices`); everything that is not in a layer is on the
    first.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        size, channels = config.hidden_size, config.vae.latent_channels
        self.wte = nn.Embedding(config.vocab_size, size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.ln_f = RMSNorm(size, config.rms_norm_eps)
        self.lm_head = nn.Linear(size, config.vocab_size, bias=False)

        self.patch_embed = PatchEmbed(channels, config.patch_embed_hidden_dim, size)
        self.final_layer = FinalLayer(size, config.patch_embed_hidden_dim, channels)
        self.time_embed = TimestepEmbedder(size)  # modulates patch_embed
        self.time_embed_2 = TimestepEmbedder(size)  # modulates final_layer
        self.timestep_emb = TimestepEmbedder(size)  # fills <timestep> tokens
        self.guidance_emb = TimestepEmbedder(size) if config.cfg_distilled else None  # fills <guidance>
        self.timestep_r_emb = TimestepEmbedder(size) if config.use_meanflow else None  # fills <timestep_r>
        self.layer_devices: tuple[torch.device, ...] | None = None  # by layer; None: all where the rest is

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the residual stream."""
        return self.wte.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    @property
    def drops_tokens(self) -> bool:
        """Whether rows compete for room at the experts (the reference's capacity rule), so that batches matter."""
        return any(layer.mlp.drop_tokens for layer in self.layers)

    def forward(
        self,
        x: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        plan: AttentionPlan,
        cache: KVCache,
        on_layer: OnLayer | None = None,
    ) -> torch.Tensor:
        """The stack: embedded tokens (B, T, D) -> residual stream (B, T, D), not normalised.

        Args:
            x: the tokens at the T positions of `plan`.
            rope: (cos, sin), each (T, head_dim), of these positions.
            plan: which keys each of them sees; everything before the plan's start is in the cache already.
            cache: read, and written at these positions.
            on_layer: sees the stream between layers, on the device that computed it; may raise to stop (the cache is
                then of no further use).
        """
        here = home = self.layer_devices and self.layer_devices[0]
        for index, layer in enumerate(self.layers):
            if on_layer is not None:
                on_layer(index, x)
            if home and self.layer_devices[index] != here:
                here = self.layer_devices[index]
                x, rope = x.to(here), (rope[0].to(here), rope[1].to(here))
            x = layer(x, rope, plan, cache)
        if here != home:
            x = x.to(home)
        if on_layer is not None:
            on_layer(len(self.layers), x)
        return x

    def embed_latents(self, latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) at time t (B or 1,) in 0..1000 -> tokens (B, h * w, D)."""
        return self.patch_embed(latents, self.time_embed(t))

    def velocity(self, x: torch.Tensor, t: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Picture tokens of the residual stream (B, h * w, D) -> velocity (B, C, h, w), float32."""
        return self.final_layer(x, self.time_embed_2(t), grid).float()

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Residual stream (B, D) of one position per row -> (B, vocab_size) float32, rounded to the model's dtype."""
        return self.lm_head(self.ln_f(x)).float()

    def new_cache(self, rows: int, length: int) -> KVCache:
        """An empty cache for `rows` sequences of `length` positions, each layer's where and as it computes."""
        return KVCache(
            devices=self.layer_devices or [self.device] * self.config.num_layers,
            rows=rows,
            kv_heads=self.config.num_kv_heads,
            length=length,
            head_dim=self.config.head_dim,
            dtype=self.dtype,
        )
