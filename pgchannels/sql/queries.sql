-- name: revision
select version_num from pgchannels.alembic_version;

-- name: works_from
select l.works_from from pgchannels.log l;

-- name: owner
-- Who owns the log, and whether we may act as that role: partitions are dropped by their owners.
select pg_get_userbyid(c.relowner) as owner, pg_has_role(c.relowner, 'usage') as is_ours, current_user as we,
       has_function_privilege('pgchannels.seal(integer, bigint)', 'execute') as is_node
  from pg_class c where c.oid = 'pgchannels.messages'::regclass;

-- name: max_message_size
-- Bytes that a message may have, whoever publishes it.
select l.max_message_size from pgchannels.log l;

-- name: limit_messages
select pgchannels.limit_messages($1);

-- name: current_role
select current_user;

-- name: head
select b.head, b.epoch, b.floor from pgchannels.bounds b;

-- name: head_after
-- The same, and the newest batch's mark; null if the log lacks the batch that ended at the id $1 and had
-- the mark $2. 0 and 0 stand for none.
select b.head, b.epoch, b.floor,
       case when $1::bigint = 0 or exists (select from pgchannels.batches s where s.last_id = $1 and s.mark = $2::bigint)
            then b.mark end as mark
  from pgchannels.bounds b;

-- name: was_thinned
-- Whether the log is the one that a reader knows which last saw the batch that ended at $1 and had the
-- mark $2, though that batch is gone: by retention, or because it was not the last of its second.
select $1::bigint <= b.floor
       or ($2::bigint < (extract(epoch from clock_timestamp()) * 1000000)::bigint - 60000000
           and coalesce((select n.mark / 1000000 = $2 / 1000000 from pgchannels.batches n
                          where n.last_id > $1 order by n.last_id limit 1), false)) as is_same
  from pgchannels.bounds b;

-- name: begin_epoch
select pgchannels.begin_epoch($1);

-- name: insert
-- One insert for however many publishers were waiting; unnest keeps their order.
insert into pgchannels.outbox (channel, payload, expires_at, headers)
select m.channel, m.payload::json, clock_timestamp() + m.ttl, m.headers::json
  from unnest($1::text[], $2::text[], $3::interval[], $4::text[]) as m(channel, payload, ttl, headers)
returning created_at;

-- name: insert_only
-- For a role that may insert into these columns and read nothing. $3 is for all of them.
insert into pgchannels.outbox (channel, payload, expires_at)
select m.channel, m.payload::json, clock_timestamp() + $3::interval
  from unnest($1::text[], $2::text[]) with ordinality m(channel, payload, place) order by m.place;

-- name: insert_only_with_headers
-- The same, with headers ($4) for all of them.
insert into pgchannels.outbox (channel, payload, expires_at, headers)
select m.channel, m.payload::json, clock_timestamp() + $3::interval, $4::text::json
  from unnest($1::text[], $2::text[]) with ordinality m(channel, payload, place) order by m.place;

