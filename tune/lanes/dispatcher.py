"""The dispatcher: assigns the jobs of Ray Tune's trials to lanes, and carries reports and decisions between them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from train_fn.execution import Execution
from train_fn.jobs import EpochReport, Job, JobReport, ScoreReport, TrainJob, Verdict
from tune.lanes.job_state import JobState, first_line
from tune.lanes.lane_state import (
    MAX_CONTROLLERS,
    MAX_CONTROLLERS_IN_A_ROW,
    MAX_RENDEZVOUS,
    LaneState,
    WorkerGroup,
    describe,
)

MAX_ALIKE = 3  # trials that fail in a row with the same error, before any did a step: then the study is to blame


class Dispatcher:
    """Async actor between Ray Tune and the lanes. A study has one (`tune.lanes.trainers.start_dispatcher`).

    The protocol of a trial:

    1. Tune's side submits the job (`submit`) and asks for its first report (`next_report`).
    2. Every rank of an idle worker group asks for a job (`next_assignment`). All ranks get the same one.
    3. After each epoch (or rung) every rank calls `report`, rank 0 with the report. The call waits for a decision.
    4. `next_report` returns the report to Tune.
    5. Asking for report n + 1 is the permission to go on after report n: `report` returns GO_ON on every rank. When
       `stop` is called instead, `report` returns PAUSE or END: the ranks end the trial, and no epoch is wasted.
    6. After the last report (`finished`) nothing is waited for. The ranks ask for the next job.

    When a worker group dies, its job goes back into the queue, and the next group repeats the reports of epochs that
    Tune has; those are answered at once. Messages of a worker group that was given up change nothing.
    """

    def __init__(
        self,
        num_lanes: int,
        hang_timeout_s: float = 600,
        devices_per_trial: float = 1,
        free_gib: Mapping[str, float] | None = None,
    ) -> None:
        self.hang_timeout_s = hang_timeout_s
        self.devices_per_trial = devices_per_trial
        self.free_gib = dict(free_gib or {})  # memory beside the base, by kind of device
        self.jobs: dict[int, JobState] = {}
        self.queue: deque[JobState] = deque()
        self.lanes = [LaneState(number) for number in range(num_lanes)]
        self.given_up: set[str] = set()  # worker groups
        self.changed = asyncio.Event()  # set and replaced when a waiting call should look again
        self.watch: asyncio.Task | None = None
        self.draining = False
        self.closed = False
        self.notices: list[str] = []  # for the study's output
        self.study_error = ""  # what ended the study; no job is to blame
        self.suspected: dict[str, str] = {}  # error of data or base -> the worker group that reported it
        self.alike: tuple[str, set[int]] = ("", set())  # the last error, and the trials in a row that failed with it
        self.got_further = False  # whether any trial has done an optimizer step

    # -------------------------------------------------------------------------------- called by the study

    async def submit(self, job: Job, submission: str = "") -> None:
        """Queue a job. One that was submitted before continues: Tune has begun a new process (`submission`) for it."""
        self._keep_watch()
        if (known := self.jobs.get(job.number)) and not known.stopped:
            known.submission = submission
            return
        state = self.jobs[job.number] = JobState(job, self.devices_per_trial, submission)
        if isinstance(job, TrainJob):
            state.last_epoch = job.known_epochs
        if self.study_error:
            state.fail(self.study_error, self.study_error)
        else:
            self._enqueue(state)

    async def next_report(self, number: int, seen: int) -> JobReport:
        """A job's report after the first `seen` ones (step 5 of the protocol)."""
        return await self.jobs[number].next_report(seen)

    async def last_report(self, number: int) -> JobReport:
        """The last report of a job on whose earlier reports nobody decides."""
        return await self.jobs[number].last_report()

    async def stop(self, number: int, for_good: bool = False, submission: str | None = None) -> None:
        """End a job early: at once if its workers wait for a decision, else at its next report.

        Args:
            for_good: no session continues the job. It stays so when the job is stopped again.
            submission: of the process that stops the job; None: the study itself. One that was replaced stops nothing:
                its `stop` may come after its successor's `submit`.
        """
        if (state := self.jobs.get(number)) is None or submission not in (None, state.submission):
            return
        state.stopped, state.for_good = True, state.for_good or for_good
        if state in self.queue:
            self.queue.remove(state)
        state.decide(stop=True)

    async def stop_soon(self, number: int) -> None:
        """End a job at the user's wish: now if it waits for a lane, else at its next step (`left`) or report."""
        if state := self.jobs.get(number):
            state.unwanted = True
            if state in self.queue:
                self.queue.remove(state)
                self._enqueue(state)

    async def snapshot(self) -> dict[str, Any]:
        """What the lanes do now, see `lane_state.describe`."""
        self._keep_watch()
        return describe(self._living())

    async def close(self, drain: bool = False) -> None:
        """Let each lane end when it asks for a job and the queue is empty. With `drain`, as the study is interrupted,
        every running trial writes its state at its next step, and no lane takes another job from the queue."""
        self.closed, self.draining = True, self.draining or drain
        self._wake()

    async def next_notices(self, seen: int) -> list[str] | None:
        """Lines for the study's output after the first `seen` ones. Waits for the next; None when the study closes."""
        while seen == len(self.notices) and not self.closed:
            await self.changed.wait()
        return self.notices[seen:] or None

    async def controller_failed(self, lane_number: int, error: str, unreachable: bool = False) -> tuple[bool, Any]:
        """Record that the controller of a lane's TorchTrainer ended with an error.

        Args:
            unreachable: the lane's workers did not reach each other. That gets one more try.

        Returns: whether to start another controller, and the placement group of the lane's last workers.
        """
        lane, again = self.lanes[lane_number], False
        if not lane.ended and not self.closed:
            self._give_up(lane, error)
            lane.lost_in_a_row += 1
            lane.lost_controllers += 1
            most = MAX_RENDEZVOUS if unreachable else MAX_CONTROLLERS_IN_A_ROW
            again = lane.lost_in_a_row < most and lane.lost_controllers < MAX_CONTROLLERS
            self._notify(f"lane {lane_number} {'starts again' if again else 'is given up'}: {first_line(error)}")
        return again, lane.placement_group

    async def lane_ended(self, lane_number: int, error: str) -> None:
        """Record that a lane has ended. Its job goes to another lane, or fails if there is none."""
        lane = self.lanes[lane_number]
        if lane.ended:
            return
        lane.ended = True
        living = self._living()
        if error and living and not self.closed:
            self._notify(f"lane {lane_number} has ended, {len(living)} remain: {first_line(error)}")
        self._give_up(lane, error)
        if not living:
            self._end_study(error or "all lanes have ended")

    # -------------------------------------------------------------------------------- called by the workers

    async def register(self, lane_number: int, group: str, placement_group: Any = None) -> bool:
        """Register a new worker group, whose predecessor must be dead by now. Every rank calls it.

        Returns: whether it should load the base: not when the lane or this group was given up.
        """
        self._keep_watch()
        lane = self.lanes[lane_number]
        lane.placement_group = placement_group
        if not lane.has(group) and group not in self.given_up:
            if lane.group and not lane.group.is_ready:
                await self.start_failed(
                    lane_number, lane.group.id, f"the workers of lane {lane_number} died as they started"
                )
            else:
                self._give_up(lane, "its worker group died")
            if not lane.ended:
                lane.group, lane.empty_since = WorkerGroup(group), None
        return lane.has(group) and not self.study_error

    async def agree_memory(self, device: str, free_gib: float) -> float:
        """GiB of memory beside the base on this kind of device: what the first worker of the study read on one."""
        return self.free_gib.setdefault(device, free_gib)

    async def start_failed(self, lane_number: int, group: str, error: str) -> None:
        """Record that a worker group could not load the base. Each of its ranks may call it.

        A lane that has worked before gets a second try.
        """
        lane = self.lanes[lane_number]
        if not lane.has(group):
            return
        self._give_up(lane, error)
        lane.failed_starts += 1
        if not lane.has_worked or lane.failed_starts > 1:
            await self.lane_ended(lane_number, error)
        else:
            self._notify(f"lane {lane_number} starts again: {first_line(error)}")

    async def heartbeat(
        self, lane_number: int, group: str, rank: int, actor: bytes, progress: int
    ) -> tuple[bool, int | None]:
        """Record a heartbeat: the worker's pickled handle, and a counter that rises as it makes progress. Returns
        whether the worker must shut down, and the number of the job that it must leave (see `left`), if any."""
        self._keep_watch()
        lane = self.lanes[lane_number]
        if lane.ended or group in self.given_up:
            return True, None
        if lane.group is not None and lane.has(group):
            lane.group.beat(rank, actor, progress, busy=lane.job is not None and lane.job.pending is None)
        if self.queue:
            self._wake()
        return self.draining, lane.job.job.number if lane.job and lane.job.unwanted else None

    async def left(self, number: int, group: str) -> bool:
        """Record that a rank has left a job at a step. Returns whether the user has stopped the job; all ranks leave it
        then, and take the next one."""
        state = self.jobs[number]
        if state.unwanted and self._lane_of(number, group):
            state.fail("", stopped=True)
        return state.unwanted

    async def next_assignment(self, lane_number: int, group: str, index: int) -> Job | None:
        """The next job of a worker group (step 2 of the protocol); None: there is no more."""
        lane = self.lanes[lane_number]
        if lane.ended or group in self.given_up:
            return None
        if not lane.has(group):
            self._give_up(lane, "its worker group died")
            lane.group, lane.empty_since = WorkerGroup(group), None
        workers = lane.group
        assert workers is not None
        workers.is_ready = lane.has_worked = True
        lane.failed_starts = lane.lost_in_a_row = 0
        if index not in workers.assignments:
            workers.assignments[index] = asyncio.get_running_loop().create_future()
            workers.assignments[index].set_result(await self._take(lane, workers))
        return await workers.assignments[index]

    async def report(self, number: int, group: str, epoch: float, report: EpochReport | ScoreReport | None) -> Verdict:
        """Receive a job's report from rank 0, and None from the others (step 3)."""
        if self._lane_of(number, group) is None:
            return Verdict.PAUSE
        return await self.jobs[number].receive(group, epoch, report)

    async def progress(self, number: int, group: str, message: dict[str, Any]) -> None:
        """Record a trial's progress, from rank 0."""
        if self._lane_of(number, group):
            self.jobs[number].progress = message
            self.got_further |= message.get("step", 0) > 0

    async def fail(self, number: int, group: str, error: str, own: bool = False) -> None:
        """End a job with an error, which any rank may report. The job is not tried again.

        Args:
            own: only the trial's settings can have caused the error. Another error ends the study when `MAX_ALIKE`
                trials in a row fail with it before any trial has done an optimizer step.
        """
        lane, state = self._lane_of(number, group), self.jobs[number]
        if lane is None or lane.group is None or lane.group.failure is not None or state.ended:
            return  # another rank has reported the reason
        state.fail(error)
        first = lane.group.failure = first_line(error)
        trials = self.alike[1] if first == self.alike[0] else set()
        self.alike = first, trials | {number}
        if len(self.alike[1]) >= MAX_ALIKE and not own and not self.got_further:
            self._end_study(f"{MAX_ALIKE} trials in a row failed alike before any trial had got further: {first}")

    async def interrupted(self, lane_number: int, group: str, reason: str, free: bool) -> None:
        """Record that a worker group ends and its trial is not to blame. Another group continues the trial. If `free`,
        the loss does not count as an attempt."""
        lane = self.lanes[lane_number]
        if lane.group and lane.has(group) and lane.job and lane.group.failure is None:
            lane.group.failure = reason
            lane.job.attempts -= free
            if self.draining:
                lane.job = None  # no group continues it in this session

    async def study_fault(self, lane_number: int, group: str, error: str, certain: bool = False) -> None:
        """Report an error in what all trials share: the data or the base.

        The study ends when a second worker group reports the same error, or at once if the error is `certain`. Until
        then the trial is tried again.
        """
        if not self.lanes[lane_number].has(group):
            return
        if certain or self.suspected.get(error, group) != group:
            self._end_study(error)
        else:
            self.suspected[error] = group
            await self.interrupted(lane_number, group, error, False)

    async def out_of_memory(
        self, number: int, group: str, error: str, in_step: bool, used: Execution | None, less: Execution | None
    ) -> None:
        """Start a trial again in a way that takes less memory, because a rank ran out of memory.

        Several ranks may report the same error. A trial for which no smaller way is left fails.

        Args:
            in_step: the error came in a training step. Later trials on this lane then know of it.
            used: how the trial's steps were computed.
            less: the next way that takes less memory.
        """
        lane, state = self._lane_of(number, group), self.jobs[number]
        if lane is None or lane.group is None or state.ended or state.stopped:
            return
        job = state.job
        if not isinstance(job, TrainJob):
            state.fail(f"out of memory while scoring a single image\n\n{error}")
            return
        lane.job, lane.group.failure = None, "out of memory"
        if in_step and used and less:
            lane.too_large.append((job.settings, used))
        if state.shrink(job, used, less, error):
            self._enqueue(state)

    # -------------------------------------------------------------------------------- jobs

    def _enqueue(self, state: JobState) -> None:
        if state.unwanted:
            state.fail("", stopped=True)
        else:
            self.queue.append(state)
        self._wake()

    async def _take(self, lane: LaneState, group: WorkerGroup) -> Job | None:
        """The next job from the queue, once there is one; None when the group should end."""
        lane.job = group.failure = None
        while not self.queue or self.draining or group.is_silent():
            if self.draining or (self.closed and not self.queue):
                return None
            await self.changed.wait()
            if lane.group is not group:
                return None
        state = self.queue.popleft()
        if isinstance(state.job, TrainJob):
            state.job = replace(state.job, too_large=tuple(lane.too_large))
        state.attempts += 1
        state.started_at = time.monotonic()
        lane.job = state
        return state.job

    def _lane_of(self, number: int, group: str) -> LaneState | None:
        """The lane on which this worker group has the job."""
        state = self.jobs[number]
        return next((lane for lane in self.lanes if lane.has(group) and lane.job is state), None)

    def _end_study(self, error: str) -> None:
        """End every job for an error that no hyperparameter can fix. A resumed study runs them again."""
        self.study_error = self.study_error or error
        self.queue.clear()
        for state in self.jobs.values():
            if not state.stopped:
                state.fail(error, self.study_error)
            state.decide(stop=True)
        self._wake()

    # -------------------------------------------------------------------------------- lanes

    def _living(self) -> list[LaneState]:
        return [lane for lane in self.lanes if not lane.ended]

    def _give_up(self, lane: LaneState, reason: str) -> None:
        """Mark a lane's worker group as dead: queue its job again and ignore its later messages."""
        group, lane.group = lane.group, None
        if group is not None:
            self.given_up.add(group.id)
            lane.empty_since = time.monotonic()
            reason = reason if group.failure is None else group.failure
            if group.is_ready and not lane.ended and not self.closed:
                self._notify(f"lane {lane.number} starts new workers: {first_line(reason)}")
        state, lane.job = lane.job, None
        if state and not state.ended and not state.stopped:
            problem = state.lose(reason)
            if problem and self._living():
                state.fail(problem)
            else:
                self._enqueue(state)
        self._wake()

    def _keep_watch(self) -> None:
        """Start the watch, or start it again after an error in it."""
        if self.watch is not None and self.watch.done() and not self.watch.cancelled():
            self._notify(f"the watch over the lanes starts again after an error: {self.watch.exception()!r}")
        if self.watch is None or self.watch.done():
            self.watch = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        """Every second, end workers that hang, which would hold their lane for ever, and mention slow starts."""
        while True:
            await asyncio.sleep(min(1.0, self.hang_timeout_s / 4))
            for lane in self._living():
                if lane.group and (hang := lane.group.hang(self.hang_timeout_s)):
                    await self._end_workers(lane, lane.group, *hang)
                elif lane.group and await lane.group.is_lost():
                    self._give_up(lane, "its node or its workers are gone")
                elif sentence := lane.slow_start():
                    self._notify(sentence)

    async def _end_workers(self, lane: LaneState, group: WorkerGroup, ranks: list[int], reason: str) -> None:
        """Kill workers of a lane. Ray then ends the others of their group and starts new ones."""
        for problem in group.kill(ranks):
            self._notify(f"a worker of lane {lane.number} could not be ended: {problem}")
        if group.is_ready:
            self._give_up(lane, reason)
        else:
            await self.start_failed(lane.number, group.id, f"lane {lane.number} could not start: {reason}")

    def _notify(self, text: str) -> None:
        self.notices.append(text)
        self._wake()

    def _wake(self) -> None:
        """Let every waiting call look again."""
        self.changed.set()
        self.changed = asyncio.Event()
