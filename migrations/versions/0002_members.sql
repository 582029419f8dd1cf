-- Receivers, members, presence, followers, idempotency keys, ephemeral messages.
--
-- Written for the schema "pgchannels"; whoever runs it puts in the configured name.

alter table pgchannels.nodes
    -- since when it has renewed its lease without a gap; only such a node may declare others dead,
    -- or the first one back after an outage of the database would end all the others
    add column steady_since timestamptz not null default clock_timestamp(),
    -- it has been declared dead; if it lives it must register anew, under a new id
    add column dead_since timestamptz;

alter table pgchannels.channels
    drop column expires_at,
    add column metadata json,
    add column is_received boolean not null default true,
    add column created_at timestamptz not null default clock_timestamp();

create index channels_node on pgchannels.channels (node) where node is not null;

comment on table pgchannels.channels is 'channels that are received from, and those of connections';

comment on column pgchannels.channels.cursor is 'where its receivers begin, as long as it has no row in cursors';

comment on column pgchannels.channels.is_received is 'whether somebody has received from it; a connection''s channel may only be read';

comment on column pgchannels.channels.node is 'whose lease it lives by; null for a channel that lives by being used';

alter table pgchannels.memberships
    drop column expires_at,
    add column joined_at timestamptz not null default clock_timestamp(),
    add column renewed_at timestamptz not null default clock_timestamp(),
    add column presence text,
    add column user_id text,
    add column metadata json,
    -- gone, but still counted as present for a moment: a reconnect does not flap
    add column left_at timestamptz,
    -- as who the member is counted
    add column identity text generated always as (
        case presence when 'user' then 'user:' || user_id when 'connection' then 'connection:' || channel end
    ) stored,
    add constraint memberships_presence_is_valid check (
        presence = 'connection' or (presence = 'user' and user_id is not null));

create index memberships_identity on pgchannels.memberships (group_name, identity) where identity is not null;

create index memberships_left_at on pgchannels.memberships (left_at) where left_at is not null;

comment on column pgchannels.memberships.since is 'the end of the log when it joined: later messages of the group are the member''s';

-- A JSON object of texts, of at most 1 MiB, without \u escapes: control characters and halves of
-- surrogate pairs, which not every reader's language can hold, nor the type text all of them.
create function pgchannels.is_headers(headers json) returns boolean
language plpgsql immutable strict parallel safe
as $$
begin
    return json_typeof(headers) = 'object'
       and octet_length(headers::text) <= 1048576
       and strpos(replace(headers::text, E'\\\\', '  '), E'\\u') = 0
       and not exists (select from json_each(headers) h where json_typeof(h.value) <> 'string');
end
$$;

-- A list of bytes, of at most 16 MiB together: what every reader can put back into the payload.
create function pgchannels.is_attachments(attachments bytea[]) returns boolean
language plpgsql immutable strict parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
    return attachments = '{}'
        or (array_ndims(attachments) = 1 and array_position(attachments, null) is null
            and (select sum(octet_length(a.bytes)) from unnest(attachments) a(bytes)) <= 16777216);
end
$$;

update pgchannels.outbox o set headers = null where not pgchannels.is_headers(o.headers);

update pgchannels.outbox o set attachments = null where not pgchannels.is_attachments(o.attachments);

alter table pgchannels.outbox
    add constraint outbox_headers_are_valid check (pgchannels.is_headers(headers)),
    add constraint outbox_attachments_are_valid check (pgchannels.is_attachments(attachments));

-- Idempotency keys. Written in the transaction that publishes; a second publisher waits for it.
create table pgchannels.keys (
    channel text not null,
    key text not null,
    created_at timestamptz not null,
    expires_at timestamptz not null,
    claimed_by xid8 not null default pg_current_xact_id(),
    constraint keys_pkey primary key (channel, key)
);

create index keys_expires_at on pgchannels.keys (expires_at);

-- How far a channel has been received from; a channel without a row not at all. Each claim that takes
-- something changes the row, with the row of the channel in "channels" locked.
--
-- It is updated in place 200 times ("changes"). The next update moves "version", and with it the row's
-- place in the index, behind all that it was before. A snapshot that is held for hours keeps all those
-- versions of the row; a look at the newest, by the index from its end, passes by 200 of them at most.
create table pgchannels.cursors (
    name text not null,
    version integer not null default 0,
    cursor bigint not null,
    returned bigint[] not null default '{}',
    changes smallint not null default 0,
    constraint cursors_pkey primary key (name, version)
) with (fillfactor = 50);

