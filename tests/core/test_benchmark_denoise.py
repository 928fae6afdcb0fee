"""What benchmarks/denoise.py compares with: the restated reference's way against the recordings, and a tiny run."""

import math
import re

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.denoise import (
    BRANCHES,
    PUBLISHED,
    DisagreementError,
    Flops,
    Sizes,
    TieSettlingRouter,
    build_model,
    build_rows,
    run,
)
from benchmarks.reference_way import ReferenceWay, build_masks, mixture_of_experts
from hunyuan3.moe.capacity import expert_capacity
from hunyuan3.moe.router import Routing
from hunyuan3.pipeline import Hunyuan3
from tests.core.golden_paths import checkpoint, component, golden_root

TINY = Sizes(64, 2, 4, 2, 8, 2, 32, patch_width=32, latent_channels=4, side=6, prompt=11)


@pytest.fixture(scope="module")
def recorded():
    """(MoE layer in float32, tensors) of the recording."""
    meta = component("moe")
    folder = checkpoint(meta["checkpoint"])
    assert folder is not None
    model = Hunyuan3.load(folder, device="cpu", dtype="float32").transformer()
    layer = model.layers[meta["layer"]].mlp
    return layer, load_file(golden_root() / "components" / "moe.safetensors")


@pytest.mark.parametrize("drop", [False, True])
def test_mixture_of_experts_passes_the_recording(recorded, drop):
    layer, tensors = recorded
    layer.drop_tokens = drop
    out = mixture_of_experts(layer, tensors["x"])
    torch.testing.assert_close(out, tensors[f"out_drop_{drop}"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("drop", [False, True])
def test_masks_pass_the_recording(recorded, drop):
    layer, tensors = recorded
    routing = layer.router(tensors["x"].flatten(0, 1))
    slots = expert_capacity(*routing.ids.shape, layer.num_experts, layer.capacity_factor) if drop else None
    masks = build_masks(routing, layer.num_experts, slots)
    assert masks.dispatch.shape[2] == tensors[f"capacity_drop_{drop}"].item()
    assert torch.equal(masks.dispatch.sum(dim=2).to(torch.uint8), tensors[f"kept_drop_{drop}"])
    expected = tensors[f"combine_per_expert_drop_{drop}"]
    torch.testing.assert_close(masks.combine.sum(dim=2), expected, rtol=0, atol=1e-6)


def test_slots_go_to_first_choices_first():
    ids = torch.tensor([[0, 1], [1, 0], [0, 1]])
    masks = build_masks(Routing(ids, torch.full((3, 2), 0.5)), 2, slots=2)
    taken = [[masks.dispatch[token, expert].tolist() for expert in range(2)] for token in range(3)]
    # Expert 0: first choices of tokens 0 and 2, so token 1 comes too late. Expert 1: token 1, then token 0.
    assert taken == [[[1, 0], [0, 1]], [[0, 0], [1, 0]], [[0, 1], [0, 0]]]
    assert torch.equal(masks.combine, masks.dispatch * 0.5)


def test_prints_the_ratio_last(capsys):
    run(TINY, repeats=1, seed=0)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"ratio: \d+\.\d", lines[-1])
    assert any(line.startswith("dispatch + combine, 2 layers") for line in lines)


def test_refuses_to_report_when_the_ways_disagree(capsys, monkeypatch):
    right = ReferenceWay.velocity
    monkeypatch.setattr(ReferenceWay, "velocity", lambda self, latents, t: right(self, latents, t) * 1.001)
    with pytest.raises(SystemExit, match="differ"):
        run(TINY, repeats=1, seed=0)
    assert "ratio" not in capsys.readouterr().out


def test_the_second_way_follows_the_first_in_a_tie_and_only_there():
    router = TieSettlingRouter(2, 4, top_k=2).requires_grad_(False)
    router.weight.copy_(torch.tensor([[3.0, 0.0], [1.0, 0.0], [1.0, 1e-6], [-1.0, 1.0]]))
    first = router(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    assert first.ids.tolist() == [[0, 2], [0, 1]]
    router.following = True
    second = router(torch.tensor([[1.0, -1.0], [1.0, -1.0]]))
    assert second.ids.tolist() == [[0, 2], [0, 1]]
    torch.testing.assert_close(second.weights, first.weights)
    assert router.settled == 1
    with pytest.raises(DisagreementError, match="different experts"):
        router(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))


def test_counted_operations_are_those_that_torch_counts():
    model = build_model(TINY, seed=0)
    for layer in model.layers:
        layer.mlp.router.weight.zero_()  # all tokens choose the same experts
    cache = model.new_cache(BRANCHES, TINY.length)
    for tensor in (*cache.keys, *cache.values):
        tensor.zero_()
    way = ReferenceWay(model, build_rows(TINY, seed=0), cache)
    latents = torch.randn(1, TINY.latent_channels, TINY.side, TINY.side)
    # The plain attention is two matrix products; the fused one of the CPU is not counted.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        way.velocity(latents, torch.tensor(500.0))
    size = TINY.hidden
    time_embedders = 2 * BRANCHES * 3 * (256 * size + size**2)
    modulations = 2 * BRANCHES * 2 * size * (size + TINY.patch_width)
    slots = TINY.queries * BRANCHES
    assert counter.get_total_flops() == Flops.reference(TINY, slots).total + time_embedders + modulations


def test_full_size_figures():
    """The design study's: 200 TFLOP of linear layers, 23 of attention, 282 of one-hot einsums for a guidance pair."""
    ours, theirs = Flops.ours(PUBLISHED), Flops.reference(PUBLISHED)
    assert math.isclose(ours.projections + ours.experts, 200.3e12, rel_tol=1e-3)
    assert math.isclose(ours.attention, 23.2e12, rel_tol=1e-2)
    assert math.isclose(theirs.dispatch_combine, 282e12, rel_tol=1e-2)
