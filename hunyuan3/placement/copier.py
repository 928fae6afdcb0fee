"""How an expert gets into a slot on the device, from host memory or from its files: directly, in a thread, or on a CUDA
stream.
"""

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import nn


class RingSlot:
    """Room for one expert on the device: `bank`, of one expert, with its own storage."""

    def __init__(self, bank: nn.Module) -> None:
        self.bank = bank

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.bank.parameters())


class Copier(Protocol):
    """How an expert gets into a slot. Calls come from one thread.

    ahead: whether copies run beside the compute, so that it pays to begin them early.
    """

    ahead: bool

    def start(self, source: nn.Module, slot: RingSlot) -> None:
        """Begins to copy, once what was computed with the slot's former content is done."""

    def wait(self, slot: RingSlot) -> None:
        """What is computed from here on sees the slot's new content. Raises what the copy raised."""

    def used(self, slot: RingSlot) -> None:
        """What was computed with the slot has been asked for: it may be overwritten when that is done."""

    def drain(self, slot: RingSlot) -> None:
        """Returns when no copy into the slot is under way."""

    def forget(self, slot: RingSlot) -> None:
        """Nobody will wait for the slot's content; a copy that is begun into it later comes after this one."""

    def exchange(self, slot: RingSlot, resident: nn.Module, away: nn.Module) -> None:
        """The slot holds the expert of `away`: `resident` gets it, and `away` what `resident` held. See `exchange`."""


class DirectCopier:
    """Copies when the content is waited for: nothing overlaps."""

    ahead = False

    def __init__(self, copy: "CopyExpert | None" = None) -> None:
        self._copy = copy or copy_expert
        self._sources: dict[int, nn.Module] = {}

    def start(self, source: nn.Module, slot: RingSlot) -> None:
        self._sources[id(slot)] = source

    def wait(self, slot: RingSlot) -> None:
        self._copy(self._sources.pop(id(slot)), slot.bank)

    def used(self, slot: RingSlot) -> None:
        pass

    def drain(self, slot: RingSlot) -> None:
        self._sources.pop(id(slot), None)

    def forget(self, slot: RingSlot) -> None:
        self.drain(slot)

    def exchange(self, slot: RingSlot, resident: nn.Module, away: nn.Module) -> None:
        exchange(slot, resident, away)


class ThreadCopier:
    """Copies in a thread of its own while the caller computes: for devices that compute in host memory.

    copy: what copies an expert into a slot's bank.
    """

    ahead = True

    def __init__(self, copy: "CopyExpert | None" = None) -> None:
        self._copy = copy or copy_expert
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hunyuan3-stream")
        self._jobs: dict[int, Future[None]] = {}

    def start(self, source: nn.Module, slot: RingSlot) -> None:
        self._jobs[id(slot)] = self._pool.submit(self._copy, source, slot.bank)

    def wait(self, slot: RingSlot) -> None:
        self._jobs.pop(id(slot)).result()

    def used(self, slot: RingSlot) -> None:
        pass  # a CPU computes when it is asked

    def drain(self, slot: RingSlot) -> None:
        job = self._jobs.pop(id(slot), None)
        if job is not None and not job.cancel():
            job.exception()

    def forget(self, slot: RingSlot) -> None:
        job = self._jobs.get(id(slot))
        if job is not None:
            job.cancel()  # one that runs goes on, and the thread does one after the other

    def exchange(self, slot: RingSlot, resident: nn.Module, away: nn.Module) -> None:
        exchange(slot, resident, away, self._copy)


