"""The dispatcher without Ray: lanes and worker groups that are dead, slow or faulty."""

from __future__ import annotations

import asyncio
import pickle
from dataclasses import replace
from typing import Any

import pytest
import ray
from jobs import group_of, report, running, train

from train_fn.execution import Execution
from train_fn.jobs import Verdict
from tune.lanes.dispatcher import MAX_ALIKE, Dispatcher
from tune.lanes.lane_state import MAX_CONTROLLERS_IN_A_ROW

BEGUN: list[asyncio.Future] = []


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 10))


def begin(awaitable) -> asyncio.Future:
    """Start it, and keep it from the garbage collector until the test's end."""
    BEGUN.append(asyncio.ensure_future(awaitable))
    return BEGUN[-1]


async def until(holds) -> None:
    """Wait for something that must come."""
    while not holds():
        await asyncio.sleep(0.01)


async def at_work(num_lanes: int = 1, **options: Any) -> Dispatcher:
    """A dispatcher whose every lane N has trial N, on the group `old N`."""
    dispatcher = Dispatcher(num_lanes, **options)
    for lane in range(num_lanes):
        await dispatcher.submit(train(lane))
        assert await dispatcher.register(lane, f"old {lane}")
        assert (await dispatcher.next_assignment(lane, f"old {lane}", 0)).number == lane
    return dispatcher


@pytest.fixture
def killed(monkeypatch) -> list:
    actors: list = []
    monkeypatch.setattr("ray.kill", actors.append)
    return actors


# -------------------------------------------------------------------------------- late calls of dead groups


def test_a_pending_call_of_a_lane_that_ended_gets_no_job() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(2)
        dead = begin(dispatcher.next_assignment(0, "a", 0))
        alive = begin(dispatcher.next_assignment(1, "b", 0))
        await asyncio.sleep(0.01)
        await dispatcher.lane_ended(0, "node gone")
        assert await dead is None
        await dispatcher.submit(train(7))
        assert (await alive).number == 7
        assert await dispatcher.next_assignment(0, "a", 1) is None

    run(scenario)


def test_a_late_call_of_a_dead_group_gets_no_job_and_does_not_replace_the_new_group() -> None:
    async def scenario() -> None:
        dispatcher = await at_work()
        assert await dispatcher.register(0, "new")
        assert (await dispatcher.next_assignment(0, "new", 0)).number == 0
        await dispatcher.submit(train(1))
        assert await dispatcher.next_assignment(0, "old 0", 1) is None
        assert group_of(dispatcher) == "new" and running(dispatcher) == {0: 0}
        assert not await dispatcher.register(0, "old 0")

    run(scenario)


def test_a_group_whose_heartbeat_is_overdue_gets_no_job_before_the_next_heartbeat(monkeypatch) -> None:
    monkeypatch.setattr("tune.lanes.lane_state.SILENT_S", 0.05)

    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        question = begin(dispatcher.next_assignment(0, "a", 0))
        await asyncio.sleep(0.01)
        await dispatcher.heartbeat(0, "a", 0, None, 1)
        await asyncio.sleep(0.1)
        await dispatcher.submit(train(3))
        await asyncio.sleep(0.05)
        assert not question.done()
        await dispatcher.heartbeat(0, "a", 0, None, 1)
        assert (await question).number == 3

    run(scenario)


def test_an_idle_group_that_was_killed_for_silence_gets_no_job(killed) -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1, hang_timeout_s=0.2)
        question = begin(dispatcher.next_assignment(0, "a", 0))
        await asyncio.sleep(0.01)
        await dispatcher.heartbeat(0, "a", 0, pickle.dumps("worker"), 1)
        assert await question is None and killed == ["worker"]
        await dispatcher.submit(train(0))
        assert (await dispatcher.next_assignment(0, "b", 0)).number == 0

    run(scenario)


def test_new_workers_release_the_job_of_the_old_ones_at_once() -> None:
    async def scenario() -> None:
        dispatcher = await at_work(2)
        assert await dispatcher.register(0, "new")  # loads the base for minutes
        assert list(dispatcher.queue) == [dispatcher.jobs[0]]
        assert (await dispatcher.next_assignment(1, "old 1", 1)).number == 0

    run(scenario)