comment on table pgchannels.cursors is 'how far each channel has been received from; one row a channel';

comment on column pgchannels.cursors.cursor is 'ids up to here have been taken by receivers, or passed by';

comment on column pgchannels.cursors.returned is 'ids that were taken and handed back by a receiver that was cancelled';

-- The last claim of a receiving process: if the answer is lost with the connection, the process repeats
-- the claim. Locked by each claim: a repeated one waits for the first to end. A process uses a row for
-- some hundred claims, and then another one, for the same reason as above.
create table pgchannels.claims (
    claimant uuid not null,
    token bigint not null default 0,
    names text[] not null default '{}',
    ids bigint[] not null default '{}',
    made_at timestamptz not null default clock_timestamp(),
    constraint claims_pkey primary key (claimant)
);

-- Durable readers: how far each has come, and who reads for it now.
create table pgchannels.followers (
    name text not null,
    channels text[] not null,
    position bigint not null,
    epoch integer not null,
    holder uuid,
    created_at timestamptz not null default clock_timestamp(),
    moved_at timestamptz not null default clock_timestamp(),
    constraint followers_pkey primary key (name)
);

comment on column pgchannels.followers.position is 'the last id whose effects are done';

-- For who is there now; read by those who listen, and swept out within seconds. Not logged: an
-- insert flushes nothing, and a crash of the server empties it.
create unlogged table pgchannels.ephemeral (
    id bigint generated always as identity,
    channel text not null,
    payload json not null,
    headers json,
    attachments bytea[],
    created_at timestamptz not null default clock_timestamp(),
    constraint ephemeral_pkey primary key (id),
    constraint ephemeral_channel_is_valid check (pgchannels.is_channel(channel)),
    constraint ephemeral_payload_is_valid check (pgchannels.is_payload(payload)),
    constraint ephemeral_headers_are_valid check (pgchannels.is_headers(headers)),
    constraint ephemeral_attachments_are_valid check (pgchannels.is_attachments(attachments))
);

create index ephemeral_created_at on pgchannels.ephemeral (created_at);

-- Who is named in the headers of a message: the channel that does not get it, and the channels that it
-- was sent to, null for all of the channel's readers. A list that cannot be parsed names nobody:
-- publishers can put any text there.
create function pgchannels.recipients(headers json, out excluded text, out named text[])
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
    list text := headers ->> 'pgchannels-only';
begin
    excluded := headers ->> 'pgchannels-except';
    if list is not null then
        named := array(select distinct e.name from json_array_elements_text(list::json) e(name));
    end if;
exception
    when data_exception or statement_too_complex then
        named := '{}';
end
$$;

-- A channel in a claim.
create type pgchannels.claiming as (
    name text,
    wanted integer,
    looking integer,
    cursor bigint,
    version integer,
    returned bigint[],
    -- the messages that come next
    ids bigint[],
    sizes integer[],
    kinds integer[],
    -- of these and those that were returned: what was taken, how many were passed by, and the last id
    -- that was looked at
    taken bigint[],
    passed_by integer,
    through bigint
);

-- Of the messages that come next for some channels, decide for claim() which are taken. It is called where
-- not all of them are simply for those who read the channel. Up to "looking" messages of each channel are
-- given, of a kind each: 0 is for all who read the channel, 1 has headers, 2 was sent to some channels
-- directly, 3 has expired. What was handed back comes before them.
--
-- It looks at messages of "max_bytes" together, each counted once, and at one more; first at the first
-- one of each channel. Headers are parsed once a message, however many receivers there are.
create function pgchannels.judge(
    channels pgchannels.claiming[], upto bigint, floor bigint, max_bytes bigint) returns pgchannels.claiming[]
