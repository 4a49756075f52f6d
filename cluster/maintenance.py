"""Leaving a node, and replacing all actors one by one: the steps and their order, without Ray.

Both are made of steps that may be repeated: whoever is interrupted runs the same command again. Nothing here
decides about slots; that is the coordinator's work, which both ask for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Final, Protocol

from carillon.clock import SystemClock
from carillon.errors import ClusterError
from cluster.embedded import write_private

Say = Callable[[str], None]

KINDS: Final = ("router", "pool", "shard", "gateway", "ingress", "coordinator")
"""What `restart` replaces, in this order: those that nobody notices first, so that code that does not start
is found before it costs a socket."""
DRAIN_ORDER: Final = ("gateway", "router", "pool", "shard")
"""How a node is left once its slots have moved."""
STOP_S: Final = 10.0
"""Longest wait for an actor that was drained to close what it has open."""

_CLOCK = SystemClock()


class Control(Protocol):
    """What is asked of the running system (cluster/operator.py: RayControl)."""

    def status(self) -> dict[str, Any]:
        """The coordinator's status. Raises ClusterError while it does not answer."""
        ...

    def actor(self, name: str) -> dict[str, Any]:
        """An actor's status; `{"error": ...}` if it does not answer."""
        ...

    def start_drain(self, name: str) -> Callable[[float], bool]:
        """Begin to drain an actor; what is returned waits so many seconds and tells whether it is done."""
        ...

    def stop(self, name: str, timeout_s: float) -> None:
        """Have an actor close what it has open."""
        ...

    def restart(self, name: str) -> None:
        """End an actor's process; Ray starts another in its place."""
        ...

    def remove(self, name: str) -> None:
        """End an actor for good."""
        ...

    def leave_node(self, node: str) -> dict[str, Any]:
        """See `Coordinator.drain_node`. Raises ClusterError."""
        ...

    def return_to_node(self, node: str) -> str:
        """See `Coordinator.undrain_node`. Raises ClusterError."""
        ...

    def actors_of(self, node: str) -> list[str]:
        """Names of our actors on a node, those included that have left the cluster map."""
        ...

    def replace_ingress(self, generation: str) -> None:
        """Replace the ingress replicas; returns when the new ones serve. Raises ClusterError."""
        ...


def kind_of(name: str) -> str:
    """The kind of actor that a name tells."""
    return name.split("-", 1)[0]


def trouble(status: dict[str, Any]) -> str:
    """What is wrong with the cluster, as a sentence; "" if nothing is."""
    if status.get("starting"):
        return status.get("waiting_for") or "the coordinator is starting"
    if status["retired"]:
        return "the cluster is going down"
    if status["postgres"] != "ok":
        return f"PostgreSQL: {status['postgres']}"
    if status["missing"]:
        return f"{', '.join(status['missing'])} is missing"
    left = {node["node"] for node in status["nodes"] if node["draining"]}
    members = [member for member in status["members"] if member["node"] not in left]
    lost = [member["name"] for member in members if not member["joined"]]
    if lost:
        return f"{', '.join(lost)} has lost its link"
    if status["ownerless"]:
        return f"{status['ownerless']} slots have no owner"
    held = [member["slots"] for member in members if member["kind"] == "shard"]
    if held and max(held) - min(held) > 1:
        return f"the slots are not shared out yet: {', '.join(map(str, held))}"
    return ""


# ---------------------------------------------------------------------------------------------------
# Leaving a node


def drain_node(control: Control, node: str, timeout_s: float, say: Say, poll_s: float = 0.5) -> str:
    """Leave a node: slots first, then sockets, then its actors. Returns the node's id.

    Args:
        node: its id, or the start of it.
        timeout_s: longest wait for sockets and jobs.

    Idempotent: again, it goes on with what is left.

    Raises:
        ClusterError: no such node, one that cannot be left, or somebody did not finish in time.
    """
    left = control.leave_node(node)
    name = left["node"][:8]
    if left["slots"]:
        say(f"{left['slots']} slots have moved from node {name} to other nodes")
    actors = control.actors_of(left["node"])
    if not actors:
        say(f"nothing is left to drain on node {name}")
    deadline = _CLOCK.monotonic() + timeout_s
    for kind in DRAIN_ORDER:
        waits = {actor: control.start_drain(actor) for actor in actors if kind_of(actor) == kind}
        while waits:
            if kind == "gateway":
                open_ = sum(control.actor(actor).get("connections") or 0 for actor in waits)
                say(f"{open_} sockets are open on node {name}")
            done = [actor for actor, wait in waits.items() if wait(poll_s)]
            for actor in done:
                del waits[actor]
            if waits and _CLOCK.monotonic() > deadline:
                raise ClusterError(
                    f"{', '.join(waits)} did not finish within {timeout_s:g} s: the same command goes on"
                )
        for actor in actors:
            if kind_of(actor) == kind:
                control.stop(actor, STOP_S)
                control.remove(actor)
                say(f"{actor} has ended")
    return left["node"]


