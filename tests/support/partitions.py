"""A log whose partitions are small, so that there are many ends to go wrong at."""

from __future__ import annotations

import psycopg


def make_small(database_url: str, size: int) -> None:
    """Let the partitions of an empty log hold *size* ids each, beginning with one."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("drop table pgchannels.messages_1")
        connection.execute(
            "update pgchannels.log set partition_size = %s, partitioned_to = 1, attached_to = 1",
            [size],
        )
        for _ in range(2):  # made, and told of
            connection.execute("select pgchannels.add_partitions(1)")
