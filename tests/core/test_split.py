"""Layers on two devices: to the bit what one device gives, and every tensor where its work is done.

`cpu:0` and `cpu:1` stand in for two cards: other devices to everything that compares devices, and tensors on them
compute. Such a tensor forgets its number, though, so nothing fails that mixes the two. `Devices` remembers where each
tensor was made or moved to, and refuses an operation on tensors of both, as real cards do.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from hunyuan3.errors import RequestError
from hunyuan3.folder import ModelFolder
from hunyuan3.generate.sampling import SamplingOptions
from hunyuan3.generate.taylor import TaylorOptions
from hunyuan3.pack import pack
from hunyuan3.parts import LoadOptions
from hunyuan3.pipeline import Hunyuan3
from hunyuan3.placement.split import LayerSplit, SplitRequest
from hunyuan3.quant.policy import FORMATS
from hunyuan3.writing import TextRequest, answering, thinking

FIRST, SECOND = torch.device("cpu", 0), torch.device("cpu", 1)
LAYERS = 3
HOT = SamplingOptions(temperature=3.0)  # or the tiny models end at once


class Devices(TorchDispatchMode):
    """Knows which tensors are on `FIRST` and which on `SECOND`, and refuses to mix them.

    What is made on a device without a number (the host, or "where that tensor is") belongs to the first it is used on.
    """

    COPIES = ("_to_copy", "copy_")

    def __init__(self):
        super().__init__()
        self.home = WeakIdKeyDictionary()  # storage -> device
        self.crossings = 0
        self.operations = {FIRST: 0, SECOND: 0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        homes = {self.home.get(tensor.untyped_storage()) for tensor in given if tensor.ndim} - {None}
        name, asked = function.overloadpacket.__name__, kwargs.get("device")
        result = function(*args, **kwargs)
        if name in self.COPIES:
            here = self.home.get(args[0].untyped_storage()) if name == "copy_" else asked or next(iter(homes), None)
            self.crossings += bool(homes - {here})
        elif len(homes) > 1:
            raise RuntimeError(f"{function} of tensors on two devices")
        else:
            here = next(iter(homes), asked)
            for tensor in given:
                self._settle(tensor, here)
        if given and here in self.operations:
            self.operations[here] += 1
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor):
                self._settle(made, here)
        return result

    def _settle(self, tensor, device):
        if device in (FIRST, SECOND):
            self.home.setdefault(tensor.untyped_storage(), device)


def split_after(layers):
    return LayerSplit(((FIRST, layers), (SECOND, LAYERS - layers)))


def latents(model, seed=1, steps=3, **settings):
    conditioning = model.conditioning("a red fox", width=64, height=64)
    return model.sample(conditioning, seed=seed, steps=steps, **settings).latents


def think(folder):
    return thinking(folder, "think_recaption", need_ratio=True)


def written(model, plan=answering, seed=1):
    request = TextRequest("what is it?")
    run = model.write(request, plan(model.folder), sampling=HOT, seed=seed, max_new_tokens=24)
    list(run)
    return run


def streamed(folder, share, split, slots=3):
    """A model of which this share of the experts is on each device."""
    options = {"split": split, "dtype": "float32", "streaming": slots}
    placed = Hunyuan3.open(folder, **options).placed_transformer

    def room(device):
        required = placed.required_on(device)
        return required + placed.full_ring_on(device) + int(share * (placed.total_on(device) - required))

    return Hunyuan3.open(folder, vram={device: room(device) for device in placed.devices}, **options)


@pytest.fixture(scope="module")
def whole(folders):
    return Hunyuan3.load(folders["instruct"], device="cpu", dtype="float32")


# the same numbers, each on its device


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"seed": 2, "batch_size": 2},
        {"one_branch_at_a_time": True},
        {"guidance": 1.0},
        {"steps": 6, "taylor": TaylorOptions(interval=2)},
    ],
    ids=str,
)
def test_a_split_drawing_is_the_whole_one(folders, whole, layers, settings):
    with Devices() as devices:
        model = Hunyuan3.load(folders["instruct"], dtype="float32", split=split_after(layers))
        drawn = latents(model, **settings)
    assert torch.equal(drawn, latents(whole, **settings))
    assert min(devices.operations.values()) > 100, "both devices worked"


def test_the_stream_crosses_each_border_once_and_comes_home(folders):
    model = Hunyuan3.load(folders["instruct"], dtype="float32", split=split_after(1))
    with Devices() as devices:
        model = Hunyuan3.load(folders["instruct"], dtype="float32", split=split_after(1))
        latents(model)
    passes = 4  # the prompt, and three steps
    assert devices.crossings == passes * 4, "the stream and two rotary tables there, the stream back"


def test_layers_that_are_not_where_the_stream_is_are_noticed(folders):
    """That the tests above can fail."""
    with Devices(), pytest.raises(RuntimeError, match="two devices"):
        model = Hunyuan3.load(folders["instruct"], dtype="float32", split=split_after(1))
        model.transformer().layer_devices = (FIRST,) * LAYERS
        latents(model)


@pytest.mark.parametrize("plan", [answering, think])
def test_a_split_text_is_the_whole_one(folders, whole, plan):
    with Devices():
        model = Hunyuan3.load(folders["instruct"], dtype="float32", split=split_after(2))
        run = written(model, plan)
    assert run.ids == written(whole, plan).ids and len(run.ids) > 10


def test_a_drawing_goes_on_from_what_was_thought_on_two_devices(folders):
    def drawn(**options):
        model = Hunyuan3.load(folders["instruct"], dtype="float32", **options)
        run = written(model, think)
        conditioning = model.conditioning("what is it?", width=64, height=64, trace=run.trace)
        return model.sample(conditioning, seed=1, steps=2).latents, model.prefixes

    expected, _ = drawn(device="cpu")
    with Devices():
        actual, kept = drawn(split=split_after(1))
    assert torch.equal(actual, expected) and kept.nbytes


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_can_be_split_from_the_folder_and_from_a_pack(folders, tmp_path, name):
    expected = latents(Hunyuan3.load(folders["instruct"], device="cpu", dtype="float32", format=name))
    shared = name == "int4"  # its tables are kept per device, by a name that the stand-ins share
    with contextlib.nullcontext() if shared else Devices():
        model = Hunyuan3.load(folders["instruct"], dtype="float32", format=name, split=split_after(1))
        assert torch.equal(latents(model), expected)
    if not name.endswith("_dynamic"):
        list(pack(ModelFolder.open(folders["instruct"]), tmp_path / "packed", name))
        model = Hunyuan3.load(tmp_path / "packed", dtype="float32", split=split_after(1))
        assert torch.equal(latents(model), expected)


def test_bfloat16_and_the_distilled_model(folders):
    for variant in ("base", "distil"):
        expected = latents(Hunyuan3.load(folders[variant], device="cpu", dtype="bfloat16"))
        with Devices():
            model = Hunyuan3.load(folders[variant], dtype="bfloat16", split=split_after(2))
            assert torch.equal(latents(model), expected)


# split and streamed


@pytest.mark.parametrize("share", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("slots", [2, 5])
@pytest.mark.parametrize("layers", [1, 2])
def test_each_device_streams_its_own_experts(folders, whole, share, slots, layers):
    with Devices():
        model = streamed(folders["instruct"], share, split_after(layers), slots)
        assert torch.equal(latents(model), latents(whole))
        assert written(model).ids == written(whole).ids
        assert torch.equal(latents(model, seed=5), latents(whole, seed=5))
    streams = model.placed_transformer.streams
    assert streams.copied and set(streams.rings) == {FIRST, SECOND}
    for ring in streams.rings.values():
        assert ring.num_free + len(ring._under_way) == ring.count and not ring._taken
    resident = [sum(layer.mlp.experts.resident) for layer in model.transformer().layers]
    assert len(set(resident[:layers])) == len(set(resident[layers:])) == 1, "the same share in a device's layers"


class HaltError(Exception):
    pass


@pytest.mark.parametrize("at", range(1, 14))
def test_a_stop_anywhere_leaves_everything_usable(folders, whole, at):
    model = streamed(folders["instruct"], 0.3, split_after(1))
    model.transformer()
    calls = iter(range(1, 100))

    def check():
        if next(calls) == at:
            raise HaltError

    conditioning = model.conditioning("a red fox", width=64, height=64)
    with pytest.raises(HaltError):
        list(model.sample(conditioning, seed=1, steps=3, check_cancelled=check))
    assert torch.equal(latents(model), latents(whole))


# where the weights are


def test_weights_come_and_go_by_device(folders, whole):
    model = Hunyuan3.open(folders["instruct"], dtype="float32", split=split_after(1))
    placed = model.placed_transformer
    assert placed.devices == (FIRST, SECOND)
    assert placed.total_on(FIRST) + placed.total_on(SECOND) == placed.total_bytes
    assert placed.total_on(SECOND) > placed.total_on(FIRST) / 3
    model.transformer()
    assert placed.loaded_on(SECOND) == placed.total_on(SECOND)
    assert placed.unload(device=FIRST) == placed.total_on(FIRST)
    assert (placed.loaded_on(FIRST), placed.loaded_on(SECOND)) == (0, placed.total_on(SECOND)) and not placed.is_ready
    assert placed.unload(host_has_room=lambda _nbytes: True) == placed.total_on(SECOND)
    assert placed.loaded_bytes == 0 and placed.host_bytes == placed.total_on(SECOND)
    assert torch.equal(latents(model), latents(whole)), "what is missing is read again, the rest brought back"
    model.release()
    assert placed.loaded_bytes == placed.host_bytes == 0


def test_rings_of_both_devices_are_released(folders):
    model = streamed(folders["instruct"], 0.3, split_after(1))
    latents(model)
    placed = model.placed_transformer
    assert [placed.ring_on(device) == placed.full_ring_on(device) > 0 for device in placed.devices] == [True, True]
    shrunk = placed.shrink(1, device=SECOND)
    assert shrunk and placed.is_ready and placed.loaded_on(FIRST) > placed.required_on(FIRST)
    placed.unload()
    assert [placed.ring_on(device) for device in placed.devices] == [0, 0]


def test_the_room_of_each_device_is_kept_apart(folders, whole):
    model = Hunyuan3.open(folders["instruct"], dtype="float32", split=split_after(1), streaming=2)
    placed = model.placed_transformer
    room = {FIRST: placed.required_on(FIRST), SECOND: placed.total_on(SECOND)}
    placed.load(room=room)
    assert placed.loaded_on(FIRST) == placed.required_on(FIRST)
    assert placed.loaded_on(SECOND) == placed.total_on(SECOND)
    assert torch.equal(latents(model), latents(whole))


# how it is asked for


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        ("auto", SplitRequest()),
        (" ", SplitRequest()),
        ("0,1", SplitRequest((torch.device("cuda:0"), torch.device("cuda:1")))),
        ("1", SplitRequest((torch.device("cuda:1"),))),
        ("0:20, 1:12", SplitRequest((torch.device("cuda:0"), torch.device("cuda:1")), layers=(20, 12))),
        (
            "0:22GiB,1:1.5gb",
            SplitRequest((torch.device("cuda:0"), torch.device("cuda:1")), nbytes=(22 * 2**30, 15 * 10**8)),
        ),
        ("cpu:0:1,cpu:1:2", SplitRequest((FIRST, SECOND), layers=(1, 2))),
        ("cpu:0,cpu:1", SplitRequest((FIRST, SECOND))),
    ],
)
def test_the_ways_to_ask(text, request_):
    assert SplitRequest.parse(text, "cuda") == request_


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("0,", "''"),
        ("0;1", "0;1"),
        ("0:20,1", "same kind of number"),
        ("0:20,1:12GiB", "same kind of number"),
        ("0:0,1:32", "0 is not a number of layers"),
        ("0:1.5,1:30", "1.5 is not a number of layers"),
        ("0:1.2.3GiB,1:1GiB", "1.2.3 is not a number"),
        ("0:0GiB,1:1GiB", "some memory"),
        ("0,0", "twice"),
        ("nonsense:0,1", "nonsense:0"),
        ("-1", "-1"),
        ("256", "no device 256"),
        ("0,cpu:128", "no device cpu:128"),
        (f"0:{'9' * 400}GiB", "not a number"),
    ],
)
def test_what_is_not_understood_is_said(text, told):
    with pytest.raises(RequestError) as error:
        SplitRequest.parse(text, "cuda")
    assert told in str(error.value) and "gpu_split" in str(error.value)


def test_a_split_must_fit_the_model(folders):
    with pytest.raises(RequestError, match=r"4 layers .*has 3"):
        Hunyuan3.open(folders["instruct"], split=LayerSplit(((FIRST, 2), (SECOND, 2))))
    with pytest.raises(RequestError, match="at least one layer"):
        LayerSplit(((FIRST, 3), (SECOND, 0)))
    with pytest.raises(RequestError, match="each once"):
        LayerSplit(((FIRST, 3), (FIRST, 1)))
    with pytest.raises(RequestError, match="begins on cpu:0"):
        LoadOptions(device="cpu", split=split_after(1)).resolved()
    with pytest.raises(RequestError, match=r"cuda:7.*does not work here"):
        LoadOptions(split=LayerSplit(((FIRST, 1), (torch.device("cuda:7"), 2)))).resolved()