-- name: insert_checked
-- The same for messages with attachments (a slice of $7 each) or idempotency keys, and where
-- channels have a capacity ($10). A row for each message: when it was published, null if its channel
-- is full; and whether it is new.
--
-- Keys are claimed in their order, so that two of these cannot wait for each other; the second one
-- of the same key waits for the first to commit, and then sees it. How full a channel is, is as of
-- the statement's beginning: concurrent publishers may overshoot by what they have under way.
with given as materialized (
    select m.*, clock_timestamp() as created_at
      from unnest($1::text[], $2::text[], $3::interval[], $4::text[], $5::integer[], $6::integer[], $8::text[])
           with ordinality as m(channel, payload, ttl, headers, first, last, key, place)
), coming as materialized (
    select o.channel, count(*) as count from pgchannels.outbox o
     where $10::integer is not null and o.channel in (select g.channel from given g) group by o.channel
), room as (
    select c.name,
           $10::integer - coalesce(cardinality(k.returned), 0)
           - (select count(*) from (
                  select from pgchannels.messages r
                   where r.channel between c.name and c.name and r.id > greatest(k.cursor, c.cursor, l.floor)
                     and (r.expires_at is null or r.expires_at > clock_timestamp())
                   order by r.channel, r.id limit $10) waiting)
           - coalesce(o.count, 0) as free
      from pgchannels.log l cross join pgchannels.channels c
      left join lateral (select k.cursor, k.returned from pgchannels.cursors k
                          where k.name = c.name order by k.name desc, k.version desc limit 1) k on true
      left join coming o on o.channel = c.name
     where $10::integer is not null and c.is_received and c.name in (select g.channel from given g)
), numbered as (
    select g.*, g.key is null or row_number() over (partition by g.channel, g.key order by g.place) = 1 as is_first,
           exists (select from pgchannels.keys k
                    where k.channel = g.channel and k.key = g.key and k.expires_at > g.created_at) as is_known
      from given g
), admitted as (
    select g.*
      from (select n.*, count(*) filter (where n.is_first and not n.is_known) over (partition by n.channel order by n.place) as nth
              from numbered n) g
      left join room r on r.name = g.channel
     where r.free is null or g.nth <= r.free or g.is_known
), claimed as (
    insert into pgchannels.keys as k (channel, key, created_at, expires_at)
    select a.channel, a.key, a.created_at, a.created_at + $9::interval
      from admitted a where a.key is not null and a.is_first order by a.channel, a.key
    on conflict (channel, key) do update
        set created_at = case when k.expires_at <= excluded.created_at then excluded.created_at else k.created_at end,
            expires_at = case when k.expires_at <= excluded.created_at then excluded.expires_at else k.expires_at end,
            claimed_by = case when k.expires_at <= excluded.created_at then excluded.claimed_by else k.claimed_by end
    returning k.channel, k.key, k.created_at, k.claimed_by = pg_current_xact_id() as is_new
), published as (
    insert into pgchannels.outbox (channel, payload, expires_at, headers, attachments, created_at)
    select a.channel, a.payload::json, a.created_at + a.ttl, a.headers::json,
           case when a.last >= a.first then ($7::bytea[])[a.first:a.last] end, a.created_at
      from admitted a left join claimed c on c.channel = a.channel and c.key = a.key
     where a.key is null or (a.is_first and c.is_new)
     order by a.place
)
select coalesce(c.created_at, a.created_at) as created_at,
       a.key is null or (a.is_first and c.is_new) as is_new
  from given g
  left join admitted a on a.place = g.place
  left join claimed c on c.channel = a.channel and c.key = a.key
 order by g.place;

-- name: insert_ephemeral
-- The notification goes with the commit; that flushes nothing, for the table is not logged. It names
-- the ids, so a node reads these and no others. All of a statement's lie between the two.
with sent as (
    insert into pgchannels.ephemeral (channel, payload, headers, attachments)
    select m.channel, m.payload::json, m.headers::json,
           case when m.last >= m.first then ($6::bytea[])[m.first:m.last] end
      from unnest($1::text[], $2::text[], $3::text[], $4::integer[], $5::integer[])
           as m(channel, payload, headers, first, last)
    returning id
)
select pg_notify($7, 'e ' || min(s.id) || ' ' || max(s.id)) from sent s;

-- name: read_ephemeral
-- $1 and $2: the ids that were told; $3: at most so many.
select e.id, e.channel, e.payload, e.created_at,
       (octet_length(e.payload::text) + coalesce(octet_length(e.headers::text), 0)
        + (select coalesce(sum(octet_length(a.bytes)), 0) from unnest(e.attachments) a(bytes)))::integer as size,
       e.headers, e.attachments
  from pgchannels.ephemeral e
 where e.id between $1::bigint and $2::bigint order by e.id limit $3;

-- name: sweep_ephemeral
-- What is older than $1; if $2 is given, not what has been so for longer than that. The lower bound
-- leads past the entries of rows that were deleted before, and are still in the index while a
-- snapshot is held. With clock_timestamp(), which is volatile, no index would be used.
with deleted as (
    delete from pgchannels.ephemeral e
     where e.created_at < statement_timestamp() - $1::interval
       and e.created_at >= coalesce(statement_timestamp() - $1::interval - $2::interval, '-infinity')
    returning 1
)
select count(*) from deleted;

-- name: seal
call pgchannels.seal_and_notify($1, $2, $3, null, null, null);

-- name: seal_only
-- Without a notification; and in a REPEATABLE READ transaction, so that what its snapshot shows is in
-- the log then, and nothing else.
select s.sealed, s.head, s.stopped from pgchannels.seal($1, $2) s;

