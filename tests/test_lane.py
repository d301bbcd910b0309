"""The dispatcher without Ray: assignments, reports and decisions, and lost worker groups; and a worker's errors."""

from __future__ import annotations

import asyncio
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from jobs import group_of, report, running, train

from train_fn.data.samples import Sample, Splits, closed_set
from train_fn.execution import Execution, smaller
from train_fn.jobs import ScoreJob, TrainJob, Verdict
from train_fn.model.batches import BatchFailed
from train_fn.settings import ModelSettings, TrialSettings
from train_fn.support.storage import Storage
from train_fn.trial.applied import TrialFailed
from train_fn.trial.engine import MicroBatchTooLarge
from train_fn.trial.loop import Preempted
from train_fn.trial.memory import cached_sizes, choose_execution, longest_sample, memory_needed
from train_fn.trial.pristine import BaseChanged
from train_fn.worker import InputsChanged, LaneConfig, check_node, report_error, versions
from tune.lanes.dispatcher import Dispatcher
from tune.lanes.job_state import MAX_ATTEMPTS


def begin(awaitable) -> asyncio.Future:
    """Start it, and keep it from the garbage collector until the test's end."""
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


def test_all_ranks_get_the_same_job_and_the_same_decision() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(train(0))
        one, two = await asyncio.gather(*[dispatcher.next_assignment(0, "g", 0) for _ in range(2)])
        assert one == two == train(0)
        ranks = [begin(dispatcher.report(0, "g", 1, m)) for m in (report(1), None)]
        first = await dispatcher.next_report(0, 0)
        assert replace(first, device_s=0) == report(1) and first.device_s > 0
        assert not await soon(asyncio.gather(*map(asyncio.shield, ranks)))  # neither may go on yet
        waiting = begin(dispatcher.next_report(0, 1))
        assert await asyncio.gather(*ranks) == [False, False]
        waiting.cancel()

    run(scenario)


def test_last_report_lets_a_job_run_to_its_end() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(train(0))
        last = begin(dispatcher.last_report(0))
        await dispatcher.next_assignment(0, "g", 0)
        for epoch in (1, 2, 3):
            assert await dispatcher.report(0, "g", epoch, report(epoch, finished=epoch == 3)) == Verdict.GO_ON
        assert replace(await last, device_s=0) == report(3, finished=True)

    run(scenario)


def test_a_node_that_differs_from_the_driver_is_refused_with_all_differences(tmp_path) -> None:
    image = tmp_path / "one.png"
    image.write_bytes(b"")
    job = LaneConfig(lane=0, dispatcher=None, model=ModelSettings(), splits=splits_of(image),
                  storage=Storage(tmp_path), num_threads=1, versions=versions())  # fmt: skip
    check_node(job)
    other = replace(job, splits=splits_of(tmp_path / "two.png"), storage=Storage(tmp_path / "nowhere"),
                    versions={**versions(), "version_torch": "1.0"})  # fmt: skip
    with pytest.raises(RuntimeError) as refused:
        check_node(other)
    for part in ("torch is ", "the driver's 1.0", "two.png", "nowhere cannot be written"):
        assert part in str(refused.value)


def splits_of(image: Path) -> Splits:
    return Splits((Sample((str(image),), "?", "a", 0),), (), (), closed_set(("a", "b")))


def test_two_failed_starts_with_work_in_between_do_not_end_a_lane() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        for group in ("a", "b"):
            assert await dispatcher.register(0, group)
            begin(dispatcher.next_assignment(0, group, 0))
            await asyncio.sleep(0.01)
            assert await dispatcher.register(0, f"after {group}")
            for _ in range(2):  # each rank reports it
                await dispatcher.start_failed(0, f"after {group}", "no memory")
        for number in (1, 2):
            assert await dispatcher.register(0, f"last {number}") is (number == 1)
            await dispatcher.start_failed(0, f"last {number}", "no memory")

    run(scenario)