def test_a_late_stop_of_a_process_that_was_replaced_stops_nothing() -> None:
    """Tune starts a trial's process again; the old one's `stop` may arrive after the new one's `submit`."""

    async def scenario() -> None:
        dispatcher = await at_work()
        await dispatcher.submit(train(1), "old")
        await dispatcher.submit(train(1), "new")
        await dispatcher.stop(1, submission="old")
        waiting = begin(dispatcher.next_report(1, 0))
        assert (await dispatcher.next_assignment(0, "old 0", 1)).number == 1
        begin(dispatcher.report(1, "old 0", 1, report(1)))
        assert (await waiting).epoch == 1
        await dispatcher.stop(1, submission="new")
        assert dispatcher.jobs[1].stopped

    run(scenario)


def test_a_trial_that_is_submitted_after_its_stop_begins_anew() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(train(1), "old")
        await dispatcher.stop(1, submission="old")
        await dispatcher.submit(train(1), "new")
        assert [state.submission for state in dispatcher.queue] == ["new"]

    run(scenario)


# -------------------------------------------------------------------------------- trials that the user stops


def test_a_trial_that_waits_for_a_lane_and_is_stopped_by_the_user_ends_at_once() -> None:
    async def scenario() -> None:
        dispatcher = await at_work()
        await dispatcher.submit(train(1))
        waiting = begin(dispatcher.next_report(1, 0))
        await asyncio.sleep(0.01)
        await dispatcher.stop_soon(1)
        last = await waiting
        assert last.stopped and not last.error and not dispatcher.queue

    run(scenario)


def test_a_trial_that_the_user_stops_while_it_trains_ends_at_its_report_or_with_its_workers() -> None:
    async def scenario() -> None:
        dispatcher = await at_work(2)
        for number in range(2):
            await dispatcher.stop_soon(number)
        assert await dispatcher.heartbeat(0, "old 0", 0, None, 1) == (False, 0)
        begin(dispatcher.report(0, "old 0", 1, report(1)))
        assert (await dispatcher.next_report(0, 0)).epoch == 1  # Tune, which has the report, stops the trial
        waiting = begin(dispatcher.next_report(1, 0))
        await dispatcher.register(1, "new")  # the workers have died: the trial is not tried again
        last = await waiting
        assert last.stopped and last.device_s > 0 and not dispatcher.queue

    run(scenario)


def test_a_trial_that_the_user_stops_is_left_at_a_step_and_its_workers_take_the_next() -> None:
    async def scenario() -> None:
        dispatcher = await at_work()
        waiting = begin(dispatcher.next_report(0, 0))
        assert not await dispatcher.left(0, "old 0")  # a preempted worker
        await dispatcher.stop_soon(0)
        await dispatcher.submit(train(1))
        assert await dispatcher.left(0, "old 0")
        assert (await waiting).stopped
        assert (await dispatcher.next_assignment(0, "old 0", 1)).number == 1
        assert await dispatcher.left(0, "old 0")  # a slower rank
        assert not dispatcher.jobs[1].ended and not dispatcher.jobs[1].unwanted
        assert await dispatcher.heartbeat(0, "old 0", 0, None, 2) == (False, None)

    run(scenario)


# -------------------------------------------------------------------------------- late messages of dead groups


@pytest.mark.parametrize("kind", ["fail", "progress", "report", "memory", "fault", "interrupted"])
def test_a_late_message_of_a_dead_group_changes_nothing(kind) -> None:
    async def scenario() -> None:
        dispatcher = await at_work()
        await dispatcher.register(0, "new")
        await dispatcher.next_assignment(0, "new", 0)
        before = dispatcher.jobs[0].job
        if kind == "fail":
            await dispatcher.fail(0, "old 0", "boom")
        elif kind == "progress":
            await dispatcher.progress(0, "old 0", {"step": 99})
        elif kind == "report":
            assert await dispatcher.report(0, "old 0", 1, report(1, finished=True)) == Verdict.PAUSE
        elif kind == "memory":
            await dispatcher.out_of_memory(0, "old 0", "out of memory", True, Execution(images=2), Execution(images=1))
        elif kind == "fault":
            await dispatcher.study_fault(0, "old 0", "an image has changed", True)
        else:
            await dispatcher.interrupted(0, "old 0", "left", True)
        state = dispatcher.jobs[0]
        assert not state.reports and not state.ended and not state.progress and state.job is before
        assert running(dispatcher) == {0: 0} and not dispatcher.study_error
        assert dispatcher.lanes[0].group and dispatcher.lanes[0].group.failure is None

    run(scenario)


