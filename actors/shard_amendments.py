"""What services do to notifications they sent: edit, retract, cancel. Applied by the writer, like changes.

Every act is a state that is set: told twice, it finds itself done and answers how things stand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from actors.shard_changes import ChangeEntry, Changes, finish
from actors.shard_users import User
from carillon import edits, server_frames
from carillon.clock import Clock
from carillon.errors import InvalidInputError, NotFoundError, UnavailableError
from carillon.messages import Amend
from carillon.messages import Amended as Answer
from carillon.notification import gone
from carillon.session import Effect
from carillon.settings import ShardSettings
from stores.postgres.amendments import Amended, EditDone, EditRow, Standing
from stores.postgres.shard_store import ShardStore

AMENDMENTS: Final = frozenset(("edit", "retract", "cancel"))
RETRACTED: Final = "retracted"
CANCELLED: Final = "cancelled"


class AmendEntry(ChangeEntry):
    """One amendment on its way.

    Attributes:
        done: called with `carillon.messages.Amended` after the commit, or with the error.
    """

    __slots__ = ("message",)

    def __init__(self, user: User, message: Amend, done: Callable[[Any], None]) -> None:
        super().__init__(user, message.op, [message.notification], None, True, done)
        self.message = message

    def row(self) -> Amended:
        """As the store takes it."""
        message = self.message
        return Amended(self.user.stream_id, message.notification, message.act, message.actor)


class Amendments:
    """Applies amendments, one statement per kind.

    Args:
        changes: counts expired rows anew.
        term, run: as in `Changes`.
        due_now: called when pushes are due: withdrawals, or such as replace a text.
        stopped: called with what is not to be pushed any more, and why.
        expires: as in `Changes`.
    """

    def __init__(
        self,
        store: ShardStore,
        clock: Clock,
        settings: ShardSettings,
        changes: Changes,
        *,
        term: Callable[[], int],
        run: Callable[[User, list[Effect]], None],
        due_now: Callable[[], None],
        stopped: Callable[[bytes, str], None],
        expires: Callable[[User, int], None],
    ) -> None:
        self._expires = expires
        self._store = store
        self._clock = clock
        self._keep = settings.edit_history
        self._changes = changes
        self._term = term
        self._run_effects = run
        self._due_now = due_now
        self._stopped = stopped

    async def apply(self, op: str, entries: Sequence[ChangeEntry]) -> None:
        """Apply amendments of one kind, of each user one, and answer them. Errors as `Changes.apply`."""
        todo = [entry for entry in entries if isinstance(entry, AmendEntry)]
        if not todo:
            return
        if op == "edit":
            await self._edit(todo)
        elif op == "retract":
            await self._retract(todo)
        else:
            await self._cancel(todo)

    async def _retract(self, entries: list[AmendEntry]) -> None:
        done = await self._store.retract(self._term(), [e.row() for e in entries], self._clock.now_ms())
        changed = [entry for entry in entries if entry.user.stream_id in done]
        for entry in changed:
            self._stopped(entry.message.notification, RETRACTED)
        # One that had expired is no part of the count any more, nor to be left out of it.
        before = await self._changes.recount([entry.user for entry in changed if entry.user.expired])
        for entry in changed:
            user = entry.user
            user.rev, user.unread, taken_back = done[user.stream_id]
            if taken_back:
                self._due_now()
            self._gone(user, entry.message.notification)
            if user.session is not None and user.expired != before.get(user.stream_id, user.expired):
                self._run_effects(user, user.session.counted(user.shown_unread(), told=True))
        await self._answer(entries)

    def _gone(self, user: User, raw: bytes) -> None:
        session = user.session
        if session is not None:
            session.withdrawn((raw,))
            frame = server_frames.notification_state("RETRACTED", raw, user.rev)
            self._run_effects(user, session.state_changed(user.rev, user.shown_unread(), [frame]))

    async def _cancel(self, entries: list[AmendEntry]) -> None:
        if await self._store.cancel(self._term(), [e.row() for e in entries], self._clock.now_ms()):
            self._due_now()  # what a push that is stopped spoke for, if it did
        for entry in entries:
            self._stopped(entry.message.notification, CANCELLED)
            if entry.user.session is not None:
                entry.user.session.dealt_with((entry.message.notification,))
        await self._answer(entries)

    async def _edit(self, entries: list[AmendEntry]) -> None:
        now_ms = self._clock.now_ms()
        term = self._term()  # under which these users are ours: a new map may come meanwhile
        known = await self._store.standing([e.row() for e in entries])
        rows: list[EditRow] = []
        todo: list[tuple[AmendEntry, Standing]] = []
        for entry in entries:
            message = entry.message
            found = known.get(message.notification)
            row = None if found is None or found.done else self._edited(entry, found, now_ms)
            if row is not None and found is not None:
                rows.append(row)
                todo.append((entry, found))
            else:
                finish([entry], _unknown() if found is None else _answer(found))
        if not rows:
            return
        done = await self._store.edit(term, rows, now_ms, self._keep)
        over = [e.user for e, _ in todo if (d := done.get(e.user.stream_id)) and gone(d.row, now_ms)]
        await self._changes.recount(over)
        for entry, before in todo:
            result = done.get(entry.user.stream_id)
            if result is None:
                finish([entry], UnavailableError("the notification changed meanwhile"))
                continue
            self._tell(entry.user, result, now_ms)
            finish([entry], Answer(before.version + 1, None, before.cancelled_ms, before.stopped))

    def _edited(self, entry: AmendEntry, found: Standing, now_ms: int) -> EditRow | None:
        """What is to be written; None: nothing, or the entry was refused."""
        message = entry.message
        refused = edits.over(found.expires_ms, found.retracted_ms, now_ms)
        new: edits.Edited | None = None
        if refused is None:
            try:
                new = edits.edited(found.content, found.expires_ms, message.patch)
            except InvalidInputError as exc:
                refused = exc
        if new is not None:
            refused = edits.conflict(found.version, message.version)
        if refused is not None:
            finish([entry], refused)
        if refused is not None or new is None:
            return None
        return EditRow(
            entry.user.stream_id, message.notification, message.act, message.actor,
            new.content, new.expires_ms, found.version, new.shown,
        )  # fmt: skip

    def _tell(self, user: User, done: EditDone, now_ms: int) -> None:
        user.rev, user.unread = done.row.rev, done.unread
        if gone(done.row, now_ms):  # an edit ended it
            self._gone(user, done.row.id)
            return
        if done.row.expires_ms is not None:
            self._expires(user, done.row.expires_ms)
        if done.replaced:
            self._due_now()
        if user.session is not None:
            self._run_effects(user, user.session.updated(done.row, user.shown_unread()))

    async def _answer(self, entries: list[AmendEntry]) -> None:
        known = await self._store.standing([e.row() for e in entries])
        for entry in entries:
            found = known.get(entry.message.notification)
            finish([entry], _unknown() if found is None else _answer(found))


def _unknown() -> NotFoundError:
    return NotFoundError("there is no such notification", "id", "the id of a notification")


def _answer(found: Standing) -> Answer:
    return Answer(found.version, found.retracted_ms, found.cancelled_ms, found.stopped)
