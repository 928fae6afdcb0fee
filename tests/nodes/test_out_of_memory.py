"""Memory that runs out in the middle: one retry with a smaller plan, then an error that says what to change.

As in test_eviction.py ComfyUI's own memory manager runs on a made-up card. The faults are injected at every place where
torch makes a tensor: `Fault` raises torch.OutOfMemoryError at the n-th one of a stage. What this cannot show is that a
real card has the room for the retry.
"""

from __future__ import annotations

import gc
import io
import logging
import re
import sys
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from hunyuan3.placement import out_of_memory as core_out_of_memory
from tests.nodes.graphs import drawing, node
from tests.nodes.listener import Listener
from tests.nodes.test_eviction import CARD, HOST, ROOMY, Card, error, on_meta, submodule
from tools.comfy_server import ComfyServer, PromptError

if TYPE_CHECKING:
    from tests.nodes.conftest import ComfyPack

pytestmark = pytest.mark.comfy

CARD_IS_FULL = "CUDA out of memory. Tried to allocate 3.50 GiB. GPU 0 has a total capacity of 23.99 GiB of which 1 is"
PARTS = ("transformer", "vae", "vision")
WHERE = ("first", "middle", "last")


# --- faults -----------------------------------------------------------------------------------------------------------

# (end of a file's name, function) of a frame -> stage. The innermost such frame of an operation decides.
STAGES = {
    ("placed.py", "_bring"): "load",
    ("model.py", "new_cache"): "cache",
    ("denoise.py", "prefill"): "prompt",
    ("denoise.py", "velocity"): "step",
    ("text.py", "prefill"): "prefill",
    ("text.py", "feed"): "feed",
    ("text.py", "keep"): "keep",
    ("autoencoder.py", "decode"): "decode",
    ("autoencoder.py", "encode"): "encode",
    ("siglip2.py", "forward"): "vision",
    ("preview.py", "_preview"): "preview",
}


