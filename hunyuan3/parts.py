"""Load the networks of an opened folder: where they live, in which dtype, with which kernels."""

import copy
import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from .callbacks import CheckCancelled
from .checkpoint.index import CheckpointIndex
from .checkpoint.keymap import ROUTER_SUFFIX, Slot, transformer_slots
from .checkpoint.load import Transform, load_parameters
from .errors import RequestError
from .folder import ModelFolder
from .moe.router import RouterPrecision
from .moe.select import MoEBackend, choose_backend, expert_backend, log_choice
from .ops.attention import AttentionBackend, attention_backend
from .placement.copier import RingSlot, copier_for
from .placement.disk import ExpertFiles
from .placement.guess import guess_ahead
from .placement.page_lock import PageLock
from .placement.placed import HostHasRoom, PlacedModule, Streams, units_by_prefix
from .placement.ring import ExpertRing
from .placement.split import LayerSplit
from .placement.streaming import EXPERT_UNIT, ExpertStreaming, StreamedBank, expert_unit
from .quant.modules import is_quantized, swap, transform_to
from .quant.policy import policy_of, same_storage
from .transformer.model import Hunyuan3Transformer

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
VAE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class LoadOptions:
    """How to load. Every "auto" is settled by `resolved`.

    device: a torch device, or "auto": CUDA or ROCm, else MPS, else CPU.
    dtype: "bfloat16" (the published precision; the arithmetic follows the reference's autocast), "float32" (exact), or
        "auto": bfloat16 on an accelerator, float32 on a CPU.
    vae_dtype: "float16" (as the reference on a GPU: bfloat16-rounded weights, float16 convolutions, float32 residual
        stream in the decoder), "float32", "bfloat16", or "auto": float16 beside a bfloat16 transformer on an
        accelerator, else float32.
    moe_backend: "auto", "loop" or "grouped" (see moe.select).
    router: "reference" runs the router in the model's dtype, as the reference does; "fp32" always in float32.
    drop_tokens: the reference's capacity rule, for comparisons; None means what config.json says (published: off).
    attention: "auto", "sdpa" or "math" (see ops.attention).
    format: how the large matrices are stored: "auto" (as they are in the folder), "bf16" (as published), "fp8", "int8"
        or "int4"; "fp8_dynamic" and "int8_dynamic" quantise the activations, too (see quant.policy).
    streaming: slots of the ring through which experts come from host memory, at least 2; 0: all weights must be on the
        device.
    vram: bytes that the transformer's weights may take on each device, the ring included, or by device; None, or a
        device left out: all of them.
    disk: whether experts that are streamed may stay in their files, to be read in every pass; not those of a format
        that they are not stored in.
    split: which devices compute which layers, the first one being `device`; None: all are computed there.
    ram: bytes of host memory that streamed experts may take; None: all that they need.
    pinned: bytes of host memory that may be page-locked for streaming to a CUDA card; None: as many as there are.
    expert_cache: whether, of experts that are streamed, those that words use often stay on the device.
    expert_guesses: whether the copies of a word's experts begin before their layer's router has chosen them.
    """

    device: str | torch.device = "auto"
    dtype: str = "auto"
    vae_dtype: str = "auto"
    moe_backend: MoEBackend = "auto"
    router: RouterPrecision = "reference"
    drop_tokens: bool | None = None
    attention: AttentionBackend = "auto"
    format: str = "auto"
    streaming: int = 0
    vram: int | Mapping[torch.device, int] | None = None
    ram: int | None = None
    pinned: int | None = None
    expert_cache: bool = True
    expert_guesses: bool = True
    disk: bool = False
    split: LayerSplit | None = None

    def resolved(self, stored: str = "bf16") -> "ResolvedOptions":
        """Settles what is "auto" on this machine, for a folder whose weights are `stored` in a format.

        Raises RequestError for what is unknown or does not work here.
        """
        weight_format = stored if self.format == "auto" else self.format
        if self.split is not None and self.device not in ("auto", self.split.devices[0]):
            raise RequestError(
                f"device is {str(self.device)!r}, but the split begins on {self.split.devices[0]}. Leave device 'auto'."
            )
        device, *others = [_device(asked) for asked in (self.split.devices if self.split else (self.device,))]
        on_accelerator = device.type != "cpu"
        dtype = _named(DTYPES, "dtype", self.dtype, "bfloat16" if on_accelerator else "float32")
        follows_reference = on_accelerator and dtype == torch.bfloat16
        vae_dtype = _named(VAE_DTYPES, "vae_dtype", self.vae_dtype, "float16" if follows_reference else "float32")
        if self.router not in ("reference", "fp32"):
            raise RequestError(f"router is {self.router!r}; it must be reference or fp32.")
        policy = policy_of(weight_format)
        if stored != "bf16" and not same_storage(weight_format, stored):
            raise RequestError(
                f"format is {weight_format!r}, but the folder is a pack of {stored!r}. Choose 'auto', or the folder as "
                "it was published."
            )
        dynamic = policy.experts if policy is not None and policy.dynamic else None
        backend, reason = choose_backend(self.moe_backend, device, dtype, dynamic)
        for other in others:
            if backend == "grouped":
                backend, reason = choose_backend(self.moe_backend, other, dtype, dynamic)
        if self.streaming and self.moe_backend == "auto":
            backend, reason = "loop", "experts that are streamed come one by one"
        if self.streaming == 1 or self.streaming < 0:
            raise RequestError(f"streaming is {self.streaming}; it must be 0, or at least 2 slots.")
        if self.disk and not reads_from_files(weight_format, stored):
            raise RequestError(
                f"Experts cannot be read from disk in every pass in the format {weight_format!r}, which the folder "
                "does not have: make a pack of it (python -m hunyuan3.pack)."
            )
        attention_backend(self.attention)  # refuses unknown names now, not after loading
        attention = "sdpa" if self.attention == "auto" else self.attention
        return ResolvedOptions(
            device=device,
            dtype=dtype,
            vae_dtype=vae_dtype,
            moe_backend=backend,
            moe_reason=reason,
            router=self.router,
            drop_tokens=self.drop_tokens,
            attention=attention,
            format=weight_format,
            streaming=self.streaming,
            vram=self.vram,
            ram=self.ram,
            pinned=self.pinned,
            expert_cache=self.expert_cache,
            expert_guesses=self.expert_guesses,
            disk=self.disk,
            split=self.split,
        )