language plpgsql volatile
set search_path = pg_catalog, pg_temp
-- The planner cannot know how long the arrays are.
set enable_nestloop = off
as $$
#variable_conflict use_column
begin
    return (
        with mine as materialized (
            select m.*, m.ordinality as place from unnest(judge.channels) with ordinality m
        ), next as materialized (
            select x.*, row_number() over in_order as nth,
                   count(*) filter (where x.kind = 0) over in_order - (x.kind = 0)::integer as plain_before
              from (select m.place, m.wanted, u.id, u.size, u.kind
                      from mine m cross join lateral unnest(m.ids, m.sizes, m.kinds) u(id, size, kind)
                    union all
                    select m.place, m.wanted, r.id, r.size, case when r.expires_at <= clock_timestamp() then 3 else 0 end
                      from mine m cross join lateral unnest(m.returned) u(id)
                     cross join lateral (select r.id, r.size, r.expires_at from pgchannels.messages r
                                          where r.id = u.id limit 1) r
                     where r.id <= least(judge.upto, m.cursor) and r.id > judge.floor) x
            window in_order as (partition by x.place order by x.id)
        ), priced as (
            select n.*, sum(n.price) over (order by n.turn) - n.price as before
              from (select x.*, row_number() over (order by x.nth, x.place) as turn,
                           case when row_number() over (partition by x.id order by x.nth, x.place) = 1
                                then x.size::bigint else 0 end as price
                      from next x
                     where x.plain_before < x.wanted) n
        ), looked as materialized (
            select l.place, l.wanted, l.id, l.kind
              from (select p.*, bool_and(p.is_paid) over (partition by p.place order by p.nth) as is_looked_at
                      from (select q.*, min(q.before) over (partition by q.id) < judge.max_bytes as is_paid from priced q) p) l
             where l.is_looked_at
        ), judged as materialized (
            select r.id, j.excluded, j.named
              from (select distinct l.id from looked l where l.kind in (1, 2)) l
             cross join lateral (select r.id, r.headers from pgchannels.messages r where r.id = l.id limit 1) r
             cross join lateral pgchannels.recipients(r.headers) j
        ), taken as materialized (
            select t.place, t.id
              from (select l.place, l.wanted, l.id, row_number() over (partition by l.place order by l.id) as nth
                      from looked l
                      join mine m on m.place = l.place
                      left join judged j on j.id = l.id
                      left join (select d.id, n.name from judged d cross join lateral unnest(d.named) n(name)) n
                             on n.id = l.id and n.name = m.name
                     where l.kind = 0
                        or l.kind < 3 and j.excluded is distinct from m.name
                           and case when j.named is null then l.kind = 1 else n.name is not null end) t
             where t.nth <= t.wanted
        )
        select array_agg((m.name, m.wanted, m.looking, m.cursor, m.version, m.returned, m.ids, m.sizes, m.kinds,
                          coalesce(t.ids, '{}'), coalesce(l.count, 0) - coalesce(t.count, 0),
                          case when t.count = m.wanted then t.last
                               when coalesce(l.count, 0) < g.count then coalesce(l.last, 0)
                               when cardinality(m.ids) >= m.looking then l.last
                               else judge.upto end)::pgchannels.claiming order by m.place)
          from mine m
          left join (select x.place, count(*) as count from next x group by x.place) g on g.place = m.place
          left join (select x.place, count(*) as count, max(x.id) as last from looked x group by x.place) l on l.place = m.place
          left join (select x.place, count(*) as count, max(x.id) as last, array_agg(x.id order by x.id) as ids
                       from taken x group by x.place) t on t.place = m.place);
end
$$;

-- Take messages for receivers that wait: up to "wanted" for each channel of "names", its own and those of
-- its groups since it joined. Call it as a statement of its own, in READ COMMITTED: it locks the channels,
-- in the order of names, and each statement after that must see what the previous holder of a lock
-- committed. So of all processes one at a time takes from a channel, and a claim that had to wait goes on
-- from where the other one stopped.
--
-- "claimant" and "token" are who claims, and the number of the claim. If that one was made before, and
-- only the answer was lost with the connection, this one waits for it to end, takes nothing itself, and
-- returns the same messages again, for whichever channels they were.
--
-- The work is bounded, whatever publishers write: for each channel a claim looks at the next "looking"
-- messages, for all channels together at "max_bytes", and moves the cursors to the last messages that it
-- has looked at; see judge().
--
-- "known_to": ids from there on do not count, for this session may not know of their partitions yet; see
-- store.py.
--
-- Returns a row for each channel, with the ids of what was taken, "may_have_more" if not all of the log
-- was looked at, and how many messages were passed by; and a row without a name for each message.
create function pgchannels.claim(
    names text[], wanted integer[], looking integer[], claimant uuid, token bigint, known_to bigint, max_bytes bigint)
returns table (
    head bigint, epoch integer, partitioned_to bigint, may_claim boolean,
    name text, is_known boolean, groups text[], may_have_more boolean, passed_by integer, ids bigint[],
    id bigint, channel text, payload json, created_at timestamptz, size integer, headers json, attachments bytea[])
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    last pgchannels.claims;
    has_row boolean;
    bounds pgchannels.bounds;
    upto bigint;
    locked text[] := '{}';
    mine record;
    channels pgchannels.claiming[] := '{}';
    given_names text[] := '{}';
    given_ids bigint[] := '{}';
