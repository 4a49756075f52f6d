"""Every way in which a delivery can be wrong is flagged, and nothing that is allowed is."""

from __future__ import annotations

from benchmarks.ledger import Accepted, Device, Ledger, judge


def note(number: int) -> bytes:
    """The id of event `number`."""
    return f"0190a000-0000-7000-8000-{number:012d}".encode()


def ledger_of(count: int, user: str = "ana", start: int = 1) -> Ledger:
    """A ledger in which `user` was promised events 1..count."""
    ledger = Ledger()
    for number in range(start, start + count):
        ledger.accept(note(number), Accepted(user, number, intended_s=float(number), answered_s=number + 0.1))
    return ledger


def device_of(*numbers: int, user: str = "ana") -> Device:
    """A device of `user` that received these events, 5 ms after they were meant to be sent."""
    return Device(user, [(n + 0.005, note(n), n) for n in numbers])


def test_everything_once_and_in_order_is_ok() -> None:
    """Two devices that each received all of it: no violation."""
    verdict = judge(
        ledger_of(3), [device_of(1, 2, 3), device_of(1, 2, 3)], stored={note(n): n for n in (1, 2, 3)}
    )
    assert verdict.ok, verdict.sentence()
    assert (verdict.accepted, verdict.received, verdict.not_stored) == (3, 6, 0)


def test_a_loss_on_one_of_two_devices_is_flagged() -> None:
    """An id that reached one device of the user and not the other is lost."""
    verdict = judge(ledger_of(3), [device_of(1, 2, 3), device_of(1, 3)])
    assert not verdict.ok
    assert verdict.lost == 1
    assert verdict.examples == [f"lost: {note(2).decode()} seq 2 of ana"]


def test_a_duplicate_is_flagged_and_not_taken_for_disorder() -> None:
    """The second copy counts as duplicated, once, and as nothing else."""
    verdict = judge(ledger_of(3), [device_of(1, 2, 1, 3)])
    assert (verdict.duplicated, verdict.out_of_order, verdict.lost) == (1, 0, 0)
    assert not verdict.ok


def test_disorder_is_flagged() -> None:
    """Seq 2 after seq 3 on one device breaks the order; nothing is lost."""
    verdict = judge(ledger_of(3), [device_of(1, 3, 2)])
    assert (verdict.out_of_order, verdict.lost, verdict.duplicated) == (1, 0, 0)
    assert not verdict.ok


def test_order_is_per_user_only() -> None:
    """Devices of different users may receive in any interleaving."""
    ledger = ledger_of(2)
    ledger.accept(note(9), Accepted("ben", 1, 0.0, 0.1))
    verdict = judge(ledger, [device_of(1, 2), Device("ben", [(0.2, note(9), 1)])])
    assert verdict.ok, verdict.sentence()


def test_a_notification_of_another_user_is_flagged() -> None:
    """Receiving what belongs to someone else is a violation even if the owner got it too."""
    ledger = ledger_of(1)
    verdict = judge(ledger, [device_of(1), Device("ben", [(1.0, note(1), 1)])])
    assert verdict.foreign == 1
    assert not verdict.ok


def test_a_phantom_is_flagged_unless_an_answer_was_lost() -> None:
    """An id nobody was told is wrong, except as the effect of a POST whose answer never came."""
    assert judge(ledger_of(2), [device_of(1, 2, 3)]).phantom == 1
    ledger = ledger_of(2)
    ledger.lose_answer()
    verdict = judge(ledger, [device_of(1, 2, 3)])
    assert verdict.ok, verdict.sentence()
    assert verdict.ambiguous == 1


def test_a_seq_other_than_answered_is_flagged() -> None:
    """The frame, the answer and the row must name the same seq."""
    ledger = ledger_of(1)
    assert judge(ledger, [Device("ana", [(1.0, note(1), 2)])]).seq_mismatch == 1
    assert judge(ledger, [device_of(1)], stored={note(1): 7}).seq_mismatch == 1


def test_an_id_answered_twice_is_flagged() -> None:
    """Two events must not share an id."""
    ledger = ledger_of(1)
    ledger.accept(note(1), Accepted("ana", 2, 0.0, 0.1))
    assert not judge(ledger, [device_of(1)]).ok


def test_a_gap_in_the_seqs_is_flagged() -> None:
    """A new user whose events got seq 1, 2 and 4 lost number 3."""
    ledger = ledger_of(2)
    ledger.accept(note(4), Accepted("ana", 4, 0.0, 0.1))
    assert judge(ledger, [device_of(1, 2, 4)]).seq_gap == 1
    assert judge(ledger, [device_of(1, 2, 4)], fresh_users=False).ok


def test_what_is_not_stored_is_flagged() -> None:
    """Delivered is not enough: 202 promises a row."""
    verdict = judge(ledger_of(2), [device_of(1, 2)], stored={note(1): 1})
    assert verdict.not_stored == 1
    assert not verdict.ok


def test_offline_users_need_a_push_and_online_ones_do_not() -> None:
    """Each event of a user without a device on a socket must be among the pushes."""
    ledger = ledger_of(2)
    ledger.accept(note(8), Accepted("off", 1, 0.0, 0.1))
    ledger.accept(note(9), Accepted("off", 2, 0.0, 0.1))
    verdict = judge(ledger, [device_of(1, 2)], pushed=[note(8), note(8)])
    assert verdict.not_pushed == 1
    assert judge(ledger, [device_of(1, 2)], pushed=[note(8), note(9)]).ok


def test_refusals_are_counted_but_break_no_promise() -> None:
    """503 promises nothing; a run in which nothing was accepted proves nothing and fails."""
    ledger = ledger_of(1)
    ledger.refuse(503, 4)
    verdict = judge(ledger, [device_of(1)])
    assert verdict.ok
    assert verdict.refused == {"503": 4}
    assert not judge(Ledger(), []).ok


def test_latency_counts_from_the_intended_time_and_leaves_warm_up_out() -> None:
    """A late send is part of the latency; warm-up and repeated receipts are not."""
    ledger = ledger_of(2)
    ledger.accepted[note(1)].measured = False
    latencies = ledger.latencies_s([device_of(1, 2, 2)])
    assert [round(latency, 6) for latency in latencies] == [0.005]
