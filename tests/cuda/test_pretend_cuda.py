"""The pretended devices themselves: what is wrong is found, what is right is not."""

import threading
from contextlib import nullcontext, suppress
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tests.pretend_cuda import Findings, PretendTensor, on_device, pretend_cuda, run_ranks

T = timedelta(seconds=20)


def new_stream(rank: int = 0) -> torch.cuda.Stream:
    return torch.cuda.Stream(torch.device("cuda", rank))


def sum_of_two_streams(*, ordered: bool) -> tuple[Findings, torch.Tensor]:
    """Writes on the default stream, reads on another one, which waits for it or does not."""
    with pretend_cuda(lag="caller") as found:

        def body(rank, store):
            x, y = torch.zeros(10, device="cuda"), torch.zeros(10, device="cuda")
            torch.cuda.synchronize()
            side = new_stream()
            x.fill_(1)
            if ordered:
                side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                y.copy_(x)
            side.synchronize()
            y.record_stream(side)
            return y.cpu()

        [result] = run_ranks(body, 1)
    return found, result


def test_a_planted_race_is_found_and_makes_a_wrong_number():
    found, result = sum_of_two_streams(ordered=False)
    assert any("write by [aten.fill_.Scalar" in text and "read by [copy_" in text for text in found.races.values())
    assert torch.equal(result, torch.zeros(10))


def test_an_event_orders():
    found, result = sum_of_two_streams(ordered=True)
    assert found.problems() == []
    assert torch.equal(result, torch.ones(10))


def test_views_race_by_their_bytes():
    def races(start: int) -> int:
        with pretend_cuda() as found:

            def body(rank, store):
                x = torch.zeros(10, device="cuda")
                side = new_stream()
                side.wait_stream(torch.cuda.current_stream())
                x[:5].fill_(1)
                with torch.cuda.stream(side):
                    x[start:].fill_(2)
                torch.cuda.current_stream().wait_stream(side)

            run_ranks(body, 1)
        return len(found.races)

    assert races(5) == 0
    assert races(4) == 1


def test_work_of_a_side_stream_may_be_late_too():
    with pretend_cuda(lag="streams") as found:

        def body(rank, store):
            x = torch.zeros(10, device="cuda")
            side = new_stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                x.fill_(1)
            return x.cpu()  # without a wait for it

        [result] = run_ranks(body, 1)
    assert len(found.races) == 1
    assert torch.equal(result, torch.zeros(10))


def test_a_thread_without_a_device_opens_a_foreign_context():
    def contexts(*, sets_device: bool) -> dict:
        with pretend_cuda() as found:

            def body(rank, store):
                x = torch.zeros(4, device=f"cuda:{rank}")
                side = new_stream(rank)
                side.wait_stream(torch.cuda.current_stream())

                def work():
                    if sets_device:
                        torch.cuda.set_device(rank)
                    with torch.cuda.stream(side):
                        x.add_(1)

                thread = threading.Thread(target=work, daemon=True)
                thread.start()
                thread.join(20)
                torch.cuda.current_stream().wait_stream(side)

            run_ranks(body, 2)
        return found.contexts

    assert list(contexts(sets_device=False)) == [(1, 0)]
    assert contexts(sets_device=True) == {}


@pytest.mark.parametrize("how", ["not at all", "recorded", "waited for"])
def test_an_early_free_is_found(how):
    with pretend_cuda() as found:

        def body(rank, store):
            side = new_stream()
            x, y = torch.zeros(4, device="cuda"), torch.zeros(4, device="cuda")
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                y.add_(x)
            if how == "recorded":
                x.record_stream(side)
            if how == "waited for":
                torch.cuda.current_stream().wait_stream(side)
            del x
            torch.cuda.current_stream().wait_stream(side)

        run_ranks(body, 1)
    assert len(found.freed) == (how == "not at all")