class Watch(TorchDispatchMode):
    """Counts, by stage, the operations that make a tensor. Views and what is done in place allocate nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(given.alias_info for given in func._schema.returns):
            stage = current_stage()
            self.seen[stage] += 1
            self.about_to(stage)
        return func(*args, **(kwargs or {}))

    def about_to(self, stage: str) -> None:
        """A tensor is going to be made."""


class Fault(Watch):
    """Memory runs out at the n-th tensor (from 1) of a stage, and again at the next `again`-th one, `times` in all."""

    def __init__(
        self, stage: str, at: int = 1, times: int = 1, again: int = 1, error: Callable[[], Exception] | None = None
    ) -> None:
        super().__init__()
        self.stage, self.at, self.times, self.again = stage, at, times, again
        self.error = error or (lambda: torch.OutOfMemoryError(CARD_IS_FULL))
        self.raised = 0

    def about_to(self, stage: str) -> None:
        wanted = self.again if self.raised else self.at
        if stage == self.stage and self.raised < self.times and self.seen[stage] >= wanted:
            self.raised += 1
            self.seen.clear()
            raise self.error()


def current_stage() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        stage = STAGES.get((code.co_filename.rpartition("/")[2], code.co_name))
        if stage == "step":
            return "first step" if frame.f_locals["step"] == 0 else "later step"
        if stage is not None:
            return stage
        frame = frame.f_back
    return ""


# --- a handle on the made-up card -------------------------------------------------------------------------------------


class Handle:
    """An opened tiny checkpoint whose nodes can be run, as ComfyUI runs them."""

    def __init__(self, pack: ComfyPack, folder: Path, card: Card, **options: Any) -> None:
        self.pack = pack
        self.memory = submodule(pack, "nodes.memory")
        pipeline, io_types = submodule(pack, "hunyuan3.pipeline"), submodule(pack, "nodes.io_types")
        options = {"dtype": "float32", "vae_dtype": "float32"} | options
        self.core = pipeline.Hunyuan3.open(folder, device=CARD, **options)
        self.model = io_types.ModelHandle(
            name="tiny",
            model=self.core,
            transformer=self.memory.PartPatcher.of(self.core.placed_transformer, self.core.prefixes),
            vae=self.memory.PartPatcher.of(self.core.placed_vae),
            vision=self.memory.PartPatcher.of(self.core.placed_vision),
        )
        card.parts += [getattr(self.model, name) for name in PARTS]

    def run(self, name: str, **inputs: Any) -> tuple[Any, ...]:
        return self.pack.nodes[name].PREPARE_CLASS_CLONE({}).execute(model=self.model, **inputs).args

    def draw(self, **inputs: Any) -> torch.Tensor:
        conditioning = self.core.conditioning("a red fox", width=64, height=64)
        settings = {"seed": 1, "steps": 3, "preview": "off"} | inputs
        return self.run("Hunyuan3Sampler", conditioning=conditioning, **settings)[0]["samples"]

    def write(self, **inputs: Any) -> str:
        again = {"sampling": "custom", "repetition_penalty": 0.7, "temperature": 1.0}
        return self.run("Hunyuan3Ask", prompt="what?", seed=5, max_new_tokens=24, **again, **inputs)[0]

    def decode(self, **inputs: Any) -> torch.Tensor:
        return self.run("Hunyuan3VAEDecode", samples={"samples": LATENT}, **inputs)[0]

    def encode(self, **inputs: Any) -> torch.Tensor:
        return self.run("Hunyuan3VAEEncode", pixels=PIXELS, **inputs)[0]["samples"]

    def look(self, **inputs: Any) -> torch.Tensor:
        (seen,) = self.run("Hunyuan3ImageConditioning", image_1=PIXELS, image_2=PIXELS.flip(1), **inputs)
        return torch.cat([part.flatten() for p in seen.pictures for part in (p.posterior.mean, p.tokens)])

    def parts(self) -> list[Any]:
        return [getattr(self.model, name) for name in PARTS]


LATENT = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(1))
PIXELS = torch.rand(1, 128, 192, 3, generator=torch.Generator().manual_seed(2))
SMALLER = {"draw": {"cfg_mode": "sequential"}, "decode": {"tile_size": 96}, "encode": {"tile_size": 96}}
JOBS = {
    "draw": ("load", "cache", "prompt", "first step", "later step"),
    "write": ("load", "cache", "prefill", "feed", "keep"),
    "decode": ("load", "decode"),
    "encode": ("load", "encode"),
    "look": ("load", "encode", "vision"),
}
SITES = [(job, stage) for job, stages in JOBS.items() for stage in stages]


@pytest.fixture(scope="module", autouse=True)
def files_are_read_unwatched(comfy_pack: ComfyPack) -> Iterator[None]:
    """safetensors cannot make a tensor of a mapped file where operations are watched; it is no memory of the card's."""

    class Unwatched:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Any:
            return Unwatched(self.file.__enter__())

        def __exit__(self, *exc_info: Any) -> None:
            self.file.__exit__(*exc_info)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> torch.Tensor:
            with _disable_current_modes():
                return self.file.get_tensor(name)

    reader = submodule(comfy_pack, "hunyuan3.checkpoint.read").TensorReader

    def unwatched(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with _disable_current_modes():
                return method(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        module = submodule(comfy_pack, "hunyuan3.pipeline")
        patch.setattr(module, "open_shard", lambda path, opened=module.open_shard: Unwatched(opened(path)))
        for name in ("get", "into"):
            patch.setattr(reader, name, unwatched(getattr(reader, name)))
        yield


@pytest.fixture
def card(stand_in_cards: Callable[..., None]) -> Card:
    """As in test_eviction.py: a card and a host with room, and a memory manager that believes in them."""
    card = Card()
    stand_in_cards(card.free, lambda *_a, **_k: card.total, CARD)
    return card


@pytest.fixture
def handle(comfy_pack: ComfyPack, card: Card, tiny_checkpoint: Path) -> Handle:
    return Handle(comfy_pack, tiny_checkpoint, card)


@pytest.fixture(scope="module")
def undisturbed(comfy_pack: ComfyPack, tiny_checkpoint: Path) -> dict[str, tuple[Any, Counter[str]]]:
    """Job -> what it gives when memory never runs out, and how many tensors each of its stages makes.

    With the smaller plan from the start: job + " smaller".
    """
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        import comfy.model_management as mm

        patch.setattr(mm, "get_free_memory", Card().free)
        patch.setattr(mm, "get_total_memory", lambda *_a, **_k: ROOMY)
        patch.setattr(mm, "is_device_cpu", lambda device: device == HOST)
        patch.setattr(mm, "current_loaded_models", [])
        Handle(comfy_pack, tiny_checkpoint, Card()).draw()  # what torch makes once for all is not counted
        for job in JOBS:
            for name, more in ((job, {}), (f"{job} smaller", SMALLER.get(job, {}))):
                with Watch() as watch:
                    results[name] = getattr(Handle(comfy_pack, tiny_checkpoint, Card()), job)(**more), watch.seen
        handle = Handle(comfy_pack, tiny_checkpoint, Card())
        encode = handle.core.encode_pictures
        handle.core.encode_pictures = lambda *a, **k: encode(*a, **(k | {"tile_size": 192}))
        results["look smaller"] = handle.look(), Counter()
        assert not torch.equal(results["look smaller"][0], results["look"][0])
    return results


def same(found: Any, wanted: Any) -> bool:
    return found == wanted if isinstance(wanted, str) else torch.equal(found, wanted)


def nothing_is_lost(mm: types.ModuleType, handle: Handle) -> None:
    """Whatever is on the card is on the manager's list, and what is listed is what is there."""
    for part in handle.parts():
        listed = any(part is known for known in mm.loaded_models())
        assert listed or part.loaded_size() == 0, f"{part.placed.name} is loaded and not listed"
    for prefix in handle.core.prefixes._entries.values():
        assert all(k.shape[2] == len(prefix.ids) for k in (*prefix.keys, *prefix.values))
        assert len(prefix.keys) == handle.core.folder.config.num_layers


# --- once: the result -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "stage", "where"),
    # Pictures to look at are large ones whatever their size: slow, so not everywhere.
    [(job, stage, where) for job, stage in SITES for where in (WHERE if job != "look" else ("middle",))],
)
def test_once_gives_the_result(
    mm: types.ModuleType, handle: Handle, undisturbed: dict[str, Any], job: str, stage: str, where: str
):
    """To the bit that of the plan that was run in the end; guidance in turn: within 1e-4 of both at once (float32)."""
    wanted, seen = undisturbed[job]
    with Fault(stage, place(seen[stage], where)) as fault:
        found = getattr(handle, job)()
    assert fault.raised == 1
    smaller, _ = undisturbed[f"{job} smaller"]
    same_plan = stage in ("load", "vision") or job == "write"
    assert same(found, wanted if same_plan else smaller)
    if job == "draw":
        assert (found - wanted).abs().max() < 1e-4
    nothing_is_lost(mm, handle)
    if job == "draw":
        handle.core.prefixes.clear()
    assert same(getattr(handle, job)(), wanted)


@pytest.mark.parametrize(("job", "stage"), SITES)
def test_twice_is_said_and_the_next_request_works(
    mm: types.ModuleType, handle: Handle, undisturbed: dict[str, Any], job: str, stage: str
):
    wanted, seen = undisturbed[job]
    with Fault(stage, place(seen[stage], "middle"), times=2) as fault, pytest.raises(Exception) as caught:
        getattr(handle, job)()
    assert fault.raised == 2
    assert type(caught.value) is error(handle, "OutOfBudgetError")
    text = str(caught.value)
    for said in ("also at the second try", "3.50 GiB more were asked for", "were free on cpu:0", "To make it fit, "):
        assert said in text
    assert caught.value.__context__ is None, "an error that ComfyUI keeps must not keep tensors"
    nothing_is_lost(mm, handle)
    assert same(getattr(handle, job)(), wanted)
    nothing_is_lost(mm, handle)


# --- with experts that stream -----------------------------------------------------------------------------------------


@pytest.fixture
def streamed(comfy_pack: ComfyPack, card: Card, tiny_checkpoint: Path, mm: types.ModuleType) -> Handle:
    """On a card with room for a third of the experts."""
    handle = Handle(comfy_pack, tiny_checkpoint, card, streaming=3)
    part = handle.model.transformer
    third = (part.placed.total_bytes - part.placed.required_bytes) // 3
    card.total = int(mm.minimum_inference_memory()) + part.least_bytes + third + 1000
    return handle


def slots_are_all_there(handle: Handle) -> bool:
    ring = handle.core.placed_transformer.streams.ring
    return not ring._slots or (ring.num_free + len(ring._under_way) == ring.count and not ring._taken)


@pytest.mark.parametrize("where", ["first", "middle"])
@pytest.mark.parametrize(
    ("job", "stage"), [(job, stage) for job, stage in SITES if job in ("draw", "write") and stage != "load"]
)
@pytest.mark.parametrize("times", [1, 2])
def test_streamed_work_survives_and_loses_no_slot(
    mm: types.ModuleType, streamed: Handle, undisturbed: dict[str, Any], job: str, stage: str, where: str, times: int
):
    """In the middle of a step, with copies under way: the same results as when all is resident, to the bit."""
    wanted, _ = undisturbed[job]
    with Watch() as watch:
        assert same(getattr(streamed, job)(), wanted)
    streamed.core.prefixes.clear()
    found = None
    with Fault(stage, place(watch.seen[stage], where), times=times) as fault:
        try:
            found = getattr(streamed, job)()
        except error(streamed, "OutOfBudgetError") as caught:
            assert "also at the second try" in str(caught)
    assert fault.raised == times
    assert (found is None) == (times == 2)
    if found is not None:
        smaller, _ = undisturbed[f"{job} smaller"]
        assert same(found, wanted if job == "write" else smaller)
    nothing_is_lost(mm, streamed)
    streamed.core.prefixes.clear()
    assert same(getattr(streamed, job)(), wanted)
    assert slots_are_all_there(streamed)
    assert streamed.core.placed_transformer.streams.copied > 0
    assert streamed.core.placed_transformer.host_bytes > 0


def test_written_with_streamed_experts_the_log_tells_hits_and_bytes(streamed: Handle, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        streamed.write()
    (line,) = (
        record.getMessage() for record in caplog.records if "of their experts on the device" in record.getMessage()
    )
    assert re.search(r"\d+ tokens, \d+% of their experts on the device, \d+\.\d+ MB copied per token", line)
    assert "tokens/s" in line


def test_fault_that_stays_is_tried_twice_and_not_thrice(handle: Handle):
    with Fault("first step", times=100) as fault, pytest.raises(error(handle, "OutOfBudgetError")):
        handle.draw()
    assert fault.raised == 2


def test_batch_and_step_cache_survive(handle: Handle, undisturbed: dict[str, Any]):
    settings = {"batch_size": 2, "step_cache": step_cache(handle), "steps": 6}
    with Fault("later step", 20):
        found = handle.draw(**settings)
    handle.core.prefixes.clear()
    assert torch.equal(found, handle.draw(**settings, cfg_mode="sequential"))
    assert (found - handle.draw(**settings)).abs().max() < 1e-4


@pytest.mark.parametrize("settings", [{"guidance": 1.0}, {"cfg_mode": "sequential"}], ids=str)
def test_one_branch_is_drawn_again_to_the_bit(handle: Handle, settings: dict[str, Any]):
    with Fault("later step", 20) as fault:
        found = handle.draw(**settings)
    assert fault.raised == 1
    handle.core.prefixes.clear()
    assert torch.equal(found, handle.draw(**settings))


def test_capacity_dropping_keeps_both_branches_together(comfy_pack: ComfyPack, card: Card, tiny_checkpoint: Path):
    """They compete for experts: one at a time would be another picture (and is refused)."""
    handle = Handle(comfy_pack, tiny_checkpoint, card, drop_tokens=True)
    with Fault("later step", 20) as fault:
        found = handle.draw()
    assert fault.raised == 1
    assert torch.equal(found, handle.draw())


# --- what is done before the retry ------------------------------------------------------------------------------------


def test_all_else_is_evicted_and_kept_prompts_go(mm: types.ModuleType, handle: Handle, monkeypatch: pytest.MonkeyPatch):
    handle.decode()
    handle.draw()
    kept = handle.core.prefixes.nbytes
    assert kept > 0
    assert handle.model.vae.loaded_size() > 0
    seen = []
    load = mm.load_models_gpu
    monkeypatch.setattr(mm, "load_models_gpu", lambda *a, **k: (seen.append(state(mm, handle)), load(*a, **k))[1])
    with Fault("first step"):
        handle.draw(seed=2)
    everything = handle.model.transformer.placed.total_bytes
    assert [entry["transformer"] for entry in seen] == [everything, everything], "the weights in use stay"
    assert [entry["vae"] for entry in seen] == [handle.model.vae.model_size(), 0]
    assert [entry["kept"] for entry in seen] == [kept, 0]
    assert [entry["listed"] for entry in seen] == [2, 1]


def test_failed_attempts_tensors_are_gone_at_the_retry(handle: Handle):
    """At once, not at the next garbage collection."""
    sampler = submodule(handle.pack, "nodes.sampler")
    refs: list[weakref.ref] = []
    alive: list[list[bool]] = []

    def watching(one_branch: bool) -> Any:
        alive.append([ref() is not None for ref in refs])
        run = prepare(handle, one_branch)
        start_of = run._start_of

        def start(schedule: Any) -> Any:
            rows, latents = start_of(schedule)
            refs.append(weakref.ref(latents))
            return rows, latents

        run._start_of = start
        return run

    progress = submodule(handle.pack, "nodes.progress").NodeProgress(None)
    gc.collect()
    gc.disable()
    collect, gc.collect = gc.collect, lambda *_a: 0
    try:
        with Fault("later step", 20):
            sampler.draw(handle.model, watching, "batched", None, progress)
    finally:
        gc.collect = collect
        gc.enable()
    assert alive == [[], [], [False]]


def test_host_shortage_drops_weights_instead_of_moving_them(mm: types.ModuleType, handle: Handle):
    handle.decode()
    with Fault("first step", error=lambda: MemoryError()) as fault:
        handle.draw()
    assert fault.raised == 1
    assert on_meta(handle.model.vae)
    nothing_is_lost(mm, handle)


def test_load_that_fails_in_the_second_part_leaves_no_first_one_unlisted(mm: types.ModuleType, handle: Handle):
    """The manager takes both off its list before it loads either."""
    handle.decode()
    read = handle.core.placed_vision._read

    def failing(*_arguments: Any) -> None:
        raise torch.OutOfMemoryError(CARD_IS_FULL)

    handle.core.placed_vision._read = failing
    with pytest.raises(error(handle, "OutOfBudgetError"), match="loading the VAE and the vision tower"):
        handle.look()
    nothing_is_lost(mm, handle)
    handle.core.placed_vision._read = read
    handle.look()


# --- Cancel, other errors, previews -----------------------------------------------------------------------------------


def test_cancel_between_the_tries(mm: types.ModuleType, handle: Handle, monkeypatch: pytest.MonkeyPatch):
    progress = submodule(handle.pack, "nodes.progress").NodeProgress
    monkeypatch.setattr(
        progress, "text", lambda _s, text: mm.interrupt_current_processing() if "trying once more" in text else None
    )
    handle.decode()
    with Fault("first step") as fault, pytest.raises(mm.InterruptProcessingException):
        handle.draw()
    assert fault.raised == 1
    assert handle.model.vae.loaded_size() > 0, "nothing was evicted for a retry that is not wanted"
    assert not mm.processing_interrupted()
    nothing_is_lost(mm, handle)


@pytest.mark.parametrize(("job", "stage"), [s for s in SITES if s[1] in ("first step", "feed", "decode", "encode")])
def test_cancel_during_the_retry(mm: types.ModuleType, handle: Handle, job: str, stage: str):
    class FaultThenCancel(Fault):
        def about_to(self, stage: str) -> None:
            super().about_to(stage)
            if self.raised and self.seen[self.stage] == 2:
                mm.interrupt_current_processing()

    with FaultThenCancel(stage), pytest.raises(mm.InterruptProcessingException):
        getattr(handle, job)()
    nothing_is_lost(mm, handle)


@pytest.mark.parametrize(
    "wrong", [RuntimeError("CUDA error: device-side assert triggered"), ValueError("out of memory"), OSError("disk")]
)
def test_other_errors_pass_at_once(handle: Handle, wrong: Exception):
    with Fault("first step", times=9, error=lambda: wrong) as fault, pytest.raises(type(wrong)) as caught:
        handle.draw()
    assert caught.value is wrong
    assert fault.raised == 1


def test_failed_preview_stops_no_drawing(handle: Handle, undisturbed: dict[str, Any], caplog: pytest.LogCaptureFixture):
    """Previews are off for the rest of the run."""
    handle.draw(preview="auto")  # prepares them
    handle.core.prefixes.clear()
    with caplog.at_level(logging.WARNING), Fault("preview", times=9) as fault:
        found = handle.draw(preview="auto")
    assert fault.raised == 1
    assert torch.equal(found, undisturbed["draw"][0])
    assert "out of memory for a preview" in caplog.text


@pytest.mark.parametrize(("stage", "times"), [("encode", 9), ("load", 2)])
def test_previews_that_cannot_be_prepared_stop_no_drawing(
    mm: types.ModuleType,
    handle: Handle,
    undisturbed: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stage: str,
    times: int,
):
    monkeypatch.setattr(submodule(handle.pack, "nodes.preview"), "_read", lambda *_a: None)
    with caplog.at_level(logging.WARNING), Fault(stage, times=times) as fault:
        found = handle.draw(preview="auto")
    assert fault.raised == (1 if stage == "encode" else 2)
    assert torch.equal(found, undisturbed["draw"][0])
    assert "no memory to prepare previews" in caplog.text
    nothing_is_lost(mm, handle)


# --- what is said -----------------------------------------------------------------------------------------------------


def test_log_and_node_tell_what_is_tried(
    handle: Handle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    texts: list[str] = []
    progress = submodule(handle.pack, "nodes.progress").NodeProgress
    monkeypatch.setattr(progress, "text", lambda _self, text: texts.append(text))
    with caplog.at_level(logging.WARNING), Fault("first step"):
        handle.draw()
    told = "out of memory while drawing; trying once more, from the first step, guidance one branch after the other"
    assert any(text.startswith(told) for text in texts)
    assert told in caplog.text
    assert re.search(r"3\.50 GiB more were asked for; \d+\.\d\d GiB were free on cpu:0", caplog.text)
    assert texts[-1].endswith("memory ran out once: guidance one branch after the other")
    with Fault("decode"):
        handle.decode()
    assert (
        "out of memory while decoding; trying once more, in tiles of 96 pixels, with everything else evicted" in texts
    )


@pytest.mark.parametrize(
    ("job", "stage", "options", "inputs", "said", "unsaid"),
    [
        ("draw", "first step", {}, {}, ["int8 or int4", "64x64"], ["batch_size", "input pictures", "tile"]),
        (
            "draw",
            "first step",
            {"format": "int8"},
            {"batch_size": 2},
            ["set format to int4", "batch_size"],
            ["int8 or"],
        ),
        ("draw", "first step", {"format": "int4"}, {}, ["smaller picture"], ["set format"]),
        ("draw", "load", {}, {}, ["while loading the transformer", "int8 or int4"], ["64x64"]),
        ("write", "feed", {}, {}, ["max_new_tokens (it was 24)", "int8 or int4"], ["cfg_mode"]),
        ("decode", "decode", {}, {}, ["vae_dtype to float16"], ["set format", "set tile_size"]),
        ("decode", "decode", {"vae_dtype": "bfloat16"}, {}, ["close other programs"], ["vae_dtype", "set format"]),
        ("decode", "decode", {}, {"tile_size": 384}, ["also at the second try (in tiles of 96"], []),
        ("encode", "encode", {}, {}, ["while encoding", "vae_dtype to float16"], ["set format"]),
        ("look", "vision", {}, {}, ["while encoding pictures"], ["tile"]),
    ],
)
def test_advice_is_true(
    comfy_pack: ComfyPack,
    card: Card,
    tiny_checkpoint: Path,
    job: str,
    stage: str,
    options: dict[str, Any],
    inputs: dict[str, Any],
    said: list[str],
    unsaid: list[str],
):
    handle = Handle(comfy_pack, tiny_checkpoint, card, **options)
    with Fault(stage, times=2), pytest.raises(error(handle, "OutOfBudgetError")) as caught:
        getattr(handle, job)(**inputs)
    text = str(caught.value)
    assert [part for part in said if part not in text] == [], text
    assert [part for part in unsaid if part in text] == [], text


def test_estimate_stands_in_where_the_error_tells_no_number(handle: Handle):
    with Fault("first step", times=2, error=lambda: torch.OutOfMemoryError("Allocation on device")):
        with pytest.raises(error(handle, "OutOfBudgetError"), match=r"needs about \d+\.\d\d MiB \(estimated\)"):
            handle.draw()


def test_what_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**50)
    counts = [
        (torch.OutOfMemoryError("x"), None, False),
        (torch.OutOfMemoryError(CARD_IS_FULL), int(3.5 * 2**30), False),
        (torch.OutOfMemoryError("HIP out of memory. Tried to allocate 20.00 MiB. GPU 0"), 20 * 2**20, False),
        (torch.OutOfMemoryError("Currently allocated : 7.62 GiB\nRequested     : 1.00 GiB"), 2**30, False),
        (
            RuntimeError("MPS backend out of memory (MPS allocated: 8.99 GB). Tried to allocate 96.00 MB"),
            96 << 20,
            False,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 77 bytes."), 77, True),
        (real.value, 2**52, True),
        (MemoryError(), None, True),
    ]
    for wrong, asked, host in counts:
        assert core_out_of_memory.is_out_of_memory(wrong), wrong
        assert core_out_of_memory.asked_bytes(wrong) == asked
        assert core_out_of_memory.is_out_of_host_memory(wrong) == host
    for wrong in (RuntimeError("out of memory"), ValueError("MPS backend out of memory"), KeyError("MemoryError")):
        assert not core_out_of_memory.is_out_of_memory(wrong)


def test_what_an_error_holds_is_let_go_though_someone_holds_the_error():
    refs = []

    def attempt() -> None:
        tensor = torch.zeros(1)
        refs.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError(CARD_IS_FULL)

    def cleaning() -> None:
        try:
            attempt()
        finally:
            also = torch.zeros(1)
            refs.append(weakref.ref(also))
            raise MemoryError

    with pytest.raises(MemoryError) as held:
        cleaning()
    assert all(ref() is not None for ref in refs)
    core_out_of_memory.let_go(held.value)
    assert all(ref() is None for ref in refs)


# --- in a server ------------------------------------------------------------------------------------------------------

SERVED = {
    "load": ("hunyuan3.placement.placed:PlacedModule._bring", "loading the transformer"),
    "draw": ("hunyuan3.transformer.model:Hunyuan3Transformer.embed_latents", "drawing"),
    "decode": ("hunyuan3.vae.autoencoder:Decoder.forward", "decoding"),
}


@pytest.mark.parametrize("stage", SERVED)
def test_served_prompts(probed_server: ComfyServer, stage: str):
    """After one fault the picture comes, after two the prompt fails with the clear text and the next one draws."""
    server, (at, doing) = probed_server, SERVED[stage]
    # A stage of its own, seen afresh each time: ComfyUI takes from its cache what it has drawn before.
    seeds = iter(range(7000 + 100 * list(SERVED).index(stage), 8000))

    def prompt() -> dict[str, Any]:
        # Small enough that the smallest tile is the whole: the same picture.
        small = {"width": 96, "height": 96}
        return drawing(conditioning=small, sampler={"seed": next(seeds), "preview": "off"})

    with Listener(server) as page:
        for times in (1, 2):
            fresh(server)
            asked = prompt()
            wanted = picture(server, server.queue(asked))
            fresh(server)
            server.post("/hunyuan3_probe/fault", {"at": at, "times": times})
            if times == 1:
                told = page.run(asked)
                texts = told.texts("sampler") + told.texts("decode")
                assert any(text.startswith(f"out of memory while {doing}; trying once more") for text in texts)
                np.testing.assert_allclose(picture(server, told.outputs), wanted, atol=1)  # of 255
            else:
                failing, following = server.submit(asked), server.submit(prompt())
                with pytest.raises(PromptError, match=f"OutOfBudgetError: Out of memory while {doing}, also at the"):
                    server.wait(failing)
                assert server.history(failing)["outputs"].keys() <= {"loader", "sampler"}, "no picture"
                assert len(np.unique(picture(server, server.wait(following)))) > 20, "black"
                np.testing.assert_array_equal(picture(server, server.queue(asked)), wanted)


# --- helpers ----------------------------------------------------------------------------------------------------------


def place(count: int, where: str) -> int:
    """Which of `count` tensors (from 1) is the first, the middle, the last."""
    assert count, "the stage was not found"
    return {"first": 1, "middle": (count + 1) // 2, "last": count}[where]


def fresh(server: ComfyServer) -> None:
    """Nothing loaded, nothing cached: waits until the worker has seen to it, before it takes a second prompt."""
    server.post("/free", {"unload_models": True, "free_memory": True})
    for colour in (1, 2):
        show = node("PreviewImage", images=["empty", 0])
        server.queue({"empty": node("EmptyImage", width=8, height=8, batch_size=1, color=colour), "show": show})


def picture(server: ComfyServer, outputs: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(server.view(**outputs["show"]["images"][0]))).convert("RGB"))


def prepare(handle: Handle, one_branch_at_a_time: bool) -> Any:
    return submodule(handle.pack, "nodes.sampler").SamplingRun.prepare(
        handle.core.folder,
        handle.core.placed_transformer.module,
        handle.core.conditioning("a red fox", width=64, height=64),
        steps=3,
        one_branch_at_a_time=one_branch_at_a_time,
        prefixes=handle.core.prefixes,
    )


def step_cache(handle: Handle) -> Any:
    options = submodule(handle.pack, "hunyuan3.generate.taylor").TaylorOptions
    return options(interval=3, first_enhance_steps=1)


def state(mm: types.ModuleType, handle: Handle) -> dict[str, int]:
    return {
        "transformer": handle.core.placed_transformer.loaded_bytes,
        "vae": handle.model.vae.loaded_size(),
        "kept": handle.core.prefixes.nbytes,
        "listed": len(mm.loaded_models()),
    }