begin
    select k.* into last from pgchannels.claims k where k.claimant = claim.claimant for update;
    has_row := found;
    if last.token < claim.token then
        locked := array(select c.name from pgchannels.channels c
                         where c.name = any (claim.names) order by c.name for no key update);
    elsif last.token = claim.token then
        given_names := last.names;
        given_ids := last.ids;
    end if;
    select b.* into bounds from pgchannels.bounds b;
    upto := least(bounds.head, known_to - 1);

    if locked <> '{}' then
        select array_agg((a.name, a.wanted, a.looking, coalesce(k.cursor, c.cursor), k.version,
                          coalesce(k.returned, '{}'), t.ids, t.sizes, t.kinds, t.ids, 0,
                          case when t.count = a.wanted then t.last else upto end)::pgchannels.claiming) as channels,
               bool_or(k.name is null) as any_new,
               bool_or(not c.is_received or c.last_active_at < clock_timestamp() - interval '10 seconds') as any_idle,
               bool_or(t.count > 0 or k.returned <> '{}' or upto > coalesce(k.cursor, c.cursor) + 1000) as any_moved,
               -- nothing has to be judged
               bool_and((t.count = 0 or t.is_plain and a.looking = a.wanted) and coalesce(k.returned = '{}', true))
               and sum(t.size) <= max_bytes as is_simple
          into mine
          from unnest(claim.names, claim.wanted, claim.looking) a(name, wanted, looking)
         cross join lateral (select c.* from pgchannels.channels c where c.name = a.name limit 1) c
          left join lateral (select k.* from pgchannels.cursors k
                              where k.name = a.name order by k.name desc, k.version desc limit 1) k on true
         cross join lateral (
             select coalesce(array_agg(u.id), '{}') as ids, array_agg(u.size) as sizes, array_agg(u.kind) as kinds,
                    count(*) as count, max(u.id) as last, coalesce(bool_and(u.kind = 0), true) as is_plain,
                    coalesce(sum(u.size), 0) as size
               from (select r.id, r.size,
                            case when r.expires_at <= clock_timestamp() then 3
                                 when s.channel = 'pgchannels:direct' then 2
                                 when r.headers is not null then 1 else 0 end as kind
                       from (select a.name as channel, coalesce(k.cursor, c.cursor) as after
                             union all
                             select g.group_name, greatest(g.since, k.cursor, c.cursor)
                               from pgchannels.memberships g
                              where g.channel = a.name and g.left_at is null and g.group_name <> a.name
                             union all
                             select 'pgchannels:direct', coalesce(k.cursor, c.cursor)
                              where a.name ~ '[.][0-9a-f]{32}[.][0-9a-f]{16}$') s
                      cross join lateral (
                          select r.id, r.size, r.expires_at, r.headers from pgchannels.messages r
                           where r.channel between s.channel and s.channel
                             and r.id > greatest(s.after, bounds.floor) and r.id <= upto
                           order by r.channel, r.id limit a.looking) r
                      order by r.id limit a.looking) u) t
         where cardinality(locked) = cardinality(claim.names) or a.name = any (locked);
        channels := mine.channels;
        if not mine.is_simple then
            channels := pgchannels.judge(channels, upto, bounds.floor, max_bytes);
        end if;
        if mine.any_new then
            insert into pgchannels.cursors (name, cursor)
            select m.name, m.cursor from unnest(channels) m where m.version is null;
        end if;
        if mine.any_moved then
            update pgchannels.cursors k
               set cursor = greatest(m.cursor, m.through),
                   -- of those that were neither taken nor come after what was looked at, the messages are gone
                   returned = array(select r.id from unnest(m.returned) r(id) where r.id <> all (m.taken) and r.id > m.through),
                   version = k.version + (k.changes = 200)::integer,
                   changes = case when k.changes = 200 then 0 else k.changes + 1 end
              from unnest(channels) m
             where k.name = m.name and k.version = coalesce(m.version, 0)
               -- If all was looked at and nothing taken, only now and then: the next claims have less to pass by.
               and (m.taken <> '{}' or m.through > m.cursor and (m.through < upto or m.through > m.cursor + 1000)
                    or m.returned <> '{}' and m.through > 0);
        end if;
        if mine.any_idle then
            -- In use: memberships of channels that are not used end.
            update pgchannels.channels c set is_received = true, last_active_at = clock_timestamp()
              from unnest(locked) m(name)
             where c.name = m.name
               and (not c.is_received or c.last_active_at < clock_timestamp() - interval '10 seconds');
        end if;
        if mine.any_moved then
            select coalesce(array_agg(m.name), '{}'), coalesce(array_agg(u.id), '{}') into given_names, given_ids
              from unnest(channels) m cross join lateral unnest(m.taken) u(id);
            if given_ids <> '{}' then
                update pgchannels.claims k
                   set token = claim.token, names = given_names, ids = given_ids, made_at = clock_timestamp()
                 where k.claimant = claim.claimant;
            end if;
        end if;
    end if;

    return query
    select bounds.head, bounds.epoch, bounds.partitioned_to, has_row, a.name,
           exists (select from pgchannels.channels c where c.name = a.name),
           array(select g.group_name from pgchannels.memberships g where g.channel = a.name and g.left_at is null),
           a.through < upto, a.passed_by, a.taken,
           null::bigint, null::text, null::json, null::timestamptz, null::integer, null::json, null::bytea[]
      from (select m.name, m.through, m.passed_by, m.taken from unnest(channels) m
            union all
            -- those that were not locked, and those of an answer that was lost
            select u.name, 0, 0, array(select g.id from unnest(given_names, given_ids) g(name, id)
                                        where g.name = u.name order by g.id)
              from (select u.name from unnest(claim.names) u(name) union select u.name from unnest(given_names) u(name)) u
             where (channels = '{}' or cardinality(channels) < cardinality(claim.names))
               and u.name not in (select m.name from unnest(channels) m)) a;
    if given_ids <> '{}' then
        return query
        select bounds.head, bounds.epoch, bounds.partitioned_to, has_row,
               null::text, null::boolean, null::text[], null::boolean, null::integer, null::bigint[], r.*
          from (select distinct u.id from unnest(given_ids) u(id)) i
         cross join lateral (
             select r.id, r.channel, r.payload, r.created_at, r.size, r.headers, r.attachments
               from pgchannels.messages r where r.id = i.id limit 1) r;
    end if;