@pytest.mark.parametrize("ranks", [(0,), (0, 1), (1, 1, 0)])
def test_a_failed_start_counts_once_however_many_ranks_report_it(ranks) -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(2)
        await dispatcher.register(0, "a")
        begin(dispatcher.next_assignment(0, "a", 0))
        await asyncio.sleep(0.01)
        await dispatcher.register(0, "b")
        for _ in ranks:
            await dispatcher.start_failed(0, "b", "no memory")
        assert await dispatcher.register(0, "c")  # a lane that has worked may have had bad luck, once
        for _ in ranks:
            await dispatcher.start_failed(0, "c", "no memory")
        assert not await dispatcher.register(0, "d")
        assert (await dispatcher.snapshot())["lanes"] == 1

    run(scenario)


def test_a_stopped_trial_is_not_queued_again_after_out_of_memory() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(train(0, per_device_train_batch_size=2, gradient_accumulation_steps=8))
        await dispatcher.next_assignment(0, "g", 0)
        await dispatcher.stop(0)
        await dispatcher.stop(1)  # never submitted: nothing to stop
        await dispatcher.out_of_memory(0, "g", "out of memory", True, Execution(images=2), Execution(images=1))
        assert not dispatcher.queue

    run(scenario)


def test_stop_decides_on_the_pending_report() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(train(0))
        await dispatcher.next_assignment(0, "g", 0)
        rank = begin(dispatcher.report(0, "g", 1, report(1)))
        await dispatcher.next_report(0, 0)
        await dispatcher.stop(0)
        assert await rank == Verdict.PAUSE

    run(scenario)


def test_a_stop_for_good_stays_one() -> None:
    """Tune's process of the trial stops it, too, and knows nothing of the reason."""

    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(train(0))
        await dispatcher.next_assignment(0, "g", 0)
        ranks = [begin(dispatcher.report(0, "g", 1, message)) for message in (report(1), None)]
        await dispatcher.next_report(0, 0)
        await dispatcher.stop(0, for_good=True)
        await dispatcher.stop(0)
        assert await asyncio.gather(*ranks) == [Verdict.END, Verdict.END]

    run(scenario)


def test_stop_before_a_report_and_before_a_start() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(train(0))
        await dispatcher.submit(train(1))
        await dispatcher.stop(1)
        await dispatcher.next_assignment(0, "g", 0)
        await dispatcher.stop(0)
        assert await dispatcher.report(0, "g", 1, report(1)) == Verdict.PAUSE
        assert not await soon(dispatcher.next_assignment(0, "g", 1))  # trial 1 was taken out of the queue

    run(scenario)


def test_a_lost_job_starts_again_and_repeated_epochs_are_not_published_twice() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(train(7))
        await dispatcher.next_assignment(0, "old", 0)
        begin(dispatcher.report(7, "old", 1, report(1)))
        assert (await dispatcher.next_report(7, 0)).epoch == 1
        waiting = begin(dispatcher.next_report(7, 1))
        assert (await dispatcher.next_assignment(0, "new", 0)).number == 7
        assert await dispatcher.report(7, "new", 1, report(1)) == Verdict.GO_ON
        assert not waiting.done()
        begin(dispatcher.report(7, "new", 2, report(2, finished=True)))
        assert (await waiting).epoch == 2

    run(scenario)


def test_a_trial_that_makes_progress_may_lose_more_groups() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(train(0))
        for attempt, step in enumerate((2, 4, 6, 8, 8)):
            assert (await dispatcher.next_assignment(0, f"g{attempt}", 0)).number == 0
            await dispatcher.progress(0, f"g{attempt}", {"phase": "train", "step": step})
        begin(dispatcher.next_assignment(0, "last but one", 0))
        await asyncio.sleep(0.01)
        assert running(dispatcher) == {0: 0} and dispatcher.jobs[0].attempts == 3
        begin(dispatcher.next_assignment(0, "last", 0))
        assert "worker group died" in (await dispatcher.next_report(0, 0)).error

    run(scenario)


