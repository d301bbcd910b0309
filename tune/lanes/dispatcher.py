"""The dispatcher: a queue of assignments between Ray Tune and the lanes."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
import ray.tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tune.lanes.memory import OUT_OF_MEMORY_ADVICE, halve, takes_as_much

if TYPE_CHECKING:
    from tune.lanes.layout import Layout


# How often a trial is begun that loses its worker group by no known fault of its own, and gets no further.
MAX_ATTEMPTS = 3
MAX_CONTROLLERS = 20  # of one lane, lost ones; no trial is to blame for them
MAX_CONTROLLERS_IN_A_ROW = 3  # without a worker group that asked for work in between
MAX_ALIKE = 3  # trials that fail with the same error before any trial has got further: the study is to blame
SILENT_S = 5.0  # without a heartbeat: a worker group that is handed no trial, since it may be dead
SLOW_START_S = 60.0  # after this, a lane that still loads the base is mentioned
NO_WORKERS_S = 120.0  # and one that has no workers
LONGEST_START_S = 1800.0  # of loading the base; the time-out for hangs if that is longer


@dataclass
class Ticket:
    """One trial (or scoring job) between the study and a lane."""

    assignment: dict[str, Any]
    reports: list[dict[str, Any]] = field(default_factory=list)
    told: asyncio.Event = field(default_factory=asyncio.Event)  # set when there is a new report
    verdicts: dict[tuple[str, int], asyncio.Future] = field(default_factory=dict)
    open_verdict: tuple[str, int] | None = None  # a report whose sender waits for the answer
    last_epoch: int = 0
    attempts: int = 0
    furthest: int = 0  # optimizer step to which any attempt came
    stopped: bool = False
    ended: bool = False
    spent_s: float = 0.0  # of attempts that were lost
    taken_at: float | None = None
    progress: dict[str, Any] = field(default_factory=dict)  # of this attempt, as `run_trial` tells it

    def lane_s(self) -> float:
        """Seconds of a lane so far, lost attempts included."""
        return self.spent_s + (time.monotonic() - self.taken_at if self.taken_at is not None else 0.0)

    def let_go(self) -> None:
        """No lane has it any more."""
        self.spent_s, self.taken_at, self.progress = self.lane_s(), None, {}


class Heartbeat(NamedTuple):
    """The last heartbeat of a worker."""

    group: str
    actor: Any
    when: float
    beats: int
    moved: float  # when it last had got further, or had nothing to do


@dataclass
class Start:
    """A worker group that loads the base and has not asked for work yet."""

    group: str
    since: float
    mentioned: bool = False


class Dispatcher:
    """Async actor: a queue of assignments on one side, reports on the other. The study makes one (`start_dispatcher`).

    A report is answered only when its trial has been told to go on (Tune asks for the next report) or to stop, so an
    early stop wastes no compute. All ranks of a group ask, and get the same answer. What comes from a worker group that
    has been given up changes nothing.
    """

    def __init__(
        self, num_lanes: int, workers_per_trial: int = 1, hang_timeout_s: float = 600, devices_per_trial: float = 1
    ) -> None:
        now = time.monotonic()
        self.workers_per_trial = workers_per_trial
        self.devices_per_trial = devices_per_trial  # of which seconds are counted
        self.tickets: dict[int, Ticket] = {}
        self.queue: deque[int] = deque()
        self.changed = asyncio.Event()  # set and replaced when a waiting question may have an answer
        self.assigned: dict[tuple[str, int], asyncio.Future] = {}
        self.running: dict[int, int] = {}  # lane -> number
        self.groups: dict[int, str] = {}  # lane -> its living worker group, once that has asked for work
        self.starts: dict[int, Start] = {}  # lane -> its worker group that loads the base
        self.empty_since = {lane: now for lane in range(num_lanes)}  # lanes without any worker group
        self.given_up: set[str] = set()  # worker groups
        self.lanes = set(range(num_lanes))
        self.worked: set[int] = set()  # lanes of which a worker group has asked for work
        self.too_large: dict[int, list[dict[str, Any]]] = {lane: [] for lane in self.lanes}  # settings that did not fit
        self.failed_starts: dict[int, int] = {}  # by lane, since a worker group last asked for work
        self.lost_controllers: dict[int, list[int]] = {lane: [0, 0] for lane in self.lanes}  # in a row, and in all
        self.closed = False
        self.last_error = ""
        self.study_error = ""  # what ended the study, for no trial is to blame
        self.suspected: dict[str, str] = {}  # error -> the worker group that met it outside any trial's settings
        self.alike: tuple[str, set[int]] = ("", set())  # the last error, and the trials in a row that it ended
        self.got_further = False  # whether any trial has
        self.hang_timeout_s = hang_timeout_s
        self.heartbeats: dict[tuple[int, int], Heartbeat] = {}  # by lane and rank
        self.watch: asyncio.Task | None = None
        self.leaving = False
        self.reasons: dict[int, str] = {}  # why a lane's group is about to end
        self.places: dict[int, Any] = {}  # lane -> the placement group of its last worker group
        self.notices: list[str] = []  # for the study's output

    # -------------------------------------------------------------------------------- the study's side

    async def submit(self, number: int, assignment: dict[str, Any]) -> None:
        """Queue a trial or a scoring job under a number of its own. One that is known already goes on: its Tune process
        was lost, and the new one asks for its reports again."""
        self._keep_watch()
        if number in self.tickets and not self.tickets[number].stopped:
            return
        self.tickets[number] = Ticket(assignment | {"number": number}, last_epoch=assignment.get("known_epochs", 0))
        if self.lanes and not self.study_error:
            self._enqueue(number)
        else:
            self._error(number, self.study_error or self.last_error)

    async def next_report(self, number: int, seen: int) -> dict[str, Any]:
        """The trial's report after those `seen`; asking for one that is not there yet tells the lane to go on.
        {"error": ...} ends a trial; with "study_error" it says what ends the study, and the trial is not to blame."""
        ticket = self.tickets[number]
        if seen == len(ticket.reports):
            self._answer(ticket, stop=False)
        while seen == len(ticket.reports):
            ticket.told.clear()
            await ticket.told.wait()
        return ticket.reports[seen]

    async def last_report(self, number: int) -> dict[str, Any]:
        """A job's last report: nobody decides on those before."""
        report: dict[str, Any] = {"done": False}
        seen = 0
        while not report.get("done") and "error" not in report:
            report, seen = await self.next_report(number, seen), seen + 1
        return report

    async def stop(self, number: int) -> None:
        """End a trial early: at once if its lane waits for an answer, else at its next report."""
        if (ticket := self.tickets.get(number)) is None:
            return
        ticket.stopped = True
        if number in self.queue:
            self.queue.remove(number)
        self._answer(ticket, stop=True)

    async def snapshot(self) -> dict[str, Any]:
        """What the lanes do now: how many there are, how many of them are `starting`, and of each that is `running`
        something its label, the seconds so far and, when training has begun, its progress."""
        self._keep_watch()
        running = []
        for _, number in sorted(self.running.items()):
            ticket = self.tickets[number]
            label = ticket.assignment.get("label", f"trial {number}")
            running.append({"label": label, "seconds": ticket.lane_s()} | ticket.progress)
        return {"lanes": len(self.lanes), "starting": len(self.lanes - self.groups.keys()), "running": running}

    async def leave(self) -> None:
        """The study is interrupted: every running trial checkpoints at its next step, and no lane begins another."""
        self.leaving = True
        await self.close()

    async def close(self) -> None:
        """No more assignments: lanes end when they ask next."""
        self.closed = True
        self._wake()

    async def next_notices(self, seen: int) -> list[str] | None:
        """What the study's output should say of its lanes, after `seen` notices; None when the study closes."""
        while seen == len(self.notices) and not self.closed:
            changed = self.changed
            await changed.wait()
        return self.notices[seen:] or None

    # -------------------------------------------------------------------------------- the lanes' side

    async def next_assignment(self, lane: int, group: str, turn: int) -> dict[str, Any] | None:
        """What a worker group does next; None: nothing more. A group not seen before means the old one was lost."""
        if group in self.given_up or lane not in self.lanes:
            return None
        if self.groups.get(lane) != group:
            self._give_up(lane, "its worker group died")
            self.groups[lane] = group
            self.worked.add(lane)
            self.starts.pop(lane, None)
            self.empty_since.pop(lane, None)
            self.failed_starts.pop(lane, None)
            self.lost_controllers[lane][0] = 0
        key = (group, turn)
        if key not in self.assigned:
            self.assigned[key] = asyncio.get_running_loop().create_future()
            self.assigned[key].set_result(await self._take(lane, group))
        return await self.assigned[key]

    async def report(self, number: int, group: str, epoch: int, message: dict[str, Any] | None) -> bool:
        """A trial's report from rank 0 (other ranks send None); True: stop now."""
        ticket = self.tickets[number]
        if self._lane_of(number, group) is None:
            return True
        verdict = ticket.verdicts.setdefault((group, epoch), asyncio.get_running_loop().create_future())
        if message is not None and not verdict.done():
            if ticket.stopped or ticket.ended:
                verdict.set_result(True)
            elif epoch <= ticket.last_epoch:  # begun again after a loss: Tune knows this epoch already
                verdict.set_result(False)
            else:
                ticket.last_epoch = epoch
                ticket.open_verdict = (group, epoch)
                self.got_further = True
                self._tell(ticket, message | {"device_s": ticket.lane_s() * self.devices_per_trial})
                if message["done"]:
                    ticket.ended = True
                    self._answer(ticket, stop=False)
        return await verdict

    async def progress(self, number: int, group: str, message: dict[str, Any]) -> None:
        """How far a trial is, from rank 0."""
        if self._lane_of(number, group) is not None:
            self.tickets[number].progress = message
            self.got_further |= message.get("step", 0) > 0

    async def pulse(self, lane: int, group: str, rank: int, actor: Any, beats: int) -> bool:
        """Record a worker's heartbeat and how far its work has come. Returns True if the worker must shut down."""
        self._keep_watch()
        if group in self.given_up or lane not in self.lanes:
            return True
        now, last = time.monotonic(), self.heartbeats.get((lane, rank))
        busy = lane in self.running and self.tickets[self.running[lane]].open_verdict is None
        stands = busy and last is not None and (last.group, last.beats) == (group, beats)
        self.heartbeats[lane, rank] = Heartbeat(group, actor, now, beats, last.moved if last and stands else now)
        if self.queue:
            self._wake()
        return self.leaving

    async def interrupted(self, lane: int, group: str, reason: str, free: bool) -> None:
        """A worker group ends by no fault of its trial, which goes on elsewhere. free: at no cost of its attempts."""
        if self.groups.get(lane) == group and lane in self.running and lane not in self.reasons:
            self.reasons[lane] = reason
            self.tickets[self.running[lane]].attempts -= free
            if self.leaving:
                self.running.pop(lane)  # nobody takes it on

    async def fail(self, number: int, group: str, error: str, own: bool = False) -> None:
        """End a trial with an error, reported by any rank. It is not tried again.

        Args:
            own: only the trial's settings can have caused the error. Another error ends the study when `MAX_ALIKE`
                trials in a row fail with it before any trial has reported progress.
        """
        lane = self._lane_of(number, group)
        if lane is None or self.tickets[number].ended or lane in self.reasons:  # another rank has said why
            return
        self._error(number, error)
        first = self.reasons[lane] = first_line(error)
        trials = self.alike[1] if first == self.alike[0] else set()
        self.alike = first, trials | {number}
        if len(self.alike[1]) >= MAX_ALIKE and not own and not self.got_further:
            self._end_study(f"{MAX_ALIKE} trials in a row failed alike before any trial had got further: {first}")

    async def study_fault(self, lane: int, group: str, error: str, certain: bool = False) -> None:
        """Report an error in what all trials share: the data or the base.

        The study ends when a second worker group reports the same error, or at once if the error is `certain`. Until
        then the trial is tried again.
        """
        if self.groups.get(lane) != group:
            return
        if certain or self.suspected.get(error, group) != group:
            self._end_study(error)
        else:
            self.suspected[error] = group
            await self.interrupted(lane, group, error, False)

    async def out_of_memory(self, number: int, group: str, error: str, in_step: bool) -> None:
        """A rank ran out of memory: the trial begins again with half the micro-batch and the same global batch.

        Several ranks of a group may tell of the same one. A micro-batch of one that still does not fit fails the trial.
        in_step: in a training step, so that on this lane no trial as large need try the same.
        """
        ticket, lane = self.tickets[number], self._lane_of(number, group)
        if ticket.ended or ticket.stopped or lane is None:
            return
        if "settings" not in ticket.assignment:
            self._error(number, f"out of memory while scoring a single image\n\n{error}")
            return
        del self.running[lane]
        self.reasons[lane] = "out of memory"
        ticket.let_go()
        if ticket.assignment["settings"]["per_device_train_batch_size"] == 1:
            self._error(number, f"out of memory with one image a step. {OUT_OF_MEMORY_ADVICE}\n\n{error}")
            return
        if in_step:
            self.too_large[lane].append(ticket.assignment["settings"])
        halve(ticket.assignment, "out of memory")
        ticket.attempts -= 1
        self._answer(ticket, stop=True)
        self._enqueue(number)

    async def wants(self, lane: int, group: str = "", place: Any = None) -> bool:
        """Register a new worker group. Returns whether it should load the base: not when its lane has been given up.

        The lane's previous group must be dead by now.
        """
        self._keep_watch()
        self.places[lane] = place
        start = self.starts.get(lane)
        if group not in (self.groups.get(lane), start and start.group) and group not in self.given_up:
            self._give_up(lane, "its worker group died")
            if start is not None:
                self._start_failed(lane, start.group, f"the workers of lane {lane} died as they started")
            if lane in self.lanes:
                self.starts[lane] = Start(group, time.monotonic())
                self.empty_since.pop(lane, None)
        return lane in self.lanes and group not in self.given_up and not self.study_error

    async def place(self, lane: int) -> Any:
        """The placement group that the lane's last worker group had."""
        return self.places.get(lane)

    async def start_failed(self, lane: int, group: str, error: str) -> None:
        """A worker group could not load its base; each of its ranks may say so."""
        self._start_failed(lane, group, error)

    async def controller_failed(self, lane: int, error: str) -> bool:
        """The controller of a lane's TorchTrainer has ended with an error. Returns True if a new one shall start."""
        if lane not in self.lanes or self.closed:
            return False
        self._give_up(lane, error)
        self.starts.pop(lane, None)
        self.empty_since[lane] = time.monotonic()
        count = self.lost_controllers[lane] = [number + 1 for number in self.lost_controllers[lane]]
        again = count[0] < MAX_CONTROLLERS_IN_A_ROW and count[1] < MAX_CONTROLLERS
        self._notice(f"lane {lane} {'starts again' if again else 'is given up'}: {first_line(error)}")
        return again

    async def lane_ended(self, lane: int, error: str) -> None:
        """A lane's TorchTrainer has come to its end; what it ran goes to another lane, or fails if there is none."""
        self._lane_ended(lane, error)

    # -------------------------------------------------------------------------------- within

    def _lane_of(self, number: int, group: str) -> int | None:
        """The lane on which this very worker group has the trial."""
        lanes = (lane for lane, running in self.running.items() if running == number)
        return next((lane for lane in lanes if self.groups.get(lane) == group), None)

    def _keep_watch(self) -> None:
        """Start the watch, or start it again after an error in it."""
        if self.watch is not None and self.watch.done() and not self.watch.cancelled():
            self._notice(f"the watch over the lanes starts again after an error: {self.watch.exception()!r}")
        if self.watch is None or self.watch.done():
            self.watch = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        """Every second, end workers that send no heartbeat, make no progress with a trial, or take too long to load the
        base: they would hold their lane for ever. Mention lanes that start slowly."""
        longest = max(LONGEST_START_S, self.hang_timeout_s)
        while True:
            await asyncio.sleep(min(1.0, self.hang_timeout_s / 4))
            now = time.monotonic()
            for (lane, rank), last in list(self.heartbeats.items()):
                start = self.starts.get(lane)
                if last.group not in (self.groups.get(lane), start and start.group) or lane not in self.lanes:
                    self.heartbeats.pop((lane, rank), None)
                elif now - min(last.when, last.moved) > self.hang_timeout_s:
                    self._end_workers(lane, f"its rank {rank} gave no sign of work for {self.hang_timeout_s:g} s", rank)
            for lane, start in list(self.starts.items()):
                if now - start.since > longest:
                    self._end_workers(lane, f"its base was not loaded after {longest:g} s (--hang-timeout can be more)")
                elif now - start.since > SLOW_START_S and not start.mentioned:
                    start.mentioned = True
                    self._notice(f"lane {lane} has been loading the base for {SLOW_START_S:g} s")
            for lane, since in list(self.empty_since.items()):
                if now - since > NO_WORKERS_S and lane in self.lanes:
                    self.empty_since[lane] = math.inf  # mentioned
                    self._notice(
                        f"lane {lane} has had no workers for {NO_WORKERS_S:g} s: it waits for free resources, or its "
                        f"workers do not reach each other"
                    )

    def _end_workers(self, lane: int, reason: str, rank: int | None = None) -> None:
        """Kill a lane's workers, or the one that hangs: Ray then ends the others and starts new ones."""
        start = self.starts.get(lane)
        for key, last in list(self.heartbeats.items()):
            if key[0] == lane and rank in (None, key[1]):
                del self.heartbeats[key]
                try:
                    ray.kill(last.actor)
                except (ValueError, ray.exceptions.RayError) as error:  # no longer an actor that can be killed
                    self._notice(f"a worker of lane {lane} could not be ended: {error}")
        if start is not None:
            self._start_failed(lane, start.group, f"lane {lane} could not start: {reason}")
        else:
            self._give_up(lane, reason)

    def _give_up(self, lane: int, reason: str) -> None:
        """Mark a lane's worker group as dead: put its trial back in the queue and ignore its later messages."""
        reason = self.reasons.pop(lane, reason)
        if group := self.groups.pop(lane, None):
            self.given_up.add(group)
            self.empty_since[lane] = time.monotonic()
            if lane in self.lanes and not self.closed:
                self._notice(f"lane {lane} starts new workers: {first_line(reason)}")
        if lane in self.running:
            self._lost(lane, reason)
        self._wake()

    def _start_failed(self, lane: int, group: str, error: str) -> None:
        """Count a failed start. A lane that has worked before may have had bad luck, once."""
        if group in self.given_up:
            return
        self.given_up.add(group)
        self.starts.pop(lane, None)
        self.empty_since[lane] = time.monotonic()
        self.failed_starts[lane] = self.failed_starts.get(lane, 0) + 1
        if lane not in self.worked or self.failed_starts[lane] > 1:
            self._lane_ended(lane, error)
        else:
            self._notice(f"lane {lane} starts again: {first_line(error)}")

    def _lane_ended(self, lane: int, error: str) -> None:
        if lane not in self.lanes:
            return
        self.lanes.discard(lane)
        self.last_error = error or "all lanes have ended"
        if error and self.lanes and not self.closed:
            self._notice(f"lane {lane} has ended, {len(self.lanes)} remain: {first_line(error)}")
        self.reasons.setdefault(lane, error)
        self._give_up(lane, error)
        self.starts.pop(lane, None)
        self.empty_since.pop(lane, None)
        if not self.lanes:
            self._end_study(self.last_error)

    def _end_study(self, error: str) -> None:
        """End every trial for an error that no hyperparameter can fix. A resumed study runs them again."""
        self.study_error = self.study_error or error
        self.queue.clear()
        for number, ticket in self.tickets.items():
            if not ticket.stopped:
                self._error(number, error)
            self._answer(ticket, stop=True)
        self._wake()

    def _notice(self, text: str) -> None:
        self.notices.append(text)
        self._wake()

    def _wake(self) -> None:
        """Let every waiting question look again."""
        self.changed.set()
        self.changed = asyncio.Event()

    def _may_be_dead(self, lane: int, group: str) -> bool:
        """Whether a rank's heartbeat is overdue."""
        now = time.monotonic()
        beats = [last for (of, _), last in self.heartbeats.items() if of == lane and last.group == group]
        return any(now - last.when > SILENT_S for last in beats)

    async def _take(self, lane: int, group: str) -> dict[str, Any] | None:
        self.running.pop(lane, None)
        self.reasons.pop(lane, None)
        while not self.queue or self.leaving or self._may_be_dead(lane, group):
            if self.leaving or (self.closed and not self.queue):
                return None
            changed = self.changed
            await changed.wait()
            if self.groups.get(lane) != group:
                return None
        number = self.queue.popleft()
        ticket = self.tickets[number]
        settings = ticket.assignment.get("settings", {})
        while any(takes_as_much(settings, known) for known in self.too_large[lane]):
            halve(ticket.assignment, "an earlier trial of this size ran out of memory here")
            settings = ticket.assignment["settings"]
        ticket.attempts += 1
        ticket.taken_at = time.monotonic()
        self.running[lane] = number
        return ticket.assignment

    def _enqueue(self, number: int) -> None:
        self.queue.append(number)
        self._wake()

    def _lost(self, lane: int, reason: str) -> None:
        number = self.running.pop(lane)
        ticket = self.tickets[number]
        if ticket.ended or ticket.stopped:
            return
        step = ticket.progress.get("step", 0)
        if step > ticket.furthest:  # further than ever: the losses so far say nothing against it
            ticket.furthest, ticket.attempts = step, 1
        ticket.let_go()
        self._answer(ticket, stop=True)  # ranks that still wait for an answer belong to the dead group
        if ticket.attempts >= MAX_ATTEMPTS and self.lanes:
            self._error(number, f"lost {ticket.attempts} times, last because {reason}")
        else:
            self._enqueue(number)

    def _error(self, number: int, error: str) -> None:
        ticket = self.tickets[number]
        if not ticket.ended:
            ticket.ended = True
            report = {"error": error, "device_s": ticket.lane_s() * self.devices_per_trial}
            self._tell(ticket, report | ({"study_error": self.study_error} if self.study_error else {}))

    @staticmethod
    def _tell(ticket: Ticket, report: dict[str, Any]) -> None:
        ticket.reports.append(report)
        ticket.told.set()

    @staticmethod
    def _answer(ticket: Ticket, stop: bool) -> None:
        if ticket.open_verdict is not None:
            ticket.verdicts[ticket.open_verdict].set_result(stop)
            ticket.open_verdict = None


def first_line(text: str) -> str:
    """The first line of an error: what follows is a trace."""
    return text.strip().partition("\n")[0]


def start_dispatcher(layout: Layout, hang_timeout_s: float) -> Any:
    """The study's dispatcher actor; it takes no CPU and stays on this node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(Dispatcher)
    return actor.options(num_cpus=0, max_concurrency=1000, scheduling_strategy=here).remote(
        layout.lanes, layout.workers_per_trial, hang_timeout_s, layout.devices_per_trial
    )
