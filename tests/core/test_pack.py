"""Packs: the same numbers as the folder they come from, whole after any stop, and refused where something is wrong."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hunyuan3 import pack as packing
from hunyuan3.__main__ import main as command_line
from hunyuan3.checkpoint.index import INDEX_NAME, CheckpointIndex
from hunyuan3.checkpoint.manifest import PACK_NAME, UNFINISHED_NAME
from hunyuan3.checkpoint.shard import ShardWriter, StoredTensor
from hunyuan3.config import ModelConfig
from hunyuan3.error import main as error_main
from hunyuan3.errors import CheckpointError, OutOfBudgetError, RequestError
from hunyuan3.folder import ModelFolder, Networks
from hunyuan3.pack import main, pack, verify
from hunyuan3.pipeline import Hunyuan3
from hunyuan3.quant.policy import FORMATS, storage_of
from tests.core.golden_paths import REPOSITORY

STORED = [name for name in FORMATS if name == storage_of(name)]


def bytes_of(folder):
    """File name -> digest of every file of a folder."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def packs(folders, tmp_path_factory):
    """Format -> pack of the tiny instruct folder. Read only."""
    root = tmp_path_factory.mktemp("packs")
    for name in STORED:
        assert main([str(folders["instruct"]), str(root / name), "--format", name, "--device", "cpu"]) == 0
    return {name: root / name for name in STORED}


@pytest.fixture
def pack_copy(packs, tmp_path):
    return shutil.copytree(packs["int8"], tmp_path / "pack")


# the same numbers


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_pack_loads_what_the_loader_makes_of_the_published_folder(folders, packs, weight_format):
    options = {"device": "cpu", "dtype": "float32", "format": weight_format}
    packed, published = (
        Hunyuan3.open(packs[storage_of(weight_format)], **options),
        Hunyuan3.open(folders["instruct"], **options),
    )
    for part in ("transformer", "vae", "vision"):
        ours = dict(getattr(packed, part)().named_parameters())
        theirs = dict(getattr(published, part)().named_parameters())
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype, name
            assert torch.equal(ours[name], theirs[name]), name


def test_a_pack_draws_and_decodes_the_same_picture(folders, packs):
    drawn = []
    for folder, weight_format in ((packs["int4"], "auto"), (folders["instruct"], "int4")):
        model = Hunyuan3.load(folder, device="cpu", format=weight_format)
        assert model.options.format == "int4"
        drawn.append(model.decode(model.sample(model.conditioning("a fox", width=64, height=64), steps=2).latents))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("weight_format", ["int8", "fp8", "int4"])
def test_a_pack_as_published_is_converted_while_loading(folders, packs, weight_format):
    packed, published = (
        dict(Hunyuan3.open(folder, device="cpu", format=weight_format).transformer().named_parameters())
        for folder in (packs["bf16"], folders["instruct"])
    )
    assert all(torch.equal(packed[name], published[name]) for name in published)


def test_what_is_packed_and_how(folders, packs):
    published = ModelFolder.open(folders["instruct"])
    for name, path in packs.items():
        folder = ModelFolder.open(path)
        assert (folder.stored_format, folder.variant) == (name, "instruct")
        assert folder.config == published.config
        assert folder.system_prompts.texts == published.system_prompts.texts
        assert (path / "tokenizer.json").read_bytes() == (folders["instruct"] / "tokenizer.json").read_bytes()
        stored = CheckpointIndex.from_folder(path)
        layer = {key: info for key, info in stored.tensors.items() if key.startswith("model.layers.1.")}
        assert {info.file.name for info in layer.values()} == {"layer-001.safetensors"}
        experts = layer["model.layers.1.mlp.experts.down_proj.weight"]
        assert experts.shape[0] == folder.config.moe.num_experts
        assert {"bf16": "BF16", "int8": "I8", "fp8": "F8_E4M3", "int4": "U8"}[name] == experts.dtype
        assert folder.index["model.layers.1.mlp.gate.wg.weight"].dtype == "F32", "the router stays as published"
        assert folder.index["model.wte.weight"].dtype == "BF16"