-- name: notify
select pg_notify($1, $2);

-- name: read_channels
-- The messages of some channels after an id, oldest first, and the bounds of the log in the same
-- snapshot: one row at least. A merge of one bounded page a channel, so that the cost does not
-- depend on how much lies behind. $4 bounds the page's bytes; the message that crosses it is in.
--
-- Messages whose time is over are in the page, with "is_live" false, until they are pruned: a read
-- that walked past them to find others would have no bound.
--
-- $5 and $6: the last id and the mark of a batch that was seen earlier, or 0 and 0. If the log lacks
-- that batch, "mark" is null; else it is the newest batch's.
--
-- "between" and "order by channel, id" leave the planner the index on (channel, id) alone. With
-- "channel = …" and "order by id" it may walk the primary key and filter, expecting the channel all
-- along it: for a quiet channel beside a few busy ones that is a walk over the whole log.
select b.head, b.epoch, b.floor, b.partitioned_to,
       case when $5::bigint = 0 or exists (select from pgchannels.batches s where s.last_id = $5 and s.mark = $6::bigint)
            then b.mark end as mark,
       p.is_live, p.id, p.channel, p.payload, p.created_at, p.size, p.headers, p.attachments
  from pgchannels.bounds b
  left join lateral (
      select m.*, sum(m.size) over (order by m.id) - m.size as before
        from (select m.id, m.channel, m.payload, m.created_at, m.size, m.headers, m.attachments, m.is_live
                from unnest($1::text[]) c(channel)
               cross join lateral (
                   select m.*, (m.expires_at is null or m.expires_at > clock_timestamp()) as is_live
                     from pgchannels.messages m
                    where m.channel between c.channel and c.channel
                      and m.id > greatest($2::bigint, b.floor)
                    order by m.channel, m.id limit $3) m
               order by m.id limit $3) m
  ) p on p.before < $4::bigint
 order by p.id;

-- name: read_channel_backwards
-- As read_channels, for one channel ($1) before an id ($2) and after one ($3), newest first.
select b.head, b.epoch, b.floor, b.partitioned_to,
       case when $6::bigint = 0 or exists (select from pgchannels.batches s where s.last_id = $6 and s.mark = $7::bigint)
            then b.mark end as mark,
       p.is_live, p.id, p.channel, p.payload, p.created_at, p.size, p.headers, p.attachments
  from pgchannels.bounds b
  left join lateral (
      select m.*, sum(m.size) over (order by m.id desc) - m.size as before
        from (select m.*, (m.expires_at is null or m.expires_at > clock_timestamp()) as is_live
                from pgchannels.messages m
               where m.channel between $1 and $1
                 and m.id < $2::bigint and m.id > greatest($3::bigint, b.floor)
               order by m.channel desc, m.id desc limit $4) m
  ) p on p.before < $5::bigint
 order by p.id desc;

-- name: read_log
-- As read_channels, for the log as a whole.
select b.head, b.epoch, b.floor, b.partitioned_to,
       case when $4::bigint = 0 or exists (select from pgchannels.batches s where s.last_id = $4 and s.mark = $5::bigint)
            then b.mark end as mark,
       p.is_live, p.id, p.channel, p.payload, p.created_at, p.size, p.headers, p.attachments
  from pgchannels.bounds b
  left join lateral (
      select m.*, sum(m.size) over (order by m.id) - m.size as before
        from (select m.*, (m.expires_at is null or m.expires_at > clock_timestamp()) as is_live
                from pgchannels.messages m
               where m.id > greatest($1::bigint, b.floor)
               order by m.id limit $2) m
  ) p on p.before < $3::bigint
 order by p.id;

-- name: position_before
-- How far the log had come before a time: to the end of the last batch that was sealed before then; 0
-- if none is known. The times of batches grow as their ids do. After a minute, only the last batch of
-- each second is known.
select b.epoch, coalesce((select s.last_id from pgchannels.batches s
                           where s.sealed_at < $1 order by s.sealed_at desc limit 1), 0) as id
  from pgchannels.bounds b;

-- name: take_lease
-- Take or renew: true if $2 holds it now, for $3 from now on by the database's clock.
insert into pgchannels.leases as l (name, holder, expires_at)
values ($1, $2, clock_timestamp() + $3::interval)
on conflict (name) do update set holder = excluded.holder, expires_at = excluded.expires_at
    where l.holder = excluded.holder or l.expires_at <= clock_timestamp()
