"""What benchmarks/formats.py measures with: its quantiser against the package's, its rotation, its table."""

import pytest
import torch

from benchmarks import formats
from benchmarks.formats import (
    CHOICES,
    GROUPS,
    WEIGHTS,
    Codebook,
    Method,
    PackageMethod,
    hadamard,
    label,
    lloyd,
    make_weight,
    methods,
    nearest,
    relative,
    report,
    rotate,
)
from hunyuan3.ops import quantized

ROWS, COLUMNS = 16, 512


@pytest.fixture(autouse=True)
def few_weights(monkeypatch):
    monkeypatch.setattr(formats, "_LLOYD_WEIGHTS", 2**14)
    lloyd.cache_clear()
    yield
    lloyd.cache_clear()


@pytest.mark.parametrize("kind", WEIGHTS)
def test_own_quantiser_agrees_with_the_package(kind):
    weight = make_weight(kind, 64, 1024, seed=0)
    groups = weight.unflatten(-1, (-1, quantized.GROUP))
    levels = Codebook(quantized._LEVELS, signed=True)
    _, _, own = nearest(groups, levels, CHOICES["searched"], "fp8")
    package = PackageMethod("int4").stored(weight)
    assert relative(own.flatten(-2), weight) == pytest.approx(relative(package, weight), abs=1e-3)


@pytest.mark.parametrize(("codebook", "scheme"), [("int8", "int8"), ("e4m3", "fp8")])
def test_a_scale_per_row_is_the_packages_own_8_bits(codebook, scheme):
    weight = make_weight("gauss", 64, 1024, seed=0)
    own, package = Method(codebook, 0, "largest"), PackageMethod(scheme)
    assert own.bits(1024) == package.bits(1024)
    assert relative(own.stored(weight), weight) == pytest.approx(relative(package.stored(weight), weight), abs=1e-4)


def test_levels_found_here_are_no_worse_than_the_packages():
    weight = make_weight("gauss", 64, 1024, seed=0)
    own, package = Method("lloyd", 16), PackageMethod("int4")
    assert own.bits(1024) == package.bits(1024)
    assert relative(own.stored(weight), weight) < relative(package.stored(weight), weight) + 1e-3


def test_bits_count_scales():
    assert [Method("lloyd", group).bits(4096) for group in (16, 128)] == [4.5 + 1 / 128, 4.0625 + 1 / 128]
    assert Method("nf4", 64, scale="fp16").bits(4096) == 4.25
    assert Method("-7..7", 0).bits(4096) == 4 + 1 / 128


def test_hadamard_is_orthogonal_and_its_own_inverse():
    matrix = hadamard(128)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(128))
    weight = make_weight("cols", ROWS, COLUMNS, seed=0)
    torch.testing.assert_close(rotate(rotate(weight)), weight)
    torch.testing.assert_close(rotate(weight).norm(), weight.norm())


def test_table_has_the_rows_it_promises(capsys):
    listed = [method for _, rows in methods() for method in rows]
    fours = {
        (method.codebook, method.group, method.choice, method.rotated)
        for method in listed
        if isinstance(method, Method)
    }
    for codebook in ("-7..7", "-7..8", "nf4", "lloyd"):
        for group in GROUPS:
            assert {(codebook, group, choice, False) for choice in ("largest", "searched")} <= fours
            assert (codebook, group, "searched", True) in fours
    assert {method for method in listed if isinstance(method, PackageMethod)} == {
        PackageMethod(scheme, rotated) for scheme in quantized.SCHEMES for rotated in (False, True)
    }
    report(ROWS, COLUMNS, seed=0)
    lines = capsys.readouterr().out.splitlines()
    for title, rows in methods():
        first = lines.index(title) + 1
        for line, method in zip(lines[first : first + len(rows)], rows, strict=True):
            assert line.startswith(label(method))
            assert line.count(".") == 1 + 3 * len(WEIGHTS) + ("." in label(method)) * 2
