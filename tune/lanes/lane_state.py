"""A lane in the dispatcher: its worker group, and the signs that the group is dead, hung or slow."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import ray

from train_fn.execution import Execution
from train_fn.jobs import Job
from train_fn.settings import TrialSettings
from tune.lanes.job_state import JobState

MAX_CONTROLLERS = 20  # lost controllers of one lane; no job is to blame for them
MAX_CONTROLLERS_IN_A_ROW = 3  # of those, without a worker group that asked for a job in between
MAX_RENDEZVOUS = 2  # of those, where the workers did not reach each other: each takes two minutes
SILENT_S = 5.0  # without a heartbeat; then a worker group gets no job, since it may be dead
ANSWER_S = 1.0  # for a worker to answer that it lives
LOST_S = 15.0  # without a heartbeat; then Ray is asked whether the worker is dead
SLOW_START_S = 60.0  # after this, the study's output mentions a lane that still loads the base
NO_WORKERS_S = 120.0  # and after this, a lane that has no workers
LONGEST_START_S = 1800.0  # of loading the base; the time-out for hangs if that is longer


@dataclass
class Heartbeat:
    """The last heartbeat of a worker."""

    actor: bytes  # its handle, pickled
    received_at: float
    progress: int  # the worker's counter of progress
    progressed_at: float  # when the counter last rose, or the worker had nothing to do


@dataclass(eq=False)
class WorkerGroup:
    """The processes that run a lane's jobs together."""

    id: str
    started_at: float = field(default_factory=time.monotonic)
    is_ready: bool = False  # whether it has loaded the base and asked for a job
    failure: str | None = None  # why it is about to end, from the first rank that reported an error
    heartbeats: dict[int, Heartbeat] = field(default_factory=dict)  # by rank
    assignments: dict[int, asyncio.Future[Job | None]] = field(default_factory=dict)  # by assignment index
    slow_start_noted: bool = False

    def beat(self, rank: int, actor: bytes, progress: int, busy: bool) -> None:
        """Record a heartbeat. busy: the group has a job and waits for no decision."""
        now, last = time.monotonic(), self.heartbeats.get(rank)
        stands_still = busy and last is not None and last.progress == progress
        self.heartbeats[rank] = Heartbeat(actor, now, progress, last.progressed_at if last and stands_still else now)

    def is_silent(self) -> bool:
        """Whether a rank's heartbeat is overdue."""
        now = time.monotonic()
        return any(now - last.received_at > SILENT_S for last in self.heartbeats.values())

    async def is_lost(self) -> bool:
        """Whether heartbeats have stopped and Ray says that the worker is dead.

        The group's successor would show it, too. But when a node is lost and no other one is free, there is none. A
        group that has not loaded the base has no job that could go elsewhere.
        """
        now = time.monotonic()
        unheard = [last for last in self.heartbeats.values() if self.is_ready and now - last.received_at > LOST_S]
        for last in unheard:
            try:
                await asyncio.wait_for(ray.cloudpickle.loads(last.actor).__ray_ready__.remote(), ANSWER_S)
            except ray.exceptions.ActorDiedError:
                return True
            except (TimeoutError, ray.exceptions.RayError):  # it lives and is busy, or cannot be reached now
                continue
        return False

    def kill(self, ranks: list[int]) -> list[str]:
        """Kill some of the workers. Returns why it was impossible, for each where it was."""
        problems = []
        for rank in ranks:
            try:
                ray.kill(ray.cloudpickle.loads(self.heartbeats.pop(rank).actor))
            except (ValueError, ray.exceptions.RayError) as error:  # no longer an actor that can be killed
                problems.append(str(error))
        return problems

    def hang(self, timeout_s: float) -> tuple[list[int], str] | None:
        """Ranks that must be killed, and the reason: they send no heartbeat, make no progress with a job, or take too
        long to load the base."""
        now, longest_start_s = time.monotonic(), max(LONGEST_START_S, timeout_s)
        for rank, last in self.heartbeats.items():
            if now - min(last.received_at, last.progressed_at) > timeout_s:
                return [rank], f"its rank {rank} gave no sign of work for {timeout_s:g} s"
        if self.is_ready or now - self.started_at <= longest_start_s:
            return None
        reason = f"its base was not loaded after {longest_start_s:g} s (--hang-timeout can be more)"
        return list(self.heartbeats), reason


@dataclass(eq=False)
class LaneState:
    """What the dispatcher knows of one lane."""

    number: int
    group: WorkerGroup | None = None
    empty_since: float | None = field(default_factory=time.monotonic)
    """Since when it has no worker group; None: it has one, or the study's output has mentioned the lack."""
    placement_group: Any = None  # the placement group of its last worker group
    job: JobState | None = None
    too_large: list[tuple[TrialSettings, Execution]] = field(default_factory=list)
    """Trials that ran out of its memory, and how they were computed."""
    has_worked: bool = False  # whether any of its worker groups was ready
    failed_starts: int = 0  # since a worker group was last ready
    lost_in_a_row: int = 0  # controllers lost since a worker group was last ready
    lost_controllers: int = 0
    ended: bool = False

    def has(self, group: str) -> bool:
        """Whether this is its living worker group."""
        return self.group is not None and self.group.id == group

    def slow_start(self) -> str:
        """A sentence when the lane waits long for workers or for the base, once; else empty."""
        now, group = time.monotonic(), self.group
        if group is None and self.empty_since is not None and now - self.empty_since > NO_WORKERS_S:
            self.empty_since = None
            waits = "it waits for free resources, or its workers do not reach each other"
            return f"lane {self.number} has had no workers for {NO_WORKERS_S:g} s: {waits}"
        if group and not group.is_ready and not group.slow_start_noted and now - group.started_at > SLOW_START_S:
            group.slow_start_noted = True
            return f"lane {self.number} has been loading the base for {SLOW_START_S:g} s"
        return ""


def describe(living: list[LaneState]) -> dict[str, Any]:
    """What the lanes do now: number of `lanes`, of those that are `starting`, and for each `running` job its label, its
    seconds so far and, once training has begun, its progress."""
    starting = sum(not (lane.group and lane.group.is_ready) for lane in living)
    states = [lane.job for lane in living if lane.job]
    running: list[dict[str, Any]] = [
        {"label": state.job.label or f"trial {state.job.number}", "seconds": state.lane_s} | state.progress
        for state in states
    ]
    return {"lanes": len(living), "starting": starting, "running": running}
