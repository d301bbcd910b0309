"""Names of Ray's that have no public way in the installed version, each with its reason. Import it after `start_ray`
has set Ray's environment."""

from __future__ import annotations

import logging
from typing import Any

import ray._private.services
import ray._private.worker
from ray._private.authentication.authentication_utils import is_token_auth_enabled

SESSIONS_FOLDER = "_temp_dir"
"""Option of `ray.init`: folder of Ray's sessions. RAY_TMPDIR would do the same, but it is the user's: a second start in
the same process would take the value of the first for the user's."""

needs_token = is_token_auth_enabled
"""Whether this Ray answers only to those who have its token: RAY_AUTH_MODE, a token's file and a default decide."""


def local_cluster() -> str:
    """Address of the cluster that `ray start` has started on this machine; empty: Ray's files name none.

    `ray.init("auto")` would try an address that no longer answers for a quarter of an hour.

    Raises ConnectionError when there is none, or more than one.
    """
    return ray._private.services.canonicalize_bootstrap_address("auto") or ""


def log_raylet_errors() -> None:
    """Log the errors that Ray's processes send to the driver. Ray prints them, whatever `log_to_driver` says."""

    def log(data: Any, ignore_prefix: bool) -> None:
        logging.getLogger("ray").warning("\n".join(data["lines"]))

    ray._private.worker.print_to_stdstream = log


def keep_keys_out_of_logs() -> None:
    """Take credentials out of the variables that Tune copies into runtime environments, which Ray logs.

    Workers of this machine inherit the variables, those of others have their own.
    """
    from ray.tune.execution import class_cache

    names = class_cache.ENV_VARS_TO_PROPAGATE
    names.difference_update([name for name in names if name.startswith("AWS_")])


def lane_trainer(alone: bool) -> Any:
    """TorchTrainer without processes that Ray adds to each one and lanes do not need: for datasets and, on a Ray of one
    machine, for removing placement groups, which needs the dashboard, and for asking an autoscaler for nodes. Workers
    would start only after the latter's answer."""
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    needless = {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if alone else set())

    class NoAutoscaling(FixedScalingPolicy):
        def after_controller_start(self, train_run_context: Any) -> None:
            pass  # without a client, nothing is cancelled either

        def _maybe_send_resource_request(self) -> None:
            pass

    class LaneTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # of Train V2's TorchTrainer
            return [callback for callback in callbacks if type(callback).__name__ not in needless]

        def _initialize_and_run_controller(self, **options: Any) -> Any:
            if alone:
                options["scaling_policy"] = NoAutoscaling(self.scaling_config)  # type: ignore[arg-type]  # of Train V2
            return super()._initialize_and_run_controller(**options)  # type: ignore[misc]

    return LaneTrainer
