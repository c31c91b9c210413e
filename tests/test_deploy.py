"""What `deploy/` says of the server is so: its options, its paths, its ports and its times."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from arriero.cli.app import app
from arriero.serving.server import LANDING

DEPLOY = Path(__file__).parent.parent / "deploy"
BASE = DEPLOY / "kubernetes" / "base"


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def parsed(arguments: list[str]) -> dict[str, Any]:
    """The options of a verb's command line, which typer takes."""
    command = get_command(app).commands[arguments[0]]  # type: ignore[attr-defined]
    context = command.make_context(arguments[0], [str(each) for each in arguments[1:]])
    return dict(context.params)


def deployment() -> Any:
    return read(BASE / "deployment.yaml")["spec"]["template"]["spec"]


def test_the_deployment_s_arguments_are_those_of_the_server_and_its_times_fit() -> None:
    spec, server = deployment(), deployment()["containers"][0]
    given = parsed(server["args"])
    assert given["host"] == "0.0.0.0"
    assert given["port"] == server["ports"][0]["containerPort"]
    hook = int(re.search(r"sleep\((\d+)\)", server["lifecycle"]["preStop"]["exec"]["command"][-1])[1])  # type: ignore[index]
    assert spec["terminationGracePeriodSeconds"] > hook + given["drain_seconds"] + LANDING
    mounts = {mount["name"] for mount in server["volumeMounts"]}
    assert mounts == {volume["name"] for volume in spec["volumes"]}
    gpu = read(DEPLOY / "kubernetes" / "gpu" / "kustomization.yaml")["patches"][0]["patch"]
    added = [each["value"] for each in yaml.safe_load(gpu) if each["path"].endswith("/args/-")]
    assert parsed([*server["args"], *added])["trust"] is True


def test_probes_ask_for_paths_that_the_server_has() -> None:
    server = deployment()["containers"][0]
    paths = {server[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    routes = (DEPLOY.parent / "serving" / "app.py").read_text("utf-8")
    assert paths == {"/ready", "/health"}
    assert all(f'Route("{path}"' in routes for path in paths)


def test_who_routes_by_the_gauges_reads_them_without_a_key() -> None:
    about = read(BASE / "deployment.yaml")["spec"]["template"]["metadata"]["annotations"]
    given = parsed(deployment()["containers"][0]["args"])
    assert about["prometheus.io/path"] == "/metrics"
    assert given["api_key_file"] is not None
    assert given["open_metrics"] is True


def test_service_and_pool_choose_the_deployment_s_pods() -> None:
    labels = read(BASE / "deployment.yaml")["spec"]["template"]["metadata"]["labels"]
    pool = read(BASE / "inference-pool.yaml")["spec"]
    for chosen in (read(BASE / "service.yaml")["spec"]["selector"], pool["selector"]["matchLabels"]):
        assert chosen.items() <= labels.items()
    assert pool["targetPorts"][0]["number"] == deployment()["containers"][0]["ports"][0]["containerPort"]
    claim = next(each for each in deployment()["volumes"] if each["name"] == "model")
    name = read(BASE / "model-volume.yaml")["metadata"]["name"]
    assert claim["persistentVolumeClaim"]["claimName"] == name


@pytest.mark.parametrize("name", ["base", "cpu", "gpu"])
def test_every_resource_of_a_kustomization_is_there(name: str) -> None:
    folder = DEPLOY / "kubernetes" / name
    assert all((folder / each).exists() for each in read(folder / "kustomization.yaml")["resources"])


def test_the_unit_s_commands_are_the_command_line_s_and_its_times_fit() -> None:
    text = (DEPLOY / "arriero@.service").read_text("utf-8")
    started = re.findall(r"(?m)^Exec\w+=/opt/arriero/bin/arriero (.*)$", text)
    doctor, server = (parsed(each.replace("%i", "tiny").split()) for each in started)
    assert doctor["port"] == 0
    stop = int(re.search(r"TimeoutStopSec=(\d+)", text)[1])  # type: ignore[index]
    assert stop > server["drain_seconds"] + LANDING
    assert str(server["unix_socket"]).startswith("/run/arriero-tiny/")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "arriero@.service").read_text("utf-8")
    unit = tmp_path / "arriero@tiny.service"
    unit.write_text(text.replace("/opt/arriero/bin/arriero", "/bin/true"), "utf-8")
    run = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert (run.returncode, run.stderr.strip()) == (0, "")


def test_the_container_runs_as_nobody_special_and_starts_a_verb() -> None:
    text = (DEPLOY / "Containerfile").read_text("utf-8")
    user = re.findall(r"(?m)^USER (\d+):(\d+)$", text)[-1]
    security = deployment()["securityContext"]
    assert user == (str(security["runAsUser"]), str(security["runAsGroup"]))
    assert 'ENTRYPOINT ["arriero"]' in text
