"""Token rows as the recordings describe them: places of everything, decoded text, dense masks."""

import re
from collections.abc import Sequence
from typing import Any

import torch

from hunyuan3.folder import ModelFolder
from hunyuan3.ops.attention import AttentionPlan
from hunyuan3.text.tokenizer import Tokenizer
from hunyuan3.types import TokenSequence

_SCATTERED = {
    "gen_timestep_scatter_index": "gen_timestep",
    "guidance_scatter_index": "guidance",
    "gen_timestep_r_scatter_index": "timestep_r",
    "cond_timestep_scatter_index": "cond_timesteps",
}


def slices(rows: Sequence[TokenSequence]) -> dict[str, Any]:
    """Per row, where the sections lie, as [start, stop)."""
    return {
        "text_slices": [row.text_spans for row in rows],
        "gen_image_slices": [row.spans("gen") for row in rows],
        "vae_image_slices": [row.spans("vae") for row in rows],
        "vit_image_slices": [row.spans("vit") for row in rows],
        "joint_image_slices": [row.joint_spans for row in rows],
        "all_image_slices": [[run.span for run in row.runs] for row in rows],
    }


def scattered(rows: Sequence[TokenSequence]) -> dict[str, list[list[int]]]:
    """Per row, the positions of the embedder tokens; only those kinds that the rows have."""
    found = {}
    for key, attribute in _SCATTERED.items():
        values = [getattr(row, attribute) for row in rows]
        if values[0] is not None and values[0] != ():
            found[key] = [list(v) if isinstance(v, tuple) else [v] for v in values]
    return found


def decoded(rows: Sequence[TokenSequence], tokenizer: Tokenizer) -> list[str]:
    """Per row its text, runs of `<img>` shortened to their number."""
    texts = [tokenizer.decode(row.ids) for row in rows]
    return [re.sub(r"(?:<img>)+", lambda run: f"[<img>x{len(run[0]) // len('<img>')}]", text) for text in texts]


def row_tensors(rows: Sequence[TokenSequence]) -> dict[str, torch.Tensor]:
    """Ids, placeholder masks, lengths and embedder positions of rows of equal length (no padding is needed)."""
    tensors = {
        "tokens": torch.tensor([row.ids for row in rows]),
        "real_pos": torch.tensor([[len(row)] for row in rows]),
    }
    for kind in ("gen", "vae", "vit"):
        if rows[0].spans(kind):
            mask = torch.zeros(len(rows), len(rows[0]), dtype=torch.uint8)
            for index, row in enumerate(rows):
                for start, stop in row.spans(kind):
                    mask[index, start:stop] = 1
            tensors[f"{kind}_image_mask"] = mask
    return tensors | {key: torch.tensor(positions) for key, positions in scattered(rows).items()}


def drawn_picture(row: TokenSequence, folder: ModelFolder) -> dict[str, Any]:
    """What the recordings call `gen_image_info`, read off a finished row."""
    run = row.gen_run
    assert row.gen_timestep is not None
    return {
        "image_width": run.grid.width * folder.config.vae_downsample,
        "image_height": run.grid.height * folder.config.vae_downsample,
        "token_width": run.grid.width,
        "token_height": run.grid.height,
        "image_token_length": run.span.stop - run.span.start,
        "base_size": folder.config.image_base_size,
        "ratio_index": folder.tokens.ratio_index(row.ids[row.gen_timestep - 1]),
        "add_timestep_token": row.ids[row.gen_timestep] == folder.tokens.timestep,
        "add_guidance_token": row.guidance is not None,
        "add_timestep_r_token": row.timestep_r is not None,
    }


def dense_mask(plan: AttentionPlan) -> torch.Tensor:
    """What an attention plan lets see: boolean (queries, keys up to the plan's end)."""
    first, end = plan[0].start, plan[-1].stop
    mask = torch.zeros(end - first, end, dtype=torch.bool)
    for run in plan:
        for query in range(run.start, run.stop):
            mask[query - first, : run.stop if run.full else query + 1] = True
    return mask


def packed(mask: torch.Tensor) -> torch.Tensor:
    """Boolean (..., S) -> uint8 (..., ceil(S / 8)), the first value in the highest bit."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8))
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)
    return (padded.unflatten(-1, (-1, 8)) * weights).sum(dim=-1).to(torch.uint8)
