"""The container's files agree with one another and with what they mount. No image is built here."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from broker import config
from broker.config import KvAdapter, Overrides, RedisAdapter
from tests.support.broker import REPOSITORY

FOLDER = REPOSITORY / "deploy" / "container"
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
PORTS = {"prometheus": 9090, "redis": 6379}  # of the images


def mounts(service: str) -> dict[str, str]:
    """Where a service has what: path in the container to path here, or to a volume's name."""
    return {target: source for source, target, *_ in _volumes(service)}


def _volumes(service: str) -> list[list[str]]:
    return [volume.split(":") for volume in SERVICES[service]["volumes"]]


def settings(name: str) -> config.Config:
    loaded, warnings = config.load(str(FOLDER / name), Overrides(), {})
    assert warnings == []
    return loaded


def test_services() -> None:
    assert SERVICES.keys() == {"broker", "redis", "prometheus", "grafana"}
    assert SERVICES["redis"]["profiles"] == ["redis"], "the others come up without it"
    for name, service in SERVICES.items():
        assert set(service.get("depends_on", [])) <= SERVICES.keys()
        assert service["restart"] == "unless-stopped"
        if name != "broker":
            image, _, tag = service["image"].partition(":")
            assert image
            assert re.match(r"v?\d", tag), "the same image tomorrow"


@pytest.mark.parametrize("service", SERVICES)
def test_what_is_mounted_exists(service: str) -> None:
    named = set()
    for source, target, *mode in _volumes(service):
        assert target.startswith("/")
        if source.startswith("."):
            assert (FOLDER / source).exists(), source
            assert mode == ["ro"], source
        else:
            named.add(source)
    assert named <= COMPOSE["volumes"].keys()


def test_every_volume_is_used() -> None:
    used = {source for name in SERVICES for source, *_ in _volumes(name)}
    assert COMPOSE["volumes"].keys() <= used


def test_the_image_is_made_of_what_is_there() -> None:
    build = SERVICES["broker"]["build"]
    context = (FOLDER / build["context"]).resolve()
    assert context == REPOSITORY
    assert (context / build["dockerfile"]).read_text() == DOCKERFILE
    for words in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE):
        for source in words.split()[:-1]:
            assert (context / source).exists(), source
    packages = re.findall(r"^COPY (\w+) /src/", DOCKERFILE, re.MULTILINE)
    assert sorted(packages) == ["broker", "gateway", "shards"]


@pytest.mark.parametrize("name", ["broker.yaml", "redis.yaml"])
def test_the_configurations_fit_the_container(name: str) -> None:
    loaded, broker = settings(name), SERVICES["broker"]
    assert mounts("broker")[f"/etc/broker/{name}"] == f"./{name}"
    exposed = set(re.findall(r"^EXPOSE (.+)$", DOCKERFILE, re.MULTILINE)[0].split())
    first = loaded.metrics.port
    ports = {loaded.stream.port, loaded.worker.port, *range(first, first + 1 + loaded.shards)}
    assert exposed == set(map(str, ports))
    published = {port.rpartition(":")[2] for port in broker["ports"]}
    assert published == {str(loaded.stream.port), str(loaded.worker.port)}
    assert {loaded.stream.host, loaded.worker.host, loaded.metrics.host} == {"0.0.0.0"}
    writable = {path.partition(":")[0] for path in broker["tmpfs"]} | {"/data"}
    assert loaded.run_dir in writable
    if isinstance(loaded.adapter, KvAdapter):
        assert Path(loaded.adapter.file_path).parent == Path("/data")
    else:
        assert isinstance(loaded.adapter, RedisAdapter)
        assert loaded.adapter.redis_url == f"redis://redis:{PORTS['redis']}"
    # Its stop has to be over before the engine's patience is.
    assert float(broker["stop_grace_period"].rstrip("s")) > 2 * loaded.limits.stop_timeout_s + 10


def test_the_command_is_one() -> None:
    command = SERVICES["broker"]["command"]
    assert "/etc/broker/${BROKER_CONFIG:-broker.yaml}" in command
    words = [word.replace("${BROKER_CONFIG:-broker.yaml}", "broker.yaml") for word in command]
    assert words[:3] == ["serve", "--config", "/etc/broker/broker.yaml"]
    assert f"CMD {words}".replace("'", '"') in DOCKERFILE
    assert 'ENTRYPOINT ["broker"]' in DOCKERFILE


@pytest.mark.skipif(shutil.which("promtool") is None, reason="prometheus is not installed")
def test_prometheus_finds_its_rules(tmp_path: Path) -> None:
    """In a folder as the container has it."""
    for target, source in mounts("prometheus").items():
        if source.startswith("."):
            assert target.startswith("/etc/prometheus/")
            shutil.copy(FOLDER / source, tmp_path / Path(target).name)
    done = subprocess.run(
        ["promtool", "check", "config", "prometheus.yml"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rules found" in done.stdout


def test_prometheus_scrapes_every_process() -> None:
    loaded = settings("broker.yaml")
    scraping = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    (job,) = scraping["scrape_configs"]
    own = yaml.safe_load((REPOSITORY / "deploy" / "prometheus" / "prometheus.yml").read_text())
    assert job["job_name"] == own["scrape_configs"][0]["job_name"]
    found = {t["labels"]["process"]: t["targets"] for t in job["static_configs"]}
    names = ["gateway", *(f"shard-{k}" for k in range(loaded.shards))]
    first = loaded.metrics.port
    assert found == {name: [f"broker:{first + k}"] for k, name in enumerate(names)}


def test_grafana_finds_its_dashboards_and_prometheus() -> None:
    grafana = mounts("grafana")
    providers = FOLDER / grafana["/etc/grafana/provisioning/dashboards"]
    (provider,) = [
        entry
        for path in providers.glob("*.yml")
        for entry in yaml.safe_load(path.read_text())["providers"]
    ]
    dashboards = FOLDER / grafana[provider["options"]["path"]]
    assert len(list(dashboards.glob("*.json"))) == 3
    source_file = FOLDER / grafana["/etc/grafana/provisioning/datasources/prometheus.yml"]
    (source,) = yaml.safe_load(source_file.read_text())["datasources"]
    assert source["url"] == f"http://prometheus:{PORTS['prometheus']}"
    shipped = REPOSITORY / "deploy" / "grafana" / "provisioning" / "datasources" / "prometheus.yml"
    (own,) = yaml.safe_load(shipped.read_text())["datasources"]
    assert {**own, "url": ""} == {**source, "url": ""}
    scraping = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == scraping["global"]["scrape_interval"]