@dataclass(frozen=True)
class ResolvedOptions:
    """`LoadOptions` with nothing left open. `moe_reason`: why that backend."""

    device: torch.device
    dtype: torch.dtype
    vae_dtype: torch.dtype
    moe_backend: str
    moe_reason: str
    router: RouterPrecision
    drop_tokens: bool | None
    attention: str
    format: str
    streaming: int = 0
    vram: int | Mapping[torch.device, int] | None = None
    ram: int | None = None
    pinned: int | None = None
    expert_cache: bool = True
    expert_guesses: bool = True
    disk: bool = False
    split: LayerSplit | None = None


def reads_from_files(weight_format: str, stored: str) -> bool:
    """Whether weights are used in a format as a folder that is `stored` in one has them."""
    return weight_format == "bf16" or stored != "bf16"


def place_transformer(folder: ModelFolder, options: ResolvedOptions) -> PlacedModule:
    """The transformer, unloaded; layers are its units. The router's weights stay float32 in every dtype."""
    log_choice(options.moe_backend, options.moe_reason)
    model = folder.networks.transformer()
    if options.split is not None:
        model.layer_devices = options.split.by_layer(len(model.layers))
    slots, transform = folder.networks.transformer_slots, None
    policy = policy_of(options.format)
    if policy is not None:
        swap(model, policy)
    if options.streaming:
        for layer in model.layers:
            bank = layer.mlp.experts
            layer.mlp.experts = StreamedBank([bank.alone() for _ in range(layer.mlp.num_experts)])
        slots = transformer_slots(dict(model.named_parameters()))
    if policy is not None and folder.stored_format == "bf16":
        slots = transformer_slots(dict(model.named_parameters()))
        transform = transform_to(policy, options.device)
    for layer in model.layers:
        layer.mlp.backend = expert_backend(options.moe_backend)
        layer.mlp.router.precision = options.router
        layer.self_attn.attend = attention_backend(options.attention)
        if options.drop_tokens is not None:
            layer.mlp.drop_tokens = options.drop_tokens
    stored = {name: parameter.dtype for name, parameter in model.named_parameters() if is_quantized(name, model)}

    def dtype_of(name: str) -> torch.dtype:
        return stored.get(name) or (torch.float32 if name.endswith(ROUTER_SUFFIX) else options.dtype)

    devices = model.layer_devices or (options.device,) * len(model.layers)

    def device_of(name: str) -> torch.device:
        layer = re.match(r"layers\.(\d+)\.", name)
        return devices[int(layer[1])] if layer else options.device

    streams = _stream(model, folder.index, options, devices, dtype_of) if options.streaming else None
    return _place("transformer", model.eval(), folder, slots, options, dtype_of, transform, streams, device_of)


