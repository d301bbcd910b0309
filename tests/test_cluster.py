"""The cluster files: read by Ray's own loader, and `ray up` / `ray down` for real against a mock of AWS on loopback."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster.yaml"
ON_PREMISES = ROOT / "docs" / "cluster-onprem.yaml"
KUBERAY = ROOT / "docs" / "cluster-kuberay.yaml"
GUIDE = ROOT / "docs" / "cluster.md"
FILES = [CLUSTER, ON_PREMISES, KUBERAY]

# Names the study searches or sets. None of them is a property of a machine.
HYPERPARAMETERS = ["lora", "alpha", "dropout", "learning_rate", "lr", "weight_decay", "warmup", "batch", "epoch"]
TOKEN = "0123456789abcdef0123456789abcdef-not-a-real-token"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}


def pins() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = project["dependencies"] + [r for extra in project["optional-dependencies"].values() for r in extra]
    found = {}
    for requirement in requirements:
        if pin := re.fullmatch(r"([\w-]+)(\[[\w,-]+\])?==([\w.+]+)", requirement):
            assert found.setdefault(pin[1], pin[3]) == pin[3], f"two pins of {pin[1]} in pyproject.toml"
    return found


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def prepared(path: Path) -> dict[str, Any]:
    """The file as `ray up` sees it before it asks the provider anything: defaults filled in, checked by the schema."""
    pytest.importorskip("jsonschema", reason="ray[default] is not installed (extra `cluster`)")
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(load(path))
    validate_config(config)
    return config


# -- the files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_names_no_hyperparameter_and_no_second_version(path: Path) -> None:
    text = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
    words = set(re.findall(r"[a-z0-9]+", text.lower()))  # `lora_r` is `lora` and `r`
    assert not words & {word for name in HYPERPARAMETERS for word in name.split("_")} - {"rate"}
    assert "==" not in text


def test_aws_file_passes_rays_loader() -> None:
    config = prepared(CLUSTER)
    head, worker = (config["available_node_types"][name] for name in ("head", "worker"))
    assert config["head_node_type"] == "head"
    assert (head["min_workers"], head["max_workers"]) == (0, 0)
    assert head["resources"] == {"CPU": 0}, "no trial may run on the head"
    assert (worker["min_workers"], worker["max_workers"]) == (0, config["max_workers"]), "one number says the maximum"
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "IamInstanceProfile" not in worker["node_config"]
    # The region is written out twice: zones and the name of the file system follow it.
    region = config["provider"]["region"]
    assert all(zone.startswith(region) for zone in config["provider"]["availability_zone"].split(","))
    assert f".efs.{region}.amazonaws.com" in " ".join(config["initialization_commands"])
    # One switch, one line: without it the file is still valid and asks for on-demand workers.
    switch = [line for line in CLUSTER.read_text().splitlines() if "InstanceMarketOptions" in line]
    assert len(switch) == 1
    on_demand = yaml.safe_load(CLUSTER.read_text().replace(switch[0] + "\n", ""))
    assert "InstanceMarketOptions" not in on_demand["available_node_types"]["worker"]["node_config"]


def test_nothing_listens_beyond_loopback() -> None:
    config = load(CLUSTER)
    starts = " ".join(config["head_start_ray_commands"])
    assert "mlflow server --host 127.0.0.1" in starts
    assert "0.0.0.0" not in CLUSTER.read_text()
    assert "IpPermissions" not in config["provider"]["security_group"]


@pytest.mark.parametrize("path", [CLUSTER, ON_PREMISES], ids=lambda p: p.name)
def test_token_is_on_and_travels_as_a_file(path: Path) -> None:
    config = load(path)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("RAY_AUTH_MODE=token" in command for command in config["setup_commands"])
    assert "RAY_AUTH_TOKEN" not in path.read_text()


@pytest.mark.parametrize("path", [CLUSTER, ON_PREMISES], ids=lambda p: p.name)
def test_nodes_install_the_synced_project(path: Path) -> None:
    config = load(path)
    assert config["file_mounts"]["~/vlm-tune"] == "."
    assert sum("pip install" in command for command in config["setup_commands"]) == 1
    assert any(command.endswith("pip install --quiet -e '.[cluster]'") for command in config["setup_commands"])
    assert {"/.git", "/results", "/mlruns", "/.venv"} <= set(config["rsync_exclude"])
    # An unanchored name would also leave out a package folder of that name.
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert not {f"/{name.split('.')[0]}" for name in packages} & set(config["rsync_exclude"])


@pytest.mark.parametrize("path", [CLUSTER, ON_PREMISES], ids=lambda p: p.name)
def test_commands_are_shell(path: Path) -> None:
    config = load(path)
    commands = [c for key, value in config.items() if key.endswith("_commands") for c in value]
    assert len(commands) >= 8
    for command in commands:
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_second_setup_does_not_grow_bashrc(tmp_path: Path) -> None:
    (tmp_path / ".bashrc").write_text("")
    config = load(CLUSTER)
    exports = [c for c in config["setup_commands"] + config["head_setup_commands"] if ".bashrc" in c]
    assert len(exports) == 2
    for command in exports * 2:
        subprocess.run(["bash", "-c", command], check=True, env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]})
    seen = subprocess.run(
        ["bash", "-c", "source ~/.bashrc; echo $RAY_AUTH_MODE $MLFLOW_TRACKING_URI ${PATH%%:*}"],
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert seen.stdout.split() == ["token", "http://127.0.0.1:5000", f"{tmp_path}/venv/bin"]
    assert len((tmp_path / ".bashrc").read_text().splitlines()) == 2


def test_on_premises_file() -> None:
    config = prepared(ON_PREMISES)
    (node_type,) = config["available_node_types"].values()
    assert config["provider"]["type"] == "local"
    assert node_type["min_workers"] == node_type["max_workers"] == len(config["provider"]["worker_ips"])
    # Same nodes as on AWS: what differs is how they come to be.
    aws = load(CLUSTER)
    assert config["rsync_exclude"] == aws["rsync_exclude"]
    on_aws_only = "169.254.169.254"  # the watcher for spot notices
    assert config["worker_start_ray_commands"] == [
        command for command in aws["worker_start_ray_commands"] if on_aws_only not in command
    ]
    assert set(aws["setup_commands"]) <= set(load(ON_PREMISES)["setup_commands"])


def test_kuberay_file() -> None:
    job = load(KUBERAY)
    cluster = job["spec"]["rayClusterSpec"]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert cluster["rayVersion"] == pins()["ray"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    (gpu,) = cluster["workerGroupSpecs"]
    assert gpu["minReplicas"] == 0
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], gpu)]
    assert len({container["image"] for pod in pods for container in pod["containers"]}) == 1
    for pod in pods:
        mounts = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]} == {"shared"}
    assert "nvidia.com/gpu" not in pods[0]["containers"][0]["resources"]["limits"]
    assert pods[1]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    arguments = shlex.split(job["spec"]["entrypoint"])
    assert arguments[arguments.index("--lanes") + 1] == str(gpu["maxReplicas"])


def test_guide_fills_in_what_the_file_leaves_open_and_names_real_commands() -> None:
    pytest.importorskip("jsonschema", reason="ray[default] is not installed (extra `cluster`)")
    from ray.scripts.scripts import cli

    guide, text = GUIDE.read_text(), CLUSTER.read_text()
    open_values = set(re.findall(r"\b\w+-REPLACE\b", text))
    assert open_values == {"ami-REPLACE", "fs-REPLACE"}
    assert all(f"s/{value}/" in guide for value in open_values)
    assert f"FROM rayproject/ray:{pins()['ray']}-py312" in guide
    assert set(re.findall(r"\w+==([\w.]+)", guide)) == set()
    commands = set(re.findall(r"(?:^|['`]|token )ray ([a-z-]+)", guide, flags=re.MULTILINE))
    assert {"up", "down", "exec", "job", "dashboard", "attach", "rsync-down"} <= commands
    for command in commands:
        assert command in cli.commands or command.replace("-", "_") in cli.commands, f"ray {command}"
    for link in re.findall(r"\]\(([^)#:]+)\)", guide):
        assert (GUIDE.parent / link).exists(), link


# -- ray up, against a mock --------------------------------------------------------------------------------------------

STUB = """#!{python}
# Stands in for ssh and rsync: writes down what it was asked to do, keeps the single files sent, and succeeds.
import json, os, shutil, sys
name = os.path.basename(sys.argv[0])
with open(os.path.join({log!r}, "calls.jsonl"), "a") as calls:
    calls.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