def test_a_trial_that_loses_every_group_fails() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(train(0))
        for attempt in range(MAX_ATTEMPTS):
            assert (await dispatcher.next_assignment(0, f"g{attempt}", 0)).number == 0
        begin(dispatcher.next_assignment(0, "last", 0))
        assert "worker group died" in (await dispatcher.next_report(0, 0)).error

    run(scenario)


def test_a_trial_that_failed_is_not_tried_again() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(train(0))
        await dispatcher.submit(train(1))
        await dispatcher.next_assignment(0, "g", 0)
        await dispatcher.fail(0, "g", "boom")
        assert (await dispatcher.next_report(0, 0)).error == "boom"
        assert (await dispatcher.next_assignment(0, "h", 0)).number == 1

    run(scenario)


def test_the_ladder_goes_from_large_micro_batches_to_gradient_checkpointing() -> None:
    """Halved down to one sample, then a smaller activation budget, then each layer's input only, then nothing."""

    def ladder(way: Execution | None) -> list[Execution]:
        ways: list[Execution] = []
        while way := smaller(way, 2600):
            ways.append(way)
        return ways

    by_tokens = ladder(Execution(tokens=10_240, compiled=True))
    assert [way.tokens for way in by_tokens] == [5120, 2600, 2600, 2600]
    assert ladder(Execution(tokens=5200, gradient_checkpointing=True))[0].tokens == 2600
    assert [way.activation_budget for way in by_tokens] == [1.0, 1.0, 0.6, 1.0]
    assert [way.gradient_checkpointing for way in by_tokens] == [False, False, False, True]
    by_images = ladder(Execution(images=6))
    assert [(way.images, way.gradient_checkpointing) for way in by_images] == [(3, False), (1, False), (1, True)]
    assert ladder(Execution(images=1, gradient_checkpointing=True)) == []


def test_out_of_memory_takes_the_next_smaller_way_until_there_is_none() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(train(0))
        ways = [Execution(images=4), Execution(images=2), Execution(images=1, gradient_checkpointing=True), None]
        for group, used, less in zip("abc", ways, ways[1:], strict=False):
            assignment = await dispatcher.next_assignment(0, group, 0)
            assert assignment.execution == (used if group > "a" else None)  # the worker chooses the first one
            for _ in range(2):  # both ranks report it
                await dispatcher.out_of_memory(0, group, "CUDA out of memory", True, used, less)
        assert assignment.notes == (
            "out of memory: micro-batch 4 -> 2 images, same global batch",
            "out of memory: micro-batch 2 -> 1 images, same global batch",
        )
        error = (await dispatcher.next_report(0, 0)).error
        places = [error.index(word) for word in ("smallest way", "--use-qlora", "--lora-r", "paged")]
        assert places == sorted(places) and "CUDA out of memory" in error
        assert dispatcher.jobs[0].attempts == 1

    run(scenario)