returning true;

-- name: drop_lease
delete from pgchannels.leases where name = $1 and holder = $2;

-- name: add_partitions_ahead
-- Keep room for about one whole partition beyond the one in use; see the function for their width.
select pgchannels.add_partitions(b.head + greatest(l.partition_size, (l.attached_to - l.floor) / 20))
  from pgchannels.bounds b cross join pgchannels.log l;

-- name: aged_through
-- The last id that was sealed longer ago than $1; the newest batch stays, it carries the snapshot.
select coalesce(max(b.last_id), 0) from pgchannels.batches b
 where b.sealed_at < clock_timestamp() - $1::interval;

-- name: raise_floor
update pgchannels.log set floor = $1 where floor < $1;

-- name: partitions
-- Oldest first, with their bounds (the upper one exclusive) and whether a detach was interrupted.
-- pg_get_expr gives null for what another pruner drops at this moment.
select c.relname as name, i.inhdetachpending as detaching,
       substring(b.bound from 'FROM [(]''?([0-9]+)''?[)]')::bigint as first_id,
       substring(b.bound from 'TO [(]''?([0-9]+)''?[)]')::bigint as end_id
  from pg_inherits i join pg_class c on c.oid = i.inhrelid
 cross join pg_get_expr(c.relpartbound, c.oid) b(bound)
 where i.inhparent = 'pgchannels.messages'::regclass and b.bound is not null
 order by first_id;

-- name: leftovers
-- Partitions that were detached and then, by a crash, not dropped.
select c.relname as name
  from pg_class c
 where c.relnamespace = (select p.relnamespace from pg_class p where p.oid = 'pgchannels.messages'::regclass)
   and c.relkind = 'r' and c.relname ~ '^messages_[0-9]+$'
   and not exists (select from pg_inherits i where i.inhrelid = c.oid);

-- name: count_aged
select count(*) from pgchannels.messages m where m.id <= $1 and m.id > $2;

-- name: delete_aged
with deleted as (
    delete from pgchannels.messages m
     where m.id in (select a.id from pgchannels.messages a where a.id <= $1 order by a.id limit $2)
    returning 1
)
select count(*) from deleted;

-- name: count_expired
select count(*) from pgchannels.messages m where m.expires_at <= clock_timestamp() and m.id > $1;

-- name: delete_expired
with deleted as (
    delete from pgchannels.messages m
     where m.id in (select e.id from pgchannels.messages e
                     where e.expires_at <= clock_timestamp() limit $1)
    returning 1
)
select count(*) from deleted;

-- name: count_expired_keys
select count(*) from pgchannels.keys k where k.expires_at <= clock_timestamp();

-- name: delete_expired_keys
-- Not one that is being renewed now.
with deleted as (
    delete from pgchannels.keys k
     using (select e.channel, e.key from pgchannels.keys e
             where e.expires_at <= clock_timestamp()
             order by e.channel, e.key limit $1 for update skip locked) e
     where k.channel = e.channel and k.key = e.key
    returning 1
)
select count(*) from deleted;

-- name: count_stale_memberships
select count(*)
  from pgchannels.memberships m left join pgchannels.channels c on c.name = m.channel
 where m.left_at is null and m.renewed_at < clock_timestamp() - $1::interval
   and (c.name is null or c.node is null and c.last_active_at < clock_timestamp() - $1::interval);

-- name: end_stale_memberships
-- Those of ordinary channels that are not used: neither renewed nor received from for $1.
with stale as materialized (
    select m.group_name, m.channel
      from pgchannels.memberships m
     where m.left_at is null and m.renewed_at < clock_timestamp() - $1::interval
       and not exists (select from pgchannels.channels c
                        where c.name = m.channel
                          and (c.node is not null or c.last_active_at >= clock_timestamp() - $1::interval))
     limit $2 for update of m skip locked
), listed as (
    select array_agg(s.group_name) as groups, array_agg(s.channel) as names, array_agg(false) as adding,
           array_agg(null::text) as presences, count(*) as count
      from stale s
)
select l.count, case when l.count > 0 then pgchannels.change_memberships(
           l.groups, l.names, l.adding, l.presences, interval '0', null) end
  from listed l;

