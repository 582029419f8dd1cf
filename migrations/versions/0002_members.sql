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
    add column returned bigint[] not null default '{}',
    add column is_received boolean not null default true,
    add column created_at timestamptz not null default clock_timestamp();

create index channels_node on pgchannels.channels (node) where node is not null;

comment on table pgchannels.channels is 'channels that are received from, and those of connections';

comment on column pgchannels.channels.cursor is 'what receivers have taken, or passed by: ids up to here';

comment on column pgchannels.channels.returned is 'ids that were taken and handed back by a receiver that was cancelled';

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

-- What a receiving process's last claim took, so that one whose answer was lost on the way can be
-- asked again. Locked by each claim: a repeated one waits for the first to end.
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

-- Whether a message with these headers is for the receiver: not one that excludes it, and of those
-- that are sent to several, one that names it.
create function pgchannels.is_for(headers json, receiver text, named boolean) returns boolean
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
    recipients text := headers ->> 'pgchannels-only';
begin
    if headers ->> 'pgchannels-except' = receiver then
        return false;
    end if;
    if recipients is null then
        return not named;
    end if;
    -- Not parsed: whoever can publish can put anything there. In a list of names, a name has quotes.
    return strpos(recipients, '"' || receiver || '"') > 0;
end
$$;

-- What changes who is present in a group goes one after the other, and is told of in that order,
-- with counts that add up. The log's order within a batch is that of transaction ids, so this must
-- come before anything that gives the transaction its id: before any write or row lock.
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
         where d.identity is not null
           and not exists (select from pgchannels.memberships m
                            where m.group_name = d.group_name and m.identity = d.identity)
         order by d.group_name, d.identity
    ), present as materialized (
        select g.group_name, count(distinct m.identity) as count
          from (select distinct o.group_name from gone o) g
          left join pgchannels.memberships m on m.group_name = g.group_name and m.identity is not null
         group by g.group_name
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
             where j.identity is not null
               and not exists (select from pgchannels.memberships m
                                where m.group_name = j.group_name and m.identity = j.identity)
             order by j.group_name, j.identity
        ), present as materialized (
            select g.group_name, count(distinct m.identity) as count
              from (select distinct r.group_name from arrived r) g
              left join pgchannels.memberships m on m.group_name = g.group_name and m.identity is not null
             group by g.group_name
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
        -- Who has come back is no longer on the way out.
        if counted <> '{}' then
            delete from pgchannels.memberships g
             using unnest(groups, names, adding) c(group_name, channel, adding), pgchannels.memberships m
             where c.adding and m.group_name = c.group_name and m.channel = c.channel and m.left_at is null
               and g.group_name = m.group_name and g.identity = m.identity and g.left_at is not null;
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
