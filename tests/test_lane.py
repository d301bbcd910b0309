"""The dispatcher's rules, without Ray: who gets what, who is answered, and what a lost worker group costs."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from train_fn.data.samples import Sample, Splits
from train_fn.model.batches import BatchFailed
from train_fn.settings import ModelSettings
from train_fn.support.storage import Storage
from train_fn.trial.applied import TrialFailed
from train_fn.trial.engine import MicroBatchTooLarge
from train_fn.trial.loop import Preempted
from train_fn.trial.pristine import BaseChanged
from train_fn.worker import InputsChanged, LaneJob, check_node, goes_on, versions
from tune.lanes.dispatcher import MAX_ATTEMPTS, Dispatcher


def message(epoch: int, done: bool = False) -> dict:
    return {"epoch": epoch, "done": done}


def begin(awaitable) -> asyncio.Future:
    """Let it run; kept from the garbage collector until the test's end."""
    task = asyncio.ensure_future(awaitable)
    BEGUN.append(task)
    return task


BEGUN: list[asyncio.Future] = []


async def soon(awaitable, seconds: float = 0.05) -> bool:
    """Whether it is done within a moment."""
    task = asyncio.ensure_future(awaitable)
    done, _ = await asyncio.wait({task}, timeout=seconds)
    return bool(done)


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_all_ranks_get_the_same_trial_and_the_same_verdict() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(0, {"kind": "train"})
        one, two = await asyncio.gather(*[dispatcher.next_assignment(0, "g", 0) for _ in range(2)])
        assert one == two == {"kind": "train", "number": 0}
        ranks = [begin(dispatcher.report(0, "g", 1, m)) for m in (message(1), None)]
        report = await dispatcher.next_report(0, 0)
        assert message(1).items() <= report.items() and report["device_s"] > 0
        assert not await soon(asyncio.gather(*map(asyncio.shield, ranks)))  # neither is told to go on yet
        waiting = begin(dispatcher.next_report(0, 1))
        assert await asyncio.gather(*ranks) == [False, False]
        waiting.cancel()

    run(scenario)


def test_last_report_lets_a_job_run_through() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(0, {})
        last = begin(dispatcher.last_report(0))
        await dispatcher.next_assignment(0, "g", 0)
        for epoch in (1, 2, 3):
            assert await dispatcher.report(0, "g", epoch, message(epoch, done=epoch == 3)) is False
        assert message(3, done=True).items() <= (await last).items()

    run(scenario)


def test_a_node_that_sees_other_things_than_the_driver_is_told_all_at_once(tmp_path) -> None:
    image = tmp_path / "one.png"
    image.write_bytes(b"")
    job = LaneJob(lane=0, dispatcher=None, model=ModelSettings(), splits=splits_of(image), positive="",
                  storage=Storage(tmp_path), num_threads=1, versions=versions())  # fmt: skip
    check_node(job)
    other = replace(job, splits=splits_of(tmp_path / "two.png"), storage=Storage(tmp_path / "nowhere"),
                    versions={**versions(), "version_torch": "1.0"})  # fmt: skip
    with pytest.raises(RuntimeError) as refused:
        check_node(other)
    for part in ("torch is ", "the driver's 1.0", "two.png", "nowhere cannot be written"):
        assert part in str(refused.value)


def splits_of(image: Path) -> Splits:
    return Splits((Sample(str(image), "?", "a", 0),), (), (), ("a", "b"))


def test_two_hiccups_far_apart_do_not_give_a_lane_up() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1, workers_per_trial=2)
        for group in ("a", "b"):
            assert await dispatcher.wants(0, group)
            begin(dispatcher.next_assignment(0, group, 0))
            await asyncio.sleep(0.01)
            assert await dispatcher.wants(0, f"after {group}")
            for _ in range(2):  # each rank tells
                await dispatcher.start_failed(0, f"after {group}", "no memory")
        for number in (1, 2):
            assert await dispatcher.wants(0, f"last {number}") is (number == 1)
            await dispatcher.start_failed(0, f"last {number}", "no memory")

    run(scenario)


