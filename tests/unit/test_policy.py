"""The policy document: what is refused, and what its parts add up to."""

from __future__ import annotations

from typing import Any

import pytest

from carillon.errors import ClusterError
from carillon.policy import Policy, PolicyError, WatchRule, build, callback_allowed, complete, validate
from cluster.admin import policy_set

DEFAULT = Policy("push_after", 30_000, 60_000)


def test_what_a_document_leaves_out_is_the_default() -> None:
    """Types lie over the tenant's own policy, and that over the cluster's."""
    policy = build({"holdS": 0, "types": {"chat": {"whenAwayDelayS": 2.5}}}, DEFAULT)
    assert policy.of("other") == Policy("push_after", 30_000, 0)
    assert policy.of("chat") == Policy("push_after", 2500, 0)
    assert build(None, DEFAULT).of("chat") == DEFAULT
    assert complete({"holdS": 5}, DEFAULT) == {
        "whenAway": "push_after", "whenAwayDelayS": 30.0, "holdS": 5.0, "types": {},
        "presence": {"watch": "nobody"}, "topics": {"subscribe": "nobody"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("document", "path"),
    [
        ([], ""),
        ({"whenAway": "never"}, "whenAway"),
        ({"holdS": -1}, "holdS"),
        ({"holdS": 3601}, "holdS"),
        ({"whenAwayDelayS": True}, "whenAwayDelayS"),
        ({"delay": 3}, "delay"),
        ({"presence": "tenant"}, "presence"),
        ({"presence": {}}, "presence/watch"),
        ({"presence": {"watch": "friends"}}, "presence/watch"),
        ({"presence": {"watch": ["tenant"]}}, "presence/watch"),
        ({"presence": {"watch": "tenant", "who": 1}}, "presence/who"),
        ({"presence": {"watch": "tenant", "url": "https://a.example/"}}, "presence/url"),
        ({"presence": {"watch": "callback"}}, "presence/url"),
        ({"presence": {"watch": "callback", "url": None}}, "presence/url"),
        ({"presence": {"watch": "callback", "url": "http://a.example/"}}, "presence/url"),
        ({"presence": {"watch": "callback", "url": "https://u:p@a.example/"}}, "presence/url"),
        ({"types": {"chat": {"presence": {"watch": "tenant"}}}}, "types/chat/presence"),
        ({"types": []}, "types"),
        ({"types": {"": {}}}, "types/"),
        ({"types": {"chat": {"types": {}}}}, "types/chat/types"),
        ({"types": {f"t{n}": {} for n in range(201)}}, "types"),
        ({"defaults": True}, "defaults"),
        ({"defaults": {"quietHours": {"start": "1", "end": "2"}}}, "defaults/quietHours/start"),
        ({"defaults": {"doNotDisturbUntil": "2030-01-01T00:00:00Z"}}, "defaults/doNotDisturbUntil"),
        ({"forced": {"global": True}}, "forced/global"),
        ({"forced": {"types": {"x": 3}}}, "forced/types/x"),
        ({"limits": {"user": {"count": 0, "windowS": 60}}}, "limits/user/count"),
        ({"limits": {"user": {"count": 5}}}, "limits/user"),
        ({"limits": {"types": {"x": {"count": 5, "windowS": 1e9}}}}, "limits/types/x/windowS"),
        ({"limits": {"overflow": "drop"}}, "limits/overflow"),
        ({"types": {"x": {"limits": {}}}}, "types/x/limits"),
    ],
)
def test_a_wrong_document_is_refused_with_the_place(document: Any, path: str) -> None:
    """Every rule names the member that breaks it; suppression is bounded."""
    with pytest.raises(PolicyError) as found:
        validate(document)
    assert found.value.errors[0].path == path


def test_members_are_set_one_by_one() -> None:
    """`--set` of the command line: members, those of types with dots, and taking out."""
    document: dict[str, Any] = {"holdS": 5}
    for assignment in ("whenAway=both", "types.chat.message.holdS=3", "holdS="):
        policy_set(document, assignment)
    assert document == {"whenAway": "both", "types": {"chat.message": {"holdS": 3.0}}}
    with pytest.raises(ClusterError, match="member=value"):
        policy_set(document, "whenAway")
    policy_set(document, "presence.watch=tenant")
    assert document["presence"] == {"watch": "tenant"}
    policy_set(document, "presence.watch=")
    assert "presence" not in document


def test_presence_is_the_tenants_or_the_clusters() -> None:
    """Who may watch whom: the document's rule if it has one, else the cluster's."""
    everybody = WatchRule("tenant")
    assert build(None, DEFAULT).presence == WatchRule("nobody")
    assert build({"holdS": 3}, DEFAULT, everybody).presence == everybody
    assert build({"presence": {"watch": "nobody"}}, DEFAULT, everybody).presence == WatchRule("nobody")
    asked = {"presence": {"watch": "callback", "url": "https://a.example/may"}}
    assert build(asked, DEFAULT).presence == WatchRule("callback", "https://a.example/may")
    assert complete(asked, DEFAULT)["presence"] == asked["presence"]


@pytest.mark.parametrize(
    ("url", "hosts", "allowed"),
    [
        ("https://a.example/may", "", False),
        ("https://a.example/may", "a.example", True),
        ("https://A.example/may", "b.example, a.EXAMPLE", True),
        ("https://a.example:8443/may", "a.example", False),
        ("https://a.example:8443/may", "a.example:8443", True),
        ("https://a.example.evil.test/", "a.example", False),
        ("http://127.0.0.1:9999/", "127.0.0.1", False),
        ("https://169.254.169.254/latest", "a.example", False),
    ],
)
def test_only_hosts_of_the_operator_are_asked(url: str, hosts: str, allowed: bool) -> None:
    """A tenant cannot have requests sent to a host, or a port, that the operator did not name."""
    assert callback_allowed(url, hosts) == allowed
    document = {"presence": {"watch": "callback", "url": url}}
    if allowed:
        assert validate(document, hosts) == validate(document)
    else:
        with pytest.raises(PolicyError) as found:
            validate(document, hosts)
        assert found.value.errors[0].path == "presence/url"


@pytest.mark.parametrize(
    ("rule", "path"),
    [
        ([], "topics"),
        ({}, "topics/subscribe"),
        ({"subscribe": "some"}, "topics/subscribe"),
        ({"subscribe": "prefix"}, "topics/prefixes"),
        ({"subscribe": "any", "prefixes": ["a"]}, "topics/prefixes"),
        ({"subscribe": "prefix", "prefixes": []}, "topics/prefixes"),
        ({"subscribe": "prefix", "prefixes": ["a", ""]}, "topics/prefixes/1"),
        ({"subscribe": "any", "x": 1}, "topics/x"),
    ],
)
def test_a_rule_of_topics_that_is_none(rule: Any, path: str) -> None:
    """A rule of topics that breaks its form is refused with the place."""
    with pytest.raises(PolicyError) as caught:
        validate({"topics": rule})
    assert [error.path for error in caught.value.errors] == [path]


def test_which_topics_clients_may_name() -> None:
    """None without a rule; with prefixes those that begin with one of them."""
    assert not build(None, DEFAULT).topics.allows("a")
    assert build({"topics": {"subscribe": "any"}}, DEFAULT).topics.allows("a")
    rule = build({"topics": {"subscribe": "prefix", "prefixes": ["a.", "b"]}}, DEFAULT).topics
    assert [name for name in ("a", "a.", "a.c", "b", "bc", "c.a.") if rule.allows(name)] == [
        "a.",
        "a.c",
        "b",
        "bc",
    ]
