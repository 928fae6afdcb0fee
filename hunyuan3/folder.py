"""An opened checkpoint folder: everything but the weights.

Opening reads configuration, vocabulary, prompts and the tensor headers, and compares them with each other, so that a
folder that cannot work is refused in a second, with the reason, and not after minutes of loading.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from accelerate import init_empty_weights

from .checkpoint.index import CheckpointIndex
from .checkpoint.keymap import Slot, transformer_slots, vae_slots, vision_slots
from .checkpoint.load import check_complete
from .checkpoint.manifest import PACK_NAME, PackManifest
from .checkpoint.shard import SAFETENSORS_DTYPES
from .config import VARIANTS, GenerationConfig, ModelConfig, Variant, detect_variant
from .errors import CheckpointError, RequestError, UnsupportedConfigError
from .image.resolution import ResolutionTable
from .quant.modules import is_quantized, swap
from .quant.policy import FORMATS, policy_of
from .text.special_tokens import SpecialTokens
from .text.system_prompts import SystemPrompts
from .text.template import TEMPLATES, Template
from .text.tokenizer import Tokenizer
from .transformer.model import Hunyuan3Transformer
from .vae.autoencoder import AutoencoderKLConv3D
from .vision.siglip2 import Vision


@dataclass(frozen=True)
class ModelFolder:
    """The official folder, as downloaded, checked and parsed. No Python of it is ever executed."""

    path: Path
    config: ModelConfig
    generation: GenerationConfig
    variant: Variant
    index: CheckpointIndex
    tokenizer: Tokenizer
    tokens: SpecialTokens
    system_prompts: SystemPrompts
    resolutions: ResolutionTable
    pack: PackManifest | None = None

    @classmethod
    def open(cls, path: str | Path, variant: str = "auto") -> "ModelFolder":
        """Opens and checks a folder.

        Args:
            path: holds config.json, generation_config.json, tokenizer.json, the safetensors index and its shards; or
                what `python -m hunyuan3.pack` made of such a folder.
            variant: "auto", or "base", "instruct", "distil" to override what the folder says it is (spec 1.0).

        Raises CheckpointError, UnsupportedConfigError or RequestError, each naming the file or input at fault.
        """
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a folder. Give the folder that holds config.json and the weights.")
        pack = PackManifest.from_folder(path)
        if pack is not None and pack.format not in FORMATS:
            raise CheckpointError(
                f"{path / PACK_NAME} is of the format {pack.format!r}, which this package does not know."
            )
        config = ModelConfig.from_folder(path)
        generation = GenerationConfig.from_folder(path)
        index = CheckpointIndex.from_folder(path).unstacked()
        found = detect_variant(config, generation, index.tensors)
        tokenizer = Tokenizer.from_folder(path)
        tokens = SpecialTokens.from_tokenizer(tokenizer, config)
        folder = cls(
            path=path,
            config=config,
            generation=generation,
            variant=_chosen_variant(variant, found),
            index=index,
            tokenizer=tokenizer,
            tokens=tokens,
            system_prompts=SystemPrompts.from_folder(path),
            resolutions=ResolutionTable.build(config.image_base_size, len(tokens.ratios)),
            pack=pack,
        )
        networks = folder.networks
        check_complete(index, {name: slot.shape for name, slot in networks.all_slots.items()}, path, networks.small)
        if len(tokenizer) > config.vocab_size:
            raise UnsupportedConfigError(
                f"{path / 'tokenizer.json'} has {len(tokenizer)} tokens, more than vocab_size {config.vocab_size} of "
                "config.json. The two files do not belong together."
            )
        return folder

    @property
    def template(self) -> Template:
        """How this variant lays out a conversation."""
        return TEMPLATES["pretrain" if self.variant == "base" else "instruct"]

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence: what generation_config.json allows and the rotary table covers."""
        return min(self.generation.max_length, self.config.max_position_embeddings)

    @property
    def stored_format(self) -> str:
        """The weight format that the files are in: "bf16" (as published) unless this is a pack."""
        return "bf16" if self.pack is None else self.pack.format

    @cached_property
    def networks(self) -> "Networks":
        """The networks of this folder, without storage."""
        return Networks(self.config, None if self.pack is None else self.pack.format)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits that tell one checkpoint's files from another's: names, shapes, dtypes, sizes, times.

        Raises CheckpointError if one is no longer there.
        """
        digest = hashlib.sha256()
        for file in sorted({info.file for info in self.index.tensors.values()}):
            try:
                stat = file.stat()
            except OSError as error:
                raise CheckpointError(f"{file} cannot be read ({error}). Put it back, or download it again.") from error
            digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        shapes = {name: [info.dtype, list(info.shape)] for name, info in self.index.tensors.items()}
        digest.update(json.dumps([self.variant, shapes], sort_keys=True).encode())
        return digest.hexdigest()[:16]


class Networks:
    """What a configuration describes: networks on the meta device, and where each published tensor goes in them.

    pack_format: of a pack; None for a folder as published. small: safetensors dtype of each tensor that a pack stores
    small.
    """

    def __init__(self, config: ModelConfig, pack_format: str | None = None) -> None:
        self.config = config
        transformer, policy = self.transformer(), policy_of(pack_format or "bf16")
        if policy is not None:
            swap(transformer, policy)
        parameters = dict(transformer.named_parameters())
        self.transformer_slots = transformer_slots(parameters)
        self.small = {
            name: SAFETENSORS_DTYPES[parameters[slot.parameter].dtype]
            for name, slot in self.transformer_slots.items()
            if is_quantized(slot.parameter, transformer)
        }
        self.vae_slots = vae_slots(dict(self.vae().named_parameters()))
        self.vision_slots = vision_slots(dict(self.vision().named_parameters()))

    @property
    def all_slots(self) -> dict[str, Slot]:
        """Published name -> slot of every tensor that a folder must hold."""
        return {**self.transformer_slots, **self.vae_slots, **self.vision_slots}

    def transformer(self) -> Hunyuan3Transformer:
        with init_empty_weights(include_buffers=True):
            return Hunyuan3Transformer(self.config)

    def vae(self) -> AutoencoderKLConv3D:
        with init_empty_weights(include_buffers=True):
            return AutoencoderKLConv3D(self.config.vae)

    def vision(self) -> Vision:
        with init_empty_weights(include_buffers=True):
            return Vision(self.config.vision, self.config.hidden_size)


def _chosen_variant(asked: str, found: Variant) -> Variant:
    if asked == "auto" or asked == found:
        return found
    if asked not in VARIANTS:
        raise RequestError(f"variant is {asked!r}; it must be auto, {', '.join(VARIANTS)}.")
    if "distil" in (asked, found):
        raise RequestError(
            f"variant is {asked!r}, but the folder's config.json and tensors are those of a {found!r} checkpoint "
            "(guidance and timestep_r embedders decide that). Choose 'auto'."
        )
    return asked  # base and instruct differ only in how the sequence is laid out