# ---------------------------------------------------------------------------------------------------
# Replacing all actors


class Journal:
    """What a restart has done, kept in a file until it is through, so that the next one goes on there.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.done: dict[str, str] = {}
        """The new incarnation by name."""
        with contextlib.suppress(OSError, ValueError):
            document = json.loads(path.read_text())
            self.done = {str(name): str(new) for name, new in document["done"].items()}

    def note(self, name: str, incarnation: str) -> None:
        """An actor has been replaced."""
        self.done[name] = incarnation
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_private(self._path, json.dumps({"done": self.done}) + "\n")

    def clear(self) -> None:
        """The restart is through, or is to begin anew."""
        self.done = {}
        self._path.unlink(missing_ok=True)


def restart_actors(
    control: Control,
    actors: Collection[str],
    journal: Journal,
    timeout_s: float,
    say: Say,
    poll_s: float = 0.1,
) -> int:
    """Replace actors one by one, each once the cluster is well again; returns how many.

    A shard gives its slots away first, a gateway closes its sockets with 4201, routers and pools finish what
    they hold, ingress replicas are replaced by Serve.

    Args:
        actors: kinds or names; empty means all.
        journal: those it names are left out, if they are still what they became then.
        timeout_s: longest wait for one actor to drain, and for the cluster to be well after it.

    Raises:
        ClusterError: unknown actor, or the cluster is not well; those that are through stay replaced.
    """
    status = _settled(control, timeout_s, "nothing was replaced", poll_s)
    incarnations = _incarnations(status)
    unknown = [name for name in actors if name not in KINDS and name not in incarnations]
    if unknown:
        raise ClusterError(f"there is no actor {unknown[0]!r}; `status` lists them")
    left = {node["node"] for node in status["nodes"] if node["draining"]}
    stay = {member["name"] for member in status["members"] if member["node"] in left}
    names = sorted(
        (
            name
            for name in incarnations
            if name not in stay and (not actors or name in actors or kind_of(name) in actors)
        ),
        key=lambda name: (KINDS.index(kind_of(name)), name),
    )
    todo = [name for name in names if journal.done.get(name) != incarnations[name]]
    if len(todo) < len(names):
        say(f"going on with an earlier restart: {len(names) - len(todo)} of {len(names)} are through")
    for number, name in enumerate(todo, 1):
        began = _CLOCK.monotonic()
        say(f"({number} of {len(todo)}) {name}")
        _replace(control, name, timeout_s, say)
        what = f"{number} of {len(todo)} are replaced, {name} the last; the same command goes on"
        status = _settled(control, timeout_s, what, poll_s, replaced=(name, incarnations[name]))
        journal.note(name, _incarnations(status)[name])
        say(f"({number} of {len(todo)}) {name} is back after {_CLOCK.monotonic() - began:.1f} s")
    journal.clear()
    return len(todo)


def _incarnations(status: dict[str, Any]) -> dict[str, str]:
    """Whom to replace: (name, incarnation). The ingress counts as one, as Serve names its replicas anew."""
    found = {m["name"]: m["incarnation"] for m in status["members"] if m["kind"] != "ingress"}
    replicas = sorted(m["incarnation"] for m in status["members"] if m["kind"] == "ingress")
    if replicas:
        found["ingress"] = " ".join(replicas)
    return {**found, "coordinator": str(status["epoch"])}


def _replace(control: Control, name: str, timeout_s: float, say: Say) -> None:
    if name == "ingress":
        control.replace_ingress(os.urandom(4).hex())
        return
    kind = kind_of(name)
    if kind == "gateway":
        sockets = control.actor(name).get("connections") or 0
        say(f"    closing {sockets} sockets with 4201")
    if kind != "coordinator":  # its drain is the end of the whole cluster
        wait = control.start_drain(name)
        if not wait(timeout_s):
            # What it holds is committed, and found again by whoever follows it.
            say(f"    {name} has not drained within {timeout_s:g} s and is replaced as it is")
    control.stop(name, STOP_S)
    control.restart(name)


def _settled(
    control: Control, timeout_s: float, so_far: str, poll_s: float, replaced: tuple[str, str] = ("", "")
) -> dict[str, Any]:
    """The status once the cluster is well and `replaced` (name, old incarnation) is there anew."""
    deadline = _CLOCK.monotonic() + timeout_s
    name, old = replaced
    while True:
        try:
            status = control.status()
            wrong = trouble(status)
            if not wrong and name and _incarnations(status).get(name, old) == old:
                wrong = f"{name} is not back"
        except ClusterError as exc:
            wrong = str(exc)
        else:
            if not wrong:
                return status
        if _CLOCK.monotonic() > deadline:
            raise ClusterError(f"the cluster is not well after {timeout_s:g} s: {wrong}; {so_far}")
        time.sleep(poll_s)
