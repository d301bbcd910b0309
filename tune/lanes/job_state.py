"""A job in the dispatcher: its reports, and the decisions that its workers wait for."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from typing import Any

from train_fn.execution import OUT_OF_MEMORY_ADVICE, Execution, change
from train_fn.jobs import EpochReport, Job, JobFailed, JobReport, ScoreReport, TrainJob, Verdict

MAX_ATTEMPTS = 3  # attempts of a job whose worker groups keep dying without further progress


@dataclass(eq=False)
class JobState:
    """What the dispatcher knows of one job."""

    job: Job
    devices: float  # devices of a lane, whose seconds are counted
    submission: str = ""  # of the process of Tune's that waits for the reports
    reports: list[JobReport] = field(default_factory=list)
    new_report: asyncio.Event = field(default_factory=asyncio.Event)
    decisions: dict[tuple[str, float], asyncio.Future[Verdict]] = field(default_factory=dict)
    """Answers to the workers' reports, by worker group and the epochs trained."""
    pending: tuple[str, float] | None = None  # worker group and epochs of the report that waits for a decision
    last_epoch: float = 0  # epochs trained at the last report
    attempts: int = 0
    furthest_step: int = 0  # optimizer step that any attempt has reached
    stopped: bool = False  # whether the study has stopped the job early
    for_good: bool = False  # whether nothing continues the job after that
    unwanted: bool = False  # whether the user has stopped the job: no lane takes it any more
    ended: bool = False  # whether `reports` has the job's last report
    lost_s: float = 0.0  # lane seconds of lost attempts
    started_at: float | None = None
    progress: dict[str, Any] = field(default_factory=dict)  # progress of this attempt, as `run_trial` sends it

    @property
    def lane_s(self) -> float:
        """Seconds of a lane so far, lost attempts included."""
        return self.lost_s + (time.monotonic() - self.started_at if self.started_at is not None else 0.0)

    def release(self) -> None:
        """End an attempt without a result."""
        self.lost_s, self.started_at, self.progress = self.lane_s, None, {}

    def lose(self, reason: str) -> str:
        """End an attempt because its worker group died.

        Returns: why the job is not to be tried again; empty if it is.
        """
        step = self.progress.get("step", 0)
        if step > self.furthest_step:  # progress: earlier losses do not count against the job
            self.furthest_step, self.attempts = step, 1
        self.release()
        self.decide(stop=True)  # for ranks of the dead group that still wait
        return f"lost {self.attempts} times, last because {reason}" if self.attempts >= MAX_ATTEMPTS else ""

    def shrink(self, job: TrainJob, used: Execution | None, less: Execution | None, error: str) -> bool:
        """End an attempt because a rank ran out of memory. Returns whether the job is tried again, computed as `less`;
        without a smaller way it fails."""
        self.release()
        if used is None or less is None:
            self.fail(f"out of memory in the smallest way there is. {OUT_OF_MEMORY_ADVICE}\n\n{error}")
            return False
        self.job = replace(job, execution=less, notes=(*job.notes, f"out of memory: {change(used, less)}"))
        self.attempts -= 1
        self.decide(stop=True)
        return True

    async def last_report(self) -> JobReport:
        """The last report of a job on whose earlier reports nobody decides."""
        seen = 0
        while True:
            report, seen = await self.next_report(seen), seen + 1
            if isinstance(report, JobFailed) or report.finished:
                return report

    async def next_report(self, seen: int) -> JobReport:
        """The report after the first `seen` ones. Asking for a report that is not there yet is the permission to go
        on."""
        if seen == len(self.reports):
            self.decide(stop=False)
        while seen == len(self.reports):
            self.new_report.clear()
            await self.new_report.wait()
        return self.reports[seen]

    def receive(self, group: str, epoch: float, report: EpochReport | ScoreReport | None) -> asyncio.Future[Verdict]:
        """Take in a report of a rank: None from all ranks but rank 0. Returns the decision on it.

        Args:
            epoch: the epochs trained, not whole at a rung within an epoch.
        """
        decision = self.decisions.setdefault((group, epoch), asyncio.get_running_loop().create_future())
        if report is None or decision.done():
            return decision
        if self.stopped or self.ended:
            decision.set_result(Verdict.END if self.for_good else Verdict.PAUSE)
        elif epoch <= self.last_epoch:  # repeated after a loss: Tune has this epoch
            decision.set_result(Verdict.GO_ON)
        else:
            self.last_epoch, self.pending = epoch, (group, epoch)
            if isinstance(report, EpochReport):
                report.device_s = self.lane_s * self.devices
            self._publish(report)
            if report.finished:
                self.ended = True
                self.decide(stop=False)
        return decision

    def decide(self, stop: bool) -> None:
        """Answer the report that waits for a decision, if there is one."""
        if self.pending is not None:
            verdict = Verdict.END if self.for_good else Verdict.PAUSE
            self.decisions[self.pending].set_result(verdict if stop else Verdict.GO_ON)
            self.pending = None

    def fail(self, error: str, study_error: str = "", stopped: bool = False) -> None:
        """End the job with an error, or because the user has stopped it, unless it has ended."""
        if not self.ended:
            self.ended, device_s = True, self.lane_s * self.devices
            self._publish(JobFailed(error=error, device_s=device_s, study_error=study_error, stopped=stopped))

    def _publish(self, report: JobReport) -> None:
        self.reports.append(report)
        self.new_report.set()


def first_line(text: str) -> str:
    """The first line of an error, without its trace."""
    return text.strip().partition("\n")[0]
