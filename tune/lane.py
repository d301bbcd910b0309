"""Lanes: long-lived TorchTrainers that trials pass through, and the dispatcher between them and Ray Tune.

A trial that started its own TorchTrainer would pay for processes, imports, process group and base model each time:
17 to 20 s around a second of training. Lanes pay once. They belong to the study, not to a Tune trial: Tune's side of a
trial (`QueuedTrial`) only hands settings to the dispatcher and waits for reports, and any lane takes the next one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
import ray.tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from train_fn.worker import LaneJob, lane_loop, versions

if TYPE_CHECKING:
    from tune.prepare import Study
    from tune.study import Layout

# How often a trial is begun that loses its worker group by no known fault of its own, and gets no further.
MAX_ATTEMPTS = 3
MAX_CONTROLLERS = 20  # of one lane, lost ones; no trial is to blame for them

# The fine-tuning guide's advice, in its order.
OUT_OF_MEMORY_ADVICE = (
    "In this order: --use-qlora; --per-device-train-batch-size 1 --gradient-accumulation-steps 16; --lora-r 32; "
    "--gradient-checkpointing; --optim paged_adamw_8bit"
)


# Settings that decide, beside rank and dropout, how much memory a micro-batch takes.
MEMORY_SETTINGS = ("use_lora", "use_dora", "lora_target_modules", "train_projector", "gradient_checkpointing",
                   "torch_compile", "optim", "zero_stage", "offload_optimizer")  # fmt: skip


def takes_as_much(settings: dict[str, Any], known: dict[str, Any]) -> bool:
    """Whether a trial needs at least the memory of another one."""
    if settings.get("per_device_train_batch_size", 1) == 1:
        return False
    # A list where it has been in a file, else a tuple.
    alike = all(json.dumps(settings.get(name)) == json.dumps(known.get(name)) for name in MEMORY_SETTINGS)
    sizes = [
        (one["per_device_train_batch_size"], one.get("lora_r", 0), one.get("lora_dropout", 0.0) > 0)
        for one in (settings, known)
    ]
    return alike and all(own >= other for own, other in zip(*sizes, strict=True))


def halve(assignment: dict[str, Any], reason: str) -> None:
    """Half the micro-batch at the same global batch, with a note why."""
    settings = dict(assignment["settings"])
    micro = settings["per_device_train_batch_size"]
    settings["per_device_train_batch_size"] = micro // 2 if micro % 2 == 0 else 1
    settings["gradient_accumulation_steps"] *= micro // settings["per_device_train_batch_size"]
    note = f"{reason}: micro-batch {micro} -> {settings['per_device_train_batch_size']}, same global batch"
    assignment |= {"settings": settings, "notes": [*assignment.get("notes", []), note]}


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


class Heard(NamedTuple):
    """The last that was heard of a worker."""

    group: str
    actor: Any
    when: float
    beats: int
    moved: float  # when it last had got further, or had nothing to do


class Dispatcher:
    """Async actor: a queue of assignments on one side, reports on the other. The study makes one (`start_dispatcher`).

    A report is answered only when its trial has been told to go on (Tune asks for the next report) or to stop, so an
    early stop wastes no compute. All ranks of a group ask, and get the same answer.
    """

    def __init__(
        self, num_lanes: int, workers_per_trial: int = 1, hang_timeout_s: float = 600, devices_per_trial: float = 1
    ) -> None:
        self.workers_per_trial = workers_per_trial
        self.devices_per_trial = devices_per_trial  # of which seconds are counted
        self.tickets: dict[int, Ticket] = {}
        self.queue: deque[int] = deque()
        self.changed = asyncio.Condition()
        self.assigned: dict[tuple[str, int], asyncio.Future] = {}
        self.running: dict[int, int] = {}  # lane -> number
        self.groups: dict[int, str] = {}  # lane -> its living worker group
        self.lanes = set(range(num_lanes))
        self.too_large: dict[int, list[dict[str, Any]]] = {lane: [] for lane in self.lanes}  # settings that did not fit
        self.failed_starts: dict[int, int] = {}
        self.closed = False
        self.last_error = ""
        self.hang_timeout_s = hang_timeout_s
        self.pulses: dict[tuple[int, int], Heard] = {}  # by lane and rank
        self.watch: asyncio.Task | None = None
        self.leaving = False
        self.reasons: dict[int, str] = {}  # why a lane's group is about to end
        self.places: dict[int, Any] = {}  # lane -> the placement group of its last worker group

    # -------------------------------------------------------------------------------- the study's side

    async def submit(self, number: int, assignment: dict[str, Any]) -> None:
        """Queue a trial or a scoring job under a number of its own. One that is known already goes on: its Tune process
        was lost, and the new one asks for its reports again."""
        if number in self.tickets and not self.tickets[number].stopped:
            return
        self.tickets[number] = Ticket(assignment | {"number": number}, last_epoch=assignment.get("known_epochs", 0))
        if self.lanes:
            await self._enqueue(number)
        else:
            self._error(number, self.last_error)

    async def next_report(self, number: int, seen: int) -> dict[str, Any]:
        """The trial's report after those `seen`; asking for one that is not there yet tells the lane to go on.
        {"error": ...} ends a trial."""
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
        async with self.changed:
            self.changed.notify_all()

    # -------------------------------------------------------------------------------- the lanes' side

    async def next_assignment(self, lane: int, group: str, turn: int) -> dict[str, Any] | None:
        """What a worker group does next; None: nothing more. A group not seen before means the old one was lost."""
        if self.groups.get(lane) != group:
            self.groups[lane] = group
            self.failed_starts.pop(lane, None)
            if lane in self.running:
                await self._lost(lane, self.reasons.pop(lane, "its worker group died"))
            self.reasons.pop(lane, None)
            async with self.changed:
                self.changed.notify_all()  # a question of the dead group must not take an assignment
        key = (group, turn)
        if key not in self.assigned:
            self.assigned[key] = asyncio.get_running_loop().create_future()
            self.assigned[key].set_result(await self._take(lane, group))
        return await self.assigned[key]

    async def report(self, number: int, group: str, epoch: int, message: dict[str, Any] | None) -> bool:
        """A trial's report from rank 0 (other ranks send None); True: stop now."""
        ticket = self.tickets[number]
        verdict = ticket.verdicts.setdefault((group, epoch), asyncio.get_running_loop().create_future())
        if message is not None and not verdict.done():
            if ticket.stopped:
                verdict.set_result(True)
            elif epoch <= ticket.last_epoch:  # begun again after a loss: Tune knows this epoch already
                verdict.set_result(False)
            else:
                ticket.last_epoch = epoch
                ticket.open_verdict = (group, epoch)
                self._tell(ticket, message | {"device_s": ticket.lane_s() * self.devices_per_trial})
                if message["done"]:
                    ticket.ended = True
                    self._answer(ticket, stop=False)
        return await verdict

    async def progress(self, number: int, message: dict[str, Any]) -> None:
        """How far a trial is, from rank 0."""
        self.tickets[number].progress = message

    async def pulse(self, lane: int, group: str, rank: int, actor: Any, beats: int) -> bool:
        """A worker lives, and its work has come so far; True: it must leave."""
        now, last = time.monotonic(), self.pulses.get((lane, rank))
        busy = lane in self.running and self.tickets[self.running[lane]].open_verdict is None
        stands = busy and last is not None and (last.group, last.beats) == (group, beats)
        self.pulses[lane, rank] = Heard(group, actor, now, beats, last.moved if last and stands else now)
        self.watch = self.watch or asyncio.create_task(self._watch())
        return self.leaving

    async def interrupted(self, lane: int, group: str, reason: str, free: bool) -> None:
        """A worker group ends by no fault of its trial, which goes on elsewhere. free: at no cost of its attempts."""
        if self.groups.get(lane) == group and lane in self.running and lane not in self.reasons:
            self.reasons[lane] = reason
            self.tickets[self.running[lane]].attempts -= free
            if self.leaving:
                self.running.pop(lane)  # nobody takes it on

    async def fail(self, number: int, error: str) -> None:
        """A trial's own fault, from any rank: the trial ends and is not tried again."""
        self._error(number, error)

    async def out_of_memory(self, number: int, group: str, error: str, in_step: bool) -> None:
        """A rank ran out of memory: the trial begins again with half the micro-batch and the same global batch.

        Several ranks of a group may tell of the same one. A micro-batch of one that still does not fit fails the trial.
        in_step: in a training step, so that on this lane no trial as large need try the same.
        """
        ticket = self.tickets[number]
        lane = next((lane for lane, running in self.running.items() if running == number), None)
        if ticket.ended or ticket.stopped or lane is None or self.groups[lane] != group:
            return
        if "settings" not in ticket.assignment:
            self._error(number, f"out of memory while scoring a single image\n\n{error}")
            return
        del self.running[lane]
        ticket.let_go()
        if ticket.assignment["settings"]["per_device_train_batch_size"] == 1:
            self._error(number, f"out of memory with one image a step. {OUT_OF_MEMORY_ADVICE}\n\n{error}")
            return
        if in_step:
            self.too_large[lane].append(ticket.assignment["settings"])
        halve(ticket.assignment, "out of memory")
        ticket.attempts -= 1
        ticket.open_verdict = None
        await self._enqueue(number)

    async def wants(self, lane: int, place: Any = None) -> bool:
        """Whether a lane's worker group should load the base at all: not when the lane has been given up."""
        self.places[lane] = place
        return lane in self.lanes

    async def place(self, lane: int) -> Any:
        """The placement group that the lane's last worker group had."""
        return self.places.get(lane)

    async def start_failed(self, lane: int, error: str) -> None:
        """A worker group could not load its base. A lane that has worked before may have had bad luck, once."""
        self.failed_starts[lane] = self.failed_starts.get(lane, 0) + 1  # each rank tells
        if lane not in self.groups or self.failed_starts[lane] > self.workers_per_trial:
            await self.lane_ended(lane, error)

    async def lane_ended(self, lane: int, error: str) -> None:
        """A lane's TorchTrainer has come to its end; what it ran goes to another lane, or fails if there is none."""
        if lane not in self.lanes:
            return
        self.lanes.discard(lane)
        self.last_error = error or "all lanes have ended"
        if lane in self.running:
            await self._lost(lane, error)
        if not self.lanes:
            while self.queue:
                self._error(self.queue.popleft(), self.last_error)

    # -------------------------------------------------------------------------------- within

    async def _watch(self) -> None:
        """End workers that have been silent for long, or that have a trial and get no further: they would hold their
        lane for ever."""
        while True:
            await asyncio.sleep(min(1.0, self.hang_timeout_s / 4))
            for (lane, rank), heard in list(self.pulses.items()):
                if self.groups.get(lane) != heard.group or lane not in self.lanes:
                    del self.pulses[lane, rank]
                elif time.monotonic() - min(heard.when, heard.moved) > self.hang_timeout_s:
                    del self.pulses[lane, rank]
                    self.reasons[lane] = f"its rank {rank} gave no sign of work for {self.hang_timeout_s:g} s"
                    ray.kill(heard.actor)

    async def _take(self, lane: int, group: str) -> dict[str, Any] | None:
        self.running.pop(lane, None)
        async with self.changed:
            await self.changed.wait_for(lambda: self.queue or self.closed or self.groups[lane] != group)
            if not self.queue or self.leaving or self.groups[lane] != group:
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

    async def _enqueue(self, number: int) -> None:
        async with self.changed:
            self.queue.append(number)
            self.changed.notify_all()

    async def _lost(self, lane: int, reason: str) -> None:
        number = self.running.pop(lane)
        ticket = self.tickets[number]
        if ticket.ended or ticket.stopped:
            return
        step = ticket.progress.get("step", 0)
        if step > ticket.furthest:  # further than ever: the losses so far say nothing against it
            ticket.furthest, ticket.attempts = step, 1
        ticket.let_go()
        ticket.open_verdict = None
        if ticket.attempts >= MAX_ATTEMPTS or not self.lanes:
            self._error(number, f"lost {ticket.attempts} times, last because {reason}")
        else:
            await self._enqueue(number)

    def _error(self, number: int, error: str) -> None:
        ticket = self.tickets[number]
        if not ticket.ended:
            ticket.ended = True
            self._tell(ticket, {"error": error, "device_s": ticket.lane_s() * self.devices_per_trial})

    @staticmethod
    def _tell(ticket: Ticket, report: dict[str, Any]) -> None:
        ticket.reports.append(report)
        ticket.told.set()

    @staticmethod
    def _answer(ticket: Ticket, stop: bool) -> None:
        if ticket.open_verdict is not None:
            ticket.verdicts[ticket.open_verdict].set_result(stop)
            ticket.open_verdict = None


