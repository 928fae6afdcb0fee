"""Page-locking: counted, limited, undone before memory is freed. CUDA's two functions are stood in for."""

import gc

import pytest
import torch

from hunyuan3.pipeline import Hunyuan3
from hunyuan3.placement.page_lock import PageLock
from hunyuan3.placement.placed import PlacedModule


class Runtime:
    """CUDA's register and unregister, as bookkeeping. fails_at: the call that finds no memory to lock."""

    def __init__(self, fails_at=0):
        self.locked, self.calls, self.fails_at = {}, 0, fails_at

    def register(self, address, nbytes):
        self.calls += 1
        if self.calls == self.fails_at:
            return 2
        assert address not in self.locked, "locked twice"
        self.locked[address] = nbytes
        return 0

    def unregister(self, address):
        del self.locked[address]
        return 0


def lock_of(runtime, limit=None):
    return PageLock(limit, runtime.register, runtime.unregister)


def test_what_is_locked_is_counted_and_unlocked_by_name():
    runtime = Runtime()
    lock = lock_of(runtime)
    one, two = torch.zeros(100), torch.zeros(7, dtype=torch.int8)
    lock.lock("a", [one, two])
    lock.lock("b", [torch.zeros(10)])
    assert lock.nbytes == 400 + 7 + 40 == sum(runtime.locked.values())
    assert one.data_ptr() in runtime.locked
    lock.unlock("a")
    lock.unlock("unknown")
    assert lock.nbytes == 40 == sum(runtime.locked.values())


def test_the_limit_and_a_refusal_leave_the_rest_as_it_is(caplog):
    runtime = Runtime()
    lock = lock_of(runtime, limit=500)
    lock.lock("a", [torch.zeros(100), torch.zeros(100), torch.zeros(10)])
    assert lock.nbytes == 400
    runtime = Runtime(fails_at=2)
    lock = lock_of(runtime)
    lock.lock("a", [torch.zeros(100), torch.zeros(100)])
    lock.lock("b", [torch.zeros(100)])
    assert lock.nbytes == 400
    assert runtime.calls == 2, "not tried again and again"
    assert "Page-locking host memory failed (CUDA error 2)" in caplog.text


def test_everything_is_unlocked_when_the_owner_dies():
    runtime = Runtime()
    lock = lock_of(runtime)
    lock.lock("a", [torch.zeros(100)])
    del lock
    gc.collect()
    assert not runtime.locked


@pytest.fixture
def streamed(folders):
    """(placed transformer on the stand-in card, its runtime)."""
    runtime, device = Runtime(), torch.device("cpu", 0)
    made = Hunyuan3.open(folders["instruct"], device=device, dtype="float32", streaming=3).placed_transformer
    return PlacedModule(made.name, made.module, made.units, device, made._read, made.streams, lock_of(runtime)), runtime


def test_only_what_streams_from_host_memory_is_locked(streamed):
    placed, runtime = streamed
    half = sum(unit.nbytes for unit in placed.units if unit.streams) // 2
    placed.load(room=placed.required_bytes + half)
    assert 0 < placed.host_bytes == sum(runtime.locked.values())
    placed.load(room=10**9)
    assert placed.host_bytes == 0
    assert not runtime.locked
    placed.shrink(half)
    assert 0 < placed.host_bytes == sum(runtime.locked.values())
    addresses = {parameter.data_ptr() for parameter in placed.module.parameters()}
    assert set(runtime.locked) <= addresses, "the very memory that is copied from"
    placed.unload(None, lambda _nbytes: True)  # layers that do not stream wait in ordinary memory
    assert sum(unit.nbytes for unit in placed.units if unit.streams) == sum(runtime.locked.values())
    placed.drop()
    assert not runtime.locked


def test_no_lock_where_there_is_no_cuda_card():
    assert PageLock.for_devices([torch.device("cpu")], None) is None
