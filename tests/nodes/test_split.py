"""Layers on two cards under ComfyUI's memory manager, and the loader's gpu_split in a real server.

`cpu:0` and `cpu:1` stand in for cards (see test_eviction.py); the memory of both is made up.
"""

from __future__ import annotations

import io
import sys
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.nodes.graphs import drawing
from tests.nodes.test_eviction import HOST, RESERVED, ROOMY, submodule
from tools.comfy_server import ComfyServer, PromptError

if TYPE_CHECKING:
    from tests.nodes.conftest import ComfyPack

pytestmark = pytest.mark.comfy

FIRST, SECOND = torch.device("cpu", 0), torch.device("cpu", 1)
GIB = 2**30


@dataclass
class Cards:
    """The made-up memory of both cards, and of the host."""

    total: dict[torch.device, int] = field(default_factory=lambda: {FIRST: ROOMY, SECOND: ROOMY})
    host_free: int = ROOMY
    others: dict[torch.device, int] = field(default_factory=lambda: {FIRST: 0, SECOND: 0})
    parts: list[Any] = field(default_factory=list)

    def on(self, device: torch.device) -> int:
        """Bytes that our parts hold on a card."""
        return sum(part.loaded_size() for part in self.parts if part.load_device == device)

    def free(self, device: torch.device | None = None, torch_free_too: bool = False) -> Any:
        """Stands for comfy.model_management.get_free_memory."""
        if device == HOST:
            held = sum(placed.host_bytes for placed in {part.placed for part in self.parts})
            free = self.host_free - held
        else:
            device = device or FIRST
            free = self.total[device] - self.others[device] - self.on(device)
        return (free, 0) if torch_free_too else free


class Other:
    """Another pack's model on a card: what the memory manager evicts when it is told to."""

    def __init__(self, mm: types.ModuleType, cards: Cards, device: torch.device, nbytes: int) -> None:
        from comfy.model_patcher import ModelPatcher

        self.patcher = ModelPatcher(torch.nn.Linear(1, 1), device, HOST, size=nbytes)
        self.cards, self.device, self.nbytes = cards, device, nbytes
        self.patcher.detach = self._leave
        cards.others[device] += nbytes
        self.loaded = mm.LoadedModel(self.patcher)
        self.loaded.real_model = lambda: self.patcher.model
        self.loaded.model_finalizer = weakref.finalize(self.patcher.model, lambda: None)
        mm.current_loaded_models.append(self.loaded)

    def _leave(self, unpatch_all: bool = True) -> torch.nn.Module:
        self.cards.others[self.device] -= self.nbytes
        self.nbytes = 0
        return self.patcher.model


@pytest.fixture
def cards(stand_in_cards: Callable[..., None]) -> Cards:
    cards = Cards()
    stand_in_cards(cards.free, lambda device=None, **_k: cards.total.get(device, ROOMY), FIRST, RESERVED)
    return cards


class Opened:
    """A tiny checkpoint opened as the loader opens it, with one layer on FIRST and two on SECOND."""

    def __init__(
        self,
        pack: ComfyPack,
        folder: Path,
        cards: Cards,
        *,
        budget: Any = None,
        runs: tuple[tuple[torch.device, int], ...] = ((FIRST, 1), (SECOND, 2)),
        **options: Any,
    ) -> None:
        self.memory = submodule(pack, "nodes.memory")
        self.budgets = submodule(pack, "nodes.budget")
        split = submodule(pack, "hunyuan3.placement.split").LayerSplit(runs)
        options = {"dtype": "float32", "vae_dtype": "float32", "split": split} | options
        self.core = submodule(pack, "hunyuan3.pipeline").Hunyuan3.open(folder, **options)
        budget = budget or self.budgets.Budget()
        self.transformer = self.memory.PartPatcher.of(self.core.placed_transformer, self.core.prefixes, budget, split)
        self.vae = self.memory.PartPatcher.of(self.core.placed_vae, budget=budget)
        (self.second,) = self.transformer.beside
        cards.parts += [self.transformer, self.second, self.vae]
        self.placed = self.core.placed_transformer

    def bring(self, part: Any, work: Any = 0) -> None:
        self.memory.bring_to_device(part, work, lambda *_: None)

    def latents(self, work: Any = 0) -> torch.Tensor:
        self.bring(self.transformer, work)
        prepare = sys.modules[type(self.core).__module__].SamplingRun.prepare
        conditioning = self.core.conditioning("a red fox", width=64, height=64)
        run = prepare(self.core.folder, self.placed.module, conditioning, seed=1, steps=2, prefixes=self.core.prefixes)
        return run.latents