if name == "rsync" and os.path.isfile(sys.argv[-2]):
    shutil.copy2(sys.argv[-2], os.path.join({log!r}, os.path.basename(sys.argv[-1].split(":", 1)[1])))
"""
# Ray waits twice 15 s for IAM to propagate and polls every 5 s; the mock needs none of it.
IMPATIENT = "import time\n_sleep = time.sleep\ntime.sleep = lambda seconds: _sleep(min(seconds, 0.2))\n"
# Launching and setting up a worker, by the classes that do it in the autoscaler on the head.
AUTOSCALE = """
import json, sys
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.instance_manager.ray_installer import RayInstaller
from ray.core.generated.instance_manager_pb2 import Instance

config = json.load(open(sys.argv[1]))
kind = config["available_node_types"]["worker"]
tags = {"ray-node-type": "worker", "ray-user-node-type": "worker", "ray-node-name": "worker"}
provider = AWSNodeProvider(config["provider"], config["cluster_name"])
for _ in range(kind["max_workers"]):  # one by one: asked for 1 to n instances, the mock starts 1
    provider.create_node(kind["node_config"], tags, 1)
worker = provider.non_terminated_nodes({"ray-node-type": "worker"})[0]
installer = RayInstaller(provider, AutoscalingConfig(config))
installer.install_ray(Instance(cloud_instance_id=worker, instance_type="worker"), "10.0.0.1")
"""


class Mock:
    """A mock of AWS on loopback, and a home folder from which `ray` uses it. No packet leaves the machine."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.endpoint = endpoint
        self.home, self.project, self.log = folder / "home", folder / "project", folder / "log"
        site, programs = folder / "site", folder / "bin"
        for path in (self.home / ".ray", self.project, self.log, site, programs):
            path.mkdir(parents=True)
        (site / "sitecustomize.py").write_text(IMPATIENT)
        for name in ("ssh", "rsync", "scp"):
            (programs / name).write_text(STUB.format(python=sys.executable, log=str(self.log)))
            (programs / name).chmod(0o755)
        (self.home / ".ray" / "auth_token").write_text(TOKEN)
        shutil.copy2(ROOT / "pyproject.toml", self.project)
        # Nothing of the caller's environment: its credentials, region or Ray address must not matter.
        self.env = {
            "PATH": f"{programs}:/usr/bin:/bin",
            "HOME": str(self.home),
            "TMPDIR": str(folder),
            "PYTHONPATH": str(site),
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_UP_enable_autoscaler_v2": "1",
            **CREDENTIALS,
        }

    def client(self, service: str, region: str) -> Any:
        import boto3

        return boto3.client(
            service,
            region_name=region,
            endpoint_url=self.endpoint,
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
        )

    def ray(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", *arguments],
            cwd=self.project,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.log / "calls.jsonl").read_text().splitlines()]


