"""Hunyuan3Loader: a checkpoint folder as a model handle."""

from dataclasses import replace
from pathlib import Path

import comfy.model_management as mm
import torch

from ..hunyuan3.checkpoint.index import INDEX_NAME, SINGLE_NAME
from ..hunyuan3.config import VARIANTS
from ..hunyuan3.errors import RequestError
from ..hunyuan3.folder import ModelFolder
from ..hunyuan3.moe.select import MOE_BACKENDS
from ..hunyuan3.ops.attention import ATTENTION_BACKENDS
from ..hunyuan3.parts import DTYPES, VAE_DTYPES, LoadOptions, reads_from_files, works
from ..hunyuan3.pipeline import Hunyuan3
from ..hunyuan3.placement.cut import RING_GROUPS as RING_SLOTS
from ..hunyuan3.placement.split import SplitRequest
from ..hunyuan3.quant.policy import FORMATS
from .budget import GIB, Budget
from .compat import io, require_choice, schema
from .folders import checkpoint_names, checkpoint_path
from .io_types import HunyuanModel, ModelHandle
from .memory import PartPatcher
from .plan import most_pinned, planned, split_of
from .progress import NodeProgress

_PARSED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "system_prompt.py")


class Hunyuan3Loader(io.ComfyNode):
    """Opens and checks the folder at once; the weights follow when a node first needs them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="Hunyuan3Loader",
            display_name="Hunyuan3 Loader",
            category="Hunyuan3",
            description=(
                "Opens a HunyuanImage-3.0 checkpoint (base, Instruct or Instruct-Distil), the official folder as it "
                "was downloaded, from models/hunyuan3. The folder is checked at once; weights are read when first "
                "needed."
            ),
            search_aliases=["hunyuan image 3", "hunyuanimage", "load hunyuan"],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=checkpoint_names(),
                    tooltip="Folder under models/hunyuan3 that holds config.json and the safetensors files.",
                ),
                io.Combo.Input(
                    "variant",
                    options=["auto", *VARIANTS],
                    default="auto",
                    optional=True,
                    tooltip="What the folder holds. 'auto' reads it from the files; override it only if that fails.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=["auto", *DTYPES],
                    default="auto",
                    optional=True,
                    tooltip="Precision of the transformer. 'auto': bfloat16 (as published) on a GPU, float32 on a CPU.",
                ),
                io.Combo.Input(
                    "device",
                    options=["auto", *_devices()],
                    default="auto",
                    optional=True,
                    tooltip="Where the model computes. 'auto': the device that ComfyUI uses.",
                ),
                io.Combo.Input(
                    "moe_backend",
                    options=list(MOE_BACKENDS),
                    default="auto",
                    optional=True,
                    tooltip="How the experts are computed. 'auto' takes the fastest that works here and says which.",
                ),
                io.Combo.Input(
                    "router",
                    options=["reference", "fp32"],
                    default="reference",
                    optional=True,
                    tooltip="Precision of the expert router: as the reference implementation, or always float32.",
                ),
                io.Combo.Input(
                    "vae_dtype",
                    options=["auto", *VAE_DTYPES],
                    default="auto",
                    optional=True,
                    tooltip="Precision of the VAE. 'auto': float16 on a GPU as the reference has it, else float32.",
                ),
                io.Combo.Input(
                    "attention",
                    options=list(ATTENTION_BACKENDS),
                    default="auto",
                    optional=True,
                    tooltip="'auto' and 'sdpa': PyTorch's fused attention. 'math': written out, slow, for comparisons.",
                ),
                io.Combo.Input(
                    "format",
                    options=["auto", *FORMATS],
                    default="auto",
                    optional=True,
                    tooltip=(
                        "How the large matrices are kept: 'auto' as in the folder, bf16 as published (163 GB), "
                        "fp8 or int8 (83 GB; int8 is the more exact), int4 (49 GB). They are converted while loading; "
                        "the arithmetic stays in 'dtype', but '_dynamic' quantises the activations, too: faster where "
                        "the device has such products."
                    ),
                ),
                io.Float.Input(
                    "vram_budget",
                    default=0.0,
                    min=0.0,
                    max=4096.0,
                    step=0.5,
                    optional=True,
                    tooltip="GiB of the device that this model and its work may take; 0: what ComfyUI can give.",
                ),
                io.Float.Input(
                    "ram_budget",
                    default=0.0,
                    min=0.0,
                    max=65536.0,
                    step=1.0,
                    optional=True,
                    tooltip="GiB of host memory that its weights may take while they are evicted; 0: what is free.",
                ),
                io.String.Input(
                    "gpu_split",
                    default="auto",
                    optional=True,
                    tooltip=(
                        "Layers on several GPUs: 'auto' uses the others if the model does not fit on one; '0' only "
                        "that one; '0,1' both; '0:20,1:12' with so many layers each; '0:22GiB,1:40GiB' with so much "
                        "memory each. The first one also holds the VAE."
                    ),
                ),
            ],
            outputs=[HunyuanModel.Output("model", display_name="model", tooltip="For all other Hunyuan3 nodes.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str | None, **_others: object) -> list[float]:
        """A folder whose files were replaced is opened again. A name that comes through a link is not known here."""
        if checkpoint is None:
            return []
        try:
            folder = checkpoint_path(checkpoint)
        except RequestError:
            return []
        return [path.stat().st_mtime if path.is_file() else 0.0 for path in _telling_files(folder)]

    @classmethod
    def execute(
        cls,
        checkpoint: str,
        variant: str = "auto",
        dtype: str = "auto",
        device: str = "auto",
        moe_backend: str = "auto",
        router: str = "reference",
        vae_dtype: str = "auto",
        attention: str = "auto",
        format: str = "auto",
        vram_budget: float = 0.0,
        ram_budget: float = 0.0,
        gpu_split: str = "auto",
    ) -> io.NodeOutput:
        require_choice("checkpoint", checkpoint, checkpoint_names())
        asked = _split(gpu_split, device)
        budget = Budget(
            _bytes("vram_budget", vram_budget),
            _bytes("ram_budget", ram_budget),
            dict(zip(asked.devices, asked.nbytes or (), strict=False)),
        )
        folder = ModelFolder.open(checkpoint_path(checkpoint), variant)
        wanted = LoadOptions(
            device=asked.devices[0] if asked.devices else _home(device),
            dtype=dtype,
            vae_dtype=vae_dtype,
            moe_backend=moe_backend,
            router=router,
            attention=attention,
            format=format,
        )
        options = wanted.resolved(folder.stored_format)
        plan, plan_text = planned(folder, options, budget, asked)
        split = split_of(plan)
        wanted = replace(wanted, device=split.devices[0], split=split if len(split.devices) > 1 else None)
        if not plan.fits_whole:
            disk = reads_from_files(options.format, folder.stored_format)
            wanted = replace(wanted, streaming=RING_SLOTS, pinned=most_pinned(), disk=disk)
        options = wanted.resolved(folder.stored_format)
        model = Hunyuan3(folder, options)
        handle = ModelHandle(
            name=checkpoint,
            model=model,
            transformer=PartPatcher.of(model.placed_transformer, model.prefixes, budget, options.split),
            vae=PartPatcher.of(model.placed_vae, budget=budget),
            vision=PartPatcher.of(model.placed_vision, budget=budget),
        )
        chosen = describe(handle)
        progress = NodeProgress(cls.hidden.unique_id)
        progress.log(f"{chosen}\n{plan_text}")
        progress.text(f"{plan_text.splitlines()[0]} {chosen}")  # all of it is in the history, and in the log
        return io.NodeOutput(handle, ui={"text": [chosen, plan_text]})


def describe(handle: ModelHandle) -> str:
    """One line: what was opened and what was chosen for it."""
    options = handle.model.options
    nbytes = handle.transformer.placed.total_bytes
    size = f"{nbytes / GIB:.2f} GiB" if nbytes > GIB / 10 else f"{nbytes / 2**20:.1f} MiB"
    where = str(options.split or options.device)
    if options.split is not None and all(device.type == "cpu" for device in options.split.devices):
        where += " (the processor stands in for cards)"
    return (
        f"{handle.model.folder.variant}, {options.format}, {_short(options.dtype)} on {where}, {size}; "
        f"experts: {options.moe_backend} ({options.moe_reason}), router {options.router}, "
        f"attention {options.attention}, VAE {_short(options.vae_dtype)}; {handle.name}"
    )


def _home(device: str) -> torch.device:
    return mm.get_torch_device() if device == "auto" else torch.device(device)


def _split(text: str, device: str) -> SplitRequest:
    """What gpu_split asks for, on devices that are here. Raises RequestError."""
    home = _home(device)
    asked = SplitRequest.parse(text, "cuda" if home.type == "cpu" else home.type)
    if not asked.devices:
        return asked
    if device != "auto" and home != asked.devices[0]:
        raise RequestError(
            f"device is {device}, but gpu_split is {text!r} and begins on {asked.devices[0]}. Set device to 'auto', or "
            "gpu_split to 'auto'."
        )
    if len({wanted.type for wanted in asked.devices}) > 1:
        raise RequestError(f"gpu_split is {text!r}; GPUs and the processor cannot share the layers. Set it to 'auto'.")
    for wanted in asked.devices:
        if not works(wanted):
            here = torch.cuda.device_count()
            cards = f"0 to {here - 1}" if here > 1 else "only 0" if here else "none ('cpu:0,cpu:1' tries a split)"
            raise RequestError(f"gpu_split is {text!r}; {wanted} does not work here. GPUs here: {cards}.")
    return asked


def _bytes(name: str, gib: float) -> int | None:
    """A budget in bytes, None for 0. Raises RequestError for a number that is none."""
    if not 0 <= gib < float("inf"):
        raise RequestError(f"{name} is {gib}; it must be a number of GiB, or 0 for all there is.")
    return int(gib * GIB) or None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _devices() -> list[str]:
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def _telling_files(folder: Path) -> list[Path]:
    return [folder / name for name in ("config.json", *_PARSED, INDEX_NAME, SINGLE_NAME)]
