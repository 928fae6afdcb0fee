"""Router, dispatch, experts, combine: the fast way against slow re-statements."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from hunyuan3.config import MoEConfig
from hunyuan3.errors import RequestError
from hunyuan3.moe.capacity import drop_over_capacity, expert_capacity
from hunyuan3.moe.dispatch import Dispatch, combine
from hunyuan3.moe.layer import MoELayer
from hunyuan3.moe.router import Router, Routing
from hunyuan3.moe.select import choose_backend, expert_backend, log_choice
from hunyuan3.parts import LoadOptions
from hunyuan3.pipeline import Hunyuan3
from tests.core.golden_paths import checkpoint, golden_root

CPU = torch.device("cpu")
SIZE, WIDTH, EXPERTS, TOP_K = 32, 24, 8, 3
BACKENDS = ["loop", "grouped"]


def make_layer(backend="loop", dtype=torch.float32, drop_tokens=False, shared=1, seed=0, **changes):
    settings = {"num_experts": EXPERTS, "top_k": (TOP_K,), "intermediate_size": (WIDTH,), **changes}
    layer = MoELayer(MoEConfig(num_shared_experts=(shared,), drop_tokens=drop_tokens, **settings), 0, SIZE)
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
        parameter.requires_grad_(False)
    layer.backend = expert_backend(backend)
    return layer.to(dtype)


def tokens(count, seed=1, dtype=torch.float32):
    return torch.randn(1, count, SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def slow_moe(layer, x):
    """One token at a time, one choice at a time, in float64; nothing is dropped."""
    layer = layer.double()
    out = torch.empty_like(x, dtype=torch.float64)
    for index, token in enumerate(x.double().view(-1, SIZE)):
        probabilities = (layer.router.weight @ token).softmax(0)
        order = sorted(range(EXPERTS), key=lambda e: -probabilities[e])[: layer.router.top_k]
        share = sum(probabilities[e] for e in order)
        total = slow_gated(token, layer.shared_mlp.gate_and_up_proj.weight, layer.shared_mlp.down_proj.weight)
        for expert in order:
            down = slow_gated(token, layer.experts.gate_up[expert], layer.experts.down[expert])
            total = total + probabilities[expert] / share * down
        out.view(-1, SIZE)[index] = total
    return out


def slow_gated(token, gate_up, down):
    half = len(gate_up) // 2
    value, gate = gate_up[:half] @ token, gate_up[half:] @ token
    return down @ (value * gate / (1 + (-gate).exp()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 2, 57])
@pytest.mark.parametrize("shared", [1, 2])
def test_both_backends_give_the_weighted_sum_of_the_chosen_experts(backend, count, shared):
    x = tokens(count)
    expected = slow_moe(make_layer(shared=shared), x)
    assert (make_layer(backend, shared=shared)(x) - expected).abs().max() < 1e-5
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [1, 3, 5, 7, 8, 100])
def test_chunking_over_experts_agrees_to_the_bit(backend, dtype, chunk_size):
    layer = make_layer(backend, dtype)
    x = tokens(45, dtype=dtype)
    whole = layer(x)
    layer.experts.chunk_size = chunk_size
    assert len(list(layer.experts.chunks())) == -(-EXPERTS // chunk_size)
    assert torch.equal(layer(x), whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pieces", [2, 5, 40])
def test_chunking_over_tokens_agrees_within_rounding(backend, pieces):
    layer = make_layer(backend)
    x = tokens(40)
    parts = torch.cat([layer(part) for part in x.chunk(pieces, dim=1)], dim=1)
    assert (parts - layer(x)).abs().max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_a_batch_do_not_influence_each_other(backend):
    layer = make_layer(backend)
    x = torch.cat((tokens(9, seed=1), tokens(9, seed=2)))
    together = layer(x)
    assert together.shape == x.shape
    assert (together - torch.cat((layer(x[:1]), layer(x[1:])))).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3, 64])
def test_the_grouped_backend_agrees_with_the_loop(dtype, count):
    x = tokens(count, dtype=dtype)
    loop, grouped = (make_layer(backend, dtype)(x) for backend in BACKENDS)
    assert loop.dtype == grouped.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (loop - grouped).abs().max() <= tolerance * loop.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk_size", [1, 2, 8])
def test_experts_that_nobody_chose_are_skipped_wherever_they_stand(backend, chunk_size):
    """First, last and in the middle; their weights are poison, so that touching a row of theirs would show."""
    layer = make_layer(backend)
    x = tokens(30)
    layer.router.weight[[0, 4, 7]] = 0
    bias = torch.zeros(EXPERTS)
    bias[[0, 4, 7]] = -1e9
    layer.router.logits = lambda x, route=layer.router.logits: route(x) + bias
    used = set(layer.router(x[0]).ids.flatten().tolist())
    assert used == {1, 2, 3, 5, 6}
    expected = layer(x)
    layer.experts.gate_up[[0, 4, 7]] = float("nan")
    layer.experts.chunk_size = chunk_size
    assert torch.equal(layer(x), expected)
    assert expected.isfinite().all()


def test_all_tokens_on_the_same_experts_is_served():
    for backend in BACKENDS:
        x = tokens(1).expand(1, 50, SIZE)
        out = make_layer(backend)(x)
        assert (out - out[:, :1]).abs().max() < 1e-6


def test_sorting_keeps_token_order_within_an_expert_and_finds_every_pair_again():
    ids = torch.randint(0, EXPERTS, (40, TOP_K), generator=torch.Generator().manual_seed(0))
    ids[ids == 5] = 6  # expert 5 stays empty
    dispatch = Dispatch.sort(ids, EXPERTS)
    starts = [0, *dispatch.ends.tolist()]
    assert starts[-1] == ids.numel()
    for expert in range(EXPERTS):
        rows = dispatch.token[starts[expert] : starts[expert + 1]].tolist()
        assert rows == [token for token, row in enumerate(ids.tolist()) for choice in row if choice == expert]
    for token in range(40):
        for choice in range(TOP_K):
            place = dispatch.place[token, choice]
            assert dispatch.token[place] == token
            assert starts[ids[token, choice]] <= place < starts[ids[token, choice] + 1]


def test_contributions_are_added_from_the_first_choice_to_the_last_in_float32():
    """(1e8 + 1) - 1e8 is 0 in float32, in any other order it is 1. Expert numbers run against the choices."""
    for ids in ([[2, 1, 0]], [[0, 1, 2]], [[1, 2, 0]]):
        dispatch = Dispatch.sort(torch.tensor(ids), 3)
        by_choice = torch.tensor([[1e8], [1.0], [-1e8]])
        outputs = torch.empty(3, 1)
        outputs[dispatch.place[0]] = by_choice
        assert combine(outputs, dispatch, Routing(torch.tensor(ids), torch.ones(1, 3))).item() == 0.0


def test_bfloat16_contributions_are_rounded_once_after_the_sum():
    """256 + 1 is 256 in bfloat16: summed there, four ones after a 256 are lost."""
    ids = torch.arange(5).view(1, 5)
    outputs = torch.tensor([[256.0], [1.0], [1.0], [1.0], [1.0]], dtype=torch.bfloat16)
    total = combine(outputs, Dispatch.sort(ids, 5), Routing(ids, torch.ones(1, 5, dtype=torch.bfloat16)))
    assert total.dtype == torch.bfloat16
    assert total.item() == 260.0


def test_weights_are_probabilities_normalised_over_the_choices_best_first():
    router = Router(SIZE, EXPERTS, TOP_K)
    router.weight.data = torch.randn(EXPERTS, SIZE, generator=torch.Generator().manual_seed(0))
    x = tokens(20)[0]
    routing = router(x)
    logits = x.double() @ router.weight.detach().double().T
    assert routing.ids.tolist() == [sorted(range(EXPERTS), key=lambda e, row=row: -row[e])[:TOP_K] for row in logits]
    expected = logits.gather(1, routing.ids).softmax(1)  # softmax over the chosen ones is the same number
    assert (routing.weights - expected).abs().max() < 1e-6


def test_one_choice_has_the_whole_weight():
    router = Router(SIZE, EXPERTS, 1)
    router.weight.data = torch.randn(EXPERTS, SIZE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(router(tokens(7)[0]).weights, torch.ones(7, 1))


def test_the_float32_router_is_the_more_precise_one_in_a_bfloat16_run():
    router = Router(SIZE, EXPERTS, TOP_K)
    router.weight.data = torch.randn(EXPERTS, SIZE, generator=torch.Generator().manual_seed(0))
    x = tokens(50, dtype=torch.bfloat16)[0]
    exact = x.double() @ router.weight.detach().double().T
    reference = router.logits(x)
    router.precision = "fp32"
    precise = router.logits(x)
    assert (reference.dtype, precise.dtype) == (torch.bfloat16, torch.float32)
    assert (precise - exact).abs().max() < 1e-5 < (reference - exact).abs().max()
    assert router(x).weights.dtype == torch.bfloat16


def test_router_options_reach_every_layer_of_a_loaded_model(folders):
    for router, dtype in (("reference", torch.bfloat16), ("fp32", torch.float32)):
        model = Hunyuan3.load(folders["instruct"], device="cpu", dtype="bfloat16", router=router).transformer()
        for layer in model.layers:
            assert layer.mlp.router.weight.dtype == torch.float32
            assert layer.mlp.router.logits(torch.ones(1, 64, dtype=torch.bfloat16)).dtype == dtype


def test_bfloat16_routing_and_output_equal_the_recording():
    """What CPU autocast makes of layer 0: the same choices everywhere, values within 2 % of the largest."""
    recorded = load_file(golden_root() / "components" / "moe_bf16.safetensors")
    folder = checkpoint("tiny-instruct")
    model = Hunyuan3.load(folder, device="cpu", dtype="bfloat16")
    layer = model.transformer().layers[0].mlp
    x = recorded["x"].flatten(0, 1)
    assert torch.equal(layer.router.logits(x), recorded["router_logits"])
    routing = layer.router(x)
    assert torch.equal(routing.ids.sort().values, recorded["topk_index"].sort().values)
    combine_weights = torch.zeros(recorded["combine_per_expert"].shape).scatter(1, routing.ids, routing.weights.float())
    assert (combine_weights - recorded["combine_per_expert"]).abs().max() < 2e-2
    for backend in BACKENDS:
        layer.backend = expert_backend(backend)
        error = (layer(recorded["x"]).float() - recorded["out_eager"].float()).abs().max()
        assert error < 2e-2 * recorded["out_eager"].abs().max()
    layer.router.precision = "fp32"
    assert (layer.router.logits(x) - recorded["router_logits_float32"]).abs().max() < 1e-5


def slow_capacity(ids, weights, num_experts, factor):
    """Spec 7.4 in words: rank by rank, token by token, an expert is full when it has C pairs."""
    count, top_k = ids.shape
    capacity = int(max(top_k, top_k * count // num_experts) * factor)
    taken = [0] * num_experts
    kept = weights.clone()
    for rank in range(top_k):
        for token in range(count):
            expert = ids[token, rank]
            if taken[expert] >= capacity:
                kept[token, rank] = 0
            taken[expert] += 1
    return kept


@pytest.mark.parametrize("count", [1, 2, 5, 33, 82])
@pytest.mark.parametrize("factor", [1.0, 0.5, 1.3, 100.0])
@pytest.mark.parametrize("skew", [1, 3])
def test_the_capacity_rule_is_first_come_first_served_rank_by_rank(count, factor, skew):
    generator = torch.Generator().manual_seed(count)
    scores = torch.rand(count, EXPERTS, generator=generator) + torch.arange(EXPERTS) * 0.1 * skew
    chosen = scores.topk(TOP_K)
    weights = chosen.values / chosen.values.sum(1, keepdim=True)
    actual = drop_over_capacity(Routing(chosen.indices, weights), EXPERTS, factor)
    assert torch.equal(actual.weights, slow_capacity(chosen.indices, weights, EXPERTS, factor))
    assert torch.equal(actual.ids, chosen.indices)
    if count == 82 and factor < 100:
        assert 0 < (actual.weights == 0).sum() < actual.weights.numel()


def test_capacity_of_the_published_models_is_an_eighth_of_the_tokens_and_never_below_the_choices():
    assert expert_capacity(10000, 8, 64, 1.0) == 1250
    assert expert_capacity(1, 8, 64, 1.0) == 8
    assert expert_capacity(4097, 8, 64, 1.0) == 512
    assert expert_capacity(1000, 8, 64, 1.5) == 187


def test_dropped_pairs_contribute_nothing_and_the_rest_is_not_raised():
    """All tokens alike, so all choose alike: those within the capacity get the full sum, the others the shared MLP."""
    for backend in BACKENDS:
        layer = make_layer(backend, drop_tokens=True)
        x = tokens(1).expand(1, 16, SIZE)
        capacity = expert_capacity(16, TOP_K, EXPERTS, 1.0)
        out, shared = layer(x), layer.shared_mlp(x)
        layer.drop_tokens = False
        dropless = layer(x)
        assert 0 < capacity < 16
        assert (out[:, :capacity] - dropless[:, :capacity]).abs().max() < 1e-6
        assert (out[:, capacity:] - shared[:, capacity:]).abs().max() < 1e-6
        assert (dropless[:, capacity:] - shared[:, capacity:]).abs().max() > 1e-2


def test_drop_tokens_of_the_options_overrides_the_configuration_both_ways(folders, copied, edit_json):
    dropping = copied("instruct")
    edit_json(dropping / "config.json", moe_drop_tokens=True)
    table = {
        (folders["instruct"], None): False,
        (folders["instruct"], True): True,
        (dropping, None): True,
        (dropping, False): False,
    }
    for (folder, option), expected in table.items():
        assert Hunyuan3.load(folder, device="cpu", drop_tokens=option).transformer().drops_tokens is expected


def test_the_plain_loop_is_chosen_on_a_cpu_and_a_backend_asked_for_is_taken():
    backend, reason = choose_backend("auto", CPU, torch.float32)
    assert backend == "loop"
    assert reason
    assert choose_backend("loop", CPU, torch.bfloat16) == ("loop", "asked for")
    assert choose_backend("grouped", CPU, torch.float32) == ("grouped", "asked for")


def test_a_backend_that_does_not_work_here_is_refused_with_the_reason():
    with pytest.raises(RequestError, match=r"moe_backend 'grouped' does not work here: .*Choose 'auto' or 'loop'"):
        choose_backend("grouped", CPU, torch.float64)  # grouped_mm has no float64 kernel
    assert choose_backend("auto", CPU, torch.float64)[0] == "loop"


def test_the_choice_of_backend_is_logged_with_its_reason(folders, caplog):
    with caplog.at_level("INFO"):
        log_choice("loop", "a reason")
    assert "loop" in caplog.text
    assert "a reason" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        model = Hunyuan3.load(folders["base"], device="cpu", moe_backend="grouped")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("hunyuan3")] == [
        "MoE backend: grouped (asked for)"
    ]
    assert all(layer.mlp.backend is expert_backend("grouped") for layer in model.transformer().layers)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("device", "cuda:99"),
        ("device", "gpu7"),
        ("dtype", "float8"),
        ("vae_dtype", "int8"),
        ("router", "float32"),
        ("moe_backend", "fused"),
    ],
)
def test_an_unknown_option_is_refused_by_name(option, value):
    with pytest.raises(RequestError, match=f"{option}.*{value}"):
        LoadOptions(**{"device": "cpu", option: value}).resolved()


def test_a_model_draws_the_same_with_either_backend(folders, models):
    grouped = Hunyuan3.load(folders["distil"], device="cpu", moe_backend="grouped")
    conditioning = models["distil"].conditioning("a fox", width=64, height=96)
    one, other = (model.sample(conditioning, seed=3, steps=3).latents for model in (models["distil"], grouped))
    assert (one - other).abs().max() < 1e-4


def test_a_model_whose_experts_come_in_chunks_draws_the_same_to_the_bit(folders, models):
    conditioning = models["distil"].conditioning("a fox", width=64, height=96)
    expected = models["distil"].sample(conditioning, seed=3, steps=3).latents
    chunked = Hunyuan3.load(folders["distil"], device="cpu")
    for layer in chunked.transformer().layers:
        layer.mlp.experts.chunk_size = 3
    assert torch.equal(chunked.sample(conditioning, seed=3, steps=3).latents, expected)


def test_the_activation_is_on_the_second_half_of_the_fused_matrix():
    """Opposite to the usual convention: swapping the halves must give something else."""
    layer = make_layer()
    x = tokens(5)
    gate_up, down = layer.shared_mlp.gate_and_up_proj.weight, layer.shared_mlp.down_proj.weight
    value, gate = F.linear(x, gate_up[:WIDTH]), F.linear(x, gate_up[WIDTH:])
    assert (layer.shared_mlp(x) - F.linear(value * F.silu(gate), down)).abs().max() < 1e-6
    assert (layer.shared_mlp(x) - F.linear(gate * F.silu(value), down)).abs().max() > 1e-2
