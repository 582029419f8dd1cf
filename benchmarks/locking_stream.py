"""A peer to compare with: it locks a row and notifies, as Centrifugo's PostgreSQL streams do.

This is the approach, in a version of our own, and not Centrifugo's code. In the transaction that
publishes, a function takes the next offset from the stream's row, inserts the message under it and
notifies. Offsets are then contiguous and in commit order at once, without a sequencer. For that the
row stays locked until the commit is done, and so does the lock under which all of a cluster's
notifications are queued. It does the least that the approach can: no idempotency keys, no expiry,
no state beside the offset.
"""

from __future__ import annotations

from typing import Final

__all__ = ["CHANNEL", "SCHEMA", "TABLES"]

CHANNEL: Final = "streams"
"""What is to be listened on."""

TABLES: Final = "streams, stream_messages"

SCHEMA: Final = f"""
create table streams (
    name text primary key,
    last_offset bigint not null
);

create table stream_messages (
    stream text not null,
    stream_offset bigint not null,
    payload json not null,
    created_at timestamptz not null default clock_timestamp(),
    primary key (stream, stream_offset)
);

create function publish_to_stream(stream text, payload json) returns bigint
language plpgsql
as $$
declare
    next_offset bigint;
begin
    insert into streams as s (name, last_offset) values (stream, 1)
        on conflict (name) do update set last_offset = s.last_offset + 1
        returning s.last_offset into next_offset;
    insert into stream_messages (stream, stream_offset, payload)
    values (stream, next_offset, payload);
    perform pg_notify('{CHANNEL}', stream || ' ' || next_offset);
    return next_offset;
end
$$;
"""