end
$$;

-- Give back what was taken for a receiver that has gone: the next one gets it, in whichever process it
-- waits. Numbered like the claims, so that it is not done twice if only the answer was lost.
create function pgchannels.hand_back(names text[], ids bigint[], claimant uuid, token bigint) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    locked text[];
begin
    update pgchannels.claims k set token = hand_back.token, names = '{}', ids = '{}', made_at = clock_timestamp()
     where k.claimant = hand_back.claimant and k.token < hand_back.token;
    if not found then
        return;
    end if;
    locked := array(select c.name from pgchannels.channels c
                     where c.name = any (hand_back.names) order by c.name for no key update);
    with updated as (
        update pgchannels.cursors k
           set returned = k.returned || b.ids,
               version = k.version + (k.changes = 200)::integer,
               changes = case when k.changes = 200 then 0 else k.changes + 1 end
          from (select u.name, array_agg(u.id) as ids
                  from unnest(hand_back.names, hand_back.ids) u(name, id)
                 where u.name = any (locked) group by u.name) b
         cross join lateral (select n.version from pgchannels.cursors n
                              where n.name = b.name order by n.name desc, n.version desc limit 1) n
         where k.name = b.name and k.version = n.version
        returning k.name
    )
    insert into pgchannels.outbox (channel, payload)
    select 'pgchannels:members', json_build_object('channels', json_agg(u.name)) from updated u having count(*) > 0;
end
$$;

-- What changes who is present in a group goes one after the other, and is told of in that order,
-- with counts that add up. The lock comes before any write or row lock, so that two of these cannot wait
-- for each other.
create function pgchannels.lock_presence(groups text[]) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    key integer;
begin
    for key in select distinct hashtext('pgchannels.' || g.name) from unnest(groups) g(name) order by 1
    loop
        perform pg_advisory_xact_lock(1885823849, key);
    end loop;
end
$$;

-- How many are present in a group that has any, as change_memberships() counts them: changed in the
-- transaction that changes the memberships, with the lock of lock_presence() held. A count over the
-- memberships would walk over all that have left, while a snapshot is held that could see them. For
-- the same reason the row moves in the index after 200 changes in place: a look at the newest version,
-- from the end, passes by no more than those.
create table pgchannels.present (
    group_name text not null,
    version integer not null default 0,
    count integer not null,
    changes smallint not null default 0,
    constraint present_pkey primary key (group_name, version)
) with (fillfactor = 50);

comment on table pgchannels.present is 'how many are present in each group; one row a group';

-- Add to the number of those who are present in a group, and return it. The memberships have been
-- changed, and the lock is held.
create function pgchannels.add_present(of_group text, number bigint) returns integer
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    now_present integer;
    row_version integer;