@pytest.fixture
def opened(comfy_pack: ComfyPack, cards: Cards, tiny_checkpoint: Path) -> Opened:
    return Opened(comfy_pack, tiny_checkpoint, cards)


@pytest.fixture(scope="module")
def whole_latents(comfy_pack: ComfyPack, tiny_checkpoint: Path) -> torch.Tensor:
    core = submodule(comfy_pack, "hunyuan3.pipeline").Hunyuan3.open(tiny_checkpoint, device=HOST, dtype="float32")
    return core.sample(core.conditioning("a red fox", width=64, height=64), seed=1, steps=2).latents


# --- under the memory manager -----------------------------------------------------------------------------------------


def test_the_manager_counts_what_is_on_each_card(mm: types.ModuleType, opened: Opened, whole_latents: torch.Tensor):
    assert torch.equal(opened.latents(), whole_latents)
    first, second, placed = opened.transformer, opened.second, opened.placed
    kept = opened.core.prefixes.nbytes
    assert first.loaded_size() == first.model_size() == placed.total_on(FIRST) + round(kept / 3)
    assert second.loaded_size() == second.model_size() == placed.total_on(SECOND) + round(kept * 2 / 3)
    assert set(mm.loaded_models()) == {first, second}
    assert (first.load_device, second.load_device) == (FIRST, SECOND)


@pytest.mark.parametrize("runs", [((FIRST, 1), (SECOND, 2)), ((SECOND, 2), (FIRST, 1))], ids=["0,1", "1,0"])
@pytest.mark.parametrize("how", ["pressure", "unload_all_models"])
def test_all_cards_are_freed(
    comfy_pack: ComfyPack,
    mm: types.ModuleType,
    cards: Cards,
    tiny_checkpoint: Path,
    whole_latents: torch.Tensor,
    how: str,
    runs: Any,
):
    """/free calls the latter, which names ComfyUI's own card alone: it must not matter which one is the home."""
    opened = Opened(comfy_pack, tiny_checkpoint, cards, runs=runs)
    opened.latents()
    assert min(cards.on(FIRST), cards.on(SECOND)) > 0
    mm.free_memory(1e30, FIRST) if how == "pressure" else mm.unload_all_models()
    assert (cards.on(FIRST), cards.on(SECOND)) == (0, 0)
    assert torch.equal(opened.latents(), whole_latents)


