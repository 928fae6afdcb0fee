"""What the pipeline feeds its networks and gets from them, read off with module hooks.

So the comparison sees the pipeline as it runs and not a second version of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from hunyuan3.ops.attention import AttentionPlan
from hunyuan3.pipeline import Hunyuan3
from hunyuan3.transformer.model import Hunyuan3Transformer


@dataclass
class StackPass:
    """One run of the stack over some positions: what attention was handed, and what came out.

    hidden: at the probed positions the first layer's input, then every layer's output; of a stage's first pass only.
    output (rows, T, D), if asked for. gap: if asked for, per token (rows * T) the smallest distance, over the layers,
    between the logits of the last chosen and the first rejected expert.
    """

    plan: AttentionPlan
    rope: tuple[torch.Tensor, torch.Tensor]
    hidden: list[torch.Tensor] = field(default_factory=list)
    output: torch.Tensor | None = None
    gap: torch.Tensor | None = None

    @property
    def start(self) -> int:
        return self.plan[0].start

    @property
    def stop(self) -> int:
        return self.plan[-1].stop


class Watch:
    """One stage, or the VAE's decoder, watched while `transformer` or `decoder` is entered.

    passes: every run of the stack. shown, shown_times: input pictures' latents (C, h, w) as they were fed, and the time
    they were said to have. noise: the first latents of the picture being drawn. fed: per name, the value that an
    embedder was given, call by call ("time": once per step, "time_r" and "guidance": once per pass).
    """

    def __init__(self, *, probe: torch.Tensor | None, gaps: bool, outputs: bool = False) -> None:
        """probe: positions whose hidden states are kept. gaps, outputs: see `StackPass`."""
        self.probe = probe
        self.gaps = gaps
        self.outputs = outputs
        self.passes: list[StackPass] = []
        self.shown: list[torch.Tensor] = []
        self.shown_times: list[torch.Tensor] = []
        self.noise: torch.Tensor | None = None
        self.fed: dict[str, list[torch.Tensor]] = {"time": [], "time_r": [], "guidance": []}
        self.decoded: torch.Tensor | None = None
        self._time = torch.empty(0)

    def transformer(self, model: Hunyuan3Transformer) -> "_Hooks":
        """Watches a transformer while the context lasts."""
        handles = [
            model.time_embed.register_forward_pre_hook(self._see_time),
            model.patch_embed.register_forward_pre_hook(self._see_latents),
            model.layers[0].register_forward_pre_hook(self._see_first_layer),
            model.time_embed_2.register_forward_pre_hook(self._see("time")),
        ]
        handles += [layer.register_forward_hook(self._see_layer) for layer in model.layers]
        handles.append(model.layers[-1].register_forward_hook(self._see_output))
        if model.guidance_emb is not None:
            handles.append(model.guidance_emb.register_forward_pre_hook(self._see("guidance")))
        if model.timestep_r_emb is not None:
            handles.append(model.timestep_r_emb.register_forward_pre_hook(self._see("time_r")))
        if self.gaps:
            handles += [layer.mlp.router.register_forward_hook(self._see_router) for layer in model.layers]
        return _Hooks(handles)

    def decoder(self, model: Hunyuan3) -> "_Hooks":
        """Watches the VAE's decoder while the context lasts."""

        def see(_module: torch.nn.Module, _args: Any, output: torch.Tensor) -> None:
            self.decoded = output

        return _Hooks([model.vae().decoder.register_forward_hook(see)])

    def _see(self, name: str) -> Callable[..., None]:
        def see(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self.fed[name].append(args[0][0].clone())

        return see

    def _see_time(self, _module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._time = args[0]

    def _see_latents(self, _module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Each embedding of latents is preceded by that of their time; at time 0 they are an input picture's."""
        latents = args[0]
        if not self._time.any():
            self.shown.append(latents[0].clone())
            self.shown_times.append(self._time[0].clone())
        elif self.noise is None:
            self.noise = latents.clone()

    def _see_first_layer(self, _module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        x, rope, plan, _cache = args
        self.passes.append(StackPass(plan, rope))
        self._keep(x)

    def _see_layer(self, _module: torch.nn.Module, _args: Any, output: torch.Tensor) -> None:
        self._keep(output)

    def _see_output(self, _module: torch.nn.Module, _args: Any, output: torch.Tensor) -> None:
        if self.outputs:
            self.passes[-1].output = output.clone()

    def _see_router(self, router: torch.nn.Module, args: tuple[torch.Tensor, ...], _output: Any) -> None:
        logits = router.logits(args[0])
        if router.top_k < logits.shape[-1]:
            best = logits.float().topk(router.top_k + 1, dim=-1).values
            gap, before = best[:, -2] - best[:, -1], self.passes[-1].gap
            self.passes[-1].gap = gap if before is None else torch.minimum(before, gap)

    def _keep(self, x: torch.Tensor) -> None:
        if self.probe is not None and len(self.passes) == 1:
            self.passes[0].hidden.append(x[:, self.probe].clone())


class _Hooks:
    def __init__(self, handles: list[Any]) -> None:
        self.handles = handles

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
