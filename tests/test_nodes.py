"""A study over several Ray nodes: one is lost and another joins, and every trial completes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from studies import ROOT, finish, start, wait_for

pytestmark = pytest.mark.ray
OPTIONS = ["--trials", "5", "--scheduler", "none", "--num-phantoms", "60", "--num-train-epochs", "2",
           "--save-steps", "2", "--report-to", "tensorboard"]  # fmt: skip


@pytest.fixture
def cluster(monkeypatch):
    """A head without CPUs for workers, and nodes that are added by the tests."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # every node has the project
    # Ray keeps the token that it read first in a process, and an earlier test may have had another home.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        yield made
    finally:
        if ray.is_initialized():
            ray.shutdown()
        made.shutdown()


@pytest.mark.campaign
@pytest.mark.parametrize("num_nodes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_node_is_lost_and_another_joins(tmp_path: Path, cluster, num_nodes: int) -> None:
    """Which lanes train the last trials depends on how fast the new node is."""
    nodes = [cluster.add_node(num_cpus=1) for _ in range(num_nodes)]
    ray_variables = {"RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "disabled"}
    process = start(tmp_path, *OPTIONS, "--lanes", str(num_nodes), **ray_variables)
    wait_for(process, "[1/5]")
    time.sleep(1)
    cluster.remove_node(nodes[0], allow_graceful=False)
    cluster.add_node(num_cpus=1)
    finished = finish(process, tmp_path)
    assert finished.code == 0, finished.out + finished.err
    trials = json.loads((tmp_path / "results" / "s" / "study.json").read_text())["trials"]
    assert [(trial["number"], trial["state"]) for trial in trials] == [(n, "COMPLETE") for n in range(5)]