@pytest.mark.parametrize("ranks", [(0,), (0, 1), (1, 1, 0)])
def test_a_failed_start_counts_once_however_many_ranks_say_so(ranks) -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(2, workers_per_trial=2)
        await dispatcher.wants(0, "a")
        begin(dispatcher.next_assignment(0, "a", 0))
        await asyncio.sleep(0.01)
        await dispatcher.wants(0, "b")
        for _ in ranks:
            await dispatcher.start_failed(0, "b", "no memory")
        assert await dispatcher.wants(0, "c")  # a lane that has worked may have had bad luck, once
        for _ in ranks:
            await dispatcher.start_failed(0, "c", "no memory")
        assert not await dispatcher.wants(0, "d")
        assert (await dispatcher.snapshot())["lanes"] == 1

    run(scenario)


def test_a_stopped_trial_is_not_begun_again_after_out_of_memory() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(0, {"settings": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}})
        await dispatcher.next_assignment(0, "g", 0)
        await dispatcher.stop(0)
        await dispatcher.stop(1)  # never submitted: nothing to stop
        await dispatcher.out_of_memory(0, "g", "out of memory", True)
        assert not dispatcher.queue

    run(scenario)


def test_stop_answers_the_report_that_waits() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(0, {})
        await dispatcher.next_assignment(0, "g", 0)
        rank = begin(dispatcher.report(0, "g", 1, message(1)))
        await dispatcher.next_report(0, 0)
        await dispatcher.stop(0)
        assert await rank is True

    run(scenario)


def test_stop_before_a_report_and_before_a_start() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(0, {})
        await dispatcher.submit(1, {})
        await dispatcher.stop(1)
        await dispatcher.next_assignment(0, "g", 0)
        await dispatcher.stop(0)
        assert await dispatcher.report(0, "g", 1, message(1)) is True
        assert not await soon(dispatcher.next_assignment(0, "g", 1))  # trial 1 was taken out of the queue

    run(scenario)


def test_a_lost_group_begins_its_trial_again_and_known_epochs_are_not_told_twice() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(7, {})
        await dispatcher.next_assignment(0, "old", 0)
        begin(dispatcher.report(7, "old", 1, message(1)))
        assert (await dispatcher.next_report(7, 0))["epoch"] == 1
        waiting = begin(dispatcher.next_report(7, 1))
        assert (await dispatcher.next_assignment(0, "new", 0))["number"] == 7
        assert await dispatcher.report(7, "new", 1, message(1)) is False
        assert not waiting.done()
        begin(dispatcher.report(7, "new", 2, message(2, done=True)))
        assert (await waiting)["epoch"] == 2

    run(scenario)


def test_a_trial_that_gets_further_each_time_may_lose_more_groups() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(0, {})
        for attempt, step in enumerate((2, 4, 6, 8, 8)):
            assert (await dispatcher.next_assignment(0, f"g{attempt}", 0))["number"] == 0
            await dispatcher.progress(0, f"g{attempt}", {"phase": "train", "step": step})
        begin(dispatcher.next_assignment(0, "last but one", 0))
        await asyncio.sleep(0.01)
        assert dispatcher.running[0] == 0 and dispatcher.tickets[0].attempts == 3
        begin(dispatcher.next_assignment(0, "last", 0))
        assert "worker group died" in (await dispatcher.next_report(0, 0))["error"]

    run(scenario)


def test_a_trial_that_loses_every_group_fails() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(0, {})
        for attempt in range(MAX_ATTEMPTS):
            assert (await dispatcher.next_assignment(0, f"g{attempt}", 0))["number"] == 0
        begin(dispatcher.next_assignment(0, "last", 0))
        assert "worker group died" in (await dispatcher.next_report(0, 0))["error"]

    run(scenario)


def test_a_fault_of_its_own_is_not_tried_again() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(0, {})
        await dispatcher.submit(1, {})
        await dispatcher.next_assignment(0, "g", 0)
        await dispatcher.fail(0, "g", "boom")
        assert (await dispatcher.next_report(0, 0))["error"] == "boom"
        assert (await dispatcher.next_assignment(0, "h", 0))["number"] == 1

    run(scenario)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_global_batch() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
        await dispatcher.submit(0, {"settings": settings})
        for group, micro, accumulation in (("a", 4, 4), ("b", 2, 8), ("c", 1, 16)):
            assignment = await dispatcher.next_assignment(0, group, 0)
            found = assignment["settings"]
            assert (found["per_device_train_batch_size"], found["gradient_accumulation_steps"]) == (micro, accumulation)
            for _ in range(2):  # both ranks tell of it
                await dispatcher.out_of_memory(0, group, "CUDA out of memory", True)
        assert len(assignment["notes"]) == 2 and "micro-batch 2 -> 1" in assignment["notes"][1]
        error = (await dispatcher.next_report(0, 0))["error"]
        places = [error.index(word) for word in ("--use-qlora", "size 1", "--lora-r", "checkpointing", "paged")]
        assert places == sorted(places) and "CUDA out of memory" in error

    run(scenario)