def _stream(
    model: Hunyuan3Transformer,
    index: CheckpointIndex,
    options: ResolvedOptions,
    devices: Sequence[torch.device],
    dtype_of: Callable[[str], torch.dtype],
) -> ExpertStreaming:
    """Connects the layers' experts to the rings of their devices."""
    banks = [layer.mlp.experts for layer in model.layers]
    shapes = [{name: p.shape for name, p in bank[0].named_parameters()} for bank in banks]
    if any(other != shapes[0] for other in shapes):
        raise RequestError("This checkpoint's layers have experts of different sizes; they cannot be streamed yet.")
    template = copy.deepcopy(banks[0][0])
    dtypes = {name: dtype_of(f"layers.0.mlp.experts.0.{name}") for name in shapes[0]}

    def slots_on(device: torch.device) -> Callable[[], RingSlot]:
        def make_slot() -> RingSlot:
            bank = copy.deepcopy(template)
            for name, shape in shapes[0].items():
                room = torch.empty(shape, dtype=dtypes[name], device=device)
                setattr(bank, name, nn.Parameter(room, requires_grad=False))
            return RingSlot(bank)

        return make_slot

    nbytes = sum(shape.numel() * dtypes[name].itemsize for name, shape in shapes[0].items())
    published = {
        slot.parameter: (name, slot) for name, slot in transformer_slots(dict(model.named_parameters())).items()
    }
    place_of = {id(one): (layer, rank) for layer, bank in enumerate(banks) for rank, one in enumerate(bank)}
    refs = [weakref.ref(bank) for bank in banks]  # they know the ring: weights must die with their model at once

    def tensors_of(one: nn.Module) -> dict[str, tuple[str, Slot]]:
        layer, rank = place_of[id(one)]
        prefix = f"layers.{layer}.mlp.experts.{refs[layer]().expert_at[rank]}."
        return {name: published[prefix + name] for name in shapes[0]}

    copiers = {}
    for device in dict.fromkeys(devices):
        files = ExpertFiles(index, tensors_of, pinned=device.type == "cuda") if options.disk else None
        copiers[device] = copier_for(device, files and files.copy)
    rings = {device: ExpertRing(slots_on(device), options.streaming, copier) for device, copier in copiers.items()}
    streaming = ExpertStreaming(banks, rings, nbytes, devices=devices, cache=options.expert_cache)
    if options.expert_guesses and all(copier.ahead for copier in copiers.values()):
        guess_ahead(model.layers, streaming)
    return streaming


def place_vae(folder: ModelFolder, options: ResolvedOptions) -> PlacedModule:
    """The VAE, unloaded. In float16 its weights go through bfloat16, as the reference holds them (spec 2.4)."""
    transform = _through_bfloat16 if options.vae_dtype == torch.float16 else None
    model = folder.networks.vae().eval()
    return _place("VAE", model, folder, folder.networks.vae_slots, options, lambda _name: options.vae_dtype, transform)


def place_vision(folder: ModelFolder, options: ResolvedOptions) -> PlacedModule:
    """The vision tower and its aligner, unloaded, in the transformer's dtype."""
    model = folder.networks.vision().eval()
    return _place(
        "vision tower", model, folder, folder.networks.vision_slots, options, lambda _name: options.dtype, None
    )


