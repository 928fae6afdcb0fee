"""Rewrite a checkpoint folder in a weight format: quicker to load, smaller to keep.

    python -m hunyuan3.pack FOLDER OUT --format int8
    python -m hunyuan3.pack --verify OUT

OUT is a complete folder that the loader takes wherever it takes the published one: one file per layer, the experts
stacked as memory wants them, scales beside, and the configuration, tokenizer and prompt files. What it loads is to the
bit what the loader makes of the published folder in the same format. If it is stopped, the same command goes on from
the last whole file and ends in the same bytes. It needs memory for one tensor.
"""

import argparse
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .callbacks import CheckCancelled, never_cancelled
from .checkpoint.index import INDEX_NAME
from .checkpoint.keymap import Slot, transformer_slots
from .checkpoint.manifest import PACK_NAME, UNFINISHED_NAME, PackedFile, PackManifest, write_json
from .checkpoint.read import TORCH_DTYPES, TensorReader
from .checkpoint.shard import ShardWriter, StoredTensor
from .config import read_json
from .errors import CheckpointError, Hunyuan3Error, OutOfBudgetError, RequestError
from .folder import ModelFolder, Networks
from .parts import LoadOptions
from .quant.modules import is_quantized, swap, transform_to
from .quant.policy import FORMATS, policy_of, storage_of

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".partial")
_SMALL = 64 * 2**20  # larger files beside the weights are not what a loader reads
_SPARE = 2**26  # bytes of the disk that stay free
_GB = 1e9


@dataclass(frozen=True)
class PackStep:
    """One weight file is written (or was, before). done, total: bytes of all of them."""

    file: str
    done: int
    total: int
    was_there: bool


@dataclass(frozen=True)
class _Layout:
    """The weight files of a pack, and where each tensor goes that the source's tensors become.

    files: name -> its tensors. places: name that `transform` gives a tensor -> (file, stored name, row of a stack).
    sources: file -> published names that it is made from, in order.
    """

    files: Mapping[str, tuple[StoredTensor, ...]]
    places: Mapping[str, tuple[str, str, int | None]]
    sources: Mapping[str, tuple[str, ...]]


def pack(
    source: ModelFolder,
    out: Path,
    weight_format: str,
    *,
    device: torch.device | None = None,
    check_cancelled: CheckCancelled = never_cancelled,
) -> Iterator[PackStep]:
    """Writes the pack, a weight file at a time; iterate to the end.

    Args:
        source: the published folder. out: made if missing; its unfinished pack is gone on with.
        weight_format: "bf16", "fp8", "int8" or "int4" (a format with dynamic activations is stored without them).
        device: quantises there, None: the CPU.

    Raises RequestError (a pack as source, another pack in `out`), CheckpointError (damaged source), OutOfBudgetError
    (disk).
    """
    weight_format, out = storage_of(weight_format), out.resolve()  # one lock, however the folder is called
    if out.exists() and not out.is_dir():
        raise RequestError(f"{out} is a file. Name a folder to write to.")
    layout = _lay_out(source, weight_format)
    with _alone(out):
        yield from _pack_alone(source, out, weight_format, layout, device, check_cancelled)


