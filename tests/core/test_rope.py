import itertools
import math

import pytest
import torch

from hunyuan3.ops.rope import apply_rope, rope_positions, rope_table
from hunyuan3.types import Grid, Span


def slow_positions(length, pictures):
    """Spec 6.3, token by token."""
    where = [(i, i) for i in range(length)]
    for (first, _), (height, width) in pictures:
        for row, column in itertools.product(range(height), range(width)):
            y = math.trunc(first + (width * height - height) / 2) + row
            x = math.trunc(first + (width * height - width) / 2) + column
            where[first + row * width + column] = (y, x)
    return where


def as_grids(pictures):
    return [(Span(*span), Grid(*grid)) for span, grid in pictures]


def test_the_published_check_value():
    """L = 10, 2 x 3: y in {12, 13}, x in {11, 12, 13} (spec 6.3)."""
    positions = rope_positions(20, [(Span(10, 16), Grid(2, 3))])
    assert positions[10:16].tolist() == [[12, 11], [12, 12], [12, 13], [13, 11], [13, 12], [13, 13]]
    assert positions[:10].tolist() == [[i, i] for i in range(10)]
    assert positions[16:].tolist() == [[i, i] for i in range(16, 20)]


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (4, 1), (2, 3), (3, 2), (3, 5), (4, 4), (25, 39), (45, 80), (5, 2)])
@pytest.mark.parametrize("first", [0, 1, 10, 37])
def test_pictures_are_centred_on_the_indices_they_occupy_halves_truncated(grid, first):
    area = grid[0] * grid[1]
    pictures = [((first, first + area), grid)]
    length = first + area + 3
    assert rope_positions(length, as_grids(pictures)).tolist() == [list(p) for p in slow_positions(length, pictures)]


def test_padding_of_a_vision_run_and_text_between_pictures_count_along_the_sequence():
    pictures = [((3, 20), (3, 5)), ((22, 34), (2, 6)), ((40, 60), (4, 5))]  # the first run is two tokens longer
    expected = [list(p) for p in slow_positions(64, pictures)]
    assert rope_positions(64, as_grids(pictures)).tolist() == expected
    assert expected[18:20] == [[18, 18], [19, 19]]


def test_the_table_is_cosine_and_sine_of_coordinate_times_frequency():
    """Even frequencies turn with y, odd ones with x; the halves are tiled, not interleaved."""
    head_dim, theta = 128, 10000.0
    positions = torch.tensor([[0, 0], [7, 7], [3, 1250], [22799, 5]])
    cos, sin = rope_table(positions, head_dim, theta)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (4, head_dim)
    for row, (y, x) in enumerate(positions.tolist()):
        for i in range(head_dim):
            k = i % (head_dim // 2)
            angle = (x if k % 2 else y) * theta ** (-2 * k / head_dim)
            tolerance = 1e-6 + 2e-7 * abs(angle)  # the angle itself is float32
            assert abs(cos[row, i].item() - math.cos(angle)) < tolerance
            assert abs(sin[row, i].item() - math.sin(angle)) < tolerance


def test_rotation_turns_pairs_half_a_head_apart():
    x = torch.tensor([[1.0, 0.0, 0.0, 2.0]])  # pairs (1, 0) and (0, 2)
    quarter = torch.full((1, 4), math.pi / 2)
    assert torch.allclose(apply_rope(x, quarter.cos(), quarter.sin()), torch.tensor([[0.0, -2.0, 1.0, 0.0]]), atol=1e-6)


def test_scores_depend_on_distance_only_on_either_axis():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 32, generator=generator)

    def score(at, other):
        tables = [rope_table(torch.tensor([position]), 32, 10000.0) for position in (at, other)]
        return (apply_rope(q, *tables[0]) * apply_rope(k, *tables[1])).sum().item()

    near = score((5, 3), (2, 9))
    assert abs(score((105, 43), (102, 49)) - near) < 1e-3
    assert abs(score((5, 3), (3, 9)) - near) > 1e-2, "one step in y must matter"
    assert abs(score((5, 3), (2, 8)) - near) > 1e-2, "one step in x must matter"
    assert abs(score((3, 5), (9, 2)) - near) > 1e-2, "the axes must not be interchangeable"


def test_rotation_of_bfloat16_is_float32():
    table = rope_table(torch.tensor([[3, 4]]), 8, 10000.0)
    assert apply_rope(torch.ones(1, 8, dtype=torch.bfloat16), *table).dtype == torch.float32
