"""The weights under ComfyUI's memory manager: what is evicted, what is told about it, and that it comes back whole.

No GPU is needed. `torch.device("cpu", 0)` stands in for a card: everything that compares devices holds it to be another
one than the host's `torch.device("cpu")`, and tensors on it compute. Its memory is made up: a `Card` says how much is
free by counting what is on it. So ComfyUI's own code decides what goes and what stays. What this cannot show is that
the bytes leave a real card, and how fast.
"""

from __future__ import annotations

import gc
import re
import sys
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from tests.nodes.conftest import ComfyPack

pytestmark = pytest.mark.comfy

HOST = torch.device("cpu")
CARD = torch.device("cpu", 0)
MIB = 2**20
RESERVED = 400 * MIB  # ComfyUI's own, with its minimum for work: 0.8 GiB + this
ROOMY = 10 * 2**30


@dataclass
class Card:
    """The made-up memory of CARD, and of the host."""

    total: int = ROOMY
    host_free: int = ROOMY
    others: int = 0  # bytes that other programs hold
    parts: list[Any] = field(default_factory=list)

    def free(self, device: torch.device | None = None, torch_free_too: bool = False) -> Any:
        """Stands for comfy.model_management.get_free_memory."""
        if device == HOST:
            free = self.host_free - sum(held_bytes(part) - part.loaded_size() for part in self.parts)
        else:
            free = self.total - self.others - sum(part.loaded_size() for part in self.parts)
        return (free, 0) if torch_free_too else free


class Opened:
    """An opened tiny checkpoint whose parts compute on CARD."""

    def __init__(
        self,
        pack: ComfyPack,
        folder: Path,
        card: Card,
        vram: int | None = None,
        ram: int | None = None,
        streaming: int = 0,
        disk: bool = False,
    ) -> None:
        pipeline = submodule(pack, "hunyuan3.pipeline")
        self.memory = submodule(pack, "nodes.memory")
        options = {"device": CARD, "dtype": "float32", "vae_dtype": "float32", "streaming": streaming, "disk": disk}
        self.core = pipeline.Hunyuan3.open(folder, **options)
        budget = submodule(pack, "nodes.budget").Budget(vram, ram)
        self.transformer = self.memory.PartPatcher.of(self.core.placed_transformer, self.core.prefixes, budget)
        self.vae = self.memory.PartPatcher.of(self.core.placed_vae, budget=budget)
        card.parts += [self.transformer, self.vae]

    def bring(self, part: Any, work: int = 0, progress: Callable[[str, int, int], None] = lambda *_: None) -> None:
        self.memory.bring_to_device(part, work, progress)

    def latents(self, between: Callable[[], None] = lambda: None) -> torch.Tensor:
        """What it draws, with the transformer brought to the device as the sampler does. `between`: after each step."""
        self.bring(self.transformer)
        conditioning = self.core.conditioning("a red fox", width=64, height=64)
        prepare = sys.modules[type(self.core).__module__].SamplingRun.prepare
        # Not core.sample(), which would load what the manager has evicted.
        module = self.core.placed_transformer.module
        run = prepare(self.core.folder, module, conditioning, seed=1, steps=2, prefixes=self.core.prefixes)
        for _step in run:
            between()
        return run.latents

    def picture(self) -> torch.Tensor:
        """`latents`, decoded."""
        latents = self.latents()
        self.bring(self.vae)
        return self.core.decode(latents)


@pytest.fixture
def card(stand_in_cards: Callable[..., None]) -> Card:
    """A card and a host with room, and a memory manager that believes in them and holds nothing."""
    card = Card()
    stand_in_cards(card.free, lambda *_a, **_k: card.total, CARD, RESERVED)
    return card


@pytest.fixture
def opened(comfy_pack: ComfyPack, card: Card, tiny_checkpoint: Path) -> Opened:
    return Opened(comfy_pack, tiny_checkpoint, card)


@pytest.fixture(scope="module")
def whole_picture(comfy_pack: ComfyPack, tiny_checkpoint: Path) -> torch.Tensor:
    """What the checkpoint draws when nothing is ever evicted."""
    core = submodule(comfy_pack, "hunyuan3.pipeline").Hunyuan3.open(tiny_checkpoint, device=HOST, dtype="float32")
    run = core.sample(core.conditioning("a red fox", width=64, height=64), seed=1, steps=2)
    return core.decode(run.latents)


