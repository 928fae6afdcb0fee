"""Weights stored small: error of each scheme, what is stored how, and the formats in a loaded model."""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from hunyuan3.checkpoint.keymap import transformer_slots
from hunyuan3.error import first_layers, layer_errors, main, weight_errors
from hunyuan3.errors import CheckpointError, RequestError
from hunyuan3.folder import ModelFolder
from hunyuan3.moe.select import expert_backend
from hunyuan3.ops import quantized
from hunyuan3.ops.product import (
    QuantizedRows,
    fp8_product,
    fp8_product_plain,
    has_int8_kernel,
    int8_product,
    int8_product_plain,
    linear,
    rows_for,
)
from hunyuan3.ops.quantized import GROUP, SCHEMES, quantize
from hunyuan3.parts import LoadOptions, load_transformer
from hunyuan3.pipeline import Hunyuan3
from hunyuan3.quant.modules import _weight, swap, transform_to
from hunyuan3.quant.policy import FORMATS, policy_of

# Relative error on Gaussian weights: measured, and a little room.
GAUSSIAN = {"int8": 0.010, "fp8": 0.028, "int4": 0.0685}
BITS = {"int8": 8.02, "fp8": 8.02, "int4": 4.52}


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gaussian_weights_come_back_within_the_stated_error_and_size(scheme):
    weight = gaussian(64, 4096) * 0.02
    stored = quantize(weight, scheme)
    assert 0.3 * GAUSSIAN[scheme] < relative(stored.dequantize(torch.float32), weight) < GAUSSIAN[scheme]
    assert 8 * stored.nbytes / weight.numel() == pytest.approx(BITS[scheme], abs=0.02)
    assert stored.shape == (64, 4096)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_of_very_different_size_do_not_disturb_each_other(scheme):
    weight = gaussian(8, 256) * torch.logspace(-6, 6, 8)[:, None]
    stored = quantize(weight, scheme).dequantize(torch.float32)
    for row in range(8):
        assert relative(stored[row], weight[row]) < 0.09


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_stay_zeros_and_nothing_becomes_nan(scheme):
    weight = gaussian(4, 64)
    weight[1] = 0
    weight[2, :GROUP] = 0
    stored = quantize(weight, scheme).dequantize(torch.float32)
    assert (stored[1] == 0).all()
    assert (stored[2, :GROUP] == 0).all()
    assert torch.isfinite(stored).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_stack_is_quantised_matrix_by_matrix_and_can_be_sliced(scheme):
    stack = gaussian(3, 16, 64)
    stored = quantize(stack, scheme)
    for index in range(3):
        alone = quantize(stack[index], scheme)
        assert torch.equal(stored[index].dequantize(torch.float32), alone.dequantize(torch.float32))
    assert torch.equal(stored[1:].dequantize(torch.float32), stored.dequantize(torch.float32)[1:])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_product_is_that_of_the_stored_weight(scheme):
    weight, x = gaussian(32, 64), gaussian(5, 64, seed=1)
    stored = quantize(weight, scheme)
    torch.testing.assert_close(linear(x, stored), x @ stored.dequantize(torch.float32).T)


def test_a_cpus_blocks_give_the_same_as_the_whole(monkeypatch):
    for scheme in SCHEMES:
        weight = gaussian(50, 64)
        whole = quantize(weight, scheme)
        monkeypatch.setattr(quantized, "_CPU_BLOCK", 7 * 64)
        blocks = quantize(weight, scheme)
        monkeypatch.undo()
        assert torch.equal(whole.data, blocks.data)
        assert all(torch.equal(a, b) for a, b in zip(whole.scales, blocks.scales, strict=True))


# activations, quantised


def dynamic(weight, scheme):
    return replace(quantize(weight, scheme), dynamic=True)


@pytest.mark.parametrize(("scheme", "limit"), [("int8", 0.02), ("fp8", 0.055)])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_a_dynamic_product_is_near_the_exact_one(scheme, limit, rows):
    weight, x = gaussian(48, 4096), gaussian(rows, 4096, seed=1) * torch.logspace(-3, 3, rows)[:, None]
    actual = linear(x, dynamic(weight, scheme))
    for row in range(rows):
        assert 0.001 < relative(actual[row], x[row] @ weight.T) < limit, "each token has a scale of its own"


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dynamic_product_is_that_of_what_is_stored(scheme, dtype):
    weight, x = dynamic(gaussian(32, 64), scheme), gaussian(2, 5, 64, seed=1).to(dtype)
    rows = rows_for(x, weight)
    read_back = rows.data.float() * rows.scale
    expected = (read_back @ weight.dequantize(torch.float32).T).to(dtype)
    actual = linear(x, weight)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected)
    assert torch.equal(linear(rows, weight), actual)
    assert torch.equal(linear(rows[:, 2:4], weight), actual[:, 2:4]), "tokens do not see each other"


def test_zero_activations_give_zeros():
    for scheme in ("int8", "fp8"):
        assert (linear(torch.zeros(3, 64), dynamic(gaussian(8, 64), scheme)) == 0).all()