begin
    update pgchannels.present p
       set count = p.count + number,
           version = p.version + case when p.changes = 200 then 1 else 0 end,
           changes = case when p.changes = 200 then 0 else p.changes + 1 end
     where p.group_name = of_group
       and p.version >= (select v.version from pgchannels.present v
                          where v.group_name = of_group order by v.version desc limit 1)
    returning p.count, p.version into now_present, row_version;
    if not found then
        select count(distinct m.identity) into now_present from pgchannels.memberships m
         where m.group_name = of_group and m.identity is not null;
        if now_present > 0 then
            insert into pgchannels.present (group_name, count) values (of_group, now_present);
        end if;
    elsif now_present <= 0 then
        delete from pgchannels.present p where p.group_name = of_group and p.version = row_version;
    end if;
    return now_present;
end
$$;

-- Publish that members have left, those of whom nothing remains in the group. The lock is held.
-- Metadata is text in "departed": as json in it, an escape such as \u0000 in a name, which json may
-- hold and text may not, could not be read here, and whoever has that name could never leave.
create function pgchannels.publish_left(departed json) returns integer
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    published integer;
begin
    with gone as (
        select distinct on (d.group_name, d.identity) d.*
          from json_to_recordset(departed)
               as d(group_name text, channel text, identity text, presence text, user_id text, metadata text)
          -- One probe each: "not exists" may be planned as a walk over all memberships.
          left join lateral (select true as remains from pgchannels.memberships m
                              where m.group_name = d.group_name and m.identity = d.identity limit 1) m on true
         where d.identity is not null and m.remains is null
         order by d.group_name, d.identity
    ), present as materialized (
        select g.group_name, pgchannels.add_present(g.group_name, -g.count) as count
          from (select o.group_name, count(*) as count from gone o group by o.group_name) g
    )
    insert into pgchannels.outbox (channel, payload)
    select 'presence:' || g.group_name,
           json_build_object(
               'type', 'presence.left', 'group', g.group_name, 'user_id', g.user_id,
               'connection', case when g.presence = 'connection' then g.channel end,
               'metadata', g.metadata::json,
               'count', p.count + count(*) over (partition by g.group_name)
                        - row_number() over (partition by g.group_name order by g.identity))
      from gone g join present p on p.group_name = g.group_name
     order by g.group_name, g.identity;
    get diagnostics published = row_count;
    return published;
end
$$;

-- Add and remove members, each pair of group and channel at most once in a call. Returns how many
-- messages it has published: who joined, who left (at once, or after "grace" if counted as a user),
-- and for channels that are not the announcer's alone, that somebody must look at their groups.
create function pgchannels.change_memberships(
    groups text[], names text[], adding boolean[], presences text[], grace interval, announcer uuid)
returns integer
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    counted text[];
    ending_groups text[];
    ending_names text[];
    published integer := 0;
    inserted integer;
    departed json;