@pytest.fixture(scope="module")
def whole_latents(comfy_pack: ComfyPack, tiny_checkpoint: Path) -> torch.Tensor:
    """What the transformer draws when nothing is ever evicted."""
    core = submodule(comfy_pack, "hunyuan3.pipeline").Hunyuan3.open(tiny_checkpoint, device=HOST, dtype="float32")
    return core.sample(core.conditioning("a red fox", width=64, height=64), seed=1, steps=2).latents


# --- loading ----------------------------------------------------------------------------------------------------------


def test_loaded_once_and_listed_once(mm: types.ModuleType, opened: Opened):
    stages: list[str] = []
    part = opened.transformer
    opened.bring(part, progress=lambda stage, done, total: stages.append(stage))
    assert set(stages) == {"load transformer"}
    assert part.loaded_size() == part.model_size()
    assert part.current_loaded_device() == CARD
    weights = storages(part)
    stages.clear()
    opened.bring(part, progress=lambda stage, done, total: stages.append(stage))
    assert stages == []
    assert storages(part) == weights  # listed anew, not moved
    assert mm.loaded_models() == [part]


def test_parts_are_evicted_alone(mm: types.ModuleType, card: Card, opened: Opened):
    """Room for one of the two networks: the other one goes when it comes, as a whole checkpoint never has to."""
    opened.bring(opened.transformer)
    card.total = least(mm) + int(1.15 * max(opened.transformer.model_size(), opened.vae.model_size()))
    opened.bring(opened.vae)
    assert opened.vae.loaded_size() == opened.vae.model_size()
    assert opened.transformer.loaded_size() < opened.transformer.model_size()


@pytest.mark.parametrize("host_free", [ROOMY, 0], ids=["kept by the host", "dropped"])
def test_picture_is_the_same_after_eviction(
    mm: types.ModuleType, card: Card, opened: Opened, whole_picture: torch.Tensor, host_free: int
):
    card.host_free = host_free
    torch.testing.assert_close(opened.picture(), whole_picture, rtol=0, atol=0)
    mm.free_memory(1e30, CARD)
    assert opened.transformer.loaded_size() == opened.vae.loaded_size() == 0
    assert mm.loaded_models() == []
    assert on_meta(opened.transformer) == (host_free == 0)
    torch.testing.assert_close(opened.picture(), whole_picture, rtol=0, atol=0)


@pytest.mark.parametrize("host_free", [ROOMY, 0], ids=["kept by the host", "dropped"])
def test_part_of_the_part_is_evicted(
    mm: types.ModuleType, card: Card, opened: Opened, whole_picture: torch.Tensor, host_free: int
):
    """The manager asks for a few bytes: one layer goes, the others stay where they are."""
    card.host_free = host_free
    opened.bring(opened.transformer)
    part, before = opened.transformer, storages(opened.transformer)
    free = card.free(CARD)
    mm.free_memory(free + 1000, CARD)
    last = part.placed.units[-1]
    assert part.model_size() - part.loaded_size() == last.nbytes == card.free(CARD) - free
    assert mm.loaded_models() == [part]
    assert part.model.model_loaded_weight_memory == part.loaded_size()
    stages: list[tuple[int, int]] = []
    opened.bring(part, progress=lambda _stage, done, total: stages.append((done, total)))
    assert stages[-1] == (part.model_size(), part.model_size())
    after = storages(part)
    moved = {name for name in before if before[name] != after[name]}
    assert moved <= set(last.parameters)
    torch.testing.assert_close(opened.picture(), whole_picture, rtol=0, atol=0)


def test_bytes_reported_are_the_bytes_freed(card: Card, opened: Opened):
    part = opened.transformer
    opened.bring(part)
    units = part.placed.units
    for asked, freed in ((1, units[-1].nbytes), (units[-2].nbytes + 1, units[-2].nbytes + units[-3].nbytes)):
        before = card.free(CARD)
        assert part.partially_unload(HOST, asked) == freed == card.free(CARD) - before
    assert part.partially_unload(HOST, 1e30) == sum(unit.nbytes for unit in units[:-3])
    assert part.partially_unload(HOST, 1e30) == 0
    assert held_bytes(part) == part.model_size()  # all of it in host memory, nothing twice