def test_what_did_not_fit_is_not_tried_again_by_a_trial_as_large() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)

        async def micro_batch(number: int, **settings) -> int:
            batch = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
            await dispatcher.submit(number, {"settings": batch | settings})
            found = await dispatcher.next_assignment(0, f"group {number}", 0)
            assert found["settings"]["gradient_accumulation_steps"] * found["settings"][
                "per_device_train_batch_size"] == 16  # fmt: skip
            return found["settings"]["per_device_train_batch_size"]

        assert await micro_batch(0, lora_r=16) == 8
        for group, micro in (("again", 4), ("and again", 2)):
            await dispatcher.out_of_memory(0, dispatcher.groups[0], "CUDA out of memory", True)
            found = await dispatcher.next_assignment(0, group, 0)
            assert found["settings"]["per_device_train_batch_size"] == micro
        dispatcher.tickets[0].ended = True
        assert await micro_batch(1, lora_r=64) == 2
        assert "earlier trial" in dispatcher.tickets[1].assignment["notes"][0]
        dispatcher.tickets[1].ended = True
        for number, settings in ((2, {"lora_r": 8}), (3, {"lora_r": 64, "gradient_checkpointing": True})):
            assert await micro_batch(number, **settings) == 8
            assert "notes" not in dispatcher.tickets[number].assignment
            dispatcher.tickets[number].ended = True
        await dispatcher.submit(4, {"adapter": "of a scoring job"})
        assert "settings" not in await dispatcher.next_assignment(0, "group 4", 0)

    run(scenario)


def test_only_a_step_that_did_not_fit_is_remembered_and_by_its_lane_alone() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(2)
        batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "lora_target_modules": ("q_proj",)}

        async def ran_out(number: int, lane: int, turn: int, in_step: bool) -> None:
            await dispatcher.submit(number, {"settings": batch})
            await dispatcher.next_assignment(lane, f"of lane {lane}", turn)
            await dispatcher.out_of_memory(number, f"of lane {lane}", "CUDA out of memory", in_step)
            # The same group, for a lone rank goes on; a rank of another group is late and says nothing new.
            again = await dispatcher.next_assignment(lane, f"of lane {lane}", turn + 1)
            await dispatcher.out_of_memory(number, "gone by now", "CUDA out of memory", in_step)
            assert dispatcher.running[lane] == number and again["settings"]["per_device_train_batch_size"] == 2
            dispatcher.tickets[number].ended = True

        async def begun(number: int, lane: int, turn: int) -> int:
            await dispatcher.submit(number, {"settings": batch | {"lora_target_modules": ["q_proj"]}})  # out of a file
            found = await dispatcher.next_assignment(lane, f"of lane {lane}", turn)
            dispatcher.tickets[number].ended = True
            return found["settings"]["per_device_train_batch_size"]

        await ran_out(0, 0, 0, in_step=False)
        assert await begun(1, 0, 2) == 4
        await ran_out(2, 0, 3, in_step=True)
        assert await begun(3, 0, 5) == 2 and await begun(4, 1, 0) == 4

    run(scenario)


def test_out_of_memory_is_no_lost_group() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(0, {"settings": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}})
        await dispatcher.next_assignment(0, "a", 0)
        await dispatcher.out_of_memory(0, "a", "", True)
        assert (await dispatcher.next_assignment(0, "b", 0))["settings"]["per_device_train_batch_size"] == 1
        assert dispatcher.tickets[0].attempts == 1 and not dispatcher.queue

    run(scenario)