class StreamCopier:
    """Copies on a CUDA stream of its own, beside the stream that computes; the host never waits.

    What is in no memory is read by a thread into page-locked memory first, and the host waits for that.

    Exchanges go on the stream that computes: behind what was computed with both experts, and before whatever moves
    them. They write over the link while the ring reads from it.
    """

    ahead = True

    def __init__(self, device: torch.device, copy: "CopyExpert | None" = None) -> None:
        """`copy`: reads an expert from its files."""
        self._stream = torch.cuda.Stream(device)
        self._device = device
        self._copy = copy
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hunyuan3-read-ahead")
        self._reads: dict[int, Future[nn.Module]] = {}
        self._forgotten: dict[int, Future[nn.Module]] = {}
        self._staging: dict[int, nn.Module] = {}  # by slot, page-locked
        self._sent: dict[int, torch.cuda.Event] = {}  # by slot, what was in its page-locked memory
        self._arrived: dict[int, torch.cuda.Event] = {}
        self._done: dict[int, torch.cuda.Event] = {}
        self._written: dict[int, torch.cuda.Event] = {}  # by source in host memory

    def start(self, source: nn.Module, slot: RingSlot) -> None:
        if is_in_files(source):
            self._reads[id(slot)] = self._pool.submit(self._read, source, slot)
        else:
            self._begin(source, slot)

    def _begin(self, source: nn.Module, slot: RingSlot) -> None:
        before = [self._done.pop(id(slot), None), self._written.pop(id(source), None)]
        if before[0] is None:  # a new slot: its memory may still be used by what was computed in it before
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for event in before:
                if event is not None:
                    self._stream.wait_event(event)
            copy_expert(source, slot.bank)
            self._arrived[id(slot)] = self._stream.record_event()

    def _read(self, source: nn.Module, slot: RingSlot) -> nn.Module:
        """Reads an expert into the slot's page-locked memory. In the thread; raises what reading raises."""
        staging = self._staging.get(id(slot))
        if staging is None:
            staging = copy.deepcopy(source)  # without storage: it is in no memory
            for name, parameter in slot.bank.named_parameters():
                room = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=True)
                setattr(staging, name, nn.Parameter(room, requires_grad=False))
            self._staging[id(slot)] = staging
        elif id(slot) in self._sent:
            self._sent.pop(id(slot)).synchronize()  # what it held may still be on its way
        self._copy(source, staging)
        return staging

    def wait(self, slot: RingSlot) -> None:
        read = self._reads.pop(id(slot), None)
        if read is not None:
            self._begin(read.result(), slot)
            self._sent[id(slot)] = self._arrived[id(slot)]
        torch.cuda.current_stream(self._device).wait_event(self._arrived.pop(id(slot)))

    def used(self, slot: RingSlot) -> None:
        self._done[id(slot)] = torch.cuda.current_stream(self._device).record_event()

    def drain(self, slot: RingSlot) -> None:
        for read in (self._reads.pop(id(slot), None), self._forgotten.pop(id(slot), None)):
            if read is not None and not read.cancel():
                read.exception()
        self._done.pop(id(slot), None)
        arrived = self._arrived.pop(id(slot), None)
        if arrived is not None:
            arrived.synchronize()
        if (sent := self._sent.pop(id(slot), None)) is not None:
            sent.synchronize()
        self._staging.pop(id(slot), None)

    def forget(self, slot: RingSlot) -> None:
        read = self._reads.pop(id(slot), None)
        if read is not None and not read.cancel():
            self._forgotten[id(slot)] = read  # it runs, and the thread does one after the other
        # Later copies come behind one that is begun, on the same stream; its event stays for `drain`.

    def exchange(self, slot: RingSlot, resident: nn.Module, away: nn.Module) -> None:
        exchange(slot, resident, away)
        self._written[id(away)] = torch.cuda.current_stream(self._device).record_event()


CopyExpert = Callable[[nn.Module, nn.Module], None]


def copy_expert(source: nn.Module, target: nn.Module) -> None:
    """Copies the parameters of one bank of one expert into those of another."""
    with torch.no_grad():
        for theirs, ours in zip(source.parameters(), target.parameters(), strict=True):
            ours.copy_(theirs, non_blocking=True)


def exchange(slot: RingSlot, resident: nn.Module, away: nn.Module, copy: CopyExpert = copy_expert) -> None:
    """An expert that just came from `away` into the slot becomes the resident one, and this one takes its place there.

    On the device the slot and the resident expert trade their storage, so nothing is copied but the one expert that
    leaves; nothing at all where `away` is in files, which hold every expert. Each of the three stays as large as it
    is. If the copy fails, all is as before.
    """
    if not is_in_files(away):
        try:
            copy(resident, away)
        except BaseException:
            copy_expert(slot.bank, away)
            raise
    arrived, leaving = dict(slot.bank.named_parameters()), dict(resident.named_parameters())
    for name in arrived:
        setattr(slot.bank, name, leaving[name])
        setattr(resident, name, arrived[name])


def is_in_files(bank: nn.Module) -> bool:
    """Whether an expert's weights are in no memory."""
    return next(bank.parameters()).is_meta


def copier_for(device: torch.device, copy: CopyExpert | None = None) -> Copier:
    """The way of copying that suits a device. `copy`: also reads experts that are in no memory from their files."""
    if device.type == "cuda":
        return StreamCopier(device, copy)
    return ThreadCopier(copy) if device.type == "cpu" else DirectCopier(copy)
