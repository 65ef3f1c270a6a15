"""What deploy/ says of the server, held against the server: options, paths, ports, times, extras."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from manyeyes.cli.main import app
from manyeyes.engines.base import THREADS_VARIABLE
from manyeyes.serving.routes import ROUTES
from manyeyes.serving.settings import ServeSettings

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
FILES = ("manyeyes.service", "Dockerfile", "kubernetes.yaml", "kubernetes-volume.yaml")
README = (DEPLOY / "README.md").read_text()
# What a server still does after the time for its requests: models and worker processes end.
SLACK_SECONDS = 5
# The table in deploy/README.md, "Memory"; of a PNG with transparency in 16 bits.
PEAK_BYTES_PER_PIXEL = 16
# The libraries and a small model.
AT_REST_BYTES = 400e6
OPEN_PATHS = {route.path for route in ROUTES if route.method == "GET" and route.open and route.early}
SERVE: Any = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
SERVE_OPTIONS = {option for parameter in SERVE.params for option in parameter.opts if option.startswith("--")}


def parse(arguments: list[str]) -> dict[str, Any]:
    """What `manyeyes serve` makes of `arguments`; a wrong option or value is the error that a user would see."""
    return SERVE.make_context("serve", list(arguments)).params


def unit() -> dict[str, list[str]]:
    """The unit's settings by name; a setting may come several times."""
    settings = defaultdict(list)
    text = (DEPLOY / "manyeyes.service").read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if line and not line.startswith(("#", "[")):
            name, _, value = line.partition("=")
            settings[name].append(value)
    return settings


