-- The outbox, the log and the functions between them.
--
-- Written for the schema "pgchannels"; whoever runs it puts in the configured name. As a migration
-- it is frozen once released: later changes come as later migrations.

do $$
begin
    if current_setting('server_version_num')::integer < 160000 then
        raise exception 'pgchannels needs PostgreSQL 16 or newer, not %', current_setting('server_version');
    end if;
    if current_setting('server_encoding') <> 'UTF8' then
        raise exception 'pgchannels needs a database with encoding UTF8, not %', current_setting('server_encoding');
    end if;
end
$$;

-- What a channel may be called. The same class as in pgchannels/messages.py: white space, control
-- and invisible formatting characters, and the wildcards of topic filters.
--
-- Here and below in PL/pgSQL, which keeps the compiled expression for the session. A function in SQL
-- would be inlined into the check, and planned anew for each insert: for small ones, half their cost.
create function pgchannels.is_channel(name text) returns boolean
language plpgsql immutable strict parallel safe
as $$
begin
    return char_length(name) between 1 and 200 and name !~ E'[\\u0001-\\u0020\\u007f-\\u00a0\\u00ad\\u061c\\u1680\\u180e\\u2000-\\u200f\\u2028-\\u202f\\u205f-\\u206f\\u3000\\ufeff\\ufff9-\\uffff\\U000e0000-\\U000e0fff+#*]';
end
$$;

-- A JSON object of at most 16 MiB that every reader can decode. The type json checks the form only.
-- Refused are half of a surrogate pair ("\ud800"), a number beyond the range of a double (1e400), and
-- more than 500 arrays and objects in each other. Few texts can hold any of these, so each rule
-- begins with a quick look at the text; only what that finds is examined.
--
-- Surrogates: most texts have no \u escape at all; of the others, those with a surrogate are looked at:
-- escaped backslashes are blanked first (they may stand before a "u"), then whole pairs; a surrogate
-- that is left is lone. Blanked, not taken out, or the halves on either side would become neighbours.
--
-- Numbers and depth: a large number has an exponent of three digits, or very many digits. Depth needs
-- as many opening brackets, without those of neighbours: an object that begins where another one has
-- ended is no deeper. jsonb knows the rest, without the one escape that it refuses.
create function pgchannels.is_payload(payload json) returns boolean
language plpgsql immutable strict parallel safe
as $$
declare
    large boolean;
    known text;
    parsed jsonb;
begin
    if json_typeof(payload) <> 'object'
       or octet_length(payload::text) > 16777216
       or strpos(payload::text, E'\\u') > 0
          and payload::text ~ E'\\\\u[dD][89a-fA-F]'
          and regexp_replace(
                  replace(payload::text, E'\\\\', ' '),
                  E'\\\\u[dD][89abAB][0-9a-fA-F]{2}\\\\u[dD][c-fC-F][0-9a-fA-F]{2}', ' ', 'g')
              ~ E'\\\\u[dD][89a-fA-F]' then
        return false;
    end if;
    large := payload::text ~ E'[,:\\s[]-?[0-9]([0-9.]*[eE]\\+?[0-9]{3}|[0-9]{24})';
    if large
       or octet_length(payload::text) > 1000
          and octet_length(payload::text) - octet_length(replace(replace(replace(replace(
                  payload::text, '},{', '}, '), '}, {', '},  '), '{', ''), '[', '')) > 500 then
        known := replace(replace(payload::text, E'\\\\', ''), E'\\u0000', '');
        if not pg_input_is_valid(known, 'jsonb') then
            return false;  -- a number beyond even what jsonb can hold
        end if;
        parsed := known;
        return not (large and jsonb_path_exists(
                       parsed, 'strict $.** ? (@.type() == "number" && '
                               '(@ >= 1.797693134862315807e308 || @ <= -1.797693134862315807e308))'))
           and not jsonb_path_exists(
                       parsed, 'strict $.**{500} ? (@.type() == "object" || @.type() == "array")');
    end if;
    return true;
end
$$;

