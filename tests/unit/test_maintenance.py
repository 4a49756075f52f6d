"""Leaving a node and replacing all actors: order, what stops it, and how it goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from carillon.errors import ClusterError
from cluster.maintenance import Journal, drain_node, restart_actors, trouble


class FakeControl:
    """Two nodes that do what they are told; `break_after` names the actor whose successor never comes."""

    def __init__(self) -> None:
        self.generation = dict.fromkeys(NAMES, 1)
        self.done: list[tuple[str, str]] = []
        self.break_after = ""
        self.interrupt_at = ""
        self.postgres = "ok"
        self.sockets = 5
        self.draining: set[str] = set()
        self.late: set[str] = set()

    def status(self) -> dict[str, Any]:
        shards = [name for name in NAMES if name.startswith("shard") and self.generation[name]]
        members = [
            {
                "name": name,
                "kind": name.split("-")[0],
                "node": NAMES[name],
                "incarnation": f"i{generation}",
                "joined": True,
                "slots": 1024 // len(shards) if name in shards else 0,
            }
            for name, generation in self.generation.items()
            if generation and name != "coordinator"
        ]
        return {
            "epoch": self.generation["coordinator"],
            "retired": False,
            "postgres": self.postgres,
            "missing": [name for name, generation in self.generation.items() if not generation],
            "ownerless": 0,
            "nodes": [{"node": node, "draining": node in self.draining} for node in ("head", "second")],
            "members": members,
        }

    def actor(self, name: str) -> dict[str, Any]:
        return {"connections": self.sockets}

    def start_drain(self, name: str) -> Callable[[float], bool]:
        if name == self.interrupt_at:
            raise KeyboardInterrupt
        self.done.append(("drain", name))
        return lambda _: name not in self.late

    def stop(self, name: str, timeout_s: float) -> None:
        self.done.append(("stop", name))

    def restart(self, name: str) -> None:
        self.done.append(("restart", name))
        self.generation[name] = 0 if name == self.break_after else self.generation[name] + 1

    def remove(self, name: str) -> None:
        self.done.append(("remove", name))
        self.generation[name] = 0

    def leave_node(self, node: str) -> dict[str, Any]:
        if node != "second":
            raise ClusterError(f"there is no live node {node!r}; nodes: head, second")
        first = "second" not in self.draining
        self.draining.add("second")
        self.done.append(("leave", node))
        return {"node": "second", "members": [], "slots": 512 if first else 0}

    def return_to_node(self, node: str) -> str:
        self.draining.discard(node)
        return node

    def actors_of(self, node: str) -> list[str]:
        return [name for name, at in NAMES.items() if at == node and self.generation[name]]

    def replace_ingress(self, generation: str) -> None:
        self.done.append(("restart", "ingress"))
        self.generation["ingress-head"] += 1


NAMES = {
    "coordinator": "head",
    "gateway-head": "head",
    "ingress-head": "head",
    "pool-fcm-head": "head",
    "router-head": "head",
    "shard-head": "head",
    "gateway-second": "second",
    "router-second": "second",
    "shard-second": "second",
}


@pytest.fixture
def control() -> FakeControl:
    return FakeControl()


def replaced(control: FakeControl) -> list[str]:
    return [name for what, name in control.done if what == "restart"]


def run(control: FakeControl, tmp_path: Path, *actors: str) -> int:
    return restart_actors(control, actors, Journal(tmp_path / "r.json"), 0.05, lambda _: None, 0.001)


def test_all_actors_are_replaced_one_by_one(control: FakeControl, tmp_path: Path) -> None:
    """Each is drained and stopped first; the coordinator, which would end the cluster, is not drained."""
    assert run(control, tmp_path) == 9
    assert replaced(control) == [
        *("router-head", "router-second", "pool-fcm-head", "shard-head", "shard-second"),
        *("gateway-head", "gateway-second", "ingress", "coordinator"),
    ]
    at = control.done.index(("restart", "shard-head"))
    assert control.done[at - 2 : at] == [("drain", "shard-head"), ("stop", "shard-head")]
    assert ("drain", "coordinator") not in control.done
    assert not (tmp_path / "r.json").exists(), "a whole restart leaves nothing to go on with"


def test_kinds_and_names_choose(control: FakeControl, tmp_path: Path) -> None:
    """Only these are replaced; a name that nobody has is refused before anything happens."""
    assert run(control, tmp_path, "shard", "router-second") == 3
    assert replaced(control) == ["router-second", "shard-head", "shard-second"]
    with pytest.raises(ClusterError, match="no actor 'shard-third'"):
        run(control, tmp_path, "shard", "shard-third")
    assert len(replaced(control)) == 3


def test_it_stops_where_the_cluster_is_not_well_and_goes_on_there(
    control: FakeControl, tmp_path: Path
) -> None:
    """An actor that does not come back ends it with a sentence; the next run leaves out what is through."""
    control.break_after = "shard-head"
    with pytest.raises(
        ClusterError, match=r"shard-head is missing; 4 of 9 are replaced, shard-head the last"
    ):
        run(control, tmp_path)
    with pytest.raises(ClusterError, match="nothing was replaced"):
        run(control, tmp_path)
    assert replaced(control)[-1] == "shard-head"
    control.break_after = ""
    control.generation["shard-head"] = 2
    control.generation["router-head"] += 1  # it crashed meanwhile: it is not what it was replaced by
    assert run(control, tmp_path) == 7
    assert replaced(control)[4:] == [
        *("router-head", "shard-head", "shard-second", "gateway-head", "gateway-second"),
        *("ingress", "coordinator"),
    ]


def test_an_interrupted_restart_goes_on(control: FakeControl, tmp_path: Path) -> None:
    """Ctrl-C between two actors: those before are not replaced again."""
    control.interrupt_at = "gateway-head"
    with pytest.raises(KeyboardInterrupt):
        run(control, tmp_path)
    control.interrupt_at = ""
    before = len(replaced(control))
    assert run(control, tmp_path) == 4
    assert replaced(control)[before:] == ["gateway-head", "gateway-second", "ingress", "coordinator"]


def test_an_ill_cluster_is_not_touched(control: FakeControl, tmp_path: Path) -> None:
    """Nothing is replaced while PostgreSQL does not answer."""
    control.postgres = "connection refused"
    with pytest.raises(ClusterError, match="PostgreSQL: connection refused; nothing was replaced"):
        run(control, tmp_path)
    assert control.done == []


def test_an_actor_that_does_not_drain_is_replaced_all_the_same(control: FakeControl, tmp_path: Path) -> None:
    """What it holds is in PostgreSQL: waiting for ever would only stop the upgrade."""
    control.late = {"router-head"}
    assert run(control, tmp_path, "router") == 2


def test_a_node_is_left_in_order(control: FakeControl, tmp_path: Path) -> None:
    """Slots, then sockets, then routers and shards; each ends for good; again there is nothing to do."""
    said: list[str] = []
    assert drain_node(control, "second", 0.05, said.append, 0.001) == "second"
    assert [name for what, name in control.done if what == "remove"] == [
        "gateway-second",
        "router-second",
        "shard-second",
    ]
    assert control.done[0] == ("leave", "second")
    assert said[0] == "512 slots have moved from node second to other nodes"
    assert "5 sockets are open" in said[1]
    done = len(control.done)
    assert drain_node(control, "second", 0.05, said.append, 0.001) == "second"
    assert control.done[done:] == [("leave", "second")]
    assert said[-1] == "nothing is left to drain on node second"


def test_a_node_that_does_not_drain_in_time_is_named(control: FakeControl) -> None:
    """Who still has sockets is named, nothing is ended by force, and the same command goes on."""
    control.late = {"gateway-second"}
    with pytest.raises(ClusterError, match=r"gateway-second did not finish within 0\.05 s"):
        drain_node(control, "second", 0.05, lambda _: None, 0.001)
    assert [what for what, _ in control.done if what == "remove"] == []
    control.late = set()
    assert drain_node(control, "second", 0.05, lambda _: None, 0.001) == "second"


def test_an_unknown_node_is_a_sentence(control: FakeControl) -> None:
    """It names the nodes that there are."""
    with pytest.raises(ClusterError, match="no live node 'x'; nodes: head, second"):
        drain_node(control, "x", 0.05, lambda _: None)


def test_a_drained_node_does_not_count_as_trouble(control: FakeControl, tmp_path: Path) -> None:
    """Whoever is on its way out owns nothing and may lose its link; a restart leaves it alone."""
    status = control.status()
    status["nodes"][1]["draining"] = True
    for member in status["members"]:
        if member["node"] == "second":
            member |= {"joined": False, "slots": 0}
    assert trouble(status) == ""
    control.draining = {"second"}
    run(control, tmp_path)
    assert not [name for name in replaced(control) if "second" in name]