def test_int8_kernel_and_plain_path_give_the_same_bits():
    """At the longest rows of the published model, with the largest numbers there are: no sum may round."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-127, 128, (size, 4096), dtype=torch.int8, generator=generator) for size in (33, 24))
    x[0], weight[0] = 127, 127
    plain = int8_product_plain(x, weight)
    assert plain[0, 0] == 4096 * 127 * 127
    assert torch.equal(plain, (x.long() @ weight.long().T).int())
    assert has_int8_kernel(torch.device("cpu"))
    for rows in (1, 16, 17, 33):
        assert torch.equal(int8_product(x[:rows], weight), plain[:rows])


def test_fp8_kernel_agrees_with_the_plain_path():
    """A CPU has it, too, if not for speed."""
    x, weight = quantize(gaussian(24, 64), "fp8"), quantize(gaussian(32, 64, seed=1), "fp8")
    plain = fp8_product_plain(x.data, x.scales[0], weight)
    try:
        kernel = fp8_product(x.data, x.scales[0], weight)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"this torch has none on a CPU: {error}")
    assert kernel.dtype == torch.bfloat16
    torch.testing.assert_close(kernel.float(), plain, atol=0.05, rtol=0.01)


def test_grouped_products_of_quantised_activations_are_refused_where_there_is_none():
    for weight_format, reason in (("int8_dynamic", "no grouped product of int8"), ("fp8_dynamic", "scaled_grouped_mm")):
        with pytest.raises(RequestError, match=reason):
            LoadOptions(device="cpu", format=weight_format, moe_backend="grouped").resolved()
        assert LoadOptions(device="cpu", format=weight_format).resolved().moe_backend == "loop"


# numbers that are none, and none at all


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("damage", [float("nan"), float("inf"), -float("inf")])
def test_damaged_weights_are_refused_by_name(folders, scheme, damage):
    weight = gaussian(4, 64)
    weight[2, 5] = damage
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    with pytest.raises(CheckpointError, match=r"experts\.3\.down_proj\.weight holds numbers that are not finite"):
        list(transform_to(policy_of(scheme), torch.device("cpu"))(name, weight))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_token_that_is_no_number_stays_none(scheme):
    """The check of the finished latents must see it; other tokens are not touched."""
    x = gaussian(3, 64)
    clean = linear(x, dynamic(gaussian(8, 64, seed=1), scheme)) if scheme != "int4" else None
    x[1, 7] = float("nan")
    if scheme == "int4":
        quantize(x, scheme)  # does not crash
        return
    out = linear(x, dynamic(gaussian(8, 64, seed=1), scheme))
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_rows_and_rows_that_do_not_lie_in_order(scheme):
    assert quantize(torch.zeros(0, 64), scheme).dequantize(torch.float32).shape == (0, 64)
    weight = gaussian(64, 32).T
    turned, plain = quantize(weight, scheme), quantize(weight.contiguous(), scheme)
    assert torch.equal(turned.dequantize(torch.float32), plain.dequantize(torch.float32))
    if scheme != "int4":
        for shape in ((0, 64), (1, 0, 64)):
            assert linear(torch.zeros(shape), dynamic(gaussian(8, 64), scheme)).shape == (*shape[:-1], 8)


# policies


@pytest.mark.parametrize("weight_format", FORMATS[1:])
def test_what_the_table_says_is_what_is_stored_and_computed_with(folders, weight_format):
    """Experts and the other large matrices each in their scheme, and all of them dynamic or none."""
    folder = ModelFolder.open(folders["instruct"])
    layer = load_transformer(folder, LoadOptions(device="cpu", format=weight_format).resolved()).layers[0]
    experts = {"int4": torch.uint8, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[weight_format.split("_")[0]]
    linears = torch.int8 if weight_format == "int4" else experts
    assert layer.mlp.experts.gate_up.dtype == layer.mlp.experts.down.dtype == experts
    modules = (layer.self_attn.qkv_proj, layer.self_attn.o_proj, *layer.mlp.shared_mlp.children())
    assert len(modules) == 4
    for module in modules:
        assert module.weight.dtype == linears
        assert module.dynamic == layer.mlp.experts.dynamic == weight_format.endswith("_dynamic")
    x = gaussian(1, 5, 64)
    rows = rows_for(x, _weight(layer.self_attn.qkv_proj, "weight"))
    assert isinstance(rows, QuantizedRows) == weight_format.endswith("_dynamic")


def test_int4_refuses_rows_that_are_no_whole_groups():
    with pytest.raises(RequestError, match="multiple of 16"):
        quantize(gaussian(4, 24), "int4")


def test_an_unknown_format_is_refused_by_name():
    with pytest.raises(RequestError, match="int3"):
        LoadOptions(device="cpu", format="int3").resolved()


@pytest.mark.parametrize("weight_format", FORMATS[1:])
def test_only_the_large_matrices_of_the_layers_are_stored_small(folders, weight_format):
    folder = ModelFolder.open(folders["distil"])
    model = load_transformer(folder, LoadOptions(device="cpu", dtype="float32", format=weight_format).resolved())
    small = {name for name, p in model.named_parameters() if p.dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn)}
    assert small, "nothing was stored small"
    assert all(name.startswith("layers.") for name in small)
    assert not any("router" in name or "norm" in name for name in small)
    plain = load_transformer(folder, LoadOptions(device="cpu", dtype="float32").resolved())
    untouched = dict(plain.named_parameters()).keys() & dict(model.named_parameters()).keys() - small
    for name in untouched:
        assert torch.equal(plain.get_parameter(name), model.get_parameter(name)), name


@pytest.mark.parametrize("weight_format", FORMATS[1:])
def test_every_stored_tensor_has_a_place_and_a_name_of_its_own(folders, weight_format):
    folder = ModelFolder.open(folders["instruct"])
    model = folder.networks.transformer()
    swap(model, policy_of(weight_format))
    slots = transformer_slots(dict(model.named_parameters()))
    places = [(slot.parameter, slot.expert) for slot in slots.values()]
    assert len(set(places)) == len(places)
    assert set(folder.networks.transformer_slots) <= set(slots)


@pytest.mark.parametrize(
    ("weight_format", "limit"),
    [("int8", 0.03), ("int8_dynamic", 0.04), ("fp8", 0.08), ("fp8_dynamic", 0.10), ("int4", 0.10)],
)
def test_a_drawing_stays_near_that_of_the_published_weights(folders, models, weight_format, limit):
    """Latents of a random model after eight steps; the limits are about twice what was measured."""
    model = Hunyuan3.load(folders["distil"], device="cpu", dtype="float32", format=weight_format)
    drawn, expected = (
        one.sample(one.conditioning("a red fox", width=96, height=64), seed=1).latents
        for one in (model, models["distil"])
    )
    assert 0 < relative(drawn, expected) < limit


@pytest.mark.parametrize("weight_format", FORMATS[1:])
def test_backends_and_chunks_agree_on_quantised_experts(folders, weight_format):
    options = LoadOptions(device="cpu", dtype="float32", format=weight_format).resolved()
    moe = load_transformer(ModelFolder.open(folders["instruct"]), options).layers[0].mlp
    x = gaussian(1, 40, 64)
    with torch.no_grad():
        expected = moe(x)
        moe.experts.chunk_size = 3
        assert torch.equal(moe(x), expected)
        if moe.experts.dynamic:
            return  # no grouped product on a CPU
        moe.backend = expert_backend("grouped")
        torch.testing.assert_close(moe(x), expected, atol=1e-5, rtol=1e-5)


def test_bytes_are_counted_before_anything_is_loaded(folders):
    sizes = {}
    for weight_format in FORMATS:
        model = Hunyuan3.open(folders["instruct"], device="cpu", dtype="bfloat16", format=weight_format)
        sizes[weight_format] = model.placed_transformer.total_bytes
        assert model.placed_transformer.loaded_bytes == 0
        loaded = model.transformer()
        assert sum(p.nbytes for p in loaded.parameters()) == sizes[weight_format]
    assert sizes["int4"] < sizes["int8"] < sizes["bf16"]


def test_errors_are_what_they_say(folders):
    """Relative error and cosine by their definitions; each layer is given the published weights' stream."""
    folder = first_layers(ModelFolder.open(folders["instruct"]), 2)
    (row,) = (row for row in weight_errors(folder, policy_of("int4"), 1) if row.kind == "self_attn.o_proj")
    with safe_open(folder.index["model.layers.0.self_attn.o_proj.weight"].file, framework="pt") as file:
        weight = file.get_tensor("model.layers.0.self_attn.o_proj.weight").float()
    stored = quantize(weight, "int8").dequantize(torch.float32)
    assert row.relative == pytest.approx(relative(stored, weight), rel=1e-5)
    assert row.cosine == pytest.approx(torch.cosine_similarity(stored.ravel(), weight.ravel(), dim=0).item(), abs=1e-6)
    one, two = (
        load_transformer(folder, LoadOptions(device="cpu", dtype="float32", format=name).resolved())
        for name in ("bf16", "int4")
    )
    both = layer_errors(one, two)
    two.layers[0] = one.layers[0]  # an exact first layer: the second's error must not change
    assert layer_errors(one, two) == [0.0, both[1]]


def test_the_error_table_ranks_the_formats_and_sees_no_error_where_there_is_none(folders, capsys):
    folder = first_layers(ModelFolder.open(folders["instruct"]), 1)
    reference = load_transformer(folder, LoadOptions(device="cpu", dtype="float32").resolved())
    assert len(reference.layers) == 1
    assert layer_errors(reference, reference) == [0.0]
    rows = {name: list(weight_errors(folder, policy_of(name), 1)) for name in FORMATS[1:]}
    experts = {
        name: next(r.relative for r in found if r.kind.startswith("mlp.experts")) for name, found in rows.items()
    }
    assert experts["int8"] < experts["fp8"] < experts["int4"] < 0.08
    assert main([str(folders["instruct"]), "--format", "int8", "--layers", "1"]) == 0
    assert "output of layer 0" in capsys.readouterr().out
    assert main([str(folders["instruct"] / "nowhere")]) == 1