HOST_WAITS = {
    "item": (lambda x: x.sum().item(), 1),
    "float": (lambda x: float(x.sum()), 1),
    "bool": (lambda x: bool(x[0] > 0), 1),
    "cpu": (lambda x: x.cpu(), 1),
    "tolist": (lambda x: x.tolist(), 1),
    "synchronize": (lambda x: torch.cuda.synchronize(), 1),
    "stream.synchronize": (lambda x: torch.cuda.current_stream().synchronize(), 1),
    "event.synchronize": (lambda x: torch.cuda.current_stream().record_event().synchronize(), 1),
    "event.query": (lambda x: torch.cuda.current_stream().record_event().query(), 0),
    "pageable to the host": (lambda x: torch.empty(4).copy_(x, non_blocking=True), 1),
    "pageable to the device": (lambda x: x.copy_(torch.empty(4), non_blocking=True), 1),
    "pinned to the host": (lambda x: torch.empty(4, pin_memory=True).copy_(x, non_blocking=True), 0),
    "pinned to the device": (lambda x: x.copy_(torch.ones(4).pin_memory(), non_blocking=True), 0),
    "pinned, but blocking": (lambda x: x.copy_(torch.ones(4).pin_memory()), 1),
    "a shape from data": (lambda x: x.nonzero(), 1),
    "a tensor of numbers": (lambda x: torch.tensor([1.0], device="cuda"), 1),
    "kernels": (lambda x: torch.where(x > 0, x, 0.0).mul_(2).sum(), 0),
}


@pytest.mark.parametrize("call", HOST_WAITS)
def test_host_waits_are_counted(call):
    function, expected = HOST_WAITS[call]
    with pretend_cuda() as found:

        def body(rank, store):
            function(torch.ones(4, device="cuda"))
            return len(found.own_waits())

        assert run_ranks(body, 1) == [expected]
    assert found.problems() == []


def test_asking_an_event_again_and_again_is_a_wait():
    with pretend_cuda(lag="caller") as found:

        def body(rank, store):
            x = torch.ones(4, device="cuda")
            event = torch.cuda.current_stream().record_event()
            x.add_(1)
            looks = 0
            while not event.query():
                looks += 1
                assert looks < 10

        run_ranks(body, 1)
    assert [w.kind for w in found.waits] == ["Event.query in a loop"]


@pytest.mark.parametrize("waits", [False, True])
def test_a_host_that_reads_pinned_memory_too_early_races(waits):
    with pretend_cuda(lag="caller") as found:

        def body(rank, store):
            buffer = torch.zeros(4, pin_memory=True)
            buffer.copy_(torch.ones(4, device="cuda"), non_blocking=True)
            if waits:
                torch.cuda.current_stream().record_event().synchronize()
            return float(buffer[1:].sum())

        assert run_ranks(body, 1) == [3.0 if waits else 0.0]
    assert len(found.races) == (not waits)


def test_a_host_that_overwrites_what_is_still_read_races():
    with pretend_cuda(lag="caller") as found:

        def body(rank, store):
            buffer = torch.ones(4, pin_memory=True)
            x = torch.empty(4, device="cuda").copy_(buffer, non_blocking=True)
            buffer.fill_(7)
            return x.cpu()

        [result] = run_ranks(body, 1)
    assert len(found.races) == 1
    assert torch.equal(result, torch.full((4,), 7.0))


def test_devices_are_not_mixed():
    with pretend_cuda():
        x, y = torch.ones(4, device="cuda:0"), torch.ones(4, device="cuda:1")
        assert isinstance(x, PretendTensor)
        assert x.is_cuda
        for other in (y, torch.ones(4)):
            with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
                x + other
        assert torch.equal((x + torch.tensor(1.0)).cpu(), torch.full((4,), 2.0))  # a number may be anywhere


def new_group(rank: int, store: dist.Store, size: int, name: str = "") -> dist.ProcessGroup:
    return dist.ProcessGroupNCCL(dist.PrefixStore(name, store), rank, size, dist.ProcessGroupNCCL.Options())