-- Where every publisher inserts, in its own transaction. One index, no lock, no NOTIFY.
create table pgchannels.outbox (
    id bigint generated always as identity,
    xid xid8 not null default pg_current_xact_id(),
    channel text not null,
    payload json not null,
    attachments bytea[],
    headers json,
    created_at timestamptz not null default clock_timestamp(),
    expires_at timestamptz,
    constraint outbox_channel_is_valid check (pgchannels.is_channel(channel)),
    constraint outbox_payload_is_valid check (pgchannels.is_payload(payload)),
    -- what every reader's language can hold
    constraint outbox_created_at_is_valid check (
        created_at >= '1970-01-01 00:00:00+00' and created_at < '9999-01-01 00:00:00+00')
) with (
    -- truncating an emptied table takes an ACCESS EXCLUSIVE lock, and publishers would wait for it
    vacuum_truncate = false
);

-- Unique, so that it can be the replica identity: without one, a publication FOR ALL TABLES would refuse
-- the deletes of each batch.
create unique index outbox_order on pgchannels.outbox (xid, id);

alter table pgchannels.outbox replica identity using index outbox_order;

comment on table pgchannels.outbox is 'published, not yet in the log; emptied by seal()';

create table pgchannels.messages (
    id bigint not null,
    channel text not null,
    payload json not null,
    attachments bytea[],
    headers json,
    size integer not null,
    created_at timestamptz not null,
    expires_at timestamptz,
    constraint messages_pkey primary key (id)
) partition by range (id);

create index messages_channel_id on pgchannels.messages (channel, id);

create index messages_expires_at on pgchannels.messages (expires_at) where expires_at is not null;

comment on table pgchannels.messages is 'the log: ids are contiguous, in commit order';

comment on column pgchannels.messages.size is 'bytes of the payload''s text, so that a page can be bounded without reading it';

-- One row a transaction of the sequencer. The snapshot says which transactions it could see.
create table pgchannels.batches (
    last_id bigint not null,
    snapshot pg_snapshot not null,
    sealed_at timestamptz not null default clock_timestamp(),
    epoch integer not null default 1,
    mark bigint not null default (extract(epoch from clock_timestamp()) * 1000000)::bigint,
    constraint batches_pkey primary key (last_id)
);

comment on column pgchannels.batches.mark is 'the microsecond at which it was sealed; by this, readers know a batch that they have seen';

create index batches_sealed_at on pgchannels.batches (sealed_at);

-- Its lock is the sequencer's. An advisory lock could be taken by any role that may connect, and kept;
-- this one takes a right that only nodes have.
create table pgchannels.sequencer_lock (
    nothing boolean not null,
    constraint sequencer_lock_pkey primary key (nothing),
    constraint sequencer_lock_is_empty check (false)
);

comment on table pgchannels.sequencer_lock is 'always empty: locked by the one that writes to the log';

-- One row: what is true of the log as a whole.
create table pgchannels.log (
    singleton boolean not null default true,
    floor bigint not null default 0,
    partition_size bigint not null default 1000000,
    partitioned_to bigint not null default 1,
    constraint log_pkey primary key (singleton),
    constraint log_is_one_row check (singleton),
    constraint log_partition_size check (partition_size > 0)
);

insert into pgchannels.log default values;

comment on column pgchannels.log.floor is 'messages with ids up to here may be gone; raised before any is removed';

comment on column pgchannels.log.partitioned_to is 'the first id that no partition takes';

create view pgchannels.bounds as
select coalesce(b.last_id, 0) as head, coalesce(b.epoch, 1) as epoch, l.floor, l.partitioned_to, b.mark
  from pgchannels.log l
  left join lateral (select n.last_id, n.epoch, n.mark from pgchannels.batches n order by n.last_id desc limit 1) b on true;

comment on view pgchannels.bounds is 'one row: the last id of the log, its epoch, the floor, the first id without a partition, and the newest batch''s mark';

create table pgchannels.channels (
    name text not null,
    cursor bigint not null default 0,
    node uuid,
    user_id text,
    last_active_at timestamptz not null default clock_timestamp(),
    expires_at timestamptz,
    retention interval,
    constraint channels_pkey primary key (name),
    constraint channels_name_is_valid check (pgchannels.is_channel(name))
);

create table pgchannels.memberships (
    group_name text not null,
    channel text not null,
    since bigint not null,
    expires_at timestamptz,
    constraint memberships_pkey primary key (group_name, channel),
    constraint memberships_group_is_valid check (pgchannels.is_channel(group_name)),
    constraint memberships_channel_is_valid check (pgchannels.is_channel(channel))
);

create index memberships_channel on pgchannels.memberships (channel);

create table pgchannels.nodes (
    id uuid not null,
    started_at timestamptz not null default clock_timestamp(),
    heartbeat_at timestamptz not null default clock_timestamp(),
    info json,
    constraint nodes_pkey primary key (id)
);