-- name: count_stale_receivers
select count(*) from pgchannels.channels c cross join pgchannels.log l
 where c.node is null and c.cursor <= l.floor and c.last_active_at < clock_timestamp() - $1::interval
   and not exists (select from pgchannels.cursors k where k.name = c.name and k.cursor > l.floor)
   and not exists (select from pgchannels.memberships m where m.channel = c.name);

-- name: delete_stale_receivers
-- Channels that nobody has received from for $1, once nothing is retained that somebody had taken:
-- without its row, a channel is received from its beginning.
with deleted as (
    delete from pgchannels.channels c
     using (select s.name from pgchannels.channels s cross join pgchannels.log l
             where s.node is null and s.cursor <= l.floor
               and s.last_active_at < clock_timestamp() - $1::interval
               and not exists (select from pgchannels.cursors k where k.name = s.name and k.cursor > l.floor)
               and not exists (select from pgchannels.memberships m where m.channel = s.name)
             order by s.name limit $2 for update of s skip locked) s
     where c.name = s.name
    returning c.name
), forgotten as (
    delete from pgchannels.cursors k using deleted d where k.name = d.name
)
select count(*) from deleted;

-- name: remove_orphans
-- Channels whose node is not there: what a connection that broke has left behind. At most $1 at once.
with orphans as materialized (
    select c.name from pgchannels.channels c
     where c.node is not null and not exists (select from pgchannels.nodes n where n.id = c.node) limit $1
), listed as (
    select array_agg(o.name) as names, count(*) as count from orphans o
)
select l.count, case when l.count > 0 then pgchannels.remove_channels(l.names, interval '0', null) end
  from listed l;

-- name: delete_old_claims
-- No claim is repeated after a day.
with deleted as (
    delete from pgchannels.claims k
     where k.claimant in (select o.claimant from pgchannels.claims o
                       where o.made_at < clock_timestamp() - interval '1 day' limit $1)
    returning 1
)
select count(*) from deleted;

-- name: count_batches
select count(*) from pgchannels.batches b
 where b.last_id <= $1 and b.last_id < (select max(n.last_id) from pgchannels.batches n);

-- name: delete_batches
-- The newest stays: it carries the id and the snapshot that the next one continues from.
with deleted as (
    delete from pgchannels.batches b
     where b.last_id in (select o.last_id from pgchannels.batches o
                          where o.last_id <= $1
                            and o.last_id < (select max(n.last_id) from pgchannels.batches n)
                          order by o.last_id limit $2)
    returning 1
)
select count(*) from deleted;

-- name: thin_batches
-- Of the batches from $1 on, $2 at most, keep the last of each second once it is a minute ago. Returns
-- from where to go on, and how many were deleted. The newest stays in any case.
with looked_at as (
    select b.last_id, b.mark, lead(b.mark) over (order by b.last_id) as following,
           b.mark < (extract(epoch from clock_timestamp()) * 1000000)::bigint - 60000000 as is_old
      from (select o.last_id, o.mark from pgchannels.batches o
             where o.last_id >= $1::bigint order by o.last_id limit $2) b
), deleted as (
    delete from pgchannels.batches b
     using looked_at s
     where b.last_id = s.last_id and s.is_old and s.following / 1000000 = s.mark / 1000000
    returning 1
)
select coalesce(max(s.last_id) filter (where s.is_old), $1) as reached, (select count(*) from deleted) as count
  from looked_at s;

-- name: requeue_stragglers
-- Of transactions from $1 on; "through" is where the next look may begin. It was taken before the look.
select pgchannels.requeue_stragglers($1::text::xid8) as requeued,
       coalesce((select pg_snapshot_xmin(b.snapshot)::text from pgchannels.batches b order by b.last_id desc limit 1),
                '0') as through;

-- Receivers

-- name: add_claimant
-- A process that claims has a row, which each of its claims locks.
insert into pgchannels.claims (claimant) values ($1) on conflict (claimant) do nothing;

-- name: replace_claimant
-- From now on it claims as $2, with a row that was not updated yet; see the table "cursors".
with replaced as (
    delete from pgchannels.claims k where k.claimant = $1
)
insert into pgchannels.claims (claimant) values ($2) on conflict (claimant) do nothing;