def start_dispatcher(layout: Layout, hang_timeout_s: float) -> Any:
    """The study's dispatcher actor; it takes no CPU and stays on this node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(Dispatcher)
    return actor.options(num_cpus=0, max_concurrency=1000, scheduling_strategy=here).remote(
        layout.lanes, layout.workers_per_trial, hang_timeout_s, layout.devices_per_trial
    )


class Lanes:
    """The study's lanes: each a TorchTrainer whose fit() runs in a thread of the driver."""

    def __init__(self, study: Study, layout: Layout, dispatcher: Any) -> None:
        self.dispatcher = dispatcher
        self.over = False
        settings = study.settings
        job = LaneJob(
            lane=0,
            dispatcher=dispatcher,
            model=settings.model,
            splits=study.splits,
            positive=study.positive,
            storage=study.storage,
            num_threads=layout.num_threads,
            profile=settings.study.profile,
            trace=settings.study.trace,
            versions=versions(),
        )
        place = f"{study.storage.uri or study.directory}/ray/{time.strftime('%Y%m%d-%H%M%S')}"
        # The default of 2 s would be added to the lane's end and to the rebuilding of a lost group.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from tune.loopback import INTERFACE, torch_config

        alone = not os.environ.get("RAY_ADDRESS")
        environment = {"OMP_NUM_THREADS": str(layout.num_threads)} if layout.num_threads else {}
        environment |= {name: os.environ.get(name, value) for name, value in INTERFACE.items()} if alone else {}

        class Plain(TorchTrainer):
            """Without the processes that Ray adds to each trainer for datasets, which there are none of, and, where
            there is no dashboard, for removing placement groups by what it tells."""

            def _create_default_callbacks(self) -> list[Any]:
                needless = {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if alone else set())
                callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # of Train V2's TorchTrainer
                return [callback for callback in callbacks if type(callback).__name__ not in needless]

        self.threads = []
        for lane in range(layout.lanes):
            trainer = Plain(
                lane_loop,
                train_loop_config={"job": dataclasses.replace(job, lane=lane)},
                torch_config=torch_config(max(1, round(settings.study.hang_timeout))),
                scaling_config=ScalingConfig(
                    num_workers=layout.workers_per_trial,
                    use_gpu=layout.use_gpu,
                    resources_per_worker=layout.worker_resources,
                ),
                run_config=RunConfig(
                    name=f"lane-{lane}",
                    storage_path=place,
                    failure_config=FailureConfig(max_failures=-1),
                    worker_runtime_env={"env_vars": environment},  # type: ignore[call-arg]  # of Train V2's RunConfig
                ),
            )
            self.threads.append(threading.Thread(target=self._run, args=(lane, trainer), daemon=True))
        for thread in self.threads:
            thread.start()

    def _run(self, lane: int, trainer: Any) -> None:
        error = ""
        for _ in range(MAX_CONTROLLERS):  # it may be lost too
            try:
                trainer.fit()
                error = ""
            except Exception as failure:  # whatever ends a lane is told to the trials that waited for it
                error = f"lane {lane} ended: {failure}"
            if self.over or not ray.is_initialized():
                return  # touching Ray after its shutdown would end the whole process
            if not error:
                break
            # What a lost controller held is held as long as the study lives: Ray's own cleaner learns of the loss only
            # through the dashboard, which a single machine does not run.
            if place := ray.get(self.dispatcher.place.remote(lane)):
                ray.util.remove_placement_group(place)
        ray.get(self.dispatcher.lane_ended.remote(lane, error))

    def leave(self, timeout_s: float = 30) -> None:
        """Let the running trials checkpoint at their next step, and wait for that."""
        ray.get(self.dispatcher.leave.remote())
        deadline = time.monotonic() + timeout_s
        while ray.get(self.dispatcher.snapshot.remote())["running"] and time.monotonic() < deadline:
            time.sleep(0.2)
        self.over = True

    def close(self, timeout_s: float = 30) -> None:
        """Let the lanes end and wait for them."""
        self.over = True
        ray.get(self.dispatcher.close.remote())
        for thread in self.threads:
            thread.join(timeout_s)