def test_a_dead_groups_question_takes_nothing() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        stale = begin(dispatcher.next_assignment(0, "old", 0))
        await asyncio.sleep(0)
        fresh = begin(dispatcher.next_assignment(0, "new", 0))
        await asyncio.sleep(0.01)
        await dispatcher.submit(0, {})
        assert (await fresh)["number"] == 0
        assert await stale is None

    run(scenario)


def test_a_lane_that_ends_hands_its_trial_to_another() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(2)
        await dispatcher.submit(0, {})
        await dispatcher.next_assignment(0, "a", 0)
        await dispatcher.lane_ended(0, "node gone")
        assert (await dispatcher.next_assignment(1, "b", 0))["number"] == 0

    run(scenario)


def test_without_lanes_every_trial_fails_with_the_reason() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(0, {})
        await dispatcher.lane_ended(0, "cannot load the base")
        await dispatcher.submit(1, {})
        for number in (0, 1):
            assert (await dispatcher.next_report(number, 0))["error"] == "cannot load the base"

    run(scenario)


def test_a_snapshot_tells_what_every_lane_does() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(3)
        assert await dispatcher.snapshot() == {"lanes": 3, "starting": 3, "running": []}
        await dispatcher.submit(4, {})
        await dispatcher.submit(5, {"label": "scoring"})
        await dispatcher.next_assignment(1, "a", 0)
        await dispatcher.next_assignment(0, "b", 0)
        await dispatcher.progress(4, "a", {"step": 1})
        await dispatcher.progress(4, "a", {"step": 2})
        found = await dispatcher.snapshot()
        assert (found["lanes"], found["starting"]) == (3, 1)
        scoring, trial = found["running"]  # by lane
        assert scoring["label"] == "scoring" and "step" not in scoring
        assert trial["label"] == "trial 4" and trial["step"] == 2 and trial["seconds"] > 0
        begin(dispatcher.next_assignment(0, "b", 1))
        begin(dispatcher.next_assignment(1, "c", 0))  # its group was lost, and the trial begins again
        await asyncio.sleep(0.01)
        (again,) = (await dispatcher.snapshot())["running"]
        assert again["label"] == "trial 4" and "step" not in again and again["seconds"] >= trial["seconds"]

    run(scenario)


def test_close_ends_the_lanes_after_the_queue() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(0, {})
        await dispatcher.close()
        assert (await dispatcher.next_assignment(0, "g", 0))["number"] == 0
        assert await dispatcher.next_assignment(0, "g", 1) is None

    run(scenario)


def test_a_lost_tune_process_hears_its_reports_again() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(0, {})
        await dispatcher.next_assignment(0, "g", 0)
        rank = begin(dispatcher.report(0, "g", 1, message(1)))
        assert (await dispatcher.next_report(0, 0))["epoch"] == 1
        await dispatcher.submit(0, {})  # the process that had asked is gone
        assert (await dispatcher.next_report(0, 0))["epoch"] == 1
        assert not rank.done()
        waiting = begin(dispatcher.next_report(0, 1))
        assert await rank is False
        waiting.cancel()

    run(scenario)


def test_a_group_that_leaves_costs_its_trial_no_attempt() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(0, {})
        for group in range(2 * MAX_ATTEMPTS):
            await dispatcher.next_assignment(0, str(group), 0)
            await dispatcher.interrupted(0, str(group), "left at step 3", True)
            await dispatcher.interrupted(0, str(group), "left at step 3", True)  # its other rank
        assert (await dispatcher.next_assignment(0, "last", 0))["number"] == 0
        for _ in range(MAX_ATTEMPTS):  # a full disk does
            await dispatcher.interrupted(0, dispatcher.groups[0], "storage: no space left", False)
            group = f"{dispatcher.groups[0]}+"
            asking = begin(dispatcher.next_assignment(0, group, 0))
            await asyncio.sleep(0.01)
        assert "no space left" in (await dispatcher.next_report(0, 0))["error"]
        asking.cancel()

    run(scenario)


def test_an_interrupted_study_lets_every_trial_leave_and_begins_none() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(0, {})
        await dispatcher.submit(1, {})
        await dispatcher.next_assignment(0, "g", 0)
        assert await dispatcher.pulse(0, "g", 0, None, 1) is False
        await dispatcher.leave()
        assert await dispatcher.pulse(0, "g", 0, None, 1) is True
        await dispatcher.interrupted(0, "g", "left at step 3", True)
        assert (await dispatcher.snapshot())["running"] == []
        assert await dispatcher.next_assignment(0, "h", 0) is None

    run(scenario)


