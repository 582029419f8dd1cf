-- Limits of connections and groups, revocations, commands to all nodes, shared rates; partitions that
-- everybody has heard of.
--
-- Written for the schema "pgchannels"; whoever runs it puts in the configured name. Code of revision
-- 0003 goes on working: its channels are no connections, and count for nobody's limit.

-- A partition takes messages, and readers are told of it, only when the transaction that made it is
-- over and its locks released. Others hear that a table has changed (its relcache entry, and with it
-- their plans, are void) a moment after they can see what was committed with it: in that moment a
-- statement may be planned without the partition, by a session that reads of it. The sequencer's lock
-- is released after that moment.
--
-- First of all: the sequencer takes its locks in this order, too.
alter table pgchannels.log add column attached_to bigint;
update pgchannels.log set attached_to = partitioned_to;
alter table pgchannels.log alter column attached_to set not null;

comment on column pgchannels.log.partitioned_to is 'the first id that no partition takes, of those that everybody has heard of';
comment on column pgchannels.log.attached_to is 'the first id that no partition takes';

alter table pgchannels.channels add column is_connection boolean not null default false;

comment on column pgchannels.channels.is_connection is 'it counts where connections are limited, and is in their registry';

-- For the registry, page by page. In the order of code points, whatever the database's is.
create index channels_connections on pgchannels.channels (name collate "C") where is_connection;

-- Digests, for the id of a user may be longer than an entry of an index can be.
create index channels_user on pgchannels.channels (md5(user_id), name collate "C") where is_connection;

-- How many rows of channels are connections of a node; changed in the transaction that changes those,
-- with the node's row locked. A node without a row has none.
--
-- Here and in rates, a row is updated in place a limited number of times ("changes"). The update after
-- those moves "version", and with it the row's place in the index, behind all that it was before. A
-- snapshot that is held for hours keeps all those versions of the row; a look at the newest, by the
-- index from its end, passes by a limited number of them.
create table pgchannels.places (
    node uuid not null,
    version integer not null default 0,
    connections integer not null,
    changes smallint not null default 0,
    constraint places_pkey primary key (node, version),
    constraint places_node_fkey foreign key (node) references pgchannels.nodes on delete cascade
) with (fillfactor = 50);

comment on table pgchannels.places is 'how many connections each node has; one row a node';

-- The node's row is locked, so no other transaction changes its places.
create function pgchannels.add_places(of_node uuid, number integer) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    update pgchannels.places p
       set connections = p.connections + number,
           version = p.version + case when p.changes = 200 then 1 else 0 end,
           changes = case when p.changes = 200 then 0 else p.changes + 1 end
     where p.node = of_node
       and p.version >= (select v.version from pgchannels.places v
                          where v.node = of_node order by v.version desc limit 1);
    if not found then
        insert into pgchannels.places (node, connections) values (of_node, number);
    end if;
end
$$;

alter table pgchannels.log add column max_message_size integer not null default 1048576;

comment on column pgchannels.log.max_message_size is 'bytes of payload and attachments that a message may have; changed by limit_messages()';

create function pgchannels.attachments_size(attachments bytea[]) returns bigint
language plpgsql immutable strict parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
    return (select coalesce(sum(octet_length(a.bytes)), 0) from unnest(attachments) a(bytes));
end
$$;

-- Set how many bytes a message may have, for all publishers, in whatever language. The limit is in a
-- constraint, so that an insert looks up nothing; for that, this waits for the transactions that
-- have published. Messages that wait to be sequenced pass.
create function pgchannels.limit_messages(bytes integer) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set lock_timeout = '500ms'
as $$
begin
    if bytes is null or bytes not between 2 and 16777216 then
        raise exception 'invalid limit %: it is 2 to 16777216 bytes', coalesce(bytes::text, 'NULL')
            using errcode = 'invalid_parameter_value';
    end if;
    update pgchannels.log set max_message_size = bytes;
    alter table pgchannels.outbox drop constraint if exists outbox_max_message_size;
    -- Nodes name the channels in their news, however long the names are. What waits may be larger, and
    -- is not looked at; where nothing waits, the constraint is an ordinary one.
    execute format(
        'alter table pgchannels.outbox add constraint outbox_max_message_size check ('
        'octet_length(payload::text) + case when attachments is null then 0 else pgchannels.attachments_size(attachments) end'
        ' <= %s or channel = %L) %s', bytes, 'pgchannels:members',
        case when pg_relation_size('pgchannels.outbox') > 1048576 or exists (select from pgchannels.outbox)
             then 'not valid' else '' end);
