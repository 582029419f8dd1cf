"""What a follower may believe about its position, whatever becomes of its user's transactions."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from pgchannels.postgres_follower import Progress
from pgchannels.records import Moved


class Row:
    """The row in the database, and what has taken effect with it. Every message is a batch."""

    def __init__(self) -> None:
        self.position = 0
        self.effects: list[int] = []

    def begin(self, id: int) -> Transaction:
        return Transaction(self, str(id))


class Transaction:
    """Sees its own writes; the conditions are those of ``save_follower``."""

    def __init__(self, row: Row, id: str) -> None:
        self._row = row
        self._id = id
        self._position = row.position
        self._effects: list[int] = []

    def save(self, before: int, after: int, transaction: str | None) -> Moved | None:
        here = self._position
        if here != before and not (here >= after and transaction == self._id):
            return None
        self._position = max(here, after)
        return Moved(self._position, self._id)

    def work(self, progress: Progress, message: int) -> bool:
        """Do it and acknowledge it; False if that fails."""
        self._effects.append(message)
        before = progress.before(message)
        if before is None:
            return False
        moved = self.save(before, message, progress.transaction)
        if moved is None:
            return False
        progress.move(before, moved)
        return True

    def commit(self) -> None:
        self._row.position = self._position
        self._row.effects += self._effects


Attempt = st.tuples(
    st.integers(0, 4),  # how many messages it goes back from the one that would be next
    st.integers(1, 4),  # how many it does
    st.booleans(),  # whether it commits; nobody tells the follower
    st.booleans(),  # whether the position then moves without an ack, or shows that it has not
)


# Some were done and rolled back, and of these only the first one is done again.
@example([(0, 2, False, False), (2, 1, True, False), (0, 1, True, False)])
@example([(0, 3, False, False), (3, 1, True, False), (1, 1, True, False)])
@given(st.lists(Attempt, max_size=40))
def test_what_is_done_is_what_the_position_says(
    attempts: list[tuple[int, int, bool, bool]],
) -> None:
    """A user may go on after a rollback, go back after a commit, and do several at a time."""
    row = Row()
    progress, reached = Progress(0), 0
    for number, (back, count, commits, looks) in enumerate(attempts):
        transaction = row.begin(number)
        first = max(1, reached + 1 - back)
        done = [transaction.work(progress, n) for n in range(first, first + count)]
        reached = max(reached, first + count - 1)
        if not all(done):
            # It was rolled back, and reading begins anew.
            progress, reached = Progress(row.position), row.position
        elif commits:
            transaction.commit()
        if looks and progress.newest != row.position:
            progress, reached = Progress(row.position), row.position
        elif looks:
            progress.commit(progress.newest)
        assert row.effects == list(range(1, row.position + 1))


def test_it_remembers_no_more_than_one_transaction() -> None:
    progress = Progress(0)
    for n in range(1, 100):
        before = progress.before(n)
        assert before == n - 1
        progress.move(before, Moved(n, transaction=str(n)))
    assert progress._saved == [98, 99]