def test_a_worker_that_lives_but_gets_no_further_is_ended_if_it_has_a_trial(monkeypatch) -> None:
    killed = []
    monkeypatch.setattr("tune.lanes.trainers.ray.kill", killed.append)

    async def scenario() -> None:
        dispatcher = Dispatcher(1, hang_timeout_s=0.4)

        async def lives() -> None:
            for _ in range(6):
                await asyncio.sleep(0.1)
                await dispatcher.pulse(0, "g", 0, "zero", 1)

        waiting = begin(dispatcher.next_assignment(0, "g", 0))
        await lives()
        assert not killed  # it has nothing to do
        await dispatcher.submit(0, {})
        await waiting
        begin(dispatcher.report(0, "g", 1, message(1)))
        await lives()
        assert not killed  # it waits to be told whether to go on
        begin(dispatcher.next_report(0, 0))
        begin(dispatcher.next_report(0, 1))
        await lives()
        assert killed == ["zero"]

    run(scenario)


def test_a_silent_worker_is_ended(monkeypatch) -> None:
    killed = []
    monkeypatch.setattr("tune.lanes.trainers.ray.kill", killed.append)

    async def scenario() -> None:
        dispatcher = Dispatcher(1, hang_timeout_s=0.4)
        await dispatcher.submit(0, {})
        await dispatcher.next_assignment(0, "g", 0)
        await dispatcher.pulse(0, "g", 0, "zero", 1)
        await dispatcher.pulse(0, "g", 1, "one", 1)
        for beats in range(6):
            await asyncio.sleep(0.1)
            await dispatcher.pulse(0, "g", 0, "zero", beats)
        assert killed == ["one"]
        assert (await dispatcher.next_assignment(0, "h", 0))["number"] == 0

    run(scenario)


class Calls:
    """Stands for a dispatcher's handle, and notes what is called."""

    def __init__(self) -> None:
        self.made: list[tuple] = []

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda *given: self.made.append((name, *given)))


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
TORCH = torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("error", "call", "sound"),
    [
        (TrialFailed("lower the learning rate"), ("fail", 7, "g", "lower the learning rate", True), True),
        (TORCH, ("out_of_memory", 7, "g", "CUDA out of memory", False), True),
        (caused(MicroBatchTooLarge("no"), TORCH), ("out_of_memory", 7, "g", "no", True), True),
        (caused(MicroBatchTooLarge("no"), CUBLAS), ("out_of_memory", 7, "g", "no", True), False),
        (CUBLAS, ("out_of_memory", 7, "g", str(CUBLAS), False), False),
        (InputsChanged("a.png has changed"), ("study_fault", 0, "g", "a.png has changed", True), False),
        (BatchFailed("not a.png"), ("study_fault", 0, "g", "not a.png"), False),
        (Preempted("left"), ("interrupted", 0, "g", "left", True), False),
        (OSError("disk"), ("interrupted", 0, "g", "disk", False), False),
        (BaseChanged("differs in q_proj"), ("interrupted", 0, "g", "differs in q_proj", False), False),
        (torch.AcceleratorError("CUDA error"), ("interrupted", 0, "g", "CUDA error", False), False),
        (KeyError("a"), ("fail", 7, "g", "KeyError: 'a'"), False),
        (dist.DistBackendError("a peer is gone"), None, False),
        (RuntimeError("[../third_party/gloo/transport] Connection closed"), None, False),
    ],
)
def test_what_becomes_of_an_error_in_a_trial(base, monkeypatch, error, call, sound) -> None:
    monkeypatch.setattr("ray.get", lambda answer: answer)
    calls = Calls()
    job = LaneJob(lane=0, dispatcher=calls, model=ModelSettings(), splits=splits_of(Path("a")), positive="",
                  storage=Storage(Path()), num_threads=1)  # fmt: skip
    assert goes_on(job, error, 7, "g") is sound
    assert [(*made[:3], made[3].partition("\n")[0], *made[4:]) for made in calls.made] == [call] * (call is not None)
