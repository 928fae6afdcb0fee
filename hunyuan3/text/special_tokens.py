"""Ids of the control tokens, looked up once by their strings.

The numbers differ between tokenizers of the family, so none is written here; those that `config.json` repeats are
compared, because a tokenizer of another checkpoint would otherwise draw noise without an error.
"""

from dataclasses import dataclass

from ..config import ModelConfig
from ..errors import CheckpointError, RequestError
from .tokenizer import Tokenizer

BASE_RATIOS = 33
EXTRA_RATIOS = 4


@dataclass(frozen=True)
class SpecialTokens:
    """Control token ids of one checkpoint.

    Attributes:
        size: `<img_size_N>` with N the checkpoint's `image_base_size`.
        ratios: `<img_ratio_0>` onwards, 33 or 37 of them; the index is the row of the resolution table.
        guidance, timestep_r: None where the config has no such embedder; then no sequence holds the token.
        joint_img_sep: None if the vocabulary lacks it; only input pictures need it, see `require`.
        source: the tokenizer file, for errors.
    """

    bos: int
    eos: int
    pad: int
    boi: int
    eoi: int
    img: int
    cfg: int
    timestep: int
    size: int
    think: int
    think_end: int
    recaption: int
    recaption_end: int
    answer: int
    answer_end: int
    ratios: tuple[int, ...]
    guidance: int | None = None
    timestep_r: int | None = None
    joint_img_sep: int | None = None
    source: str = "tokenizer.json"

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, config: ModelConfig) -> "SpecialTokens":
        """Looks every token up. Raises CheckpointError if one is missing or contradicts `config.json`."""

        def needed(token: str) -> int:
            token_id = tokenizer.token_id(token)
            if token_id is None:
                raise CheckpointError(f"{tokenizer.source} has no token '{token}', which this checkpoint needs.")
            if token_id >= config.vocab_size:
                raise CheckpointError(
                    f"{tokenizer.source}: '{token}' has id {token_id}, but config.json has 'vocab_size' "
                    f"{config.vocab_size}. The files belong to different checkpoints."
                )
            return token_id

        extra = range(BASE_RATIOS, BASE_RATIOS + EXTRA_RATIOS)
        has_extra = all(tokenizer.token_id(_ratio(i)) is not None for i in extra)
        rows = BASE_RATIOS + (EXTRA_RATIOS if has_extra else 0)
        has_separator = tokenizer.token_id(_JOINT_IMG_SEP) is not None
        tokens = cls(
            **{field: needed(token) for field, token in _TOKENS.items()},
            size=needed(f"<img_size_{config.image_base_size}>"),
            ratios=tuple(needed(_ratio(i)) for i in range(rows)),
            guidance=needed("<guidance>") if config.cfg_distilled else None,
            timestep_r=needed("<timestep_r>") if config.use_meanflow else None,
            joint_img_sep=needed(_JOINT_IMG_SEP) if has_separator else None,
            source=str(tokenizer.source),
        )
        for key, field in _CONFIG_KEYS.items():
            expected = config.token_ids.get(key)
            if expected is not None and expected != getattr(tokens, field):
                raise CheckpointError(
                    f"{tokenizer.source}: '{_TOKENS[field]}' has id {getattr(tokens, field)}, but config.json has "
                    f"'{key}' {expected}. The files belong to different checkpoints."
                )
        return tokens

    def ratio(self, index: int) -> int:
        """Id of `<img_ratio_index>`. Raises RequestError for an index this vocabulary lacks."""
        if not 0 <= index < len(self.ratios):
            raise RequestError(
                f"aspect ratio {index} does not exist here; this checkpoint has 0..{len(self.ratios) - 1}"
            )
        return self.ratios[index]

    def ratio_index(self, token_id: int) -> int | None:
        """The row of the resolution table that a token stands for, None if it is not a ratio token."""
        return self.ratios.index(token_id) if token_id in self.ratios else None

    def require_joint_img_sep(self) -> int:
        """Id of the separator inside an input picture. Raises CheckpointError if the vocabulary lacks it."""
        if self.joint_img_sep is None:
            raise CheckpointError(
                f"{self.source} has no token '{_JOINT_IMG_SEP}': this checkpoint takes no input pictures."
            )
        return self.joint_img_sep


def _ratio(index: int) -> str:
    return f"<img_ratio_{index}>"


_JOINT_IMG_SEP = "<joint_img_sep>"

_TOKENS = {
    "bos": "<|startoftext|>",
    "eos": "<|endoftext|>",
    "pad": "<pad>",
    "boi": "<boi>",
    "eoi": "<eoi>",
    "img": "<img>",
    "cfg": "<cfg>",
    "timestep": "<timestep>",
    "think": "<think>",
    "think_end": "</think>",
    "recaption": "<recaption>",
    "recaption_end": "</recaption>",
    "answer": "<answer>",
    "answer_end": "</answer>",
}

_CONFIG_KEYS = {
    "bos_token_id": "bos",
    "eos_token_id": "eos",
    "pad_token_id": "pad",
    "im_start_id": "boi",
    "im_end_id": "eoi",
    "image_token_id": "img",
}