def test_later_trials_on_the_lane_know_what_ran_out_of_memory_in_a_step() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(2)
        used, less = Execution(tokens=8192), Execution(tokens=4096)

        async def ran_out(number: int, lane: int, turn: int, in_step: bool) -> None:
            await dispatcher.submit(train(number))
            await dispatcher.next_assignment(lane, f"of lane {lane}", turn)
            await dispatcher.out_of_memory(number, f"of lane {lane}", "CUDA out of memory", in_step, used, less)
            # The same group, for a lone rank goes on; a rank of another group is late and says nothing new.
            again = await dispatcher.next_assignment(lane, f"of lane {lane}", turn + 1)
            await dispatcher.out_of_memory(number, "gone by now", "CUDA out of memory", in_step, used, less)
            assert running(dispatcher)[lane] == number and again.execution == less
            dispatcher.jobs[number].ended = True

        async def known(number: int, lane: int, turn: int) -> tuple:
            await dispatcher.submit(train(number))
            found = await dispatcher.next_assignment(lane, f"of lane {lane}", turn)
            dispatcher.jobs[number].ended = True
            return found.too_large

        await ran_out(0, 0, 0, in_step=False)
        assert await known(1, 0, 2) == ()
        await ran_out(2, 0, 3, in_step=True)
        assert await known(3, 0, 5) == ((train(2).settings, used),) and await known(4, 1, 0) == ()
        await dispatcher.submit(ScoreJob(number=5, adapters=()))
        assert isinstance(await dispatcher.next_assignment(0, "of lane 0", 6), ScoreJob)

    run(scenario)


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({}, 4096),
        ({"lora_r": 128}, 4096),
        ({"lora_r": 8}, 8192),  # it needs less
        ({"lora_dropout": 0.0}, 8192),
        ({"use_dora": True}, 8192),  # it cannot be compared
        ({"gradient_checkpointing": True}, 8192),
    ],
)
def test_a_trial_as_large_as_one_that_did_not_fit_starts_with_a_smaller_micro_batch(base, splits, options, tokens):
    settings = TrialSettings(lora_r=64)
    failed = ((settings, Execution(tokens=8192)),)
    execution, notes = choose_execution(base, splits.train, replace(settings, **options), 100.0, too_large=failed)
    assert execution.tokens == tokens and execution.images == 0
    assert len(notes) == (tokens < 8192) and all("8,192 -> 4,096 tokens" in note for note in notes)


def test_the_memory_decides_how_many_tokens_go_through_at_once(base, splits) -> None:
    """What the model of the memory expects fits, and the next larger way would not."""
    settings = TrialSettings()
    sizes, longest = cached_sizes(base, settings), longest_sample(base, splits.train)
    expected = []
    for free_gib in (10.0, 0.4, 0.2, 0.01):
        execution, notes = choose_execution(base, splits.train, settings, free_gib)
        parts = memory_needed(sizes, settings, execution, 1, False, longest, 0)
        needed = sum(gib for part, gib in parts.items() if part not in ("worker", "base"))
        expected.append((execution.tokens, execution.gradient_checkpointing, needed <= 0.9 * free_gib))
        assert not notes
    assert expected[0] == (8192, False, True)
    assert longest < expected[1][0] < 8192 and expected[1][1:] == (False, True)
    assert expected[3] == (longest, True, False)  # nothing fits: the smallest way is tried


def test_a_pending_call_of_a_dead_group_gets_no_job() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        stale = begin(dispatcher.next_assignment(0, "old", 0))
        await asyncio.sleep(0)
        fresh = begin(dispatcher.next_assignment(0, "new", 0))
        await asyncio.sleep(0.01)
        await dispatcher.submit(train(0))
        assert (await fresh).number == 0
        assert await stale is None

    run(scenario)


def test_the_job_of_a_lane_that_ends_goes_to_another() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(2)
        await dispatcher.submit(train(0))
        await dispatcher.next_assignment(0, "a", 0)
        await dispatcher.lane_ended(0, "node gone")
        assert (await dispatcher.next_assignment(1, "b", 0)).number == 0

    run(scenario)


def test_without_lanes_every_trial_fails_with_the_reason() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(train(0))
        await dispatcher.lane_ended(0, "cannot load the base")
        await dispatcher.submit(train(1))
        for number in (0, 1):
            assert (await dispatcher.next_report(number, 0)).error == "cannot load the base"

    run(scenario)


def test_a_snapshot_shows_what_every_lane_does() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(3)
        assert await dispatcher.snapshot() == {"lanes": 3, "starting": 3, "running": []}
        await dispatcher.submit(train(4))
        await dispatcher.submit(train(5, label="scoring"))
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
        await dispatcher.submit(train(0))
        await dispatcher.close()
        assert (await dispatcher.next_assignment(0, "g", 0)).number == 0
        assert await dispatcher.next_assignment(0, "g", 1) is None

    run(scenario)