def test_host_fills_up_while_evicting(card: Card, opened: Opened, whole_picture: torch.Tensor):
    """A tenth of the host stays free: some layers are kept, the rest is read again."""
    part = opened.transformer
    opened.picture()
    last = part.placed.units[-1]
    card.host_free = card.total // 10 + last.nbytes + 1
    everything = part.loaded_size()  # with the prompt that the drawing left
    assert part.partially_unload(HOST, 1e30) == everything
    kept = [unit.name for unit in part.placed.units if not part.model.get_parameter(unit.parameters[0]).is_meta]
    assert kept == [last.name]
    torch.testing.assert_close(opened.picture(), whole_picture, rtol=0, atol=0)


def test_on_a_cpu_what_is_kept_frees_nothing(comfy_pack: ComfyPack, card: Card, tiny_checkpoint: Path):
    """Where host and compute device are one, an eviction that moved nothing must not claim bytes."""
    core = submodule(comfy_pack, "hunyuan3.pipeline").Hunyuan3.open(tiny_checkpoint, device=HOST)
    part = submodule(comfy_pack, "nodes.memory").PartPatcher.of(core.placed_transformer)
    part.partially_load(HOST, 1e32)
    assert part.partially_unload(HOST, 1e30) == 0
    assert part.loaded_size() == part.model_size()
    card.host_free = 0
    assert part.partially_unload(HOST, 1e30) == part.model_size()
    assert on_meta(part)


def test_kept_prompts_count_and_go_before_any_layer(opened: Opened, whole_picture: torch.Tensor):
    opened.picture()
    part, kept = opened.transformer, opened.core.prefixes.nbytes
    assert kept > 0
    assert part.loaded_size() == part.placed.total_bytes + kept == part.model_size()
    before = storages(part)
    assert part.partially_unload(HOST, 1) == kept
    assert opened.core.prefixes.nbytes == 0
    assert storages(part) == before
    torch.testing.assert_close(opened.picture(), whole_picture, rtol=0, atol=0)