begin
    select coalesce(array_agg(distinct x.name), '{}') into counted from (
        select c.group_name as name
          from unnest(groups, presences) c(group_name, presence) where c.presence is not null
        union all
        select m.group_name from unnest(groups, names) c(group_name, channel)
          join pgchannels.memberships m on m.group_name = c.group_name and m.channel = c.channel
         where m.identity is not null) x;
    if counted <> '{}' then
        perform pgchannels.lock_presence(counted);
    end if;

    if true = any (adding) then
        -- Who is renewed as somebody else leaves as who it was.
        if counted <> '{}' then
            select json_agg(r) into departed from (
                select m.group_name, m.channel, m.identity, m.presence, m.user_id, m.metadata::text
                  from unnest(groups, names, adding, presences) c(group_name, channel, adding, presence)
                  join pgchannels.memberships m on m.group_name = c.group_name and m.channel = c.channel
                  left join pgchannels.channels k on k.name = c.channel
                 where c.adding and c.group_name = any (counted)
                   and m.identity <> case coalesce(c.presence, case when m.left_at is null then m.presence end)
                           when 'user' then 'user:' || k.user_id else 'connection:' || c.channel end) r;
        end if;
        -- A channel that is being removed elsewhere waits for us, and then finds the membership; or we
        -- wait, and find it gone. The announcer's own go with its node, so one lock does for them.
        perform from pgchannels.nodes n where n.id = announcer for key share;
        perform from pgchannels.channels k
          where k.name = any (names) and k.node is distinct from announcer order by k.name for key share;
        -- A connection's channel that is no more gets no memberships; others need no row.
        with asked as (
            select c.group_name, c.channel, c.presence, k.user_id, k.metadata
              from unnest(groups, names, adding, presences) c(group_name, channel, adding, presence)
              left join lateral (
                  select k.name, k.user_id, k.metadata from pgchannels.channels k where k.name = c.channel) k on true
             where c.adding and (k.name is not null or c.channel !~ '[.][0-9a-f]{32}[.][0-9a-f]{16}$')
        ), joined as (
            insert into pgchannels.memberships as m (group_name, channel, since, presence, user_id, metadata)
            select a.group_name, a.channel, b.head, a.presence, a.user_id, a.metadata
              from asked a cross join pgchannels.bounds b
             order by a.group_name, a.channel
            on conflict (group_name, channel) do update
                set joined_at = case when m.left_at is null then m.joined_at else excluded.joined_at end,
                    renewed_at = excluded.renewed_at,
                    since = case when m.left_at is null then m.since else excluded.since end,
                    left_at = null,
                    presence = coalesce(excluded.presence, case when m.left_at is null then m.presence end),
                    -- renewed after its channel has become nobody's, it stays what it was counted as
                    user_id = case when excluded.presence is null and excluded.user_id is null
                                   then m.user_id else excluded.user_id end,
                    metadata = case when excluded.presence is null and excluded.user_id is null
                                    then m.metadata else excluded.metadata end
            returning m.group_name, m.channel, m.identity, m.presence, m.user_id, m.metadata
        ), arrived as (
            -- The snapshot is from before the insert: whom it does not show has arrived.
            select distinct on (j.group_name, j.identity) j.*
              from joined j
              left join lateral (select true as remains from pgchannels.memberships m
                                  where m.group_name = j.group_name and m.identity = j.identity limit 1) m on true
             where j.identity is not null and m.remains is null
             order by j.group_name, j.identity
        ), present as materialized (
            select g.group_name, pgchannels.add_present(g.group_name, g.count) - g.count as count
              from (select r.group_name, count(*) as count from arrived r group by r.group_name) g
        )
        insert into pgchannels.outbox (channel, payload)
        select 'presence:' || a.group_name,
               json_build_object(
                   'type', 'presence.joined', 'group', a.group_name, 'user_id', a.user_id,
                   'connection', case when a.presence = 'connection' then a.channel end,
                   'metadata', a.metadata,
                   'count', p.count + row_number() over (partition by a.group_name order by a.identity))
          from arrived a join present p on p.group_name = a.group_name
         order by a.group_name, a.identity;
        get diagnostics published = row_count;
        if departed is not null then
            published := published + pgchannels.publish_left(departed);
        end if;
        -- A user who has come back is no longer on the way out. "offset 0": each is looked up by its
        -- identity, and not among all of the group.
        if counted <> '{}' then
            delete from pgchannels.memberships g
             using (select m.group_name, m.identity
                      from unnest(groups, names, adding) c(group_name, channel, adding)
                      join pgchannels.memberships m on m.group_name = c.group_name and m.channel = c.channel
                     where c.adding and m.left_at is null offset 0) m
             where g.group_name = m.group_name and g.identity = m.identity and g.left_at is not null;
        end if;
    end if;

    if false = any (adding) then
        -- Locked in one order, so that two of these cannot wait for each other, and only these: what
        -- is added meanwhile has no place in that order.
        select array_agg(l.group_name), array_agg(l.channel) into ending_groups, ending_names from (
            select m.group_name, m.channel
              from unnest(groups, names, adding) c(group_name, channel, adding)
              join pgchannels.memberships m on m.group_name = c.group_name and m.channel = c.channel
             where not c.adding and m.left_at is null and (m.identity is null or c.group_name = any (counted))
             order by m.group_name, m.channel for update of m) l;
        if grace > interval '0' then
            update pgchannels.memberships m set left_at = clock_timestamp()
              from unnest(ending_groups, ending_names) c(group_name, channel)
             where m.group_name = c.group_name and m.channel = c.channel and m.presence = 'user';
        end if;
        with gone as (
            delete from pgchannels.memberships m
             using unnest(ending_groups, ending_names) c(group_name, channel)
             where m.group_name = c.group_name and m.channel = c.channel and m.left_at is null
            returning m.group_name, m.channel, m.identity, m.presence, m.user_id, m.metadata::text
        )
        select json_agg(g) into departed from gone g where g.identity is not null;
        if departed is not null then
            published := published + pgchannels.publish_left(departed);
        end if;
    end if;

    -- Of a channel without a row too, unless it is a gone connection's: somebody may be about to make
    -- the row and to receive, and not see this change yet.
    insert into pgchannels.outbox (channel, payload)
    select 'pgchannels:members', json_build_object('channels', json_agg(c.name))
      from (select distinct c.name from unnest(names) c(name)) c
      left join pgchannels.channels k on k.name = c.name
     where k.is_received
        or (k.name is not null and k.node is distinct from announcer)
        or (k.name is null and c.name !~ '[.][0-9a-f]{32}[.][0-9a-f]{16}$')
    having count(*) > 0;
    get diagnostics inserted = row_count;
    return published + inserted;