-- Who does what only one node needs to do: polling the outbox, pruning.
create table pgchannels.leases (
    name text not null,
    holder uuid not null,
    expires_at timestamptz not null,
    constraint leases_pkey primary key (name)
);

-- Publish from SQL: select pgchannels.publish('room:1', '{"text": "hello"}');
create function pgchannels.publish(channel text, payload json, ttl interval default null)
returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    if not coalesce(pgchannels.is_channel(channel), false) then
        raise exception 'invalid channel name %', coalesce(quote_literal(left(channel, 80)), 'NULL')
            using errcode = 'invalid_parameter_value',
                  hint = 'A name has 1 to 200 printable characters, no white space, none of + # *.';
    end if;
    if not coalesce(pgchannels.is_payload(payload), false) then
        raise exception 'invalid payload: %', case
                when payload is null then 'it is NULL'
                when json_typeof(payload) <> 'object' then 'it is a JSON ' || json_typeof(payload)
                when octet_length(payload::text) > 16777216 then 'it has more than 16 MiB'
                else 'it holds what readers cannot decode'
            end
            using errcode = 'invalid_parameter_value',
                  hint = 'A payload is a JSON object of at most 16 MiB, without halves of surrogate pairs, numbers beyond the range of a double, or more than 500 levels.';
    end if;
    if ttl <= interval '0' then
        raise exception 'invalid ttl %: it must be positive', ttl
            using errcode = 'invalid_parameter_value';
    end if;
    insert into pgchannels.outbox (channel, payload, expires_at)
    values (channel, payload, clock_timestamp() + ttl);
end
$$;

-- Become the only one that writes to the log, until the transaction ends. Others wait their turn, in
-- the order in which they came. This mode conflicts with itself, and not with pg_dump.
--
-- In REPEATABLE READ the lock must come before the transaction's snapshot, or the snapshot may lack
-- what the previous holder has committed. A call of this function takes a snapshot; LOCK TABLE as the
-- first statement takes none.
create function pgchannels.lock_sequencer() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    lock table pgchannels.sequencer_lock in share update exclusive mode;
end
$$;

-- Make partitions until ids up to "through" have one. Built aside and attached, because ATTACH
-- takes SHARE UPDATE EXCLUSIVE on the parent, where CREATE ... PARTITION OF would shut out readers
-- (manual, ALTER TABLE, ATTACH PARTITION).
create function pgchannels.add_partitions(through bigint) returns integer
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    made integer := 0;
    state pgchannels.log;
    partition text;
begin
    select * into strict state from pgchannels.log for update;
    while state.partitioned_to <= through loop
        partition := 'messages_' || state.partitioned_to;
        execute format('create table pgchannels.%I (like pgchannels.messages including all)', partition);
        execute format('alter table pgchannels.messages attach partition pgchannels.%I for values from (%s) to (%s)',
                       partition, state.partitioned_to, state.partitioned_to + state.partition_size);
        state.partitioned_to := state.partitioned_to + state.partition_size;
        made := made + 1;
    end loop;
    if made > 0 then
        update pgchannels.log set partitioned_to = state.partitioned_to;
    end if;
    return made;
end
$$;

-- Move what has been committed to the outbox since the last batch into the log: one batch.
--
-- Call it as a statement of its own, in READ COMMITTED: each statement below must see what the
-- previous holder of the lock committed.
-- Bytes are counted from revision 0004 on.
create function pgchannels.seal(
    max_messages integer default 10000, max_bytes bigint default 16777216,
    out sealed integer, out head bigint, out stopped boolean)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