def dockerfile() -> dict[str, list[str]]:
    """What follows each instruction, by its name."""
    found = defaultdict(list)
    for line in (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ").splitlines():
        name, _, value = line.strip().partition(" ")
        if name.isupper():
            found[name].append(value.strip())
    return found


def image_arguments() -> list[str]:
    """Of `manyeyes serve`, before those that come with `docker run`."""
    entry = json.loads(dockerfile()["ENTRYPOINT"][0])
    assert entry[:2] == ["manyeyes", "serve"]
    return entry[2:]


def health_check() -> list[str]:
    return json.loads(dockerfile()["HEALTHCHECK"][0].partition("CMD ")[2])


def kubernetes() -> dict[str, Any]:
    objects = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    return {each["kind"]: each for each in objects}


def patch() -> dict[str, Any]:
    """What kubernetes-volume.yaml changes of the pod."""
    return yaml.safe_load((DEPLOY / "kubernetes-volume.yaml").read_text())["spec"]["template"]["spec"]


def pod() -> dict[str, Any]:
    return kubernetes()["Deployment"]["spec"]["template"]["spec"]


def commands_in(text: str) -> list[list[str]]:
    """The arguments of `manyeyes serve`, and of the image, in commands of code blocks."""
    blocks = "\n".join(re.findall(r"^```(?:console|ini)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    found = []
    for line in blocks.replace("\\\n", " ").splitlines():
        if "manyeyes serve " in line:
            found.append(shlex.split(line.partition("manyeyes serve ")[2]))
        elif "docker run" in line:
            found.append(image_arguments() + shlex.split(line.rpartition("manyeyes:0.1.0 ")[2]))
    return found


COMMANDS = {
    "manyeyes.service": shlex.split(unit()["ExecStart"][0])[2:],
    "Dockerfile": image_arguments() + json.loads(dockerfile()["CMD"][0]),
    "kubernetes.yaml": image_arguments() + pod()["containers"][0]["args"],
    "kubernetes-volume.yaml": image_arguments() + patch()["containers"][0]["args"],
    **dict(zip(("README.md, systemd", "README.md, Docker"), commands_in(README), strict=True)),
}


@pytest.mark.parametrize("where", COMMANDS)
def test_the_server_understands_every_command_of_deploy_and_listens_where_all_expect_it(where: str) -> None:
    settings = parse(COMMANDS[where])
    assert settings["port"] == 8000
    # A service stands behind a proxy on its machine; a container is reached from outside or not at all.
    is_service = where in ("manyeyes.service", "README.md, systemd")
    assert settings["host"] == ("127.0.0.1" if is_service else "0.0.0.0")
    assert settings["log_format"] == "json"


def test_texts_and_comments_of_deploy_name_only_options_that_exist() -> None:
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    named = {
        option for code in re.findall(r"`([^`]+)`", prose) for option in re.findall(r"(?<!\w)--[a-z][a-z-]+", code)
    }
    for name in FILES:
        for comment in re.findall(r"^ *#.*$", (DEPLOY / name).read_text(), re.MULTILINE):
            named |= set(re.findall(r"--[a-z][a-z-]+", comment))
    of_docker = {
        "--build-arg",
        "--cpus",
        "--cpuset-cpus",
        "--env",
        "--health-cmd",
        "--no-healthcheck",
        "--stop-timeout",
    }
    assert {"--drain-delay", "--drain-timeout", "--max-megapixels", "--workers"} <= named - of_docker <= SERVE_OPTIONS


@pytest.mark.parametrize("where", FILES)
def test_nothing_kills_a_server_that_still_finishes_requests(where: str) -> None:
    settings = parse(COMMANDS[where])
    if where.startswith("kubernetes"):
        allowed = pod()["terminationGracePeriodSeconds"]
        probe = pod()["containers"][0]["readinessProbe"]
        # As long as it answers everything, a probe must have seen that it will not.
        assert settings["drain_delay"] > probe["periodSeconds"] * probe["failureThreshold"]
    elif where == "Dockerfile":
        allowed = float(re.findall(r"--stop-timeout (\d+)", README)[0])
        settings = parse(COMMANDS["README.md, Docker"])
        assert dockerfile()["STOPSIGNAL"] == ["SIGTERM"]
    else:
        allowed = float(unit()["TimeoutStopSec"][0])
        assert unit()["KillMode"] == ["mixed"]
    assert allowed >= settings["drain_delay"] + settings["drain_timeout"] + SLACK_SECONDS


def test_pictures_that_are_as_large_as_allowed_do_not_get_a_server_killed_for_its_memory() -> None:
    limits = pod()["containers"][0]["resources"]["limits"]
    num_cores, gibibytes = int(limits["cpu"]), int(limits["memory"].removesuffix("Gi"))
    gigabytes = int(unit()["MemoryMax"][0].removesuffix("G"))  # systemd's G is 1024³
    assert f"--memory {gigabytes}g " in README  # and so is Docker's g
    for where, cores, memory in (
        ("manyeyes.service", 4, gigabytes),
        ("README.md, systemd", 4, gigabytes),
        ("README.md, Docker", 4, gigabytes),
        ("kubernetes.yaml", num_cores, gibibytes),
        ("kubernetes-volume.yaml", num_cores, gibibytes),
    ):
        settings = parse(COMMANDS[where])
        num_images = settings["keep_versions"] * (cores + 1)  # and one whose saliency was asked for
        decoding = num_images * PEAK_BYTES_PER_PIXEL * settings["max_megapixels"] * 1e6
        assert AT_REST_BYTES + ServeSettings().max_bodies_bytes + decoding < memory * 1024**3


def test_probes_ask_paths_that_answer_without_a_token_and_before_the_models_are_loaded() -> None:
    container = pod()["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 8000}
    for probe, path in (("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
        assert container[probe]["httpGet"] == {"path": path, "port": "http"}
        assert path in OPEN_PATHS
    assert kubernetes()["Service"]["spec"]["ports"] == [{"name": "http", "port": 80, "targetPort": "http"}]
    assert dockerfile()["EXPOSE"] == ["8000"]
    assert re.findall(r"http://127\.0\.0\.1:8000(/\w+)", health_check()[-1]) == ["/healthz"]
    assert set(re.findall(r"http://127\.0\.0\.1:8000(/[\w/]+)", README)) == {"/readyz", "/v1/recognize"}


def test_prometheus_is_sent_to_the_metrics_and_the_alarms_watch_what_is_counted() -> None:
    annotations = kubernetes()["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    metrics = next(route for route in ROUTES if route.path == annotations["prometheus.io/path"])
    assert metrics.handler == "read_metrics"
    assert annotations["prometheus.io/port"] == "8000"
    assert not metrics.open
    (job,) = re.findall(r"^```yaml\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    (job,) = yaml.safe_load(job)["scrape_configs"]
    assert "credentials_file" in job["authorization"]
    source = "".join(path.read_text() for path in (ROOT / "src" / "manyeyes" / "serving").glob("*.py"))
    names = set(re.findall(r"`(manyeyes_\w+)`", README))
    assert names
    assert all(f'"{name}"' in source for name in names)


def test_the_objects_of_kubernetes_find_each_other() -> None:
    objects = kubernetes()
    assert objects.keys() == {"Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler"}
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert objects["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert objects["Service"]["spec"]["selector"] == labels
    (models,) = patch()["volumes"]
    (mount,) = patch()["containers"][0]["volumeMounts"]
    assert patch()["containers"][0]["name"] == pod()["containers"][0]["name"]
    assert mount == {"name": models["name"], "mountPath": patch()["containers"][0]["args"][0], "readOnly": True}
    target = objects["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target["name"] == objects["Deployment"]["metadata"]["name"]
    # Both count replicas; who sets them twice is set back at each `apply`.
    assert "replicas" not in objects["Deployment"]["spec"]
    secrets = set(re.findall(r"create secret generic ([\w-]+)", README))
    mounted = {volume["secret"]["secretName"] for volume in pod()["volumes"]}
    assert secrets == mounted | {each["secretRef"]["name"] for each in pod()["containers"][0]["envFrom"]}


def test_a_pod_reads_its_token_from_the_secret_and_takes_threads_for_its_share_of_the_node() -> None:
    container = pod()["containers"][0]
    mount = container["volumeMounts"][0]
    volume = {volume["name"]: volume for volume in pod()["volumes"]}[mount["name"]]
    key = re.findall(rf"generic {volume['secret']['secretName']} --from-literal=(\w+)=", README)[0]
    for where in ("kubernetes.yaml", "kubernetes-volume.yaml"):
        assert parse(COMMANDS[where])["token_file"] == f"{mount['mountPath']}/{key}"
    assert container["env"] == [
        {"name": THREADS_VARIABLE, "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}}
    ]
    named = set(re.findall(r"MANYEYES_\w+", "".join(path.read_text() for path in DEPLOY.iterdir())))
    assert named == {THREADS_VARIABLE}


def test_no_container_and_no_service_runs_as_root_or_can_write_or_reports_to_others() -> None:
    user = dockerfile()["USER"][-1].partition(":")[0]
    assert user.isdigit()
    assert int(user) == pod()["securityContext"]["runAsUser"] > 0
    security = pod()["containers"][0]["securityContext"]
    assert security["readOnlyRootFilesystem"]
    assert not security["allowPrivilegeEscalation"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    settings = unit()
    assert (settings["DynamicUser"], settings["ProtectSystem"]) == (["yes"], ["strict"])
    assert (settings["NoNewPrivileges"], settings["CapabilityBoundingSet"]) == (["yes"], [""])
    # Nor does it tell others what it runs.
    assert "ORT_DISABLE_TELEMETRY=1" in settings["Environment"]
    assert "ORT_DISABLE_TELEMETRY=1" in dockerfile()["ENV"][0].split()
    # The models are compiled into machine code.
    assert "MemoryDenyWriteExecute" not in settings
    # A service without its token does not start.
    credential = settings["LoadCredential"][0].partition(":")[0]
    assert parse(COMMANDS["manyeyes.service"])["token_file"] == f"${{CREDENTIALS_DIRECTORY}}/{credential}"


def test_the_image_is_built_from_what_is_there_with_extras_that_exist_and_from_nothing_else() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = re.findall(r"EXTRAS=([\w,]+)", "".join(path.read_text() for path in DEPLOY.iterdir()))
    assert {"serve", "serve,s3", "serve,s3,hdfs"} == set(asked)
    assert {extra for extras in asked for extra in extras.split(",")} <= project["optional-dependencies"].keys()
    assert project["requires-python"] == ">=3.11"
    assert dockerfile()["ARG"][0].removeprefix("PYTHON=") in ("3.11", "3.12", "3.13")
    copied = [name for line in dockerfile()["COPY"] if "--from" not in line for name in line.split()[:-1]]
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == set(copied)
    assert {project["readme"], *project["license-files"], "pyproject.toml", "src"} == set(copied)