@pytest.fixture
def mock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mock]:
    pytest.importorskip("boto3", reason="boto3 is not installed (extra `cluster`)")
    server = pytest.importorskip("moto.server", reason="moto is not installed: no mock of AWS to run against")
    # Ray attaches the policies AmazonEC2FullAccess and AmazonS3FullAccess, which the mock knows only when told to.
    monkeypatch.setenv("MOTO_IAM_LOAD_MANAGED_POLICIES", "true")
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    aws = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    aws.start()
    host, port = aws.get_host_and_port()
    try:
        yield Mock(tmp_path, f"http://{host}:{port}")
    finally:
        aws.stop()


def ran_in_order(wanted: list[str], calls: list[list[str]]) -> list[str]:
    """Assert that the commands ran on the node in this order, and return all that ran."""

    def flat(text: str) -> str:
        return " ".join(text.split())

    # The last argument of ssh is the command in its login shell, quoted once.
    ran = [flat(" ".join(shlex.split(call[-1]))) for call in calls if call[0] == "ssh"]
    missing = [w for w in wanted if not any(flat(w) in command for command in ran)]
    assert not missing, missing
    places = [next(i for i, command in enumerate(ran) if flat(w) in command) for w in wanted]
    assert places == sorted(set(places))
    return ran


@pytest.mark.campaign
def test_ray_up_creates_what_the_file_says_and_ray_down_ends_it(mock: Mock) -> None:
    config = load(CLUSTER)
    region = config["provider"]["region"]
    ec2, iam, efs = (mock.client(service, region) for service in ("ec2", "iam", "efs"))
    # As docs/cluster.md does it: look up an image, make a file system, write both ids into the file.
    image = ec2.describe_images()["Images"][0]["ImageId"]
    file_system = efs.create_file_system(CreationToken="vlm-tune", Encrypted=True)["FileSystemId"]
    text = CLUSTER.read_text().replace("ami-REPLACE", image).replace("fs-REPLACE", file_system)
    (mock.project / "cluster.yaml").write_text(text)
    config = yaml.safe_load(text)
    head, worker = (config["available_node_types"][name]["node_config"] for name in ("head", "worker"))

    def instances(*states: str) -> list[dict[str, Any]]:
        found = ec2.describe_instances(Filters=[{"Name": "instance-state-name", "Values": list(states)}])
        return [instance for r in found["Reservations"] for instance in r["Instances"]]

    def disk_gib(instance: dict[str, Any]) -> list[int]:
        ids = [mapping["Ebs"]["VolumeId"] for mapping in instance["BlockDeviceMappings"]]
        return [volume["Size"] for volume in ec2.describe_volumes(VolumeIds=ids)["Volumes"]]

    output = mock.ray("up", "cluster.yaml", "-y", "--no-config-cache")

    (node,) = instances("pending", "running")
    assert (node["InstanceType"], node["ImageId"]) == (head["InstanceType"], image)
    assert disk_gib(node) == [head["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"]]
    assert node["MetadataOptions"]["HttpTokens"] == "required"
    assert node["Placement"]["AvailabilityZone"] in config["provider"]["availability_zone"].split(",")
    tags = {tag["Key"]: tag["Value"] for tag in node["Tags"]}
    assert tags["project"] == tags["ray-cluster-name"] == config["cluster_name"]
    assert (tags["ray-node-type"], tags["ray-node-status"]) == ("head", "up-to-date")

    assert node["KeyName"] == "vlm-tune"
    assert [pair["KeyName"] for pair in ec2.describe_key_pairs()["KeyPairs"]] == ["vlm-tune"]
    assert (mock.home / ".ssh" / "vlm-tune.pem").stat().st_mode & 0o777 == 0o600

    profile = iam.get_instance_profile(InstanceProfileName="ray-autoscaler-v1")["InstanceProfile"]
    assert node["IamInstanceProfile"]["Arn"] == profile["Arn"]
    policies = iam.list_attached_role_policies(RoleName=profile["Roles"][0]["RoleName"])["AttachedPolicies"]
    assert {policy["PolicyName"] for policy in policies} == {"AmazonEC2FullAccess", "AmazonS3FullAccess"}

    (group,) = ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["vlm-tune"]}])["SecurityGroups"]
    assert [g["GroupId"] for g in node["SecurityGroups"]] == [group["GroupId"]]
    outside = [
        rule for rule in group["IpPermissions"] if rule["IpRanges"] or rule["Ipv6Ranges"] or rule["PrefixListIds"]
    ]
    inside = [rule for rule in group["IpPermissions"] if rule["UserIdGroupPairs"]]
    assert [(rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) for rule in outside] == [("tcp", 22, 22)]
    assert [rule["IpProtocol"] for rule in inside] == ["-1"]
    assert [pair["GroupId"] for pair in inside[0]["UserIdGroupPairs"]] == [group["GroupId"]]
    assert len(group["IpPermissions"]) == 2

    # Files first, then system packages and mount, the project, and Ray last; each in the order of the file.
    assert not [c for c in mock.calls() if c[0] == "ssh" and "ubuntu@" not in " ".join(c)]
    keys = ("initialization_commands", "setup_commands", "head_setup_commands", "head_start_ray_commands")
    ran = ran_in_order(["uptime"] + [command for key in keys for command in config[key]], mock.calls())
    assert f"{file_system}.efs.{region}.amazonaws.com:/" in " ".join(ran)

    # Source and target close an rsync call; the project goes without what is excluded.
    synced = {call[-1].split(":", 1)[1]: call for call in mock.calls() if call[0] == "rsync"}
    assert set(synced) == {"~/vlm-tune/", "~/.ray/auth_token", "~/ray_bootstrap_config.yaml", "~/ray_bootstrap_key.pem"}
    project = synced["~/vlm-tune/"]
    assert [project[i + 1] for i, a in enumerate(project) if a == "--exclude"] == config["rsync_exclude"]

    # The token went over as a file, and nowhere else.
    assert (mock.log / "auth_token").read_text() == TOKEN
    assert TOKEN not in output + json.dumps(mock.calls())
    bootstrap = (mock.log / "ray_bootstrap_config.yaml").read_text()
    assert TOKEN not in bootstrap

    # What the head's autoscaler does with the configuration it was given: launch the workers it may, and set one up.
    remote = json.loads(bootstrap)
    assert remote["available_node_types"]["worker"]["resources"]["GPU"] == 1
    (mock.home / "vlm-tune").mkdir()
    shutil.copy2(mock.log / "ray_bootstrap_key.pem", mock.home)
    before = len(mock.calls())
    autoscale = [sys.executable, "-c", AUTOSCALE, str(mock.log / "ray_bootstrap_config.yaml")]
    done = subprocess.run(autoscale, env=mock.env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    workers = [i for i in instances("pending", "running") if i["InstanceId"] != node["InstanceId"]]
    assert len(workers) == config["max_workers"]
    for instance in workers:
        assert (instance["InstanceType"], instance.get("InstanceLifecycle")) == (worker["InstanceType"], "spot")
        assert disk_gib(instance) == [worker["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"]]
        assert [g["GroupId"] for g in instance["SecurityGroups"]] == [group["GroupId"]]
        assert "IamInstanceProfile" not in instance
    to_worker = mock.calls()[before:]
    worker_keys = ("initialization_commands", "setup_commands", "worker_start_ray_commands")
    ran_in_order([command for key in worker_keys for command in config[key]], to_worker)
    assert {call[-2] for call in to_worker if call[0] == "rsync"} == {
        f"{mock.home}/vlm-tune/",
        f"{mock.home}/.ray/auth_token",
    }
    assert TOKEN not in done.stdout + done.stderr + json.dumps(to_worker)

    mock.ray("down", "-y", "cluster.yaml")
    assert not instances("pending", "running", "stopping", "stopped")
    assert len(instances("terminated", "shutting-down")) == 1 + config["max_workers"]
