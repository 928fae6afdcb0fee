"""Span attention against a dense mask, and the fused projection against its row formula."""

import math

import pytest
import torch

from hunyuan3.errors import RequestError
from hunyuan3.ops.attention import AttentionRun, attention_backend, plan_attention, span_attention
from hunyuan3.ops.rope import apply_rope
from hunyuan3.pipeline import Hunyuan3
from hunyuan3.transformer.kv_cache import KVCache
from hunyuan3.types import Span

BACKENDS = [attention_backend(name) for name in ("sdpa", "math")]
backends = pytest.mark.parametrize("attend", BACKENDS)

LAYOUTS = {
    "text only": (13, []),
    "a picture in the middle": (20, [(5, 14)]),
    "a picture at the start": (20, [(0, 6)]),
    "a picture at the end": (20, [(9, 20)]),
    "nothing but a picture": (7, [(0, 7)]),
    "two pictures with text between": (30, [(3, 9), (15, 28)]),
    "two pictures side by side": (30, [(3, 9), (9, 28)]),
    "pictures of one token": (9, [(2, 3), (5, 6)]),
    "three pictures, the last to be drawn": (40, [(4, 10), (12, 20), (25, 37)]),
}


def dense_mask(length, spans):
    """Spec 6.2: lower triangle, then a square for each span."""
    mask = torch.ones(length, length).tril().bool()
    for start, stop in spans:
        mask[start:stop, start:stop] = True
    return mask


def dense_attention(q, k, v, mask):
    """Every head on its own, in float64; key heads are shared by consecutive query heads."""
    heads = []
    for head in range(q.shape[1]):
        shared = head // (q.shape[1] // k.shape[1])
        scores = q[:, head].double() @ k[:, shared].double().transpose(-1, -2) / math.sqrt(q.shape[-1])
        heads.append(scores.masked_fill(~mask, -math.inf).softmax(-1) @ v[:, shared].double())
    return torch.cat(heads, dim=-1)


def heads_of(length, query_heads, key_heads, batch=2, size=8):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, query_heads + 2 * key_heads, length, size)
    return torch.randn(shape, generator=generator).split([query_heads, key_heads, key_heads], dim=1)


@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (6, 1), (4, 4)])
@pytest.mark.parametrize("layout", LAYOUTS)
@backends
def test_runs_of_queries_equal_the_dense_mask(attend, layout, heads):
    length, spans = LAYOUTS[layout]
    q, k, v = heads_of(length, *heads)
    plan = plan_attention(Span(0, length), [Span(*span) for span in spans])
    out = span_attention(q, k, v, plan, attend)
    assert (out - dense_attention(q, k, v, dense_mask(length, spans))).abs().max() < 1e-5


@pytest.mark.parametrize("window", [(22, 37), (24, 37), (24, 40), (25, 37), (23, 24), (11, 40), (20, 24)])
@backends
def test_a_later_window_equals_the_rows_of_the_whole(attend, window):
    """Queries of a window against everything before it; pictures before the window are in the cache already."""
    length, spans = LAYOUTS["three pictures, the last to be drawn"]
    start, stop = window
    q, k, v = heads_of(length, 4, 2)
    plan = plan_attention(Span(*window), [Span(*span) for span in spans])
    assert (plan[0].start, plan[-1].stop) == window
    out = span_attention(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], plan, attend)
    whole = dense_attention(q, k, v, dense_mask(length, spans))
    assert (out - whole[:, start:stop]).abs().max() < 1e-5


@backends
def test_keys_behind_the_plans_end_are_not_seen(attend):
    q, k, v = heads_of(20, 4, 2)
    plan = plan_attention(Span(5, 15), [Span(8, 15)])
    out = span_attention(q[:, :, 5:15], k, v, plan, attend)
    assert torch.equal(out, span_attention(q[:, :, 5:15], k[:, :, :15], v[:, :, :15], plan, attend))


def test_the_order_in_which_spans_are_given_does_not_matter():
    spans = [Span(15, 28), Span(3, 9)]
    assert plan_attention(Span(0, 30), spans) == plan_attention(Span(0, 30), spans[::-1])
    assert plan_attention(Span(0, 30), spans) == (
        AttentionRun(0, 3, False),
        AttentionRun(3, 9, True),
        AttentionRun(9, 15, False),
        AttentionRun(15, 28, True),
        AttentionRun(28, 30, False),
    )


@pytest.mark.parametrize("window", [(0, 7), (7, 20), (6, 8)])
def test_a_window_that_cuts_a_picture_is_a_mistake(window):
    with pytest.raises(AssertionError):
        plan_attention(Span(*window), [Span(5, 10)])