end
$$;

-- Remove channels with all their memberships. Returns how many messages were published.
create function pgchannels.remove_channels(names text[], grace interval, announcer uuid) returns integer
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    groups text[];
    members text[];
begin
    perform pgchannels.lock_presence(array(
        select distinct m.group_name from pgchannels.memberships m
         where m.channel = any (names) and m.identity is not null));
    -- First the channels: whoever is adding one to a group has committed then, or will find it gone.
    delete from pgchannels.channels c
     where c.name in (select d.name from pgchannels.channels d where d.name = any (names)
                       order by d.name for update);
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

-- End the presence of those whose time of grace is over: of all, or if "within" is given, of those
-- where it has ended within that time. That leads past the entries of rows that were deleted before,
-- and are still in the index while a snapshot is held. Returns how many messages were published.
create function pgchannels.settle_departures(grace interval, max_members integer, within interval default null)
returns integer
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    counted text[];
    due_before timestamptz := clock_timestamp() - grace;
    due_after timestamptz := coalesce(due_before - within, '-infinity');
    departed json;
begin
    select array_agg(distinct d.group_name) into counted
      from (select m.group_name from pgchannels.memberships m
             where m.left_at < due_before and m.left_at >= due_after order by m.left_at limit max_members) d;
    if counted is null then
        return 0;
    end if;
    perform pgchannels.lock_presence(counted);
    with gone as (
        delete from pgchannels.memberships m
         where m.left_at < due_before and m.left_at >= due_after and m.group_name = any (counted)
        returning m.group_name, m.channel, m.identity, m.presence, m.user_id, m.metadata::text
    )
    select json_agg(g) into departed from gone g;
    return case when departed is null then 0 else pgchannels.publish_left(departed) end;
end
$$;

-- Declare nodes dead whose lease has run out, and remove what lived by them: at most so many
-- channels in a call. Only a node may ask that has itself been there for as long as a lease, or for
-- itself, if it was declared dead. Returns whether there may be more to do.
create function pgchannels.reap(
    me uuid, lease interval, max_channels integer, out more boolean, out published integer)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    is_steady boolean;
    dead uuid[];
    names text[];
begin
    more := false;
    published := 0;
    -- After an outage it may come here before it has renewed its own lease, and so noticed the gap.
    select n.dead_since is null and n.steady_since < clock_timestamp() - lease
           and n.heartbeat_at > clock_timestamp() - lease / 2 into is_steady
      from pgchannels.nodes n where n.id = me;
    select array_agg(n.id) into dead
      from pgchannels.nodes n where n.dead_since is not null and (is_steady or n.id = me);
    if (dead is null
        and not exists (select from pgchannels.nodes n
                         where is_steady and n.heartbeat_at < clock_timestamp() - lease))
       or not pg_try_advisory_xact_lock(1885823850, hashtext('pgchannels.')) then
        return;
    end if;
    -- First what was declared dead before now; see lock_presence() for why no write comes before it.
    select array_agg(d.name) into names
      from (select c.name from pgchannels.channels c where c.node = any (dead) limit max_channels) d;
    if names is not null then
        perform pgchannels.lock_presence(array(
            select distinct m.group_name from pgchannels.memberships m
             where m.channel = any (names) and m.identity is not null));
        -- One that does not know yet that it is dead may be adding members.
        perform from pgchannels.nodes n where n.id = any (dead) order by n.id for update;
        -- The lease was time enough to come back in.
        published := pgchannels.remove_channels(names, interval '0', me);
        more := true;
    else
        delete from pgchannels.nodes n
         where n.id = any (dead) and n.dead_since is not null
           and not exists (select from pgchannels.channels c where c.node = n.id);
    end if;
    if is_steady then
        update pgchannels.nodes n set dead_since = clock_timestamp()
         where n.dead_since is null and n.heartbeat_at < clock_timestamp() - lease;
        more := more or found;
    end if;
end
$$;