def test_what_other_ranks_report_after_the_first_does_not_fail_the_trial() -> None:
    async def scenario() -> None:
        dispatcher = await at_work()
        await dispatcher.interrupted(0, "old 0", "No space left on device", False)
        await dispatcher.fail(0, "old 0", "RuntimeError: a collective was aborted")
        await dispatcher.register(0, "new")
        assert (await dispatcher.next_assignment(0, "new", 0)).number == 0
        await dispatcher.fail(0, "new", "KeyError: 'a'")  # what an earlier group has met is past
        assert (await dispatcher.next_report(0, 0)).error == "KeyError: 'a'"

    run(scenario)


def test_a_heartbeat_of_a_dead_group_is_answered_with_shutdown() -> None:
    async def scenario() -> None:
        dispatcher = await at_work(2)
        assert await dispatcher.heartbeat(0, "old 0", 0, None, 1) == (False, None)
        await dispatcher.register(0, "new")
        assert await dispatcher.heartbeat(0, "old 0", 0, None, 1) == (True, None)
        await dispatcher.lane_ended(1, "node gone")
        assert await dispatcher.heartbeat(1, "old 1", 0, None, 1) == (True, None)

    run(scenario)


def test_a_report_of_a_trial_that_has_failed_is_answered_at_once() -> None:
    async def scenario() -> None:
        dispatcher = await at_work()
        await dispatcher.fail(0, "old 0", "boom")
        assert await dispatcher.report(0, "old 0", 1, report(1)) == Verdict.PAUSE
        assert len(dispatcher.jobs[0].reports) == 1

    run(scenario)


# ------------------------------------------------------------------------------------------------ the watch


@pytest.mark.parametrize("error", [ValueError("no actor"), ray.exceptions.RayError("dead"), RuntimeError("other")])
def test_the_watch_survives_what_a_kill_raises(monkeypatch, error) -> None:
    killed: list = []

    def kill(actor: Any) -> None:
        killed.append(actor)
        if len(killed) == 1:
            raise error

    monkeypatch.setattr("ray.kill", kill)

    async def scenario() -> None:
        dispatcher = await at_work(2, hang_timeout_s=0.2)
        await dispatcher.heartbeat(0, "old 0", 0, pickle.dumps("first"), 1)
        await until(lambda: killed == ["first"])
        await dispatcher.heartbeat(1, "old 1", 0, pickle.dumps("second"), 1)
        await until(lambda: killed == ["first", "second"])
        assert any("first" in n or str(error) in n for n in dispatcher.notices)

    run(scenario)


def test_the_watch_runs_from_the_start_and_restarts(killed) -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1, hang_timeout_s=0.2)
        assert await dispatcher.register(0, "a")
        assert dispatcher.watch is not None and not dispatcher.watch.done()
        dispatcher.watch.cancel()
        await asyncio.sleep(0.01)
        await dispatcher.heartbeat(0, "a", 0, pickle.dumps("silent"), 1)
        await until(lambda: killed == ["silent"])  # already while it starts

    run(scenario)