-- The outbox may hold any number of dead rows while an old transaction keeps vacuum from them. The
-- index leads past them; no other plan may be taken, however small the table once looked.
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
    previous_id bigint;
    previous pg_snapshot;
    seen_below xid8;
    in_flight xid8[];
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'seal() needs READ COMMITTED, not %', upper(current_setting('transaction_isolation'))
            using errcode = 'invalid_transaction_state';
    end if;
    -- One sequencer at a time; the next one takes what has gathered.
    perform pgchannels.lock_sequencer();
    -- An id that a reader has seen must outlive a crash, or another message would get it.
    if current_setting('synchronous_commit') = 'off' then
        perform set_config('synchronous_commit', 'local', true);
    end if;

    select b.last_id, b.snapshot into previous_id, previous
      from pgchannels.batches b order by b.last_id desc limit 1;
    if not found then
        previous_id := 0;
        previous := '1:1:';  -- a snapshot that saw nothing
    end if;
    seen_below := pg_snapshot_xmax(previous);
    in_flight := array(select pg_snapshot_xip(previous));
    if seen_below > pg_snapshot_xmax(pg_current_snapshot()) then
        -- A snapshot from the future is another cluster's, from before a dump and restore.
        seen_below := '0';
        in_flight := '{}';
    end if;
    perform pgchannels.add_partitions(previous_id + max_messages)
      from pgchannels.log l where l.partitioned_to <= previous_id + max_messages;

    -- The delete and the recorded snapshot must be one statement: two have two snapshots, and what
    -- commits between them would be lost for good. The rows that have become visible since the
    -- previous batch are those of transactions that were in flight then or have begun since (PgQ's
    -- rule). A batch that stops at its limit has not taken all that its snapshot could see, but all
    -- of the transactions before the last one it took from. It records what that one could have
    -- seen, so that the next batch begins there and does not walk over what this one has taken.
    with due as (
        (select o.ctid, o.xid, o.id
           from unnest(in_flight) f(xid)
          cross join lateral (select r.ctid, r.xid, r.id from pgchannels.outbox r
                               where r.xid = f.xid order by r.xid, r.id limit max_messages) o)
        union all
        (select o.ctid, o.xid, o.id from pgchannels.outbox o
          where o.xid >= seen_below order by o.xid, o.id limit max_messages)
        order by xid, id limit max_messages
    ), taken as (
        delete from pgchannels.outbox o where o.ctid = any (array(select ctid from due))
        returning o.*
    ), logged as (
        insert into pgchannels.messages
               (id, channel, payload, attachments, headers, size, created_at, expires_at)
        select previous_id + row_number() over (order by xid, id),
               channel, payload, attachments, headers, octet_length(payload::text), created_at, expires_at
          from taken
    )
    insert into pgchannels.batches (last_id, snapshot, epoch)
    select previous_id + count(*),
           case when count(*) < max_messages then pg_current_snapshot()
                else format('%s:%s:%s', least(pg_snapshot_xmin(pg_current_snapshot()), max(xid)), max(xid),
                            (select string_agg(f.xid::text, ',' order by f.xid)
                               from pg_snapshot_xip(pg_current_snapshot()) f(xid)
                              where f.xid < max(taken.xid)))::pg_snapshot
           end,
           coalesce((select b.epoch from pgchannels.batches b order by b.last_id desc limit 1), 1)
      from taken
    having count(*) > 0
    returning last_id into head;

    head := coalesce(head, previous_id);
    sealed := head - previous_id;
    stopped := sealed = max_messages;
end
$$;

-- Seal one batch, and tell the nodes. NOTIFY holds a cluster-wide lock until its transaction has
-- ended, so it gets one of its own, after the batch's: that writes nothing, and flushes nothing.
-- Should the server die in between, the nodes' polls find the batch.
create procedure pgchannels.seal_and_notify(
    max_messages integer, max_bytes bigint, notified text,
    inout sealed integer default null, inout head bigint default null, inout stopped boolean default null)
language plpgsql
as $$
begin
    select s.sealed, s.head, s.stopped into sealed, head, stopped from pgchannels.seal(max_messages, max_bytes) s;
    commit;
    if sealed > 0 then
        perform pg_notify(notified, head::text);
    end if;
end
$$;

-- Rows of the outbox that no batch will ever take, because every snapshot since says that they had
-- been taken. There must be none; if some are found (someone has tampered with batches, say), they
-- are published again, late and out of their order, rather than never. Only those of transactions that
-- are below the newest snapshot's xmin, and so above the index entries of what was sealed while an old
-- one was open; and not below "above": up to there, somebody has looked when these were over.
create function pgchannels.requeue_stragglers(above xid8 default '0') returns bigint
language sql volatile
set search_path = pg_catalog, pg_temp
as $$
    with newest as (
        select b.snapshot from pgchannels.batches b order by b.last_id desc limit 1
    ), requeued as (
        update pgchannels.outbox o set xid = pg_current_xact_id()
          from newest n
         where o.xid >= above
           and o.xid < pg_snapshot_xmin(n.snapshot)
           and pg_snapshot_xmax(n.snapshot) <= pg_snapshot_xmax(pg_current_snapshot())
        returning 1
    )
    select count(*) from requeued
$$;

select pgchannels.add_partitions(1);
