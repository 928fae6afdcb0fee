import pytest

from hunyuan3.errors import RequestError
from hunyuan3.image.resolution import ResolutionTable
from hunyuan3.types import Grid, ImageSize
from tests.core.golden_paths import component

GOLDEN = component("resolutions")
BASE_1024 = ResolutionTable.build(1024, 37)


@pytest.mark.parametrize("name", sorted(GOLDEN["groups"]))
def test_the_table_is_the_recorded_one(name):
    base, _, rest = name.partition("_")
    table = ResolutionTable.build(int(base), 33 if rest == "without_extra" else 37)
    assert [list(row) for row in table.rows] == GOLDEN["groups"][name]


@pytest.mark.parametrize("base", sorted(GOLDEN["target"]))
def test_pictures_go_to_the_recorded_rows(base):
    table = ResolutionTable.build(int(base), 37)
    rows = GOLDEN["target"][base]
    assert rows
    for row in rows:
        found = table.row(table.nearest(row["h"], row["w"]))
        assert found.ratio == row["ratio_index"], row
        assert [found.size.width, found.size.height] == row["target_wh"], row


def test_size_strings_mean_what_the_reference_makes_of_them():
    compared = 0
    for key, rows in GOLDEN.items():
        if key.startswith("build_gen_image_info_base"):
            table = ResolutionTable.build(int(key.removeprefix("build_gen_image_info_base")), 37)
            for row in rows:
                found = table.parse(row["image_size"])
                assert found.size == (row["image_height"], row["image_width"]), row
                assert found.grid == (row["token_height"], row["token_width"]), row
                assert found.ratio == row["ratio_index"], row
                compared += 1
    assert compared


def test_a_row_found_by_its_own_size_is_that_row():
    for ratio, size in enumerate(BASE_1024.rows):
        assert BASE_1024.nearest(*size) == ratio


def test_x_is_height_first_and_colon_is_width_first():
    assert BASE_1024.parse("1280x768").ratio == 20
    assert BASE_1024.parse("16:9").size == ImageSize(720, 1280)
    assert BASE_1024.parse("3:2").ratio == 13
    assert BASE_1024.parse(" 720 x 1280 ") == BASE_1024.parse([720, 1280]) == BASE_1024.parse((720, 1280))


def test_only_the_aspect_counts_when_snapping():
    assert BASE_1024.parse("512x512") == BASE_1024.parse("4096x4096") == BASE_1024.row(16)


def test_the_first_of_equally_near_rows_wins():
    table = ResolutionTable(64, (ImageSize(64, 32), ImageSize(32, 32), ImageSize(64, 32)))
    assert table.nearest(3, 2) == 0


def test_without_extra_rows_sixteen_to_nine_takes_a_staircase_row():
    table = ResolutionTable.build(1024, 33)
    assert len(table.rows) == 33
    assert table.parse("16:9").size == ImageSize(768, 1280)
    with pytest.raises(RequestError, match=r"aspect ratio 33 .*0\.\.32"):
        table.parse("<img_ratio_33>")


@pytest.mark.parametrize(
    "size", ["auto", "", "1024", "x", "1024x", "-5x5", "1.5:1", "a:b", "<img_ratio_>", "<img_ratio_-1>"]
)
def test_other_strings_are_refused(size):
    with pytest.raises(RequestError, match="none of"):
        BASE_1024.parse(size)


@pytest.mark.parametrize(
    ("size", "side"), [("0x16", "height"), ("16x0", "width"), ("0:16", "width"), ((16, -1), "width")]
)
def test_a_side_below_one_is_named(size, side):
    with pytest.raises(RequestError, match=f"^{side} is"):
        BASE_1024.parse(size)


@pytest.mark.parametrize("size", [(1, 2, 3), (1.5, 2), (True, 2), ("1", "2"), ()])
def test_a_tuple_must_hold_two_whole_numbers(size):
    with pytest.raises(RequestError, match="two whole numbers"):
        BASE_1024.parse(size)


def test_a_free_size_is_kept_and_announced_by_the_nearest_row():
    found = BASE_1024.free(752, 1328)
    assert found.size == ImageSize(752, 1328)
    assert found.grid == Grid(47, 83)
    assert found.ratio == 36
    assert BASE_1024.free(16, 16).ratio == 16


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        (1000, 1024, "height is 1000; .* like 1008"),
        (1024, 1001, "width is 1001; .* like 1008"),
        (1024, 999, "width is 999; .* like 992"),
        (0, 1024, "height is 0; .* like 16"),
        (1024, -64, "width is -64; .* like 16"),
        (7, 16, "height is 7; .* like 16"),
    ],
)
def test_a_free_size_off_the_grid_is_refused_with_the_nearest_allowed_value(height, width, message):
    with pytest.raises(RequestError, match=message):
        BASE_1024.free(height, width)