end
$$;

select pgchannels.limit_messages(1048576);

create table pgchannels.revocations (
    kind text not null,
    value text not null,
    revoked_at timestamptz not null,
    expires_at timestamptz not null,
    constraint revocations_pkey primary key (kind, value),
    constraint revocations_kind_is_valid check (kind in ('user', 'token'))
);

create index revocations_expires_at on pgchannels.revocations (expires_at);

comment on table pgchannels.revocations is 'whose tokens are no good, of those that were issued up to then; a long value is there as its digest';

-- Rates that all nodes share. Not logged: a take flushes nothing, and after a crash of the server all
-- begin anew. Updated in place: half of each page is free, and no index has what a take changes but
-- for due_at, which moves by steps.
create unlogged table pgchannels.rates (
    key text collate "C" not null,
    version integer not null default 0,
    changes smallint not null default 0,
    -- a bucket: what was in it at that time
    tokens double precision,
    at timestamptz,
    -- a window: when it ends, and what it has taken
    ends_at timestamptz,
    taken bigint,
    due_at timestamptz not null,
    constraint rates_pkey primary key (key, version)
) with (fillfactor = 50);

create index rates_due_at on pgchannels.rates (due_at);

comment on column pgchannels.rates.due_at is 'from then on the row says no more than none would';

