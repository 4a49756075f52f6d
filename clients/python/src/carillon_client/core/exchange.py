"""One HTTP call with its retries, as a machine that a shell drives.

```
while (step := machine.next(now())) is not None:
    if isinstance(step, Wait): sleep(step.seconds)
    else:
        try: machine.answered(now(), send(step))
        except TransportError as error: machine.failed(now(), error)
```
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, NamedTuple, Protocol, TypeVar

import msgspec

from carillon_client.core.codec import decode_json
from carillon_client.core.problems import error_of_answer, may_have_run, worth_retrying
from carillon_client.errors import (
    CarillonError,
    GaveUpError,
    ProblemError,
    TransportError,
    UnexpectedAnswerError,
)

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """How long and how often.

    Attributes:
        deadline_s: seconds from the call (or from queueing) until it is given up. No try begins later.
        attempt_timeout_s: seconds that one try may take, connecting included.
        max_attempts: tries in all; None: as many as the deadline has room for; 1: no retry.
        first_pause_s: before the second try; doubles with every further one. Each is jittered down to half.
        longest_pause_s: bound of the doubling. Retry-After may ask for more and is obeyed.
    """

    deadline_s: float = 60.0
    attempt_timeout_s: float = 15.0
    max_attempts: int | None = None
    first_pause_s: float = 0.2
    longest_pause_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("deadline_s", "attempt_timeout_s", "first_pause_s", "longest_pause_s"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"expected {name} to be above 0 and finite, got {value!r}")
        if self.max_attempts is not None and self.max_attempts < 1:
            raise ValueError(f"expected max_attempts to be at least 1 or None, got {self.max_attempts!r}")

    def pause_s(self, attempts: int, retry_after_s: float, chance: float) -> float:
        """Seconds before the next try.

        Args:
            attempts: tries so far, from 1.
            retry_after_s: what the server asked for: the pause is never shorter.
            chance: from 0 to 1; spreads clients that failed together.
        """
        base = min(self.longest_pause_s, self.first_pause_s * 2.0 ** min(attempts - 1, 60))
        return max(base * (0.5 + 0.5 * chance), retry_after_s + min(base, retry_after_s) * 0.5 * chance)


class Request(NamedTuple):
    """What a shell is to send."""

    method: str
    path: str
    body: bytes | None
    timeout_s: float
    query: tuple[tuple[str, str], ...] = ()


class Wait(NamedTuple):
    """What a shell is to sleep."""

    seconds: float


class Response(NamedTuple):
    """What came back. Header names are lower-case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


Step = Request | Wait
"""What a machine asks for."""


class Machine(Protocol):
    """What a shell can drive."""

    def next(self, now: float) -> Step | None:
        """What to do now; None: done."""
        ...

    def answered(self, now: float, response: Response) -> None:
        """The request of the last step was answered."""
        ...

    def failed(self, now: float, error: TransportError) -> None:
        """The request of the last step was not answered."""
        ...


@dataclass(frozen=True)
class Call(Generic[T]):
    """A call whose repetition has the same effect as one.

    Attributes:
        parse: from the decoded body of a 2xx to the result.
        absent: result of a 404 instead of an error; None raises.
    """

    method: str
    path: str
    parse: Callable[[Any], T]
    body: bytes | None = None
    query: tuple[tuple[str, str], ...] = ()
    absent: Callable[[], T] | None = None


_UNSET: Final[Any] = object()


class CallMachine(Generic[T]):
    """Drives one `Call`.

    Args:
        now: seconds, monotonic; the deadline counts from here.
        chance: gives numbers from 0 to 1.
    """

    def __init__(self, call: Call[T], policy: RetryPolicy, now: float, chance: Callable[[], float]) -> None:
        self._call = call
        self._policy = policy
        self._deadline = now + policy.deadline_s
        self._chance = chance
        self._attempts = 0
        self._not_before = now
        self._last: CarillonError | None = None
        self._maybe_sent = False
        self._value: Any = _UNSET
        self._error: CarillonError | None = None

    def result(self) -> T:
        """After `next` returned None: the result. Raises CarillonError: why there is none."""
        if self._error is not None:
            raise self._error
        assert self._value is not _UNSET, "asked for the result before the end"
        return self._value

    def next(self, now: float) -> Step | None:
        """What to do now."""
        if self._value is not _UNSET or self._error is not None:
            return None
        if max(now, self._not_before) >= self._deadline:
            self._give_up()
            return None
        if self._not_before > now:
            return Wait(self._not_before - now)
        self._attempts += 1
        call = self._call
        timeout_s = min(self._policy.attempt_timeout_s, self._deadline - now)
        return Request(call.method, call.path, call.body, timeout_s, call.query)

    def answered(self, now: float, response: Response) -> None:
        """An answer."""
        if 200 <= response.status < 300:
            try:
                self._value = self._call.parse(decode_json(response.body))
            except (msgspec.MsgspecError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as exc:
                self._again(now, UnexpectedAnswerError(f"the answer is not as expected: {exc!r}"), 0.0)
            return
        if response.status == 404 and self._call.absent is not None:
            self._value = self._call.absent()
            return
        error = error_of_answer(response.status, response.headers, response.body)
        self._again(now, error, error.retry_after_s if isinstance(error, ProblemError) else 0.0)

    def failed(self, now: float, error: TransportError) -> None:
        """No answer."""
        self._again(now, error, 0.0)

    def _again(self, now: float, error: CarillonError, retry_after_s: float) -> None:
        self._last = error
        self._maybe_sent = self._maybe_sent or may_have_run(error)
        if not worth_retrying(error):
            self._error = error
        elif self._attempts == self._policy.max_attempts:
            self._give_up()
        else:
            self._not_before = now + self._policy.pause_s(self._attempts, retry_after_s, self._chance())

    def _give_up(self) -> None:
        self._error = GaveUpError(self._attempts, self._last, self._maybe_sent)