def test_kept_prompts_make_room_for_the_transformers_own_work(
    mm: types.ModuleType, card: Card, opened: Opened, whole_picture: torch.Tensor
):
    """The manager evicts nothing from what it is asked to load: what that keeps besides weights must go by itself."""
    opened.picture()
    kept = opened.core.prefixes.nbytes
    opened.bring(opened.transformer, work=card.free(CARD) // 2)
    assert opened.core.prefixes.nbytes == kept, "there is room: nothing is given up"
    mm.free_memory(
        1e30, CARD, keep_loaded=[model for model in mm.current_loaded_models if model.model is not opened.vae]
    )
    opened.bring(opened.transformer, work=card.free(CARD) + kept // 2)
    assert opened.core.prefixes.nbytes == 0
    assert opened.transformer.loaded_size() == opened.transformer.placed.total_bytes
    torch.testing.assert_close(opened.picture(), whole_picture, rtol=0, atol=0)


def test_handles_of_another_precision_or_format_keep_their_own_prompts(
    comfy_pack: ComfyPack, card: Card, tiny_checkpoint: Path
):
    """A kept prompt never serves other numbers: what was computed in one precision or format stays with its handle."""
    pipeline = submodule(comfy_pack, "hunyuan3.pipeline")
    options = [{}, {"dtype": "bfloat16"}, {"format": "int8"}]
    handles = [pipeline.Hunyuan3.open(tiny_checkpoint, device=CARD, **{"dtype": "float32"} | more) for more in options]
    for number, handle in enumerate(handles):
        assert handle.prefixes.nbytes == 0, "drawn with the others before, and nothing is here"
        _ = handle.sample(handle.conditioning("a red fox", width=64, height=64), seed=number, steps=1).latents
        assert handle.prefixes.nbytes > 0


# --- the loader's budgets ---------------------------------------------------------------------------------------------


def test_parts_of_a_handle_stay_within_its_budget(
    comfy_pack: ComfyPack, card: Card, tiny_checkpoint: Path, whole_picture: torch.Tensor
):
    """Room for the larger part alone, on a card that has room for all: each makes way for the other."""
    sizes = Opened(comfy_pack, tiny_checkpoint, Card())
    largest = max(sizes.transformer.placed.total_bytes, sizes.vae.placed.total_bytes)
    limit = largest + MIB
    opened = Opened(comfy_pack, tiny_checkpoint, card, vram=limit)
    torch.testing.assert_close(opened.picture(), whole_picture, rtol=0, atol=0)
    assert opened.vae.loaded_size() == opened.vae.placed.total_bytes
    assert opened.transformer.placed.loaded_bytes + opened.vae.loaded_size() <= limit
    assert opened.transformer.placed.loaded_bytes > 0, "no more than it takes"
    opened.bring(opened.transformer)
    assert opened.transformer.placed.loaded_bytes + opened.vae.loaded_size() <= limit
    assert opened.transformer.placed.loaded_bytes == opened.transformer.placed.total_bytes


def test_work_past_the_budget_is_refused_with_numbers(comfy_pack: ComfyPack, card: Card, tiny_checkpoint: Path):
    opened = Opened(comfy_pack, tiny_checkpoint, card, vram=64 * MIB)
    opened.bring(opened.transformer, work=MIB)
    with pytest.raises(
        error(opened, "OutOfBudgetError"), match=r"its work 0\.98 GiB; the loader's budget allows 0\.06"
    ):
        opened.bring(opened.transformer, work=1000 * MIB)


def test_evicted_weights_stay_within_the_ram_budget(
    comfy_pack: ComfyPack, card: Card, tiny_checkpoint: Path, whole_picture: torch.Tensor
):
    """What waits in host memory is at most so much; the rest is read again. (CARD and host are one to torch here, so
    it is counted by what was dropped.)
    """
    opened = Opened(comfy_pack, tiny_checkpoint, card, ram=0)
    opened.bring(opened.transformer)
    assert opened.transformer.partially_unload(HOST, 1e30) > 0
    assert on_meta(opened.transformer)
    torch.testing.assert_close(opened.picture(), whole_picture, rtol=0, atol=0)


# --- experts that stream ----------------------------------------------------------------------------------------------


@pytest.fixture
def streamed(comfy_pack: ComfyPack, card: Card, tiny_checkpoint: Path, mm: types.ModuleType) -> Opened:
    """On a card with room for a third of the experts."""
    opened = Opened(comfy_pack, tiny_checkpoint, card, streaming=3)
    part = opened.transformer
    card.total = least(mm) + part.least_bytes + (part.placed.total_bytes - part.placed.required_bytes) // 3 + 1000
    return opened


def on_card(opened: Opened) -> int:
    """Experts of a layer that are on the card."""
    return sum(opened.core.placed_transformer.module.layers[0].mlp.experts.resident)


def test_a_card_that_is_too_small_draws_the_same_picture(
    mm: types.ModuleType, card: Card, streamed: Opened, whole_latents: torch.Tensor
):
    torch.testing.assert_close(streamed.latents(), whole_latents, rtol=0, atol=0)
    part = streamed.transformer
    streamed.bring(part)
    assert 0 < on_card(streamed) < 8
    assert card.free(CARD) >= 0
    assert mm.loaded_models()[0] is part
    torch.testing.assert_close(streamed.latents(), whole_latents, rtol=0, atol=0)


def test_experts_make_way_for_more_work_and_come_back(card: Card, streamed: Opened, whole_latents: torch.Tensor):
    streamed.bring(streamed.transformer)
    before = on_card(streamed)
    card.total += 10 * MIB  # ComfyUI's own minimum stands for less than this work
    streamed.bring(streamed.transformer, work=int(0.8 * 2**30) + 10 * MIB + 100_000)
    assert on_card(streamed) < before
    assert streamed.transformer.placed.is_ready
    card.total += 100 * MIB
    streamed.bring(streamed.transformer)
    assert on_card(streamed) == 8
    torch.testing.assert_close(streamed.latents(), whole_latents, rtol=0, atol=0)


@pytest.mark.parametrize("nbytes", [1000, 1e30], ids=["a little", "everything"])
def test_eviction_in_the_middle_of_a_drawing(
    mm: types.ModuleType, card: Card, streamed: Opened, whole_latents: torch.Tensor, nbytes: float
):
    """By another model that wants the card; what is not only experts comes back as a sampler would bring it."""
    steps = []

    def another_model() -> None:
        steps.append(on_card(streamed))
        mm.free_memory(card.free(CARD) + nbytes, CARD)
        if not streamed.transformer.placed.is_ready:
            streamed.bring(streamed.transformer)

    torch.testing.assert_close(streamed.latents(another_model), whole_latents, rtol=0, atol=0)
    assert len(steps) == 2
    torch.testing.assert_close(streamed.latents(), whole_latents, rtol=0, atol=0)


def test_streamed_bytes_freed_are_the_bytes_reported(mm: types.ModuleType, card: Card, streamed: Opened):
    _ = streamed.latents()
    part = streamed.transformer
    while part.loaded_size():
        before = card.free(CARD)
        freed = part.partially_unload(HOST, 1)
        assert freed > 0
        assert card.free(CARD) - before == freed
    streamed.bring(part)
    mm.free_memory(1e30, CARD)
    assert part.loaded_size() == 0
    assert mm.loaded_models() == []


def test_what_is_dropped_is_in_host_memory_no_more(streamed: Opened, whole_latents: torch.Tensor):
    """When the host's memory runs out, experts that wait there are what fills it."""
    part = streamed.transformer
    streamed.bring(part)
    assert part.placed.host_bytes > 0
    part.drop()
    assert part.placed.host_bytes == part.loaded_size() == held_bytes(part) == 0
    torch.testing.assert_close(streamed.latents(), whole_latents, rtol=0, atol=0)


def test_a_budget_leaves_experts_in_host_memory(
    comfy_pack: ComfyPack, card: Card, tiny_checkpoint: Path, whole_latents: torch.Tensor
):
    """On a card with room for everything, the loader's vram_budget decides."""
    sizes = Opened(comfy_pack, tiny_checkpoint, Card(), streaming=3).transformer
    limit = sizes.least_bytes + (sizes.placed.total_bytes - sizes.placed.required_bytes) // 2
    opened = Opened(comfy_pack, tiny_checkpoint, card, vram=limit, streaming=3)
    opened.bring(opened.transformer)
    assert 0 < on_card(opened) < 8
    ring = opened.transformer.placed.full_ring_on(opened.transformer.load_device)
    assert opened.transformer.loaded_size() + ring <= limit
    card.parts = [opened.transformer, opened.vae]
    run = opened.core.sample(opened.core.conditioning("a red fox", width=64, height=64), seed=1, steps=2)
    assert torch.isfinite(run.latents).all()


def test_experts_stay_in_their_files_where_the_host_is_too_small_as_well(
    comfy_pack: ComfyPack, mm: types.ModuleType, card: Card, tiny_checkpoint: Path, whole_latents: torch.Tensor
):
    opened = Opened(comfy_pack, tiny_checkpoint, card, streaming=3, disk=True)
    part, placed = opened.transformer, opened.transformer.placed
    third = (placed.total_bytes - placed.required_bytes) // 3
    card.total = least(mm) + part.least_bytes + third + 1000
    card.host_free = card.total // 10 + third  # a tenth stays free
    torch.testing.assert_close(opened.latents(), whole_latents, rtol=0, atol=0)
    assert 0 < on_card(opened) < 8
    assert 0 < placed.host_bytes <= third
    assert placed.file_bytes >= third // 2
    card.host_free = ROOMY
    torch.testing.assert_close(opened.latents(), whole_latents, rtol=0, atol=0)
    assert placed.file_bytes == 0, "with room they come into memory"
    card.host_free = 0
    assert part.partially_unload(HOST, 1) > 0
    torch.testing.assert_close(opened.latents(), whole_latents, rtol=0, atol=0)


def test_a_budget_makes_the_vae_work_in_tiles(comfy_pack: ComfyPack, card: Card, tiny_checkpoint: Path):
    """The loader's plan may say so; it must not fail when the picture is drawn."""
    vae, progress = submodule(comfy_pack, "nodes.vae"), submodule(comfy_pack, "nodes.progress").NodeProgress(None)
    size = submodule(comfy_pack, "hunyuan3.types").ImageSize(2048, 2048)
    small = Opened(comfy_pack, tiny_checkpoint, card, vram=2**30)
    handle = types.SimpleNamespace(model=small.core, vae=small.vae, transformer=small.transformer)
    vae.require_room_to_decode(handle, size)
    tile = vae._prepare(handle, size, 0, progress)
    assert tile is not None
    assert vae._work(handle, size, None) > 2**30 > vae._work(handle, size, tile)
    assert small.vae.loaded_size() == small.vae.model_size()
    tiny = Opened(comfy_pack, tiny_checkpoint, card, vram=9 * MIB)
    handle = types.SimpleNamespace(model=tiny.core, vae=tiny.vae, transformer=tiny.transformer)
    with pytest.raises(error(tiny, "OutOfBudgetError"), match="2048x2048 needs"):
        vae.require_room_to_decode(handle, size)


def test_loader_plans_for_the_disk_where_weights_are_used_as_they_are_stored(
    comfy_pack: ComfyPack, card: Card, tiny_checkpoint: Path
):
    """The published model in bfloat16 on 24 GiB with 64 GiB of RAM: two thirds of it find no place."""
    planned, budget = submodule(comfy_pack, "nodes.plan").planned, submodule(comfy_pack, "nodes.budget")
    folder = submodule(comfy_pack, "hunyuan3.folder").ModelFolder.open(tiny_checkpoint)
    folder = replace(folder, config=submodule(comfy_pack, "hunyuan3.plan").published_config())
    load = submodule(comfy_pack, "hunyuan3.parts").LoadOptions
    card.total, card.host_free = 24 * 2**30, 64 * 2**30
    plan, text = planned(folder, load(device=CARD, dtype="bfloat16").resolved(), budget.Budget())
    assert plan.disk > 60 * 2**30
    assert re.search(r"GiB from disk in every step", text)
    card.host_free = 16 * 2**30
    with pytest.raises(budget.OutOfBudgetError, match="from a pack"):
        planned(folder, load(device=CARD, dtype="bfloat16", format="int4").resolved(), budget.Budget())


def test_loader_streams_where_the_card_is_too_small(comfy_pack: ComfyPack, card: Card, tiny_checkpoint: Path):
    """The published model on 24 GiB, as int4, with 64 GiB of RAM; and on 64 GiB."""
    planned, budget = submodule(comfy_pack, "nodes.plan").planned, submodule(comfy_pack, "nodes.budget")
    folder = submodule(comfy_pack, "hunyuan3.folder").ModelFolder.open(tiny_checkpoint)
    folder = replace(folder, config=submodule(comfy_pack, "hunyuan3.plan").published_config())
    options = (
        submodule(comfy_pack, "hunyuan3.parts").LoadOptions(device=CARD, dtype="bfloat16", format="int4").resolved()
    )
    card.total, card.host_free = 24 * 2**30, 64 * 2**30
    plan, text = planned(folder, options, budget.Budget())
    assert not plan.fits_whole
    assert 0.2 < plan.streamed_share < 0.9
    assert "of the experts stay on cpu:0" in text
    assert "in every step" in text
    smaller, _text = planned(folder, options, budget.Budget(vram=16 * 2**30))
    assert smaller.streamed_share > plan.streamed_share
    with pytest.raises(budget.OutOfBudgetError, match="host memory"):
        planned(folder, options, budget.Budget(ram=8 * 2**30))
    card.total = 64 * 2**30
    plan, text = planned(folder, options, budget.Budget())
    assert plan.fits_whole
    assert text.startswith("Everything fits on cpu:0.")


# --- trouble ----------------------------------------------------------------------------------------------------------


def test_no_room_is_said_and_nothing_is_left_behind(mm: types.ModuleType, card: Card, opened: Opened):
    opened.bring(opened.vae)
    card.others = card.total - least(mm) - 1000
    with pytest.raises(error(opened, "RequestError"), match=r"transformer needs .* GiB more on cpu:0") as caught:
        opened.bring(opened.transformer)
    assert "Close other programs" in str(caught.value)
    assert opened.transformer.loaded_size() == 0


def test_no_room_for_the_rest_leaves_no_unlisted_layers(mm: types.ModuleType, card: Card, opened: Opened):
    """Half evicted, then another program takes the room: what is still there must not stay where no one evicts it."""
    part = opened.transformer
    opened.bring(part)
    mm.free_memory(card.free(CARD) + 1000, CARD)
    assert 0 < part.loaded_size() < part.model_size()
    card.others = card.free(CARD)
    with pytest.raises(error(opened, "RequestError"), match="GiB more"):
        opened.bring(part)
    assert part.loaded_size() == 0 or part in mm.loaded_models()
    card.others = 0
    opened.bring(part)
    assert part.loaded_size() == part.model_size()


def test_cancelled_load_leaves_nothing_on_the_card(mm: types.ModuleType, opened: Opened, whole_picture: torch.Tensor):
    part = opened.transformer

    def cancel_in_the_middle(_stage: str, done: int, total: int) -> None:
        if done * 2 > total:
            mm.interrupt_current_processing()

    with pytest.raises(mm.InterruptProcessingException):
        opened.bring(part, progress=cancel_in_the_middle)
    assert part.loaded_size() == 0
    assert part not in mm.loaded_models()
    assert not mm.processing_interrupted()
    torch.testing.assert_close(opened.picture(), whole_picture, rtol=0, atol=0)


def test_failed_load_leaves_nothing_on_the_card(opened: Opened, whole_picture: torch.Tensor):
    part = opened.transformer
    read = part.placed._read
    calls: list[object] = []

    def failing(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError("the disk is gone")
        read(*arguments)

    part.placed._read = failing
    with pytest.raises(OSError, match="the disk is gone"):
        opened.bring(part)
    assert part.loaded_size() == 0
    part.placed._read = read
    torch.testing.assert_close(opened.picture(), whole_picture, rtol=0, atol=0)


def test_detach_as_the_manager_relists_moves_nothing(opened: Opened):
    opened.bring(opened.vae)
    before = storages(opened.vae)
    opened.vae.detach(unpatch_all=False)
    assert storages(opened.vae) == before
    assert opened.vae.loaded_size() == opened.vae.model_size()
    opened.vae.detach()
    assert opened.vae.loaded_size() == 0


def test_clone_shares_the_weights(mm: types.ModuleType, opened: Opened):
    """Other packs clone patchers; the manager must see one model, not two."""
    opened.bring(opened.vae)
    copy = opened.vae.clone()
    assert type(copy) is type(opened.vae)
    assert copy.is_clone(opened.vae)
    opened.bring(copy)
    assert copy.loaded_size() == copy.model_size()
    assert len(mm.loaded_models()) == 1


def test_weights_die_with_the_handle_at_once(comfy_pack: ComfyPack, card: Card, tiny_checkpoint: Path):
    """Not at the next garbage collection: until then the next checkpoint would find no room."""
    opened = Opened(comfy_pack, tiny_checkpoint, Card())
    opened.picture()
    alive = {name: weakref.ref(part.model) for name, part in (("transformer", opened.transformer), ("VAE", opened.vae))}
    gc.collect()
    gc.disable()
    try:
        del opened
        assert [name for name, ref in alive.items() if ref() is not None] == []
    finally:
        gc.enable()


def test_lora_is_refused_by_name(opened: Opened):
    with pytest.raises(error(opened, "RequestError"), match="LoRA"):
        opened.transformer.clone().add_patches({"x": torch.zeros(1)}, 1.0)


def test_decode_that_cannot_fit_is_refused_before_drawing(comfy_pack: ComfyPack, card: Card, opened: Opened):
    vae = submodule(comfy_pack, "nodes.vae")
    size = submodule(comfy_pack, "hunyuan3.types").ImageSize(1024, 1024)
    handle = types.SimpleNamespace(model=opened.core, vae=opened.vae)
    vae.require_room_to_decode(handle, size)
    card.total = RESERVED + opened.vae.model_size() + MIB
    with pytest.raises(error(opened, "OutOfBudgetError"), match="Decoding 1024x1024 needs"):
        vae.require_room_to_decode(handle, size)


# --- helpers ----------------------------------------------------------------------------------------------------------


def submodule(pack: ComfyPack, name: str) -> Any:
    return sys.modules[f"{pack.module.__name__}.{name}"]


def error(opened: Opened, name: str) -> type[Exception]:
    """An error class as the package in ComfyUI has it: the tests' own import of hunyuan3 is another one."""
    return getattr(sys.modules[opened.memory.RequestError.__module__], name)


def least(mm: types.ModuleType) -> int:
    """Bytes that ComfyUI keeps free on a card for work."""
    return int(mm.minimum_inference_memory())


def storages(part: Any) -> dict[str, int]:
    """Parameter -> where its bytes lie."""
    return {name: parameter.data_ptr() for name, parameter in part.model.named_parameters()}


def held_bytes(part: Any) -> int:
    """Bytes of the weights that are anywhere in memory."""
    return sum(parameter.nbytes for parameter in part.model.parameters() if not parameter.is_meta)


def on_meta(part: Any) -> bool:
    return all(parameter.is_meta for parameter in part.model.parameters())