@pytest.mark.parametrize("lag", ["none", "caller", "streams"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_collectives(size, lag):
    with pretend_cuda(lag=lag) as found:

        def body(rank, store):
            group = new_group(rank, store, size)
            x = torch.full((2,), float(rank + 1), device=f"cuda:{rank}")
            total, rows = x.clone(), x.new_empty(size, 2)
            group.allreduce([total]).wait()
            group._allgather_base(rows.view(-1), x).wait(T)
            lists = list(x.new_empty(size, 2))
            group.allgather([lists], [x]).wait()
            first = x.clone()
            group.broadcast(first, 0).wait()
            sent, received = torch.arange(size, device=f"cuda:{rank}") + 10 * rank, x.new_empty(size, dtype=torch.int64)
            group.alltoall_base(received, sent, [], []).wait()
            return [t.cpu() for t in (total, rows, torch.stack(lists), first, received)]

        results = run_ranks(body, size)
    rows = torch.arange(1.0, size + 1).unsqueeze(1).expand(size, 2)
    for rank, (total, gathered, listed, first, received) in enumerate(results):
        assert torch.equal(total, rows.sum(0))
        assert torch.equal(gathered, rows)
        assert torch.equal(listed, rows)
        assert torch.equal(first, rows[0])
        assert torch.equal(received, rank + 10 * torch.arange(size))
    assert found.problems() == []


def test_a_collective_that_nobody_waits_for_races_with_its_reader():
    with pretend_cuda(lag="streams") as found:

        def body(rank, store):
            x = torch.ones(2, device=f"cuda:{rank}")
            work = new_group(rank, store, 2).allreduce([x])
            early = x.clone()
            work.wait()
            return early.cpu(), x.cpu()

        for early, late in run_ranks(body, 2):
            assert torch.equal(early, torch.ones(2))
            assert torch.equal(late, torch.full((2,), 2.0))
    assert len(found.races) == 2


def test_nccl_takes_no_tensors_of_the_cpu():
    with pretend_cuda():

        def body(rank, store):
            new_group(rank, store, 1).allreduce([torch.ones(2)])

        with pytest.raises(ValueError, match="Tensors must be CUDA and dense"):
            run_ranks(body, 1)


def test_a_rank_that_does_not_come_is_waited_for_no_longer_than_asked():
    with pretend_cuda():

        def body(rank, store):
            group = new_group(rank, store, 2)
            work = group.allreduce([torch.ones(2, device=f"cuda:{rank}")]) if rank == 0 else None
            group._connect(torch.device("cuda", rank))
            if work is not None:
                with pytest.raises(RuntimeError, match="timeout"):
                    work.wait(timedelta(seconds=0.05))
                group.abort()
                with pytest.raises(RuntimeError, match="aborted"):
                    group.allreduce([torch.ones(2, device="cuda:0")])
                torch.cuda.synchronize()  # what was on its way is over

        run_ranks(body, 2)


def test_two_communicators_from_two_threads_are_found():
    def found_by(*, threads: bool) -> Findings:
        with pretend_cuda() as found:

            def body(rank, store):
                groups = [new_group(rank, store, 2, str(i)) for i in range(2)]
                tensors = [torch.ones(2, device=f"cuda:{rank}") for _ in groups]

                def launch(i):
                    torch.cuda.set_device(rank)
                    # The ranks' threads may really come in orders in which each waits for the other.
                    with suppress(RuntimeError) if threads else nullcontext():
                        groups[i].allreduce([tensors[i]]).wait()

                workers = [threading.Thread(target=launch, args=(i,), daemon=True) for i in range(2)]
                for i, worker in enumerate(workers):
                    worker.start() if threads else launch(i)
                for worker in workers if threads else []:
                    worker.join(20)

            run_ranks(body, 2)
        return found

    assert len(found_by(threads=True).unordered) == 2
    assert found_by(threads=False).problems() == []


def test_ranks_that_launch_in_another_order_are_found():
    with pretend_cuda() as found:

        def body(rank, store):
            groups = [new_group(rank, store, 2, str(i)) for i in range(2)]
            tensors = [torch.ones(2, device=f"cuda:{rank}") for _ in groups]
            if rank == 1:
                groups.reverse()
            for group in groups:
                group._connect(torch.device("cuda", rank)) if rank == 0 else None
            works = [group.allreduce([tensor]) for group, tensor in zip(groups, tensors, strict=True)]
            for work in works:
                work.wait()

        run_ranks(body, 2)
    assert len(found.different_orders()) == 1


def test_events_measure_only_what_they_were_made_to():
    with pretend_cuda():
        stream = torch.cuda.current_stream("cuda:0")
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(stream)
        end.record(stream)
        assert begin.elapsed_time(end) >= 0
        with pytest.raises(ValueError, match="enable_timing"):
            torch.cuda.Event().elapsed_time(end)


def test_everything_is_put_back():
    before = torch.cuda.Stream, torch.empty, torch.Tensor.to, threading.Thread.start, torch.cuda.is_available()
    with pretend_cuda():
        kept = on_device(torch.ones(2), "cuda:0")
    assert (torch.cuda.Stream, torch.empty, torch.Tensor.to, threading.Thread.start) == before[:4]
    assert torch.cuda.is_available() == before[4]
    del kept