def load_transformer(folder: ModelFolder, options: ResolvedOptions) -> Hunyuan3Transformer:
    """The transformer with its weights, ready to run."""
    placed = place_transformer(folder, options)
    return placed.load(room=room_for(placed, options), host_has_room=host_room_for(placed, options))


def room_for(placed: PlacedModule, options: ResolvedOptions) -> dict[torch.device, int] | None:
    """Bytes that may still come to each device, the ring's taken off; None for no limit."""
    vram = options.vram
    if vram is None:
        return None
    limits = vram if isinstance(vram, Mapping) else dict.fromkeys(placed.devices, vram)
    return {device: limit - placed.full_ring_on(device) - placed.loaded_on(device) for device, limit in limits.items()}


def host_room_for(placed: PlacedModule, options: ResolvedOptions) -> HostHasRoom:
    """Whether so many bytes more of its weights may be kept in host memory."""
    return lambda nbytes: options.ram is None or placed.host_bytes + nbytes <= options.ram


def _place(
    name: str,
    module: nn.Module,
    folder: ModelFolder,
    slots: Mapping[str, Slot],
    options: ResolvedOptions,
    dtype_of: Callable[[str], torch.dtype],
    transform: Transform | None,
    streams: Streams | None = None,
    device_of: Callable[[str], torch.device] | None = None,
) -> PlacedModule:
    """device_of: where each parameter is computed with; None: all on the options' device."""

    def home(_name: str) -> torch.device:
        return options.device

    device_of = device_of or home
    by_parameter: dict[str, dict[str, Slot]] = {}
    for published, slot in slots.items():
        by_parameter.setdefault(slot.parameter, {})[published] = slot

    def read(
        module: nn.Module, parameters: Iterable[str], device: torch.device, check_cancelled: CheckCancelled
    ) -> None:
        wanted = {
            published: slot._replace(parameter=parameter)
            for parameter in parameters
            for published, slot in by_parameter[parameter if streams is None else streams.held_by(parameter)].items()
        }
        load_parameters(
            module,
            folder.index,
            wanted,
            device=device,
            dtype_of=dtype_of,
            transform=transform,
            check_cancelled=check_cancelled,
        )

    sizes = {key: value.numel() * dtype_of(key).itemsize for key, value in module.named_parameters()}
    units = units_by_prefix(
        sizes,
        lambda parameter: _unit_of(parameter, device_of(parameter)),
        device_of,
        streams=lambda unit: unit.startswith(EXPERT_UNIT),
    )
    lock = None if streams is None else PageLock.for_devices({unit.device for unit in units}, options.pinned)
    from_files = streams is not None and options.disk
    return PlacedModule(name, module, units, options.device, read, streams, lock, from_files)


def _unit_of(parameter: str, device: torch.device) -> str:
    """A transformer layer is a unit of its own; everything else of a network is one more.

    Experts that stream are a unit by their number, in all layers of a device: so each of these has the same share on
    it.
    """
    expert = re.match(r"layers\.\d+\.mlp\.experts\.(\d+)\.", parameter)
    if expert:
        return expert_unit(int(expert[1]), device)
    match = re.match(r"layers\.\d+", parameter)
    return match[0] if match else "rest"


def _through_bfloat16(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor.to(torch.bfloat16))]


def _named(table: dict[str, torch.dtype], what: str, name: str, default: str) -> torch.dtype:
    if name != "auto" and name not in table:
        raise RequestError(f"{what} is {name!r}; it must be auto, {', '.join(table)}.")
    return table[default if name == "auto" else name]


def works(device: torch.device) -> bool:
    """Whether tensors can be computed with on a device here."""
    try:
        _device(device)
    except RequestError:
        return False
    return True


def _device(asked: str | torch.device) -> torch.device:
    if asked == "auto":
        return torch.device(_best_device())
    try:
        device = torch.device(asked)
        torch.ones(1, device=device).item()  # the meta device, which computes nothing, fails here
    except (
        RuntimeError,
        AssertionError,
        NotImplementedError,
    ) as error:  # torch asserts where it was built without CUDA
        reason = str(error).splitlines()[0]
        raise RequestError(f"device is {str(asked)!r}, which does not work here ({reason}). Choose 'auto'.") from error
    return device


def _best_device() -> Literal["cuda", "mps", "cpu"]:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