-- name: add_receiver
-- A channel that somebody receives from has a row.
insert into pgchannels.channels (name)
select n.name from unnest($1::text[]) n(name) order by n.name on conflict (name) do nothing;

-- name: claim
-- Take messages for receivers; see the function. $7: bytes that one claim may bring.
select c.* from pgchannels.claim($1::text[], $2::integer[], $3::integer[], $4::uuid, $5::bigint, $6::bigint, $7::bigint) c;

-- name: hand_back
select pgchannels.hand_back($1::text[], $2::bigint[], $3::uuid, $4::bigint);

-- name: touch_channels
-- Somebody waits to receive from these: they are in use. In the order of names, as claims lock them.
with locked as materialized (
    select c.name from pgchannels.channels c where c.name = any ($1::text[]) order by c.name for no key update
)
update pgchannels.channels c set last_active_at = clock_timestamp() from locked l
 where c.name = l.name and c.last_active_at < clock_timestamp() - interval '10 seconds';

-- Members

-- name: register_node
insert into pgchannels.nodes (id, info) values ($1, $2::json);

-- name: renew_node
-- True while it lives; false once it has been declared dead; no row when all that has been cleared.
-- A gap of $2 may have been an outage of the database, in which others could not renew.
update pgchannels.nodes n
   set steady_since = case when n.heartbeat_at < clock_timestamp() - $2::interval
                           then clock_timestamp() else n.steady_since end,
       heartbeat_at = case when n.dead_since is null then clock_timestamp() else n.heartbeat_at end
 where n.id = $1
returning n.dead_since is null as is_alive;

-- name: remove_node
delete from pgchannels.nodes where id = $1;

-- name: reap
select r.more, r.published from pgchannels.reap($1, $2::interval, $3) r;

-- name: settle_departures
select pgchannels.settle_departures($1::interval, $2, $3::interval);

-- name: add_channels
insert into pgchannels.channels as c (name, node, user_id, metadata, cursor, is_received)
select n.name, $2, n.user_id, n.metadata::json, b.head, false
  from unnest($1::text[], $3::text[], $4::text[]) n(name, user_id, metadata) cross join pgchannels.bounds b
 order by n.name
on conflict (name) do update
    set node = excluded.node, user_id = excluded.user_id, metadata = excluded.metadata;

-- name: admit
-- Make or change channels that are connections. A row for each that is refused; see the function.
select a.channel, a.scope, a.allowed
  from pgchannels.admit($1, $2::text[], $3::text[], $4::text[], $5::integer[], $6::integer[], $7::integer[]) a;

-- name: join_groups
-- Add members to groups with limits. "refused" has the places in the arrays, from 1.
select j.refused, j.published
  from pgchannels.join_groups($1::text[], $2::text[], $3::text[], $4::integer[], $5::interval, $6::uuid) j;

-- name: change_memberships
select pgchannels.change_memberships($1::text[], $2::text[], $3::boolean[], $4::text[], $5::interval, $6::uuid);

-- name: remove_channels
select pgchannels.remove_channels($1::text[], $2::interval, $3::uuid);

-- name: channels_of
select c.name from pgchannels.channels c where c.node = $1 limit $2;

-- name: memberships_of
-- A row at least for each channel, with its owner. And whether the node $2 was alive: the channels of
-- a node that was declared dead are being removed, and no client has ended them.
select n.is_alive, a.name as channel, c.name is not null as is_known, c.user_id, c.metadata,
       m.group_name, m.since, m.presence
  from (select exists (select from pgchannels.nodes n where n.id = $2 and n.dead_since is null) as is_alive) n
 cross join unnest($1::text[]) a(name)
  left join pgchannels.channels c on c.name = a.name
  left join pgchannels.memberships m on m.channel = a.name and m.left_at is null;

-- name: group_members
select m.channel from pgchannels.memberships m where m.group_name = $1 and m.left_at is null order by m.channel;

-- name: presence
select p.user_id, p.presence, p.channel, p.connections, p.metadata, p.joined_at
  from (select distinct on (m.identity) m.user_id, m.presence, m.channel, m.metadata,
               count(*) filter (where m.left_at is null) over w as connections,
               min(m.joined_at) over w as joined_at
          from pgchannels.memberships m
         where m.group_name = $1 and m.identity is not null
        window w as (partition by m.identity)
         order by m.identity, m.left_at is null desc, m.joined_at desc) p
 order by p.joined_at, p.user_id, p.channel;