def _pack_alone(
    source: ModelFolder,
    out: Path,
    weight_format: str,
    layout: "_Layout",
    device: torch.device | None,
    check_cancelled: CheckCancelled,
) -> Iterator[PackStep]:
    sizes = {name: ShardWriter(out / name, tensors).nbytes for name, tensors in layout.files.items()}
    finished = _begin(source, out, weight_format, sizes)
    transform = (
        transform_to(policy_of(weight_format), device or torch.device("cpu")) if weight_format != "bf16" else None
    )
    done, total = 0, sum(sizes.values())
    for name, tensors in layout.files.items():
        was_there = name in finished
        if not was_there:
            with ShardWriter(out / name, tensors) as writer, TensorReader() as reader:
                for published in layout.sources[name]:
                    check_cancelled()
                    tensor = reader.get(source.index[published])
                    for key, stored in transform(published, tensor) if transform else ((published, tensor),):
                        _file, stored_name, row = layout.places[key]
                        writer.write(stored_name, stored, row)
            finished[name] = PackedFile.of(out / name)
            _note(source, out, weight_format, finished)
        done += sizes[name]
        yield PackStep(name, done, total, was_there)
    _finish(out, weight_format, layout, finished)


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keeps a second process out of the folder. The system ends the lock with the process, however that ends."""
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.parent / f".{out.name}.pack-lock"
    with path.open("a") as file:
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RequestError(f"Another process is writing a pack to {out}. Wait for it to end.") from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows does not delete what is open
                path.unlink()


def verify(folder: Path) -> Iterator[tuple[str, bool]]:
    """(file, whether it is what was written) for each weight file of a pack. Reads all of them."""
    manifest = PackManifest.from_folder(folder)
    if manifest is None:
        raise RequestError(f"{folder} is not a pack: it has no {PACK_NAME}.")
    for name, file in sorted(manifest.files.items()):
        path = folder / name
        yield name, path.is_file() and path.stat().st_size == file.nbytes and PackedFile.of(path) == file


def _lay_out(source: ModelFolder, weight_format: str) -> _Layout:
    """A file per layer, one for the rest of the transformer, one for the VAE, one for the vision tower."""
    networks, policy = Networks(source.config), policy_of(weight_format)
    model = networks.transformer()
    if policy is not None:
        swap(model, policy)
    parameters = dict(model.named_parameters())
    stacked = {slot.parameter: name for name, slot in transformer_slots(parameters, stacked=True).items()}
    slots: dict[str, tuple[str, Slot]] = {}  # name that a tensor is given -> (stored name, slot)
    for key, slot in transformer_slots(parameters).items():
        slots[key] = stacked[slot.parameter], slot
    for key, slot in {**networks.vae_slots, **networks.vision_slots}.items():
        slots[key] = key, slot
    files: dict[str, dict[str, StoredTensor]] = {}
    sources: dict[str, list[str]] = {}
    places = {}
    for key, (name, slot) in slots.items():
        file = _file_of(key)
        places[key] = file, name, slot.expert
        is_small = key not in networks.vae_slots and key not in networks.vision_slots
        if is_small and is_quantized(slot.parameter, model):
            parameter = parameters[slot.parameter]
            stored = StoredTensor(name, parameter.dtype, tuple(parameter.shape))
        else:
            shape = slot.shape if slot.expert is None else tuple(parameters[slot.parameter].shape)
            stored = StoredTensor(name, TORCH_DTYPES[source.index[key].dtype], shape)
        if files.setdefault(file, {}).setdefault(name, stored) != stored:
            raise CheckpointError(f"{source.path}: the experts of {name} are not all of one dtype.")
        if key in source.index:  # scales are in no file of the source
            sources.setdefault(file, []).append(key)
    return _Layout(
        {file: tuple(tensors.values()) for file, tensors in files.items()},
        places,
        {file: tuple(keys) for file, keys in sources.items()},
    )


def _file_of(name: str) -> str:
    parts = name.split(".")
    if parts[:2] == ["model", "layers"]:
        return f"layer-{int(parts[2]):03d}.safetensors"
    if parts[0] == "vae":
        return "vae.safetensors"
    return "vision.safetensors" if parts[0].startswith("vision_") else "rest.safetensors"


def _begin(source: ModelFolder, out: Path, weight_format: str, sizes: Mapping[str, int]) -> dict[str, PackedFile]:
    """Checks everything that can be wrong before the first byte, and returns the files that are there already."""
    if source.pack is not None:
        raise RequestError(f"{source.path} is a pack itself. Give the folder as it was published.")
    if out.resolve() == source.path.resolve() or source.path.resolve() in out.resolve().parents:
        raise RequestError(f"{out} is the source folder or lies in it. Choose another folder to write to.")
    finished: dict[str, PackedFile] = {}
    if (out / UNFINISHED_NAME).exists():
        journal = read_json(out / UNFINISHED_NAME)
        if (journal.get("source"), journal.get("format")) != (source.fingerprint, weight_format):
            raise RequestError(
                f"{out} holds an unfinished pack of {journal.get('format')} from another source, or the source has "
                "changed. Delete it or choose another folder."
            )
        for name, file in PackManifest.from_json(journal, out / UNFINISHED_NAME).files.items():
            if (out / name).is_file() and (out / name).stat().st_size == file.nbytes == sizes.get(name):
                finished[name] = file
    elif out.is_dir() and any(not file.name.endswith(".partial") for file in out.iterdir()):
        raise RequestError(f"{out} is not empty, and holds no unfinished pack. Choose a new folder.")
    out.mkdir(parents=True, exist_ok=True)
    missing = sum(size for name, size in sizes.items() if name not in finished) + _SPARE
    free = shutil.disk_usage(out).free + sum(_on_disk(file) for file in out.glob("*.partial"))
    if missing > free:
        raise OutOfBudgetError(
            f"The pack needs {missing / _GB:.1f} GB more on the disk of {out}, which has {free / _GB:.1f} GB free. "
            "Free some, or choose a smaller format."
        )
    _note(source, out, weight_format, finished)
    for file in sorted(source.path.iterdir()):
        if _is_beside_the_weights(file):
            shutil.copyfile(file, out / file.name)
    return finished


def _on_disk(file: Path) -> int:
    """Bytes that a file takes: a partial one is full of holes."""
    stat = file.stat()
    return stat.st_blocks * 512 if hasattr(stat, "st_blocks") else 0


def _is_beside_the_weights(file: Path) -> bool:
    """Configuration, tokenizer, prompts, licence. Of Python only the file that holds the system prompts."""
    if not file.is_file() or file.name in (INDEX_NAME, PACK_NAME, UNFINISHED_NAME) or file.suffix in _WEIGHTS:
        return False
    return file.stat().st_size <= _SMALL and (file.suffix != ".py" or file.name == "system_prompt.py")


def _note(source: ModelFolder, out: Path, weight_format: str, finished: Mapping[str, PackedFile]) -> None:
    """Writes down what is done. While this file is there the folder is refused by the loader."""
    journal = PackManifest(weight_format, finished).to_json() | {"source": source.fingerprint}
    write_json(out / UNFINISHED_NAME, journal)


def _finish(out: Path, weight_format: str, layout: _Layout, finished: Mapping[str, PackedFile]) -> None:
    weight_map = {tensor.name: file for file, tensors in layout.files.items() for tensor in tensors}
    total = sum(tensor.nbytes for tensors in layout.files.values() for tensor in tensors)
    write_json(out / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(out / PACK_NAME, PackManifest(weight_format, finished).to_json())
    (out / UNFINISHED_NAME).unlink()


def main(argv: list[str] | None = None) -> int:
    """Packs or verifies; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hunyuan3.pack", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="checkpoint folder as published (with --verify: a pack)")
    parser.add_argument("out", type=Path, nargs="?", help="folder to write")
    parser.add_argument("--format", choices=[name for name in FORMATS if name == storage_of(name)], default="int8")
    parser.add_argument("--device", default="auto", help="where to quantise (default: the best there is)")
    parser.add_argument("--verify", action="store_true", help="compare a pack with its checksums")
    args = parser.parse_intermixed_args(argv)  # OUT may come after the options
    try:
        return _verify(args.folder) if args.verify else _pack(args.folder, args.out, args.format, args.device)
    except Hunyuan3Error as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error}. Run the same command again to go on from here.", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped. Run the same command again to go on from here.", file=sys.stderr)
    return 1


