"""ray_cluster.yaml, judged by Ray's own schema and by what our code sets."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.ray_env import PRELOAD, PRIORITY, ROOT, SERVE_SWITCHES


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def _schema() -> dict[str, Any]:
    spec = find_spec("ray")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0])
    return json.loads((folder / "autoscaler" / "ray-schema.json").read_text())


def test_ray_accepts_it(document: dict[str, Any]) -> None:
    """Ray's launcher validates the file without a complaint."""
    jsonschema.validate(document, _schema())


def test_ray_refuses_a_misspelt_key(document: dict[str, Any]) -> None:
    """The schema that the test above uses does refuse: a typing error would be found."""
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**document, "head_start_ray_command": []}, _schema())


def test_node_types_fit_together(document: dict[str, Any]) -> None:
    """The head's type exists, workers start by themselves, and the total allows for their number."""
    types = document["available_node_types"]
    assert document["head_node_type"] in types
    workers = {name: kind for name, kind in types.items() if name != document["head_node_type"]}
    assert workers
    assert all(kind["min_workers"] <= kind["max_workers"] for kind in workers.values())
    assert sum(kind["max_workers"] for kind in workers.values()) <= document["max_workers"]


def test_environment_has_the_serve_switches(document: dict[str, Any]) -> None:
    """Nodes get exactly the Serve switches that `make up` uses: they must not differ between nodes."""
    assert _environment(document, "RAY_SERVE_") == SERVE_SWITCHES


def test_environment_has_the_start_switches(document: dict[str, Any]) -> None:
    """And those for actors' priority, and for spare processes that have our modules."""
    assert _environment(document, "RAY_worker_", "RAY_preload_") == PRIORITY | PRELOAD


def _environment(document: dict[str, Any], *begins: str) -> dict[str, str]:
    written = "\n".join(document["setup_commands"])
    return dict(line.split("=", 1) for line in written.splitlines() if line.startswith(begins))


def test_every_start_reads_the_environment(document: dict[str, Any]) -> None:
    """Head and workers start Ray with both environment files, the settings and secrets, and the switches."""
    for commands in (document["head_start_ray_commands"], document["worker_start_ray_commands"]):
        start = next(command for command in commands if "ray start" in command)
        before = start[: start.index("ray start")]
        assert ". /home/admin/carillon.env" in before
        assert ". /home/admin/ray.env" in before
        assert "set -a" in before


def test_state_of_ray_is_kept_in_redis() -> None:
    """The example of the secrets file names what a cluster needs, RAY_REDIS_ADDRESS among it."""
    lines = (ROOT / "deploy" / "cluster.env.example").read_text().splitlines()
    names = {line.split("=", 1)[0] for line in lines if line and not line.startswith("#")}
    assert names == {
        "CARILLON_POSTGRES_DSN",
        "CARILLON_REDIS_URL",
        "CARILLON_CLUSTER_SECRET",
        "CARILLON_CLUSTER_BIND_HOST",
        "CARILLON_CLUSTER_SPARE_PROCESS",
        "RAY_AUTH_TOKEN",
        "RAY_REDIS_ADDRESS",
        "RAY_REDIS_PASSWORD",
    }


def test_mounted_files_exist(document: dict[str, Any]) -> None:
    """What is copied to the nodes is here, except the secrets, which each operator writes."""
    for source in document["file_mounts"].values():
        assert source == "deploy/cluster.env" or os.path.exists(ROOT / source)