-- Connections

-- name: connections
-- By name, after $1, up to $2 of them.
select c.name, c.node, n.info ->> 'host' as host, c.user_id, c.metadata, c.created_at
  from pgchannels.channels c left join pgchannels.nodes n on n.id = c.node
 where c.is_connection and c.name collate "C" > $1::text order by c.name collate "C" limit $2;

-- name: connections_of_user
-- The same, of the user $3.
select c.name, c.node, n.info ->> 'host' as host, c.user_id, c.metadata, c.created_at
  from pgchannels.channels c left join pgchannels.nodes n on n.id = c.node
 where c.is_connection and md5(c.user_id) = md5($3::text) and c.user_id = $3 and c.name collate "C" > $1::text
 order by c.name collate "C" limit $2;

-- name: count_connections
select coalesce(sum(p.connections), 0) as count
  from pgchannels.nodes n
 cross join lateral (select p.connections from pgchannels.places p
                      where p.node = n.id order by p.version desc limit 1) p;

-- name: count_connections_of_user
select count(*) from pgchannels.channels c
 where c.is_connection and md5(c.user_id) = md5($1::text) and c.user_id = $1;

-- name: revoke
-- And tell all nodes, in the same transaction: $4 are the payloads of commands, $5 how long they last.
with revoked as (
    insert into pgchannels.revocations as r (kind, value, revoked_at, expires_at)
    select v.kind, v.value, t.now, t.now + $3::interval
      from unnest($1::text[], $2::text[]) v(kind, value)
     cross join (select clock_timestamp() as now offset 0) t
     order by v.kind, v.value
    on conflict (kind, value) do update
        set revoked_at = greatest(r.revoked_at, excluded.revoked_at),
            expires_at = greatest(r.expires_at, excluded.expires_at)
)
insert into pgchannels.outbox (channel, payload, expires_at)
select 'pgchannels:commands', c.payload::json, clock_timestamp() + $5::interval
  from unnest($4::text[]) with ordinality c(payload, place) order by c.place;

-- name: is_revoked
-- A token by its id, whenever it was issued; those of a user that were issued by then, at $3 if that
-- is known. "or" lets the planner look up both by the primary key.
select exists (
    select from pgchannels.revocations r
     where (r.kind = 'token' and r.value = $1::text
            or r.kind = 'user' and r.value = $2::text and ($3::timestamptz is null or $3 <= r.revoked_at))
       and r.expires_at > clock_timestamp()) as is_revoked;

-- name: count_expired_revocations
select count(*) from pgchannels.revocations r where r.expires_at <= statement_timestamp();

-- name: delete_expired_revocations
-- Not one that is being renewed now.
with deleted as (
    delete from pgchannels.revocations r
     using (select e.kind, e.value from pgchannels.revocations e
             where e.expires_at <= statement_timestamp()
             order by e.kind, e.value limit $1 for update skip locked) e
     where r.kind = e.kind and r.value = e.value
    returning 1
)
select count(*) from deleted;

-- name: take
select t.allowed, t.remaining, t.retry_after
  from pgchannels.take($1::text[], $2::bigint[], $3::bigint[], $4::double precision[], $5::double precision[]) t;

-- name: delete_due_rates
-- Not one that a transaction takes from now. The statement's time: a volatile one would use no index.
with deleted as (
    delete from pgchannels.rates t
     using (select d.key, d.version from pgchannels.rates d
             where d.due_at <= statement_timestamp() order by d.due_at limit $1 for update skip locked) d
     where t.key = d.key and t.version = d.version
    returning 1
)
select count(*) from deleted;

-- Followers

-- name: add_follower
-- Give a name that is new its position: $3 of the epoch $4, the beginning of what is retained if
-- $4 is 0, or the end of the log if they are null. False: there is no such position. It is asked for
-- by name first, for "do nothing" would wait for a transaction that has moved the position.
with start as (
    select case when $3::bigint is null then b.head when $4::integer = 0 then b.floor else $3 end as position,
           b.epoch, $3 is null or $4 = 0 or ($4 = b.epoch and $3 <= b.head) as is_position,
           exists (select from pgchannels.followers f where f.name = $1::text) as is_known
      from pgchannels.bounds b
), added as (
    insert into pgchannels.followers (name, channels, position, epoch)
    select $1, $2::text[], s.position, s.epoch from start s where s.is_position and not s.is_known
    on conflict (name) do nothing
)
select s.is_position or s.is_known as is_known from start s;