-- Give connections their places: make or change their channels, unless there are too many already.
-- Each request stands alone; those in a call count each other. Returns those that were refused: by
-- which limit, "user", "node" or "total"; or all, as "lost", if the node has no lease.
--
-- What is counted cannot change until this has committed: users' places are given one transaction
-- after the other (by the digest of the user's id, so that the number of locks is bounded), so are
-- those of all nodes where a total is limited, and the node's own row is locked. Places become free
-- without these locks. All locks come first, in the order users, total, nodes, channels; and with
-- lock_presence() before nodes, remove_channels() has the same.
create function pgchannels.admit(
    me uuid, names text[], users text[], metadata text[], per_user integer[], per_node integer[], total integer[])
returns table (channel text, scope text, allowed integer)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    key integer;
    is_alive boolean;
    here integer;
    everywhere bigint;
    admitted boolean[] := array_fill(false, array[cardinality(names)]);
    added integer := 0;
    of_user integer := 0;
    last_user text;
    has_moved boolean := false;
    r record;
begin
    for key in select distinct hashtext('pgchannels.' || u.id) & 255 from unnest(users) u(id) where u.id is not null order by 1
    loop
        perform pg_advisory_xact_lock(1885823851, key);
    end loop;
    if array_remove(total, null) <> '{}' then
        perform pg_advisory_xact_lock(1885823852, hashtext('pgchannels.'));
    else
        -- who counts must not miss one that does not
        perform pg_advisory_xact_lock_shared(1885823852, hashtext('pgchannels.'));
    end if;
    perform from pgchannels.nodes n
      where n.id = me
         or n.id in (select c.node from pgchannels.channels c where c.name = any (names) and c.is_connection)
      order by n.id for no key update;
    select n.dead_since is null,
           coalesce((select p.connections from pgchannels.places p
                      where p.node = me order by p.version desc limit 1), 0)
      into is_alive, here from pgchannels.nodes n where n.id = me;
    if not coalesce(is_alive, false) then
        return query select n.name, 'lost', null::integer from unnest(names) n(name);
        return;
    end if;
    if array_remove(total, null) <> '{}' then
        select coalesce(sum(p.connections), 0) into everywhere
          from pgchannels.nodes n
         cross join lateral (select p.connections from pgchannels.places p
                              where p.node = n.id order by p.version desc limit 1) p;
    end if;

    for r in
        select q.*, coalesce(c.is_connection and c.node = me, false) as has_place,
               coalesce(c.is_connection and c.node <> me, false) as moves,
               coalesce(c.is_connection and c.user_id = q.user_id, false) as is_users,
               case when q.per_user is not null and q.user_id is not null then (
                   select count(*) from (
                       select from pgchannels.channels o
                        where o.is_connection and md5(o.user_id) = md5(q.user_id) and o.user_id = q.user_id
                        limit q.per_user) o) end as existing
          from unnest(names, users, per_user, per_node, total) with ordinality
               q(name, user_id, per_user, per_node, total, place)
          left join pgchannels.channels c on c.name = q.name
         order by q.user_id, q.place
    loop
        if r.user_id is distinct from last_user then
            of_user := 0;
            last_user := r.user_id;
        end if;
        channel := r.name;
        if not r.is_users and r.existing + of_user >= r.per_user then
            scope := 'user';
            allowed := r.per_user;
            return next;
        elsif not r.has_place and here + added >= r.per_node then
            scope := 'node';
            allowed := r.per_node;
            return next;
        elsif not r.has_place and everywhere + added >= r.total then
            scope := 'total';
            allowed := r.total;
            return next;
        else
            admitted[r.place] := true;
            has_moved := has_moved or r.moves;
            if not r.is_users then
                of_user := of_user + 1;
            end if;
            if not r.has_place then
                added := added + 1;
            end if;
        end if;
    end loop;

    if has_moved then
        perform pgchannels.add_places(n.id, -m.count::integer)
           from (select c.node, count(*) as count
                   from unnest(names, admitted) a(name, is_admitted)
                   join pgchannels.channels c on c.name = a.name
                  where a.is_admitted and c.is_connection and c.node <> me group by c.node) m
           join pgchannels.nodes n on n.id = m.node;
    end if;
    if added > 0 then
        perform pgchannels.add_places(me, added);
    end if;
    insert into pgchannels.channels as c (name, node, user_id, metadata, cursor, is_received, is_connection)
    select a.name, me, a.user_id, a.metadata::json, b.head, false, true
      from unnest(names, users, metadata, admitted) a(name, user_id, metadata, is_admitted)
     cross join pgchannels.bounds b
     where a.is_admitted
     order by a.name
    on conflict (name) do update
        set node = excluded.node, user_id = excluded.user_id, metadata = excluded.metadata, is_connection = true;
end
$$;

-- As change_memberships() for those that are to be added where a group has a limit ("allowed" by
-- request): a request that would exceed it is left out, and returned. Requests are counted in their
-- order. Who is a member already stays one, and who is not limited is not held up: the lock is
-- between those who are. It comes before all that change_memberships() locks.
create function pgchannels.join_groups(
    groups text[], names text[], presences text[], allowed integer[], grace interval, announcer uuid,
    out refused bigint[], out published integer)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    key integer;
    last_group text;
    added integer := 0;
    places bigint[] := '{}';
    r record;
begin
    for key in select distinct hashtext('pgchannels.' || g.name) & 1023 from unnest(groups) g(name) order by 1
    loop
        perform pg_advisory_xact_lock(1885823853, key);
    end loop;
    refused := '{}';
    for r in
        select q.*,
               -- a member already; or a connection that is gone, and gets no membership
               exists (select from pgchannels.memberships m
                        where m.group_name = q.group_name and m.channel = q.channel and m.left_at is null)
               or (q.channel ~ '[.][0-9a-f]{32}[.][0-9a-f]{16}$'
                   and not exists (select from pgchannels.channels c where c.name = q.channel)) as needs_none,
               (select count(*) from (
                    select from pgchannels.memberships m
                     where m.group_name = q.group_name and m.left_at is null limit q.allowed) m) as existing
          from unnest(groups, names, allowed) with ordinality q(group_name, channel, allowed, place)
         order by q.group_name, q.place
    loop
        if r.group_name is distinct from last_group then
            added := 0;
            last_group := r.group_name;
        end if;
        if r.needs_none then
            places := places || r.place;
        elsif r.existing + added < r.allowed then
            places := places || r.place;
            added := added + 1;
        else
            refused := refused || r.place;
        end if;
    end loop;
    published := 0;
    if places <> '{}' then
        select pgchannels.change_memberships(
                   array_agg(q.group_name), array_agg(q.channel), array_agg(true), array_agg(q.presence), grace, announcer)
          into published
          from unnest(groups, names, presences) with ordinality q(group_name, channel, presence, place)
          join unnest(places) p(place) on p.place = q.place;
    end if;
end
$$;

-- As it was, and the places of connections become free.
create or replace function pgchannels.remove_channels(names text[], grace interval, announcer uuid) returns integer
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    groups text[];
    members text[];
    r record;
begin
    perform pgchannels.lock_presence(array(
        select distinct m.group_name from pgchannels.memberships m
         where m.channel = any (names) and m.identity is not null));
    -- The nodes before their channels, as admit() and reap() lock them.
    perform from pgchannels.nodes n
      where n.id in (select c.node from pgchannels.channels c where c.name = any (names) and c.is_connection)
      order by n.id for no key update;
    -- Then the channels: whoever is adding one to a group has committed then, or will find it gone.
    for r in
        with gone as (
            delete from pgchannels.channels c
             where c.name in (select d.name from pgchannels.channels d where d.name = any (names)
                               order by d.name for update)
            returning c.node, c.is_connection
        )
        select n.id, count(*) as count
          from gone g join pgchannels.nodes n on n.id = g.node
         where g.is_connection group by n.id
    loop
        perform pgchannels.add_places(r.id, -r.count::integer);
    end loop;
    delete from pgchannels.cursors k where k.name = any (names);
    select array_agg(m.group_name), array_agg(m.channel) into groups, members
      from pgchannels.memberships m where m.channel = any (names) and m.left_at is null;
    if groups is null then
        return 0;
    end if;
    return pgchannels.change_memberships(
        groups, members, array_fill(false, array[cardinality(groups)]),
        array_fill(null::text, array[cardinality(groups)]), grace, announcer);
end
$$;

-- Take from shared rates, for requests in the order of their keys ("C"), and within a key in that in
-- which they came: each gets all that it costs, or nothing. Returns a row for each, in that order. A key
-- has a bucket ("speed" a second come to it, up to "capacity") or windows (of so many "seconds"), by
-- which of the two is given. See rates.py, which has the same.
--
-- The rows are locked in the order of keys, after those that were missing have been made in that
-- order; and the time is read when a row is locked, so that it goes forward from one to the next.
create function pgchannels.take(
    keys text[], costs bigint[], capacities bigint[], speeds double precision[], seconds double precision[])
returns table (allowed boolean, remaining bigint, retry_after double precision)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    place integer := 1;
    moment timestamptz;
    due double precision;
    r record;
begin
    while place <= cardinality(keys) loop
        -- As "left join", because "not exists" would lose the order and the limit.
        insert into pgchannels.rates (key, due_at)
        select k.key, 'infinity' from (select distinct unnest(keys[place:]) collate "C" as key order by key) k
          left join lateral (select t.key from pgchannels.rates t
                              where t.key = k.key order by t.version desc limit 1) t on true
         where t.key is null
         order by k.key
        on conflict (key, version) do nothing;
        if found then
            -- Where another transaction has made the row and moved its version since we looked.
            delete from pgchannels.rates t
             where t.key = any (keys[place:]) and t.version = 0
               and exists (select from pgchannels.rates n where n.key = t.key and n.version > 0);
        end if;
        -- A row that another transaction changes meanwhile is waited for, and taken as that has left it,
        -- whatever its version is then.
        for r in
            select t.* from (select distinct unnest(keys[place:]) collate "C" as key order by key) k
             cross join lateral (select t.* from pgchannels.rates t
                                  where t.key = k.key order by t.version desc limit 1 for update) t
             order by k.key
        loop
            -- One that has been pruned in between is made again.
            exit when keys[place] <> r.key;
            -- Never back, should the clock have been set back.
            moment := greatest(clock_timestamp(), r.at);
            while keys[place] = r.key loop
                if speeds[place] is not null then
                    r.tokens := least(capacities[place], coalesce(
                        r.tokens + extract(epoch from moment - r.at)::double precision * speeds[place],
                        capacities[place]));
                    r.at := moment;
                    allowed := r.tokens >= costs[place];
                    -- up, to what the clock can tell, or whoever waits that long would come too early
                    retry_after := case when allowed then 0
                                        else ceil((costs[place] - r.tokens) / speeds[place] * 1000000) / 1000000 end;
                    if allowed then
                        r.tokens := r.tokens - costs[place];
                    end if;
                    remaining := floor(r.tokens);
                    due := (capacities[place] - r.tokens) / speeds[place];
                else
                    if r.ends_at is null or r.ends_at <= moment then
                        r.ends_at := moment + make_interval(secs => seconds[place]);
                        r.taken := 0;
                    end if;
                    allowed := r.taken + costs[place] <= capacities[place];
                    due := extract(epoch from r.ends_at - moment)::double precision;
                    retry_after := case when allowed then 0 else due end;
                    if allowed then
                        r.taken := r.taken + costs[place];
                    end if;
                    remaining := greatest(0, capacities[place] - r.taken);
                end if;
                return next;
                place := place + 1;
            end loop;
            update pgchannels.rates t
               set version = r.version + case when r.changes = 200 then 1 else 0 end,
                   changes = case when r.changes = 200 then 0 else r.changes + 1 end,
                   tokens = r.tokens, at = r.at, ends_at = r.ends_at, taken = r.taken,
                   due_at = to_timestamp((ceil((extract(epoch from moment)::double precision + due) / 60) + 1) * 60)
             where t.key = r.key and t.version = r.version;
        end loop;
    end loop;
end
$$;

-- Make room in the log for ids up to "through"; called at most once in a transaction. Returns how many
-- times log.partition_size was added.
--
-- A partition takes messages from a later transaction on than the one that attaches it (see the top).
-- Both transactions change the log's row under the sequencer's lock, and neither waits under it for
-- what others do with the table: ANALYZE holds the lock that ATTACH PARTITION needs for as long as it
-- samples all partitions. So the table's lock comes first, and while there is room it is only tried;
-- the next call tries again. Without room a call waits a moment, because nothing can be sealed anyway.
--
-- The more partitions there are, the wider are new ones: a read locks all of them with their indexes.
-- In a log that is as large as its retention lets it become, a new one has a twentieth of all ids.
-- While a log grows, so does the number of its partitions, but ever more slowly: from a size of a
-- million it is about 50 at a billion messages, and 85 at thirty billion.
create or replace function pgchannels.add_partitions(through bigint) returns integer
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms'
as $$
declare
    state pgchannels.log;
    begins bigint;
    width bigint;
    partitions integer;
    oldest bigint;
    partition text;
begin
    select * into strict state from pgchannels.log;
    if state.partitioned_to < state.attached_to then
        begin
            perform set_config('lock_timeout', '5s', true);
            perform pgchannels.lock_sequencer();
            update pgchannels.log set partitioned_to = attached_to returning * into strict state;
            perform set_config('lock_timeout', '100ms', true);
        exception when lock_not_available then
            return 0;
        end;
    end if;
    if state.attached_to > through then
        return 0;
    end if;
    begin
        if exists (select from pgchannels.bounds b where b.head + 1 < b.partitioned_to) then
            lock table only pgchannels.messages in share update exclusive mode nowait;
        else
            lock table only pgchannels.messages in share update exclusive mode;
        end if;
        -- Others attach under the same lock.
        select * into strict state from pgchannels.log;
        begins := state.attached_to;
        select count(*), coalesce(min(substring(c.relname from '[0-9]+$')::bigint), begins)
          into partitions, oldest
          from pg_inherits i join pg_class c on c.oid = i.inhrelid
         where i.inhparent = 'pgchannels.messages'::regclass;
        while state.attached_to <= through loop
            width := (state.attached_to - oldest) / greatest(40 - partitions, 8);
            width := greatest(1, ceil(width::numeric / state.partition_size)) * state.partition_size;
            partition := 'messages_' || state.attached_to;
            execute format('create table pgchannels.%I (like pgchannels.messages including all)', partition);
            execute format('alter table pgchannels.messages attach partition pgchannels.%I for values from (%s) to (%s)',
                           partition, state.attached_to, state.attached_to + width);
            state.attached_to := state.attached_to + width;
            partitions := partitions + 1;
        end loop;
        if state.attached_to > begins then
            -- A batch may take its time. Where the sequencer waits for the table's lock, it gives up first.
            perform set_config('lock_timeout', '5s', true);
            perform pgchannels.lock_sequencer();
            update pgchannels.log set attached_to = state.attached_to;
        end if;
    exception when lock_not_available then
        return 0;
    end;
    return (state.attached_to - begins) / state.partition_size;
end
$$;

-- Begin a new epoch: the log no longer holds what some of its readers have seen, because a backup was
-- restored or a standby promoted that lacked the end of the log. Positions of earlier epochs are
-- unknown from then on. Durable readers go on from their positions, which went back with the log.
-- Returns the epoch that the log has then.
--
-- "seen" is the epoch that the caller knows of: of several callers, the first begins a new one.
create function pgchannels.begin_epoch(seen integer default null) returns integer
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    newest integer;
begin
    perform pgchannels.lock_sequencer();
    select b.epoch into strict newest from pgchannels.bounds b;
    if newest > seen then
        return newest;
    end if;
    -- Clients see it in positions: it must outlive a crash.
    if current_setting('synchronous_commit') = 'off' then
        perform set_config('synchronous_commit', 'local', true);
    end if;
    newest := greatest(newest, seen) + 1;
    update pgchannels.batches b set epoch = newest
     where b.last_id = (select max(n.last_id) from pgchannels.batches n);
    if not found then
        insert into pgchannels.batches (last_id, snapshot, epoch) values (0, '1:1:', newest);
    end if;
    -- One that is locked by an open transaction is taken along when it is next read for.
    update pgchannels.followers f set epoch = newest, position = least(f.position, b.head)
      from pgchannels.bounds b
     where f.name in (select u.name from pgchannels.followers u for update skip locked);
    return newest;
end
$$;

-- A part of what is due, where that is more than one batch may take: for seal(), which holds the lock.
--
-- It is cut by id. That keeps the order of transactions: what must come first was committed before the
-- other was published, so it has lower ids, and is visible wherever the other is. And what becomes
-- visible after the cut need not come before what was visible then. The transactions of which
-- something is left are recorded as if they were in flight, so that the next batch looks for just
-- these. No more than "max_open" of them: the others are recorded as if they had not begun.
--
-- To find the lowest ids it does not look at all that waits. No id above that in "edge" is taken,
-- because enough others are below. Of the transactions that come next, in the order of xids, it
-- looks at more with first ids above the edge than can be open at once, and leaves the rest. For
-- suppose that a message of one of the rest must come before one that is taken, and so before an id
-- below the edge was given. At that moment the transaction of the rest had begun, and with it all
-- that were looked at, whose xids are lower. But those have published later, so all of them were
-- open. They are more than "max_open", so that the rest is recorded as not begun.
create function pgchannels.seal_part(
    previous_id bigint, seen_below xid8, in_flight xid8[], max_messages integer, max_bytes bigint,
    out last_id bigint, out stopped boolean)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
    max_open constant integer := 1000 + current_setting('max_connections')::integer;
begin
    with recursive first as materialized (
        (select o.*
           from unnest(in_flight) f(xid)
          cross join lateral (
              select r.ctid, r.xid, r.id,
                     pg_column_size(r.payload) + coalesce(pg_column_size(r.attachments), 0) + coalesce(pg_column_size(r.headers), 0) as bytes
                from pgchannels.outbox r where r.xid = f.xid order by r.xid, r.id limit max_messages + 1) o)
        union all
        (select r.ctid, r.xid, r.id, pg_column_size(r.payload) + coalesce(pg_column_size(r.attachments), 0) + coalesce(pg_column_size(r.headers), 0)
           from pgchannels.outbox r where r.xid >= seen_below order by r.xid, r.id limit max_messages + 1)
        order by xid, id limit max_messages + 1
    ), bound as materialized (
        select max(f.xid) as xid, max(f.id) as id from first f having count(*) > max_messages
    ), ahead as (
        select b.xid, null::bigint as id, 0 as place, 0 as above from bound b
        union all
        select n.xid, n.id, a.place + 1, a.above + (n.id > b.id)::integer
          from ahead a cross join bound b
         cross join lateral (
             select r.xid, r.id from pgchannels.outbox r
              where r.xid > a.xid and r.xid >= seen_below order by r.xid, r.id limit 1) n
         where a.above <= max_open and a.place <= max_messages + max_open
    ), edge as materialized (
        select b.xid, least(b.id, (select a.id from ahead a where a.place > 0
                                    order by a.id offset greatest(max_messages - 1, 0) limit 1)) as id
          from bound b
    ), due as materialized (
        select f.* from first f
         where not exists (select from edge) or f.xid >= seen_below and f.xid < (select e.xid from edge e)
        union all
        select o.*
          from edge e
         cross join (select f.xid from unnest(in_flight) f(xid)
                     union all
                     select b.xid from bound b where b.xid >= seen_below
                     union all
                     select a.xid from ahead a join edge e on a.id <= e.id) x
         cross join lateral (
             (select r.ctid, r.xid, r.id,
                     pg_column_size(r.payload) + coalesce(pg_column_size(r.attachments), 0) + coalesce(pg_column_size(r.headers), 0) as bytes
                from pgchannels.outbox r
               where r.xid = x.xid and r.id <= e.id order by r.xid, r.id limit max_messages + 1)
             union all
             -- whether there is more of it
             (select null, r.xid, r.id, 0 from pgchannels.outbox r
               where r.xid = x.xid and r.id > e.id order by r.xid, r.id limit 1)) o
        union all
        select null, a.xid, a.id, 0 from ahead a join edge e on a.id > e.id
    ), chosen as materialized (
        select s.ctid, s.id
          from (select l.ctid, l.id, sum(l.bytes) over (order by l.id) - l.bytes as before
                  from (select d.ctid, d.id, d.bytes from due d order by d.id limit max_messages) l) s
         where s.before < greatest(max_bytes, 1)
    ), cut as materialized (
        -- no row if nothing is left
        select coalesce(max(c.id), 0) as id from chosen c having count(*) < (select count(*) from due)
    ), remaining as materialized (
        select d.xid from due d cross join cut c where d.id > c.id
        union
        select f.xid from cut c cross join pg_snapshot_xip(pg_current_snapshot()) f(xid)
         order by xid limit max_open + 1
    ), noted as materialized (
        select least(pg_snapshot_xmax(pg_current_snapshot()),
                     (select r.xid from remaining r order by r.xid offset max_open)) as below
          from cut c
    ), taken as (
        delete from pgchannels.outbox o where o.ctid = any (array(select c.ctid from chosen c))
        returning o.*
    ), logged as (
        insert into pgchannels.messages
               (id, channel, payload, attachments, headers, size, created_at, expires_at)
        select previous_id + row_number() over (order by t.last_of_xid, t.id),
               channel, payload, attachments, headers,
               octet_length(payload::text) + coalesce(octet_length(headers::text), 0)
               + case when attachments is null then 0
                      else (select coalesce(sum(octet_length(a.bytes)), 0) from unnest(attachments) a(bytes)) end,
               created_at, expires_at
          from (select t.*, max(t.id) over (partition by t.xid) as last_of_xid from taken t) t
    ), recorded as (
        insert into pgchannels.batches (last_id, snapshot, epoch)
        select previous_id + count(*),
               coalesce((select format('%s:%s:%s', coalesce(min(r.xid), n.below), n.below,
                                       string_agg(r.xid::text, ',' order by r.xid))::pg_snapshot
                           from noted n left join remaining r on r.xid < n.below group by n.below),
                        pg_current_snapshot()),
               coalesce((select b.epoch from pgchannels.batches b order by b.last_id desc limit 1), 1)
          from taken
        having count(*) > 0
        returning batches.last_id
    )
    select (select r.last_id from recorded r), exists (select from cut) into last_id, stopped;
end
$$;

-- Move what has been committed to the outbox into the log: one batch of up to "max_messages", and of
-- messages until they have "max_bytes" (as they are stored, so compressed); one at least. "stopped":
-- it has left something for the next one.
create or replace function pgchannels.seal(
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
    fits boolean;
begin
    if current_setting('transaction_isolation') = 'repeatable read' then
        -- Good only if the previous holder of the lock had committed before this snapshot.
        if not exists (select from pg_locks l
                        where l.pid = pg_backend_pid() and l.locktype = 'relation' and l.granted
                          and l.relation = 'pgchannels.sequencer_lock'::regclass
                          and l.mode = 'ShareUpdateExclusiveLock') then
            raise exception 'seal() in REPEATABLE READ needs its lock to be held before the transaction begins'
                using errcode = 'invalid_transaction_state';
        end if;
    elsif current_setting('transaction_isolation') <> 'read committed' then
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
    -- Ahead by a batch, for what is attached here takes messages from the next call on.
    perform pgchannels.add_partitions(previous_id + 2::bigint * max_messages)
      from pgchannels.log l where l.partitioned_to <= previous_id + 2::bigint * max_messages;
    select least(max_messages, l.partitioned_to - 1 - previous_id) into strict max_messages from pgchannels.log l;

    -- The delete and the recorded snapshot must be one statement: two have two snapshots, and what
    -- commits between them would be lost for good. The rows that have become visible since the
    -- previous batch are those of transactions that were in flight then or have begun since (PgQ's
    -- rule).
    --
    -- Of two transactions that changed the same row, the one that had to wait for the other comes
    -- second, whichever began first: it went on to publish after the other had committed. So they are
    -- ordered by their last messages.
    with due as materialized (
        (select o.*
           from unnest(in_flight) f(xid)
          cross join lateral (
              select r.ctid, r.xid, r.id,
                     pg_column_size(r.payload) + coalesce(pg_column_size(r.attachments), 0) + coalesce(pg_column_size(r.headers), 0) as bytes
                from pgchannels.outbox r where r.xid = f.xid order by r.xid, r.id limit max_messages + 1) o)
        union all
        (select r.ctid, r.xid, r.id, pg_column_size(r.payload) + coalesce(pg_column_size(r.attachments), 0) + coalesce(pg_column_size(r.headers), 0)
           from pgchannels.outbox r where r.xid >= seen_below order by r.xid, r.id limit max_messages + 1)
        limit max_messages + 1
    ), total as materialized (
        select count(*) <= max_messages and coalesce(sum(d.bytes), 0) <= max_bytes as fits from due d
    ), taken as (
        delete from pgchannels.outbox o
         where o.ctid = any (array(select d.ctid from due d cross join total t where t.fits))
        returning o.*
    ), logged as (
        insert into pgchannels.messages
               (id, channel, payload, attachments, headers, size, created_at, expires_at)
        select previous_id + row_number() over (order by last_id, id),
               channel, payload, attachments, headers,
               octet_length(payload::text) + coalesce(octet_length(headers::text), 0)
               + case when attachments is null then 0
                      else (select coalesce(sum(octet_length(a.bytes)), 0) from unnest(attachments) a(bytes)) end,
               created_at, expires_at
          from (select t.*, max(t.id) over (partition by t.xid) as last_id from taken t) t
    ), recorded as (
        insert into pgchannels.batches (last_id, snapshot, epoch)
        select previous_id + count(*), pg_current_snapshot(),
               coalesce((select b.epoch from pgchannels.batches b order by b.last_id desc limit 1), 1)
          from taken
        having count(*) > 0
        returning last_id
    )
    select (select r.last_id from recorded r), t.fits into head, fits from total t;

    stopped := false;
    if not fits then
        select p.last_id, p.stopped into head, stopped
          from pgchannels.seal_part(previous_id, seen_below, in_flight, max_messages, max_bytes) p;
    end if;
    head := coalesce(head, previous_id);
    sealed := head - previous_id;
end
$$;

select pgchannels.regrant();