def test_a_pack_of_a_pack_folder_in_safetensors_own_eyes(packs):
    """Every tensor can be read by the library and lies where its item size asks for."""
    for path in packs["int4"].glob("*.safetensors"):
        header = int.from_bytes(path.read_bytes()[:8], "little")
        assert header % 8 == 0
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                assert torch.isfinite(file.get_tensor(name).float()).all(), name


def test_a_writer_places_rows_and_leaves_nothing_after_an_error(tmp_path):
    tensors = [StoredTensor("small", torch.int8, (3,)), StoredTensor("wide", torch.float32, (2, 2))]
    with ShardWriter(tmp_path / "a.safetensors", tensors) as writer:
        writer.write("small", torch.tensor([1, 2, 3], dtype=torch.int8))
        writer.write("wide", torch.tensor([5.0, 6.0]), row=1)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.get_tensor("small").tolist() == [1, 2, 3]
        assert file.get_tensor("wide").tolist() == [[0, 0], [5, 6]]
    assert (tmp_path / "a.safetensors").stat().st_size == writer.nbytes
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path / "b.safetensors", tensors):
        raise ZeroDivisionError
    assert not (tmp_path / "b.safetensors").exists()


# stopped and gone on with


def test_stopped_at_any_write_it_ends_in_the_same_bytes(folders, packs, tmp_path, monkeypatch):
    """Every write of a run is the last one once; the next run goes on from the last whole file."""
    expected = bytes_of(packs["int8"])
    source = ModelFolder.open(folders["instruct"])
    write, seen, cut = ShardWriter.write, 0, 0

    class PowerCutError(BaseException):
        pass

    def write_or_be_cut_off(self, *arguments, **named):
        nonlocal seen
        seen += 1
        write(self, *arguments, **named)
        if seen == cut:
            raise PowerCutError

    monkeypatch.setattr(ShardWriter, "write", write_or_be_cut_off)
    list(pack(source, tmp_path / "whole", "int8"))
    assert bytes_of(tmp_path / "whole") == expected
    total, out = seen, tmp_path / "cut"
    cuts = range(1, total, total // 25)
    for point in cuts:
        seen, cut = 0, point
        with pytest.raises(PowerCutError):
            list(pack(source, out, "int8"))
        with pytest.raises(CheckpointError, match="unfinished pack"):
            ModelFolder.open(out)
        seen, cut = 0, 0
        steps = list(pack(source, out, "int8"))
        assert (seen < total) == any(step.was_there for step in steps), "whole files are not written again"
        assert steps[-1].done == steps[-1].total
        assert bytes_of(out) == expected
        shutil.rmtree(out)
    assert len(cuts) >= 20


def test_killed_at_random_points_it_ends_in_the_same_bytes(wide_folder, tmp_path):
    """A real process, really killed."""
    command = [sys.executable, "-m", "hunyuan3.pack", wide_folder, "--format", "int4", "--device", "cpu"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    whole, out = tmp_path / "whole", tmp_path / "killed"
    started = time.monotonic()
    subprocess.run([*command, whole], cwd=REPOSITORY, env=env, check=True, capture_output=True)
    seconds = time.monotonic() - started
    generator, killed = random.Random(0), 0
    for _ in range(12):
        process = subprocess.Popen([*command, out], cwd=REPOSITORY, env=env, stdout=subprocess.PIPE)
        process.stdout.readline()  # the first file is written, or was there
        time.sleep(generator.uniform(0, seconds / 8))
        process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
        process.communicate()
        killed += process.returncode != 0
        if process.returncode == 0 or killed == 3:
            break
    assert killed, "it was never caught at work: make the folder larger"
    if process.returncode != 0:
        subprocess.run([*command, out], cwd=REPOSITORY, env=env, check=True, capture_output=True)
    assert bytes_of(out) == bytes_of(whole)


@pytest.fixture(scope="module")
def wide_folder(folders, tmp_path_factory):
    """A tiny instruct folder with larger layers: some seconds of work."""
    folder = shutil.copytree(folders["instruct"], tmp_path_factory.mktemp("wide") / "wide")
    for file in (*folder.glob("*.safetensors"), folder / INDEX_NAME):
        file.unlink()
    data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    data |= {"hidden_size": 256, "attention_head_dim": 64, "num_hidden_layers": 6, "num_experts": 32}
    data |= {"moe_intermediate_size": 512, "moe_topk": 2, "num_shared_expert": 1}
    data["vit_aligner"]["n_embed"] = 256
    (folder / "config.json").write_text(json.dumps(data), encoding="utf-8")
    shapes = {name: slot.shape for name, slot in Networks(ModelConfig.from_folder(folder)).all_slots.items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_finished_pack_is_not_written_again(folders, packs, capsys):
    assert main([str(folders["instruct"]), str(packs["int8"]), "--format", "int8"]) == 1
    assert "finished pack" in capsys.readouterr().err


def test_stopped_before_the_last_stroke_it_is_finished(folders, packs, pack_copy):
    """All files and the manifest are there, only the note that it is unfinished is still there, too."""
    source = ModelFolder.open(folders["instruct"])
    journal = json.loads((pack_copy / PACK_NAME).read_text()) | {"source": source.fingerprint}
    (pack_copy / UNFINISHED_NAME).write_text(json.dumps(journal))
    assert all(step.was_there for step in pack(source, pack_copy, "int8"))
    assert bytes_of(pack_copy) == bytes_of(packs["int8"])


def test_a_file_that_was_cut_off_after_it_was_finished_is_written_again(folders, packs, tmp_path):
    source, out = ModelFolder.open(folders["instruct"]), tmp_path / "pack"
    begun = pack(source, out, "int8")
    next(begun)
    next(begun)
    begun.close()
    first = out / "layer-000.safetensors"
    if not first.exists():
        first = next(out.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-7])
    steps = list(pack(source, out, "int8"))
    assert [step.was_there for step in steps].count(True) == 1
    assert bytes_of(out) == bytes_of(packs["int8"])


def test_two_at_once_do_not_write_to_one_folder(folders, packs, tmp_path):
    source, out = ModelFolder.open(folders["instruct"]), tmp_path / "pack"
    first = pack(source, out, "int8")
    next(first)
    (tmp_path / "link").symlink_to(out, target_is_directory=True)
    for same in (out, tmp_path / "link", out / ".." / "pack"):
        with pytest.raises(RequestError, match="Another process is writing"):
            next(pack(source, same, "int8"))
    (tmp_path / "link").unlink()
    list(first)
    assert bytes_of(out) == bytes_of(packs["int8"])
    assert [file.name for file in tmp_path.iterdir()] == ["pack"], "the lock is gone"


def test_into_the_folder_that_one_stands_in(folders, packs, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    list(pack(ModelFolder.open(folders["instruct"]), Path(), "int8"))
    assert bytes_of(tmp_path / "here") == bytes_of(packs["int8"])


def test_stopped_while_noting_it_for_the_first_time_it_goes_on(folders, packs, tmp_path):
    out = tmp_path / "pack"
    out.mkdir()
    (out / f"{UNFINISHED_NAME}.partial").write_text("{")
    list(pack(ModelFolder.open(folders["instruct"]), out, "int8"))
    assert bytes_of(out) == bytes_of(packs["int8"])


@pytest.mark.parametrize("weight_format", STORED)
def test_the_command_line_draws_from_a_pack(packs, tmp_path, weight_format, capsys):
    picture = tmp_path / "fox.png"
    arguments = ["draw", "--model", str(packs[weight_format]), "--prompt", "a fox", "-o", str(picture)]
    assert command_line([*arguments, "--width", "64", "--height", "64", "--steps", "1", "--device", "cpu"]) in (0, None)
    assert picture.stat().st_size > 100


# refused


def test_a_full_disk_is_noticed_first(folders, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(OutOfBudgetError, match=r"needs 0\.1 GB more .* has 0\.0 GB free"):
        list(pack(ModelFolder.open(folders["instruct"]), tmp_path / "out", "int8"))
    assert not list((tmp_path / "out").iterdir())


def test_the_disk_is_asked_only_for_what_is_missing(folders, packs, tmp_path, monkeypatch):
    """Finished files are there already; a partial one is mostly holes."""
    source, out = ModelFolder.open(folders["instruct"]), tmp_path / "pack"
    begun = pack(source, out, "int8")
    step = next(begun)
    begun.close()
    missing = step.total - step.done + packing._SPARE
    usage = namedtuple("usage", "total used free")
    with (out / "layer-002.safetensors.partial").open("wb") as file:
        file.truncate(10 * missing)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(0, 0, missing - 1000))
    with pytest.raises(OutOfBudgetError):
        list(pack(source, out, "int8"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(0, 0, missing))
    list(pack(source, out, "int8"))
    assert bytes_of(out) == bytes_of(packs["int8"])


def test_where_a_pack_may_not_go(folders, packs, tmp_path):
    source = ModelFolder.open(folders["instruct"])
    with pytest.raises(RequestError, match="source folder or lies in it"):
        next(pack(source, folders["instruct"] / "inside", "int8"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    with pytest.raises(RequestError, match="not empty"):
        next(pack(source, tmp_path / "full", "int8"))
    with pytest.raises(RequestError, match="is a file"):
        next(pack(source, tmp_path / "full" / "mine.txt", "int8"))
    with pytest.raises(RequestError, match="pack itself"):
        next(pack(ModelFolder.open(packs["int8"]), tmp_path / "again", "int4"))
    begun = pack(source, tmp_path / "begun", "int8")
    next(begun)
    begun.close()
    with pytest.raises(RequestError, match="unfinished pack of int8"):
        next(pack(source, tmp_path / "begun", "int4"))


def test_another_format_than_the_packs_is_refused(packs):
    for weight_format in ("bf16", "fp8", "int4"):
        with pytest.raises(RequestError, match=r"pack of 'int8'\. Choose 'auto'"):
            Hunyuan3.open(packs["int8"], device="cpu", format=weight_format)
    assert Hunyuan3.open(packs["int8"], device="cpu", format="int8_dynamic").options.format == "int8_dynamic"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99"),
        ({"format": "int3"}, "format 'int3'"),
        ({"format": "fp8"}, "in a format that is not read"),
        ({"files": {"a": {}}}, "damaged"),
        ({"format": "bf16"}, "unexpected"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(pack_copy, edit_json, change, message):
    edit_json(pack_copy / PACK_NAME, **change)
    with pytest.raises(CheckpointError, match=message):
        ModelFolder.open(pack_copy)


def test_checksums_find_a_changed_byte_and_a_lost_file(pack_copy, capsys):
    assert main(["--verify", str(pack_copy)]) == 0
    layer = pack_copy / "layer-001.safetensors"
    data = bytearray(layer.read_bytes())
    data[-5] ^= 1
    layer.write_bytes(data)
    (pack_copy / "vae.safetensors").unlink()
    assert dict(verify(pack_copy)) == {
        name: name not in ("layer-001.safetensors", "vae.safetensors")
        for name in (file.name for file in (*pack_copy.glob("*.safetensors"), pack_copy / "vae.safetensors"))
    }
    assert main(["--verify", str(pack_copy)]) == 1
    assert "2 files" in capsys.readouterr().err


def test_tools_that_want_the_published_folder_say_so(folders, packs, capsys):
    assert error_main([str(packs["int8"])]) == 1
    assert "is a pack" in capsys.readouterr().err
    assert main(["--verify", str(folders["instruct"])]) == 1
    assert "not a pack" in capsys.readouterr().err
    assert main([str(folders["instruct"])]) == 1
    assert "Say where" in capsys.readouterr().err


def test_no_python_of_the_source_is_taken_over_but_the_prompts(copied, tmp_path):
    folder = copied()
    (folder / "modeling.py").write_text("raise SystemExit('executed')")
    (folder / "old.bin").write_bytes(b"weights")
    list(pack(ModelFolder.open(folder), tmp_path / "out", "int8"))
    assert [file.name for file in (tmp_path / "out").glob("*.py")] == ["system_prompt.py"]
    assert not (tmp_path / "out" / "old.bin").exists()
    assert packing._SMALL > 1e6