@backends
def test_the_separator_sees_the_last_vision_token_and_what_follows_the_picture_is_causal(attend):
    """joint_full: one span from the first VAE token to the last vision token, the separator at 8 inside (spec 15)."""
    length, joint, changed = 20, (3, 13), 12
    q, k, v = heads_of(length, 2, 1)
    plan = plan_attention(Span(0, length), [Span(*joint)])
    before = span_attention(q, k, v, plan, attend)
    k, v = k.clone(), v.clone()
    k[:, :, changed] += 1
    v[:, :, changed] += 1
    moved = (span_attention(q, k, v, plan, attend) - before).abs().amax(dim=(0, 2)) > 0
    assert moved.tolist() == [3 <= i for i in range(length)]


@backends
def test_a_token_after_the_picture_is_seen_by_itself_and_later_ones_only(attend):
    q, k, v = heads_of(20, 2, 1)
    plan = plan_attention(Span(0, 20), [Span(3, 13)])
    before = span_attention(q, k, v, plan, attend)
    k, v = k.clone(), v.clone()
    k[:, :, 15] += 1
    v[:, :, 15] += 1
    moved = (span_attention(q, k, v, plan, attend) - before).abs().amax(dim=(0, 2)) > 0
    assert moved.tolist() == [15 <= i for i in range(20)]


def test_a_model_draws_the_same_with_either_attention(folders, models):
    written_out = Hunyuan3.load(folders["instruct"], device="cpu", attention="math")
    conditioning = models["instruct"].conditioning("a fox", width=64, height=96)
    one, other = (model.sample(conditioning, seed=3, steps=3).latents for model in (models["instruct"], written_out))
    assert 0 < (one - other).abs().max() < 1e-4


def test_an_unknown_attention_is_refused_by_name():
    with pytest.raises(RequestError, match=r"attention is 'flash9'.*sdpa, math"):
        attention_backend("flash9")


def test_qkv_rows_are_grouped_by_key_head(models):
    """Row g * (G + 2) * d + s * d + i: slots s < G are query heads G g + s, then the key head, then the value head."""
    model = models["instruct"].transformer()
    attention, config = model.layers[0].self_attn, model.config
    d, groups = config.head_dim, config.num_heads // config.num_kv_heads
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, config.hidden_size, generator=generator)
    cos, sin = torch.ones(5, d), torch.zeros(5, d)  # no rotation
    q, k, v = attention.project(x, (cos, sin))
    rows = attention.qkv_proj.weight.view(config.num_kv_heads, groups + 2, d, config.hidden_size)

    def normed(head):
        return head / (head.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()  # tiny norms weigh 1

    for g in range(config.num_kv_heads):
        for s in range(groups):
            assert (q[0, groups * g + s] - normed(x[0] @ rows[g, s].T)).abs().max() < 1e-5
        assert (k[0, g] - normed(x[0] @ rows[g, groups].T)).abs().max() < 1e-5
        assert (v[0, g] - x[0] @ rows[g, groups + 1].T).abs().max() < 1e-5


def test_queries_and_keys_are_rotated_before_they_are_normalised(models):
    """Weights per dimension make the order matter."""
    attention = models["instruct"].folder.networks.transformer().layers[0].self_attn.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in attention.parameters():
        parameter.data = torch.rand(parameter.shape, generator=generator)
    x = torch.randn(1, 3, 64, generator=generator)
    angles = torch.rand(3, 16, generator=generator)
    angles[:, 8:] = angles[:, :8]
    rope = (angles.cos(), angles.sin())
    q, _, _ = attention.project(x, rope)
    raw = (x @ attention.qkv_proj.weight.T)[0, :, :16]  # the first slot is query head 0
    norm = attention.query_layernorm
    assert (q[0, 0] - norm(apply_rope(raw, *rope))).abs().max() < 1e-5
    assert (q[0, 0] - apply_rope(norm(raw), *rope)).abs().max() > 1e-2


def test_the_cache_hands_back_everything_up_to_what_was_written_and_overwrites_in_place():
    cache = KVCache(devices=[torch.device("cpu")] * 2, rows=1, kv_heads=1, length=6, head_dim=2, dtype=torch.float32)
    first = torch.ones(1, 1, 6, 2)
    keys, values = cache.write(1, 0, first, 2 * first)
    assert (keys.shape[2], values.shape[2]) == (6, 6)
    keys, values = cache.write(1, 3, 5 * first[:, :, :2], 7 * first[:, :, :2])
    assert keys[0, 0, :, 0].tolist() == [1, 1, 1, 5, 5]
    assert values[0, 0, :, 1].tolist() == [2, 2, 2, 7, 7]
    assert cache.nbytes == 2 * 2 * 6 * 2 * 4
    with pytest.raises(AssertionError, match="beyond"):
        cache.write(0, 5, first[:, :, :2], first[:, :, :2])