def test_a_new_tune_process_gets_the_reports_again() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(train(0))
        await dispatcher.next_assignment(0, "g", 0)
        rank = begin(dispatcher.report(0, "g", 1, report(1)))
        assert (await dispatcher.next_report(0, 0)).epoch == 1
        await dispatcher.submit(train(0))  # the process that had asked is gone
        assert (await dispatcher.next_report(0, 0)).epoch == 1
        assert not rank.done()
        waiting = begin(dispatcher.next_report(0, 1))
        assert await rank == Verdict.GO_ON
        waiting.cancel()

    run(scenario)


def test_a_preempted_group_costs_its_trial_no_attempt() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(train(0))
        for attempt in range(2 * MAX_ATTEMPTS):
            await dispatcher.next_assignment(0, str(attempt), 0)
            await dispatcher.interrupted(0, str(attempt), "left at step 3", True)
            await dispatcher.interrupted(0, str(attempt), "left at step 3", True)  # its other rank
        assert (await dispatcher.next_assignment(0, "last", 0)).number == 0
        for _ in range(MAX_ATTEMPTS):  # a full disk does
            await dispatcher.interrupted(0, group_of(dispatcher), "storage: no space left", False)
            asking = begin(dispatcher.next_assignment(0, f"{group_of(dispatcher)}+", 0))
            await asyncio.sleep(0.01)
        assert "no space left" in (await dispatcher.next_report(0, 0)).error
        asking.cancel()

    run(scenario)


def test_an_interrupted_study_drains_the_lanes_and_starts_no_job() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(train(0))
        await dispatcher.submit(train(1))
        await dispatcher.next_assignment(0, "g", 0)
        assert await dispatcher.heartbeat(0, "g", 0, None, 1) == (False, None)
        await dispatcher.close(drain=True)
        assert await dispatcher.heartbeat(0, "g", 0, None, 1) == (True, None)
        await dispatcher.interrupted(0, "g", "left at step 3", True)
        assert (await dispatcher.snapshot())["running"] == []
        assert await dispatcher.next_assignment(0, "h", 0) is None

    run(scenario)


def test_a_worker_that_makes_no_progress_is_ended_if_it_has_a_job(monkeypatch) -> None:
    killed = []
    monkeypatch.setattr("ray.kill", killed.append)

    async def scenario() -> None:
        dispatcher = Dispatcher(1, hang_timeout_s=0.4)

        async def lives() -> None:
            for _ in range(6):
                await asyncio.sleep(0.1)
                await dispatcher.heartbeat(0, "g", 0, pickle.dumps("zero"), 1)

        waiting = begin(dispatcher.next_assignment(0, "g", 0))
        await lives()
        assert not killed  # it has nothing to do
        await dispatcher.submit(train(0))
        await waiting
        begin(dispatcher.report(0, "g", 1, report(1)))
        await lives()
        assert not killed  # it waits for a decision
        begin(dispatcher.next_report(0, 0))
        begin(dispatcher.next_report(0, 1))
        await lives()
        assert killed == ["zero"]

    run(scenario)


def test_a_worker_without_heartbeats_is_ended(monkeypatch) -> None:
    killed = []
    monkeypatch.setattr("ray.kill", killed.append)

    async def scenario() -> None:
        dispatcher = Dispatcher(1, hang_timeout_s=0.4)
        await dispatcher.submit(train(0))
        await dispatcher.next_assignment(0, "g", 0)
        await dispatcher.heartbeat(0, "g", 0, pickle.dumps("zero"), 1)
        await dispatcher.heartbeat(0, "g", 1, pickle.dumps("one"), 1)
        for beats in range(6):
            await asyncio.sleep(0.1)
            await dispatcher.heartbeat(0, "g", 0, pickle.dumps("zero"), beats)
        assert killed == ["one"]
        assert (await dispatcher.next_assignment(0, "h", 0)).number == 0

    run(scenario)


class Calls:
    """Stands in for a dispatcher's handle and records the calls."""

    def __init__(self) -> None:
        self.made: list[tuple] = []

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda *given: self.made.append((name, *given)))


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def raised_while(error: Exception, other: Exception) -> Exception:
    """An error that was raised while another one was being handled."""
    error.__context__ = other
    return error


CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
TORCH = torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("error", "call", "sound"),
    [
        (TrialFailed("lower the learning rate"), ("fail", 7, "g", "lower the learning rate", True), True),
        (TORCH, ("out_of_memory", 7, "g", "CUDA out of memory", False, None, None), True),
        (caused(MicroBatchTooLarge("no"), TORCH), ("out_of_memory", 7, "g", "no", True, None, None), True),
        (caused(MicroBatchTooLarge("no"), CUBLAS), ("out_of_memory", 7, "g", "no", True, None, None), False),
        (CUBLAS, ("out_of_memory", 7, "g", str(CUBLAS), False, None, None), False),
        (InputsChanged("a.png has changed"), ("study_fault", 0, "g", "a.png has changed", True), False),
        (BatchFailed("not a.png"), ("study_fault", 0, "g", "not a.png"), False),
        (Preempted("left"), ("interrupted", 0, "g", "left", True), False),
        (OSError("disk"), ("interrupted", 0, "g", "disk", False), False),
        (BaseChanged("differs in q_proj"), ("interrupted", 0, "g", "differs in q_proj", False), False),
        (torch.AcceleratorError("CUDA error"), ("interrupted", 0, "g", "CUDA error", False), False),
        (KeyError("a"), ("fail", 7, "g", "KeyError: 'a'"), False),
        (raised_while(RuntimeError("cleaning up failed"), caused(MicroBatchTooLarge("no"), TORCH)),
         ("out_of_memory", 7, "g", "cleaning up failed", True, None, None), True),
        (caused(RuntimeError("DeepSpeed failed"), TORCH),
         ("out_of_memory", 7, "g", "DeepSpeed failed", False, None, None), True),
        (torch.AcceleratorError("CUDA error: out of memory"),
         ("out_of_memory", 7, "g", "CUDA error: out of memory", False, None, None), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
         ("interrupted", 0, "g", "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`", False),
         False),
        (dist.DistBackendError("a peer is gone"),
         ("interrupted", 0, "g", "a collective failed: a peer is gone", False), False),
        (RuntimeError("[../third_party/gloo/transport] Connection closed"),
         ("interrupted", 0, "g", "a collective failed: [../third_party/gloo/transport] Connection closed", False),
         False),
    ],
)  # fmt: skip
def test_how_an_error_in_a_job_is_reported(base, monkeypatch, error, call, sound) -> None:
    monkeypatch.setattr("ray.get", lambda answer: answer)
    calls = Calls()
    job = LaneConfig(lane=0, dispatcher=calls, model=ModelSettings(), splits=splits_of(Path("a")),
                  storage=Storage(Path()), num_threads=1)  # fmt: skip
    assert report_error(job, error, base, TrainJob(number=7, settings=TrialSettings(), output=Path()), "g") is sound
    asked = [made for made in calls.made if made[0] == "left"]  # whether the user has stopped it: no
    assert asked == [("left", 7, "g")] * isinstance(error, Preempted)
    reported = [made for made in calls.made if made not in asked]
    assert [(*made[:3], made[3].partition("\n")[0], *made[4:]) for made in reported] == [call] * (call is not None)


def test_workers_that_leave_a_trial_which_the_user_has_stopped_take_the_next(base, monkeypatch) -> None:
    monkeypatch.setattr("ray.get", lambda answer: answer)
    dispatcher = SimpleNamespace(left=SimpleNamespace(remote=lambda number, group: (number, group) == (7, "g")))
    config = LaneConfig(lane=0, dispatcher=dispatcher, model=ModelSettings(), splits=splits_of(Path("a")),
                        storage=Storage(Path()), num_threads=1)  # fmt: skip
    job = TrainJob(number=7, settings=TrialSettings(), output=Path())
    assert report_error(config, Preempted("left"), base, job, "g")