-- name: take_follower
-- Take or renew the lease, and if somebody else has had it ($5: in any case), the position with it.
-- No row: another one has the lease. No position: it has been forgotten, or a transaction that may
-- move it is still open. That one is not waited for, lest each who waits hold a connection.
with lease as (
    insert into pgchannels.leases as l (name, holder, expires_at)
    values ('follower:' || $1::text, $2::uuid, clock_timestamp() + $3::interval)
    on conflict (name) do update set holder = excluded.holder, expires_at = excluded.expires_at
        where l.holder = excluded.holder or l.expires_at <= clock_timestamp()
    returning true
), unlocked as (
    select f.name from pgchannels.followers f cross join lease
     where f.name = $1 and ($5::boolean or f.holder is distinct from $2)
       for update of f skip locked
), taken as (
    -- Its position is one of this log, in whatever epoch: it went back when the log did.
    update pgchannels.followers f
       set holder = $2, channels = $4::text[], epoch = greatest(f.epoch, b.epoch),
           position = case when f.epoch < b.epoch then least(f.position, b.head) else f.position end
      from unlocked u cross join pgchannels.bounds b where f.name = u.name
    returning f.position, f.epoch
)
select f.position, f.epoch, coalesce(f.begins, false) as begins
  from lease left join (
      select t.position, t.epoch, true as begins from taken t
       union all
      select k.position, k.epoch, false from pgchannels.followers k
       where k.name = $1 and k.holder = $2 and not $5
  ) f on true
 order by begins desc limit 1;

-- name: save_follower
-- Move the position, if the holder still is the one, from where it left it; see move_in_transaction().
update pgchannels.followers f
   set position = greatest(f.position, $5::bigint), moved_at = clock_timestamp()
 where f.name = $1 and f.holder = $2::uuid and f.epoch = $3::integer
   and (f.position = any ($4::bigint[])
        or (f.position >= $5 and pg_current_xact_id()::text = $6::text))
returning f.position, pg_current_xact_id()::text;

-- name: advance_follower
-- Move the position from $4 to $5, unless a transaction that has moved it is still open. Returns
-- where it is then. That it is at $4 is looked up in the row that is locked: the update would first
-- look at the one in its snapshot, which may be older.
with unlocked as (
    select f.position from pgchannels.followers f
     where f.name = $1 and f.holder = $2::uuid and f.epoch = $3::integer
       for update skip locked
), moved as (
    update pgchannels.followers f set position = $5::bigint, moved_at = clock_timestamp()
      from unlocked u where f.name = $1 and u.position = $4::bigint and $5 > $4
    returning f.position
)
select coalesce(m.position, u.position) as position from unlocked u left join moved m on true;

-- name: followers
-- What has come for each is counted channel by channel, on the index that read_channels uses too.
select f.name, f.channels, f.position, f.epoch, c.lag, l.holder is not null as is_active, f.moved_at
  from pgchannels.followers f
 cross join pgchannels.bounds b
  left join pgchannels.leases l on l.name = 'follower:' || f.name and l.expires_at > clock_timestamp()
 cross join lateral (
     select count(*) as lag
       from (select from (select distinct unnest(f.channels)) n(channel)
              cross join lateral (
                  select from pgchannels.messages m
                   where m.channel between n.channel and n.channel
                     and m.id > greatest(f.position, b.floor)
                     and (m.expires_at is null or m.expires_at > clock_timestamp())
                   order by m.channel, m.id limit $1) m
              limit $1) m) c
 order by f.name collate "C";

-- name: forget_follower
with forgotten as (
    delete from pgchannels.followers f where f.name = $1::text returning 1
), left_over as (
    delete from pgchannels.leases l where l.name = 'follower:' || $1
)
select count(*) from forgotten;

-- name: export_snapshot
select pg_export_snapshot() as snapshot, b.epoch from pgchannels.bounds b;

-- name: grant_access
select pgchannels.grant_access($1, $2, $3);