@pytest.mark.parametrize("number", [0, 1])
def test_a_part_eviction_says_what_it_freed_on_its_card(opened: Opened, whole_latents: torch.Tensor, number: int):
    opened.latents()
    patchers = (opened.transformer, opened.second)
    part, other = patchers[number], patchers[1 - number]
    for wanted in (1, opened.placed.total_on(part.load_device) // 2):
        before, beside = part.loaded_size(), other.loaded_size() - other.kept_bytes()
        freed = part.partially_unload(HOST, wanted)
        assert freed == before - part.loaded_size() >= wanted
        assert other.loaded_size() == beside, "the other card's weights stay"
    assert torch.equal(opened.latents(), whole_latents)


def test_others_make_way_on_the_second_card(mm: types.ModuleType, cards: Cards, opened: Opened):
    other = Other(mm, cards, SECOND, ROOMY - 1000)
    assert cards.free(SECOND) < opened.placed.total_on(SECOND)
    opened.bring(opened.transformer)
    assert other.nbytes == 0
    assert opened.placed.loaded_on(SECOND) == opened.placed.total_on(SECOND)


def test_others_make_way_for_the_work_when_the_weights_are_there_already(
    mm: types.ModuleType, cards: Cards, opened: Opened
):
    opened.bring(opened.transformer)
    others = [Other(mm, cards, card, int(cards.free(card)) - 1000) for card in (FIRST, SECOND)]
    opened.bring(opened.transformer, opened.budgets.Work(GIB, GIB))
    assert [other.nbytes for other in others] == [0, 0]
    assert opened.placed.is_ready


def test_others_stay_where_there_is_room_for_both(mm: types.ModuleType, cards: Cards, opened: Opened):
    other = Other(mm, cards, SECOND, GIB)
    opened.bring(opened.transformer)
    assert other.nbytes == GIB


def test_another_model_evicts_ours_on_the_second_card(
    mm: types.ModuleType, cards: Cards, opened: Opened, whole_latents: torch.Tensor
):
    opened.latents()
    mm.free_memory(ROOMY - 1, SECOND)
    assert cards.on(SECOND) == 0
    assert torch.equal(opened.latents(), whole_latents)


@pytest.mark.parametrize("streaming", [0, 3])
def test_two_handles_on_the_same_cards_take_turns(
    comfy_pack: ComfyPack, mm: types.ModuleType, cards: Cards, tiny_checkpoint: Path, streaming: int
):
    one, two = (Opened(comfy_pack, tiny_checkpoint, cards, streaming=streaming) for _ in range(2))
    needed = one.placed.total_on(SECOND) + one.placed.full_ring_on(SECOND)
    cards.total[SECOND] = int(mm.minimum_inference_memory()) + needed * 3 // 2
    for opened in (one, two, one):
        opened.bring(opened.transformer)
        experts = [sum(bank.resident) for bank in banks_of(opened)] if streaming else [8, 8]
        assert min(experts) > 2, "the other one has left"
        assert opened.placed.is_ready
        assert cards.free(SECOND) >= 0


def banks_of(opened: Opened) -> list[Any]:
    """The streamed banks on the second card."""
    return [layer.mlp.experts for layer in opened.placed.module.layers[1:]]


def test_a_full_second_card_is_named_and_nothing_is_left_behind(
    cards: Cards, opened: Opened, whole_latents: torch.Tensor
):
    cards.others[SECOND] = ROOMY - 1000
    error = opened.memory.RequestError
    with pytest.raises(error, match=r"The transformer needs .* GiB more on cpu:1"):
        opened.bring(opened.transformer)
    assert (cards.on(FIRST), cards.on(SECOND)) == (0, 0)
    cards.others[SECOND] = 0
    assert torch.equal(opened.latents(), whole_latents)


def test_the_work_of_each_card_is_kept_free_there(mm: types.ModuleType, cards: Cards, opened: Opened):
    """Keys and values lie with their layers: two thirds of them on the second card."""
    work = opened.budgets.Work(activations=3 * GIB, cache=3 * GIB)
    assert (work.on(1 / 3), work.on(2 / 3), work.total) == (4 * GIB, 5 * GIB, 6 * GIB)
    need = opened.placed.total_on(SECOND) + 5 * GIB + int(mm.extra_reserved_memory())
    cards.total[SECOND] = need - 1000
    with pytest.raises(opened.memory.RequestError, match="more on cpu:1"):
        opened.bring(opened.transformer, work)
    cards.total[SECOND] = need + 1000
    opened.bring(opened.transformer, work)


def test_each_card_streams_what_it_has_no_room_for(
    comfy_pack: ComfyPack, mm: types.ModuleType, cards: Cards, tiny_checkpoint: Path, whole_latents: torch.Tensor
):
    opened = Opened(comfy_pack, tiny_checkpoint, cards, streaming=3)
    placed = opened.placed
    third = (placed.total_on(SECOND) - placed.required_on(SECOND)) // 3
    cards.total[SECOND] = int(mm.minimum_inference_memory()) + opened.second.least_bytes + third + 1000
    assert torch.equal(opened.latents(), whole_latents)
    resident = [sum(layer.mlp.experts.resident) for layer in placed.module.layers]
    assert resident[0] == 8
    assert 0 < resident[1] == resident[2] < 8
    assert cards.free(SECOND) >= 0
    mm.unload_all_models()
    assert (cards.on(FIRST), cards.on(SECOND)) == (0, 0)
    assert torch.equal(opened.latents(), whole_latents)


def test_the_cards_share_a_host_that_is_too_small(
    comfy_pack: ComfyPack, mm: types.ModuleType, cards: Cards, tiny_checkpoint: Path, whole_latents: torch.Tensor
):
    opened = Opened(comfy_pack, tiny_checkpoint, cards, streaming=3, disk=True)
    placed, least = opened.placed, int(mm.minimum_inference_memory())
    for part in (opened.transformer, opened.second):
        cards.total[part.load_device] = least + part.least_bytes + 1000
    experts = placed.total_bytes - placed.required_bytes
    cards.host_free = ROOMY // 10 + experts // 2
    assert torch.equal(opened.latents(), whole_latents)
    in_host = [sum(not next(bank.parameters()).is_meta for bank in layer.mlp.experts) for layer in placed.module.layers]
    assert min(in_host) >= 3
    assert max(in_host) <= 5


def test_the_host_holds_what_the_cards_do_not(
    comfy_pack: ComfyPack, mm: types.ModuleType, cards: Cards, tiny_checkpoint: Path
):
    """Just enough of it: nothing may stay in the files because another card's experts were counted, too."""
    opened = Opened(comfy_pack, tiny_checkpoint, cards, streaming=3, disk=True)
    placed, least = opened.placed, int(mm.minimum_inference_memory())
    experts = {card: placed.total_on(card) - placed.required_on(card) for card in (FIRST, SECOND)}
    cards.total[FIRST] = least + opened.transformer.least_bytes + 1000
    cards.total[SECOND] = least + opened.second.least_bytes + experts[SECOND] * 7 // 8 + 1000
    cards.host_free = ROOMY // 10 + experts[FIRST] + experts[SECOND] // 8 + 4000
    opened.bring(opened.transformer)
    assert placed.file_bytes == 0
    assert placed.host_bytes == experts[FIRST] + experts[SECOND] // 8


def test_the_vae_takes_its_turn_on_the_first_card_alone(
    mm: types.ModuleType, cards: Cards, opened: Opened, whole_latents: torch.Tensor
):
    opened.latents()
    second = cards.on(SECOND) - opened.second.kept_bytes()
    cards.total[FIRST] = int(mm.minimum_inference_memory()) + cards.on(FIRST) + GIB
    opened.bring(opened.vae, int(opened.budgets.most_free_memory(FIRST) - opened.vae.model_size()) - 1000)
    assert opened.transformer.loaded_size() == 0
    assert cards.on(SECOND) == second
    mm.unload_all_models()
    assert (cards.on(FIRST), cards.on(SECOND)) == (0, 0), "also beside a home that had left before"
    assert torch.equal(opened.latents(), whole_latents)


def test_host_memory_that_runs_out_on_the_second_card_costs_the_first_nothing(
    mm: types.ModuleType, cards: Cards, opened: Opened, whole_latents: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    placed_module, seen = type(opened.placed), []
    load = placed_module.load

    def failing(self: Any, *args: Any, device: Any = None, **others: Any) -> Any:
        seen.append((device, self.loaded_on(FIRST)))
        if device == SECOND:
            raise MemoryError("no more")
        return load(self, *args, device=device, **others)

    monkeypatch.setattr(placed_module, "load", failing)
    error = sys.modules[opened.memory.RequestError.__module__].OutOfBudgetError
    with pytest.raises(error):
        opened.bring(opened.transformer)
    assert seen[-1] == (SECOND, opened.placed.total_on(FIRST)), "the first card kept what it had for the second try"
    assert opened.placed.host_bytes == 0
    assert mm.loaded_models() == [opened.transformer]
    monkeypatch.undo()


@pytest.mark.parametrize("state", ["HIGH_VRAM", "NO_VRAM", "LOW_VRAM"])
def test_every_state_of_the_manager_leaves_room_for_the_work(
    comfy_pack: ComfyPack,
    mm: types.ModuleType,
    cards: Cards,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
):
    monkeypatch.setattr(mm, "vram_state", getattr(mm.VRAMState, state))
    opened = Opened(comfy_pack, tiny_checkpoint, cards, streaming=3)
    work = opened.budgets.Work(GIB, GIB)
    cards.total[SECOND] = opened.second.least_bytes + work.on(2 / 3) + int(mm.extra_reserved_memory()) + 1000
    opened.bring(opened.transformer, work)
    assert opened.placed.is_ready
    assert cards.free(SECOND) >= work.on(2 / 3)


def test_a_second_card_without_room_is_noticed_before_the_first_is_read(cards: Cards, opened: Opened):
    cards.others[SECOND] = ROOMY - 1000
    told: list[str] = []
    with pytest.raises(opened.memory.RequestError, match="more on cpu:1"):
        opened.memory.bring_to_device(opened.transformer, 0, lambda stage, *_: told.append(stage))
    assert told == []


def test_a_budget_holds_on_each_card(
    comfy_pack: ComfyPack, cards: Cards, tiny_checkpoint: Path, whole_latents: torch.Tensor
):
    budget_of = submodule(comfy_pack, "nodes.budget").Budget
    probe = Opened(comfy_pack, tiny_checkpoint, cards, streaming=3)
    least = probe.second.least_bytes
    half = (probe.placed.total_on(SECOND) - probe.placed.required_on(SECOND)) // 2
    opened = Opened(comfy_pack, tiny_checkpoint, cards, budget=budget_of(by_device={SECOND: least + half}), streaming=3)
    assert torch.equal(opened.latents(), whole_latents)
    assert 0 < sum(opened.placed.module.layers[1].mlp.experts.resident) < 8
    assert sum(opened.placed.module.layers[0].mlp.experts.resident) == 8
    assert opened.second.loaded_size() - opened.second.kept_bytes() <= least + half
    small = Opened(comfy_pack, tiny_checkpoint, cards, budget=budget_of(by_device={SECOND: least // 2}), streaming=3)
    error = sys.modules[opened.memory.RequestError.__module__].OutOfBudgetError
    with pytest.raises(error, match=r"on cpu:1 .*gpu_split"):
        small.bring(small.transformer)


# --- the loader's choice ----------------------------------------------------------------------------------------------


class Planning:
    """The published model, as the loader plans for it on two made-up cards."""

    def __init__(self, pack: ComfyPack, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plan = submodule(pack, "nodes.plan")
        self.budget = submodule(pack, "nodes.budget").Budget
        self.request = submodule(pack, "hunyuan3.placement.split").SplitRequest
        opened = submodule(pack, "hunyuan3.folder").ModelFolder.open(folder)
        self.folder = replace(opened, config=submodule(pack, "hunyuan3.plan").published_config())
        self.load = submodule(pack, "hunyuan3.parts").LoadOptions
        # There are no more cards to count here.
        monkeypatch.setattr(self.plan, "other_cards", lambda home: tuple({FIRST, SECOND} - {home}))

    def layers(self, text: str, weight_format: str = "int4") -> tuple[dict[str, int], bool, str]:
        """(layers by device, whether all fits, text)"""
        asked = self.request.parse(text, "cpu")
        home = asked.devices[0] if asked.devices else FIRST
        options = self.load(device=home, dtype="bfloat16", format=weight_format).resolved()
        by_device = dict(zip(asked.devices, asked.nbytes or (), strict=False))
        made, told = self.plan.planned(self.folder, options, self.budget(by_device=by_device), asked)
        split = self.plan.split_of(made)
        return {str(device): count for device, count in split.runs}, made.fits_whole, told


@pytest.fixture
def planning(comfy_pack: ComfyPack, cards: Cards, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Planning:
    cards.host_free = 64 * GIB
    return Planning(comfy_pack, tiny_checkpoint, monkeypatch)


def test_auto_takes_the_second_card_only_if_one_is_not_enough(cards: Cards, planning: Planning):
    cards.total.update({FIRST: 80 * GIB, SECOND: 80 * GIB})
    assert planning.layers("auto")[:2] == ({"cpu:0": 32}, True)
    cards.total.update({FIRST: 40 * GIB, SECOND: 40 * GIB})
    split, fits, told = planning.layers("auto")
    assert fits and set(split) == {"cpu:0", "cpu:1"} and sum(split.values()) == 32 and 10 < split["cpu:0"] < 20
    assert "Everything fits on cpu:0 and cpu:1." in told
    assert planning.layers("0")[:2] == ({"cpu:0": 32}, False)


def test_what_is_asked_for_is_done(cards: Cards, planning: Planning):
    cards.total.update({FIRST: 80 * GIB, SECOND: 80 * GIB})
    assert set(planning.layers("0,1")[0]) == {"cpu:0", "cpu:1"}
    assert planning.layers("0:20,1:12")[0] == {"cpu:0": 20, "cpu:1": 12}
    assert planning.layers("1:20,0:12")[0] == {"cpu:1": 20, "cpu:0": 12}
    split, fits, _told = planning.layers("0:20GiB,1:50GiB")
    assert fits and split["cpu:0"] < 12 < split["cpu:1"]
    with pytest.raises(Exception, match=r"20 \+ 20 layers on 2 devices: this model has 32"):
        planning.layers("0:20,1:20")


def test_the_first_card_computes_if_it_can(cards: Cards, planning: Planning):
    cards.total.update({FIRST: 24 * GIB, SECOND: 96 * GIB})
    for text in ("auto", "0,1", "0:24GiB,1:90GiB"):
        split, fits, _told = planning.layers(text)
        assert fits
        assert min(split["cpu:0"], split["cpu:1"]) >= 1
    cards.total[FIRST] = 2 * GIB  # nothing can be computed on this one
    assert planning.layers("auto")[:2] == ({"cpu:1": 32}, True)
    with pytest.raises(Exception, match=r"cpu:0 has .* the least that 1 layer .*not every device must have a layer"):
        planning.layers("0,1")


def test_a_limit_of_ones_own_is_named(cards: Cards, planning: Planning):
    cards.total.update({FIRST: 80 * GIB, SECOND: 80 * GIB})
    with pytest.raises(Exception, match="It fits without the limits in vram_budget, ram_budget and gpu_split"):
        planning.layers("0:3GiB,1:3GiB")


def test_streaming_and_split_go_together(cards: Cards, planning: Planning):
    cards.total.update({FIRST: 16 * GIB, SECOND: 24 * GIB})
    split, fits, told = planning.layers("auto")
    assert not fits and split["cpu:0"] < split["cpu:1"]
    assert "of the experts stay on cpu:0 and cpu:1" in told


# --- in a real server -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(comfy_server: ComfyServer) -> np.ndarray:
    return shown(comfy_server, "auto")


def shown(server: ComfyServer, gpu_split: str) -> np.ndarray:
    (image,) = server.queue(drawing(loader={"gpu_split": gpu_split}))["show"]["images"]
    return np.asarray(Image.open(io.BytesIO(server.view(image["filename"], image["subfolder"], image["type"]))))


@pytest.mark.parametrize("gpu_split", ["cpu:0,cpu:1", "cpu:0:1,cpu:1:2", "cpu:1:2,cpu:0:1", "cpu:0:1GiB,cpu:1:1GiB"])
def test_the_same_picture_from_two_devices(comfy_server: ComfyServer, plain: np.ndarray, gpu_split: str):
    assert np.array_equal(shown(comfy_server, gpu_split), plain)


def test_the_loader_says_what_is_where(comfy_server: ComfyServer):
    graph = drawing(loader={"gpu_split": "cpu:0:1,cpu:1:2"})
    chosen = comfy_server.queue(graph)["loader"]["text"][0]
    assert "1 layer on cpu:0, 2 layers on cpu:1 (the processor stands in for cards)" in chosen


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ({"gpu_split": "0,1"}, "GPUs here: none"),
        ({"gpu_split": "cpu:0,cuda:0"}, "cannot share the layers"),
        ({"gpu_split": "255"}, "there is no device 255"),
        ({"gpu_split": "meta:0,meta:1"}, "meta:0 does not work here"),
        ({"gpu_split": "everything"}, "'everything' is not understood"),
        ({"gpu_split": "cpu:0:1,cpu:1:1"}, "this model has 3"),
        ({"gpu_split": "cpu:0,cpu:1", "device": "cpu"}, "begins on cpu:0"),
        ({"gpu_split": "cpu:0:0.0001GiB,cpu:1:0.0001GiB"}, "cannot be drawn"),
    ],
)
def test_what_cannot_be_is_said_and_the_next_prompt_works(
    comfy_server: ComfyServer, plain: np.ndarray, inputs: dict[str, str], told: str
):
    with pytest.raises(PromptError) as error:
        comfy_server.queue(drawing(loader=inputs))
    assert told in str(error.value)
    assert np.array_equal(shown(comfy_server, "auto"), plain)