class Asked:
    """Stands in for a worker's handle: answers, or raises, when Ray is asked whether it lives."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.count = error, 0
        self.__ray_ready__ = self

    async def remote(self) -> None:
        self.count += 1
        if self.error:
            raise self.error


@pytest.mark.parametrize(
    ("error", "moves"),
    [
        (ray.exceptions.ActorDiedError(), True),
        (ray.exceptions.ActorUnavailableError("for now", b"0" * 16), False),
        (TimeoutError(), False),
        (None, False),
    ],
)
def test_the_job_of_a_node_that_is_gone_goes_to_a_free_lane_long_before_the_time_out(monkeypatch, error, moves) -> None:
    monkeypatch.setattr("tune.lanes.lane_state.LOST_S", 0.2)
    killed: list = []
    monkeypatch.setattr("ray.kill", killed.append)

    async def scenario() -> None:
        dispatcher = Dispatcher(2, hang_timeout_s=2)
        await dispatcher.submit(train(0))
        assert (await dispatcher.next_assignment(0, "lost", 0)).number == 0
        worker = Asked(error)
        monkeypatch.setattr("ray.cloudpickle.loads", lambda handle: worker)
        await dispatcher.heartbeat(0, "lost", 0, b"its handle", 1)
        free = begin(dispatcher.next_assignment(1, "free", 0))
        await asyncio.sleep(1.2)
        assert worker.count > 0 and not killed
        assert running(dispatcher) == {1 if moves else 0: 0} and free.done() is moves
        if moves:
            assert (await free).number == 0 and "its node or its workers are gone" in dispatcher.notices[0]
            assert await dispatcher.register(0, "successor")  # once a node is there

    run(scenario)


# ------------------------------------------------------------------------------------------------ starts


def test_a_start_that_never_ends_is_mentioned_then_ended_in_spite_of_heartbeats(monkeypatch, killed) -> None:
    monkeypatch.setattr("tune.lanes.lane_state.SLOW_START_S", 0.1)
    monkeypatch.setattr("tune.lanes.lane_state.LONGEST_START_S", 0.5)

    async def scenario() -> None:
        dispatcher = Dispatcher(1, hang_timeout_s=0.4)
        await dispatcher.submit(train(0))
        assert await dispatcher.register(0, "a")
        while not killed:
            await dispatcher.heartbeat(0, "a", 0, pickle.dumps("worker"), 0)
            await asyncio.sleep(0.02)
        assert [n for n in dispatcher.notices if "has been loading the base for 0.1 s" in n] == dispatcher.notices[:1]
        last = await dispatcher.next_report(0, 0)
        assert "base was not loaded after 0.5 s" in last.study_error

    run(scenario)


def test_a_lane_without_workers_is_mentioned_once(monkeypatch) -> None:
    monkeypatch.setattr("tune.lanes.lane_state.NO_WORKERS_S", 0.1)

    async def scenario() -> None:
        dispatcher = Dispatcher(2, hang_timeout_s=0.2)
        await dispatcher.submit(train(0))
        assert await dispatcher.register(1, "b")
        await asyncio.sleep(0.4)
        assert len(dispatcher.notices) == 1 and dispatcher.notices[0].startswith("lane 0 has had no workers for 0.1 s")

    run(scenario)


def test_workers_that_die_as_they_start_end_a_lane_that_never_worked() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(train(0))
        assert await dispatcher.register(0, "a")
        assert await dispatcher.register(0, "a")  # its other rank
        assert not await dispatcher.register(0, "b")
        assert "died as they started" in (await dispatcher.next_report(0, 0)).error

    run(scenario)


def test_every_restart_gives_one_notice_and_the_number_of_controllers_is_limited() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        again = [
            (await dispatcher.controller_failed(0, f"no way {n}\n\ntrace"))[0] for n in range(MAX_CONTROLLERS_IN_A_ROW)
        ]
        assert again == [True] * (MAX_CONTROLLERS_IN_A_ROW - 1) + [False]
        assert dispatcher.notices[0] == "lane 0 starts again: no way 0"
        assert dispatcher.notices[-1].startswith("lane 0 is given up: no way")
        assert len(dispatcher.notices) == MAX_CONTROLLERS_IN_A_ROW

        dispatcher = Dispatcher(1)
        for number in range(2 * MAX_CONTROLLERS_IN_A_ROW):  # with work in between
            assert (await dispatcher.controller_failed(0, "killed"))[0]
            begin(dispatcher.next_assignment(0, f"g{number}", 0))
            await asyncio.sleep(0.01)

    run(scenario)


def test_a_rendezvous_that_fails_gets_one_more_try_and_ends_the_study_with_its_reason() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(train(0))
        reason = "the workers of a lane must reach each other within 120 s, but those on a (10.0.0.1) did not"
        assert [(await dispatcher.controller_failed(0, reason, True))[0] for _ in range(2)] == [True, False]
        assert dispatcher.notices == [f"lane 0 starts again: {reason}", f"lane 0 is given up: {reason}"]
        await dispatcher.lane_ended(0, reason)
        assert (await dispatcher.next_report(0, 0)).study_error == reason

    run(scenario)


def test_notices_come_as_they_are_made_and_end_with_the_study() -> None:
    async def scenario() -> None:
        dispatcher = await at_work()
        listening = begin(dispatcher.next_notices(0))
        await asyncio.sleep(0.01)
        assert not listening.done()
        await dispatcher.register(0, "new")
        assert await listening == ["lane 0 starts new workers: its worker group died"]
        last = begin(dispatcher.next_notices(1))
        await dispatcher.close()
        assert await last is None

    run(scenario)


# ------------------------------------------------------------------------------------------------ faults of the study


def test_the_same_fault_on_two_groups_ends_the_study_and_fails_no_trial() -> None:
    async def scenario() -> None:
        dispatcher = await at_work(3)
        await dispatcher.study_fault(0, "old 0", "the processor refuses bad.png")
        assert not dispatcher.study_error
        await dispatcher.register(0, "new")
        assert (await dispatcher.next_assignment(0, "new", 0)).number == 0  # a second try
        waiting = begin(dispatcher.report(1, "old 1", 1, report(1)))
        await asyncio.sleep(0.01)
        await dispatcher.study_fault(2, "old 2", "another fault")
        await dispatcher.study_fault(0, "new", "the processor refuses bad.png")
        for number in (0, 2):
            assert (await dispatcher.next_report(number, 0)).study_error == "the processor refuses bad.png"
        assert (await dispatcher.next_report(1, 1)).study_error and await waiting == Verdict.PAUSE
        await dispatcher.submit(train(9))
        assert (await dispatcher.next_report(9, 0)).study_error == "the processor refuses bad.png"

    run(scenario)


def test_a_certain_fault_ends_the_study_at_once() -> None:
    async def scenario() -> None:
        dispatcher = await at_work(2)
        await dispatcher.study_fault(1, "old 1", "x.png has changed", True)
        assert (await dispatcher.next_report(0, 0)).study_error == "x.png has changed"
        assert not await dispatcher.register(0, "new")

    run(scenario)


def test_a_base_that_cannot_be_loaded_ends_the_study_once() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(2)
        await dispatcher.submit(train(0))
        for lane in (0, 1):
            assert await dispatcher.register(lane, f"g{lane}")
            await dispatcher.start_failed(lane, f"g{lane}", "no shard 2 of 3\ntrace")
        last = await dispatcher.next_report(0, 0)
        assert last.study_error.startswith("no shard 2 of 3")
        assert dispatcher.notices == ["lane 0 has ended, 1 remain: no shard 2 of 3"]

    run(scenario)


@pytest.mark.parametrize(
    ("errors", "own", "further", "ends"),
    [
        (["KeyError: 'a'"] * MAX_ALIKE, False, False, True),
        (["KeyError: 'a'"] * MAX_ALIKE, True, False, False),
        (["KeyError: 'a'"] * MAX_ALIKE, False, True, False),
        (["KeyError: 'a'"] * (MAX_ALIKE - 1), False, False, False),
        (["KeyError: 'a'", "KeyError: 'b'", "KeyError: 'a'", "KeyError: 'a'"], False, False, False),
    ],
)
def test_an_error_of_every_trial_ends_the_study(errors, own, further, ends) -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        for number, error in enumerate(errors):
            await dispatcher.submit(train(number))
            await dispatcher.next_assignment(0, f"g{number}", 0)
            if further:
                await dispatcher.progress(number, f"g{number}", {"step": 1})
            await dispatcher.fail(number, f"g{number}", f"{error}\n\ntrace {number}", own)
        assert bool(dispatcher.study_error) is ends
        if ends:
            assert dispatcher.study_error.endswith("KeyError: 'a'")

    run(scenario)


# ------------------------------------------------------------------------------------------------ several ranks


def test_a_trials_own_error_ends_it_whichever_rank_is_first() -> None:
    """Every rank says so and then asks for work; the second may come long after the first."""

    async def scenario() -> None:
        dispatcher = await at_work()
        await dispatcher.fail(0, "old 0", "its own fault", True)  # rank 1
        next_one = begin(dispatcher.next_assignment(0, "old 0", 1))
        await asyncio.sleep(0.01)
        assert (await dispatcher.next_report(0, 0)).error == "its own fault"
        await dispatcher.submit(train(1))
        assert (await next_one).number == 1
        await dispatcher.fail(0, "old 0", "its own fault", True)  # rank 0
        assert (await dispatcher.next_assignment(0, "old 0", 1)).number == 1
        assert running(dispatcher) == {0: 1} and not dispatcher.jobs[1].ended

    run(scenario)


def test_reports_within_an_epoch_are_decided_and_repeated_as_those_after_one() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(1)
        await dispatcher.submit(replace(train(0), known_epochs=0.5))  # the journal has the report at the first rung
        await dispatcher.register(0, "a")
        assert (await dispatcher.next_assignment(0, "a", 0)).number == 0
        first = begin(dispatcher.next_report(0, 0))
        assert await dispatcher.report(0, "a", 0.5, replace(report(1), progress=0.5)) == Verdict.GO_ON  # at once
        await asyncio.sleep(0.01)
        assert not first.done()
        answer = begin(dispatcher.report(0, "a", 1.5, replace(report(2), progress=1.5)))
        assert (await first).progress == 1.5 and not answer.done()
        await dispatcher.stop(0, for_good=True)
        assert await answer == Verdict.END

    run(scenario)
