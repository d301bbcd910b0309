"""Starting Ray, or joining a cluster."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tune.config.paths import SettingsError, import_path, program
from tune.config.settings import Settings
from tune.lanes.layout import joins_cluster
from tune.lanes.machine import ANSWER_S, allowed_cores, cluster_problem, private_folder
from tune.results.terminal import give_back_terminal


def start_ray(settings: Settings) -> dict[str, float]:
    """Join the cluster of RAY_ADDRESS, or start Ray on this machine. Nothing may import Ray before: Ray reads some of
    the variables that are set here when it is imported.

    Returns: the resources of the cluster.

    Raises SettingsError when Ray does not start, or no cluster answers.
    """
    if os.environ.get("RAY_ADDRESS", "").strip() in ("", "local"):
        os.environ.pop("RAY_ADDRESS", None)
    quiet = not settings.study.verbose
    # Workers import the project also where it is not installed. All processes that Ray starts from here inherit this.
    os.environ["PYTHONPATH"] = import_path()
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths keep their meaning in workers
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # Tune's own CSV, JSON and TensorBoard files
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # a failed trial's last result has an error only
    if not joins_cluster():
        # Keeps a Ray of this machine on the loopback. Otherwise Ray looks for a route to the outside, and where there
        # is none it prints a warning that no log level silences.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process per lane; nobody drains this node
    if joins_cluster():
        check_address(os.environ["RAY_ADDRESS"].strip())
    import logging

    import psutil
    import ray

    from tune.lanes import compat_ray

    compat_ray.keep_keys_out_of_logs()
    options: dict[str, Any] = {}
    try:
        if not joins_cluster():
            options = {
                "include_dashboard": False,
                "num_cpus": allowed_cores(),
                compat_ray.SESSIONS_FOLDER: str(private_folder() / "ray"),  # Ray makes it writable by all
                # Ray's default is a third of the memory, and Ray refuses that where /dev/shm is smaller. A study needs
                # little.
                "object_store_memory": min(2**30, psutil.virtual_memory().total // 10),
            }
        ray.init(
            log_to_driver=not quiet,
            logging_level=logging.ERROR if quiet else logging.INFO,
            configure_logging=True,
            **options,
        )
    except Exception as error:  # ray.init raises a plain one when the node's start takes too long
        fix = (
            "look at RAY_ADDRESS and the cluster" if joins_cluster() else "look at RAY_TMPDIR, /dev/shm and free memory"
        )
        raise SettingsError([f"Ray must start, but {type(error).__name__}: {str(error).strip()}: {fix}"]) from error
    # A scheduler or a spot notice ends the study as Ctrl-C does: finished trials are kept, every run is closed. Ray has
    # just set a handler of its own, which would end the process at once.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    if quiet:
        # Ray's messages in this process go where its other processes write theirs.
        handler = logging.FileHandler(session_folder() / "logs" / "driver.log", delay=True)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger("ray").handlers = [handler]
        logging.getLogger("ray").setLevel(logging.INFO)
        logging.getLogger("optuna").setLevel(logging.ERROR)
        compat_ray.log_raylet_errors()
    return ray.cluster_resources()


def watch_control_service(directory: Path, say: Callable[[str], None]) -> threading.Event:
    """End this process when the control service of this machine's Ray has died. Calls to Ray then hang, and after a
    minute of them Ray would end the process with messages of its own. A cluster that was joined is not watched.

    Args:
        directory: the study's folder.
        say: prints a line of the study's output.

    Returns: an event that the caller clears when the study no longer needs Ray.
    """
    import ray

    needed = threading.Event()
    needed.set()
    if joins_cluster():
        return needed
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def watch() -> None:
        while needed.is_set() and ray.is_initialized():
            refused = False
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
            except OSError as error:  # of a busy machine, unless nobody listens
                refused = isinstance(error, ConnectionRefusedError)
            time.sleep(1)
            if refused and needed.is_set() and ray.is_initialized():  # not at Ray's own shutdown
                command = [*program(), "--results", str(directory.parent), "--resume", directory.name]
                say(f"Ray's control service has died. Ended trials are safe. Do the rest: {shlex.join(command)}")
                give_back_terminal(terminals)
                os._exit(130)

    threading.Thread(target=watch, daemon=True).start()
    return needed


def check_address(address: str) -> None:
    """Raise SettingsError unless a cluster answers at RAY_ADDRESS."""
    if address == "auto":
        from tune.lanes.compat_ray import local_cluster

        try:
            address = local_cluster()
        except ConnectionError as error:
            problem = "`RAY_ADDRESS` auto must find a cluster on this machine, but there is none"
            raise SettingsError([f"{problem}: unset it, or start one with ray start"]) from error
    if problem := cluster_problem(address):
        raise SettingsError([problem])


def session_folder() -> Path:
    """Folder of Ray's session on this node. Ray's processes and the workers write what they print to its `logs/`."""
    import ray

    context = ray.get_runtime_context()
    return Path(context.get_temp_dir(), context.get_session_name())