class QueuedTrial(ray.tune.Trainable):
    """Tune's side of a trial: hands its settings to the dispatcher, returns the reports that come back."""

    def setup(self, config: dict[str, Any], dispatcher: Any = None, trials: str = "") -> None:  # type: ignore[override]
        self.dispatcher = dispatcher
        self.trials = Path(trials)
        self.number: int | None = None
        self._submit(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._stop()
        self._submit(new_config)
        return True

    def step(self) -> dict[str, Any]:
        report = ray.get(self.dispatcher.next_report.remote(self.number, self.seen))
        self.seen += 1
        if "error" in report:
            # A result and no exception: Tune begins a trial again whose process raised, as if the process were lost.
            return {**report, "done": True}
        # Tune overwrites `done` when it stops a trial itself.
        costs = {"trainable_params": report["applied"]["trainable_params"], "train_s": report["seconds"]["train"]}
        return {**report["metrics"], **costs, **report, "finished": report["done"]}

    def cleanup(self) -> None:
        self._stop()

    def _submit(self, config: dict[str, Any]) -> None:
        self.number, self.seen = config["number"], 0
        assignment = {
            "kind": "train",
            "settings": config["settings"],
            "output": str(self.trials / f"{self.number:04d}"),
            "known_epochs": config["known_epochs"],
        }
        ray.get(self.dispatcher.submit.remote(self.number, assignment))

    def _stop(self) -> None:
        if self.number is not None:
            ray.get(self.dispatcher.stop.remote(self.number))
            self.number = None
