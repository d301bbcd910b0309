"""Lanes: long-lived TorchTrainers that trials pass through, and the dispatcher between them and Ray Tune.

A trial that started its own TorchTrainer would pay for processes, imports, process group and base model each time:
17 to 20 s around a second of training. Lanes pay once. They belong to the study, not to a Tune trial: Tune's side of a
trial (`QueuedTrial`) only hands settings to the dispatcher and waits for reports, and any lane takes the next one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray
import ray.tune

from train_fn.model.checkpoint import hash_of
from train_fn.model.unchanged import Inputs
from train_fn.worker import LaneJob, lane_loop, versions
from tune.config.paths import SettingsError
from tune.plan.prepare import model_directory

if TYPE_CHECKING:
    from tune.lanes.layout import Layout
    from tune.plan.prepare import Study


RENDEZVOUS_S = 120  # for the workers of a lane to find each other


class Lanes:
    """The study's lanes: each a TorchTrainer whose fit() runs in a thread of the driver.

    say: shows a line of the study's output.
    """

    def __init__(
        self, study: Study, layout: Layout, dispatcher: Any, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.dispatcher = dispatcher
        self.say = say
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
            inputs=inputs_of(study),
            collective_timeout_s=round(2 * settings.study.hang_timeout) + 60,
        )
        place = f"{study.storage.uri or study.directory}/ray/{time.strftime('%Y%m%d-%H%M%S')}"
        # The default of 2 s would be added to the lane's end and to the rebuilding of a lost group.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from tune.lanes.loopback import INTERFACE, torch_config

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
                torch_config=torch_config(RENDEZVOUS_S),
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
        self.threads.append(threading.Thread(target=self._listen, daemon=True))
        for thread in self.threads:
            thread.start()

    def _listen(self) -> None:
        """Show what the dispatcher has to say of the lanes, as it comes."""
        seen = 0
        with contextlib.suppress(ray.exceptions.RayError):  # the dispatcher is gone, which the search reports
            while notices := ray.get(self.dispatcher.next_notices.remote(seen)):
                seen += len(notices)
                for notice in notices:
                    self.say(f"Lanes: {notice}")

    def _run(self, lane: int, trainer: Any) -> None:
        again = True
        while again:
            try:
                trainer.fit()
                error = ""
            except Exception as failure:  # whatever ends a lane is told to the trials that waited for it
                error = f"lane {lane} ended: {failure}"
            if self.over or not ray.is_initialized():
                return  # touching Ray after its shutdown would end the whole process
            again = bool(error) and ray.get(self.dispatcher.controller_failed.remote(lane, error))
            # What a lost controller held is held as long as the study lives: Ray's own cleaner learns of the loss only
            # through the dashboard, which a single machine does not run.
            if error and (place := ray.get(self.dispatcher.place.remote(lane))):
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


def inputs_of(study: Study) -> Inputs:
    """Images and base as the driver sees them now. Raises SettingsError when the base is not the plan's any more."""
    directory = model_directory(study.settings)
    inputs = Inputs.seen(study.splits, directory, study.plan["data_hash"], study.plan["base_hash"])
    if hash_of(inputs.base_files) != inputs.base_hash:
        raise SettingsError(
            [f"the base model {directory} must stay as the study was begun with, but has changed since"]
        )
    return inputs
