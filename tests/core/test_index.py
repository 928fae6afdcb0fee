import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from hunyuan3.checkpoint.index import INDEX_NAME, SINGLE_NAME, CheckpointIndex
from hunyuan3.errors import CheckpointError

ONE, TWO = "model-0001-of-0002.safetensors", "model-0002-of-0002.safetensors"


@pytest.fixture
def folder(tmp_path):
    """Two shards of three tensors, with an index."""
    save_file({"a": torch.zeros(2, 3, dtype=torch.bfloat16), "b": torch.ones(4)}, tmp_path / ONE)
    save_file({"c": torch.zeros(5)}, tmp_path / TWO)
    write_index(tmp_path, {"a": ONE, "b": ONE, "c": TWO})
    return tmp_path


def write_index(folder, weight_map):
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def refused(folder):
    with pytest.raises(CheckpointError) as error:
        CheckpointIndex.from_folder(folder)
    return str(error.value)


def test_every_tensor_is_found_with_its_file_shape_and_dtype(folder):
    index = CheckpointIndex.from_folder(folder)
    assert set(index) == {"a", "b", "c"}
    assert len(index) == 3
    assert (index["a"].file, index["a"].shape, index["a"].dtype) == (folder / ONE, (2, 3), "BF16")
    assert (index["c"].file, index["c"].shape, index["c"].dtype) == (folder / TWO, (5,), "F32")
    assert "d" not in index


def test_tensors_are_grouped_by_file_so_that_each_is_opened_once(folder):
    groups = CheckpointIndex.from_folder(folder).by_file(["c", "a", "b"])
    assert list(groups.items()) == [(folder / ONE, ["a", "b"]), (folder / TWO, ["c"])]


def test_a_single_file_without_an_index_will_do(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / SINGLE_NAME)
    assert set(CheckpointIndex.from_folder(tmp_path)) == {"a"}


def test_a_folder_without_weights_says_what_it_looked_for(tmp_path):
    message = refused(tmp_path)
    assert INDEX_NAME in message
    assert SINGLE_NAME in message


def test_a_missing_shard_is_named(folder):
    (folder / TWO).unlink()
    assert f"{folder / TWO} is missing" in refused(folder)


def test_a_dangling_link_is_named_as_one(folder):
    (folder / TWO).unlink()
    (folder / TWO).symlink_to(folder / "blobs" / "0123abcd")
    message = refused(folder)
    assert str(folder / TWO) in message
    assert "link to a file that does not exist" in message


def test_a_hub_cache_of_links_is_read_like_files(folder, tmp_path):
    """snapshots/<hash>/file -> ../../blobs/<sha>, the index itself included."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0a1b.2c"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, name in enumerate((ONE, TWO, INDEX_NAME)):
        (folder / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    assert set(CheckpointIndex.from_folder(snapshot)) == {"a", "b", "c"}


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 20, -1])
def test_a_download_that_was_cut_off_is_named(folder, keep):
    content = (folder / ONE).read_bytes()
    (folder / ONE).write_bytes(content[:keep])
    message = refused(folder)
    assert str(folder / ONE) in message
    assert "Download" in message


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(struct.pack("<Q", 2**63) + b"{}", id="header of 2**63 bytes"),
        pytest.param(struct.pack("<Q", 2**40) + b"{}", id="header of a terabyte"),
        pytest.param(struct.pack("<Q", 2**64 - 1), id="header of 2**64 - 1 bytes"),
        pytest.param(struct.pack("<Q", 2) + b"[]", id="header is a list"),
        pytest.param(struct.pack("<Q", 9) + b"not JSON!", id="header is no JSON"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", id="a git-lfs pointer"),
        pytest.param(b"<!DOCTYPE html><html>not found</html>", id="a web page"),
        pytest.param(b"PK\x03\x04" + bytes(100), id="a pickle archive"),
        pytest.param(b"", id="empty"),
    ],
)
def test_what_is_no_safetensors_file_is_refused_without_being_read(folder, content):
    (folder / TWO).write_bytes(content)
    message = refused(folder)
    assert str(folder / TWO) in message
    assert "damaged or not a safetensors file" in message


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
        {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
    ],
)
def test_a_header_that_points_outside_its_file_is_refused(folder, entry):
    header = json.dumps({"c": entry}).encode()
    (folder / TWO).write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    assert str(folder / TWO) in refused(folder)


def test_a_shard_that_is_a_folder_is_refused(folder):
    (folder / TWO).unlink()
    (folder / TWO).mkdir()
    assert str(folder / TWO) in refused(folder)


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "."])
def test_an_index_that_points_out_of_its_folder_is_refused(folder, shard):
    (folder / "sub").mkdir()
    for place in (folder.parent / "other.safetensors", folder / "sub" / "model.safetensors"):
        save_file({"c": torch.zeros(5)}, place)  # so that it would load if it were let through
    write_index(folder, {"a": ONE, "b": ONE, "c": shard})
    message = refused(folder)
    assert repr(shard) in message or "damaged" in message
    assert str(folder) in message


def test_a_tensor_that_is_not_in_its_shard_is_named(folder):
    write_index(folder, {"a": ONE, "b": ONE, "c": TWO, "d": TWO})
    message = refused(folder)
    assert "1 tensors" in message
    assert f"d (expected in {TWO})" in message


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "[]", "{", ""])
def test_an_index_without_a_usable_map_is_named(folder, content):
    (folder / INDEX_NAME).write_text(content, encoding="utf-8")
    assert INDEX_NAME in refused(folder)