def _pack(folder: Path, out: Path | None, weight_format: str, device: str) -> int:
    if out is None:
        raise RequestError("Say where to write the pack: python -m hunyuan3.pack FOLDER OUT.")
    source = ModelFolder.open(folder)
    if (out / PACK_NAME).exists() and not (out / UNFINISHED_NAME).exists():
        raise RequestError(f"{out} holds a finished pack. --verify compares it with its checksums.")
    started, skipped = time.monotonic(), 0
    for step in pack(source, out, weight_format, device=LoadOptions(device=device).resolved().device):
        if step.was_there:
            skipped = step.done
            print(f"{step.file}: was there")
            continue
        seconds = time.monotonic() - started
        rate = (step.done - skipped) / max(seconds, 1e-9)
        left = (step.total - step.done) / max(rate, 1e-9)
        print(
            f"{step.file}: {step.done / _GB:.2f} of {step.total / _GB:.2f} GB, {rate / 1e6:.0f} MB/s, "
            f"{left / 60:.0f} min left",
            flush=True,
        )
    print(f"{out}: a pack of {weight_format}, ready to load")
    return 0


def _verify(folder: Path) -> int:
    bad = []
    for name, is_right in verify(folder):
        print(f"{name}: {'as written' if is_right else 'DAMAGED OR MISSING'}", flush=True)
        bad += [] if is_right else [name]
    if bad:
        print(f"error: {len(bad)} files of {folder} are not as written. Pack the folder again.", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
