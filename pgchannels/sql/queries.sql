-- name: revision
select version_num from pgchannels.alembic_version;

-- name: owner
-- Who owns the log, and whether we may act as that role: partitions are made and dropped by owners.
select pg_get_userbyid(c.relowner) as owner, pg_has_role(c.relowner, 'usage') as is_ours, current_user as we
  from pg_class c where c.oid = 'pgchannels.messages'::regclass;

-- name: head
select b.head, b.epoch, b.floor from pgchannels.bounds b;

-- name: insert
-- One insert for however many publishers were waiting; unnest keeps their order.
insert into pgchannels.outbox (channel, payload, expires_at)
select m.channel, m.payload::json, clock_timestamp() + m.ttl
  from unnest($1::text[], $2::text[], $3::interval[]) as m(channel, payload, ttl);

-- name: seal
call pgchannels.seal_and_notify($1, $2, null, null);

-- name: notify
select pg_notify($1, $2);

-- name: read_channels
-- The messages of some channels after an id, oldest first, and the bounds of the log in the same
-- snapshot: one row at least. A merge of one bounded page a channel, so that the cost does not
-- depend on how much lies behind. $4 bounds the page's bytes; the message that crosses it is in.
--
-- "between" and "order by channel, id" leave the planner the index on (channel, id) alone. With
-- "channel = …" and "order by id" it may walk the primary key and filter, expecting the channel all
-- along it: for a quiet channel beside a few busy ones that is a walk over the whole log.
select b.head, b.epoch, b.floor, b.partitioned_to, p.id, p.channel, p.payload, p.created_at, p.size
  from pgchannels.bounds b
  left join lateral (
      select m.*, sum(m.size) over (order by m.id) - m.size as before
        from (select m.id, m.channel, m.payload, m.created_at, m.size
                from unnest($1::text[]) c(channel)
               cross join lateral (
                   select m.* from pgchannels.messages m
                    where m.channel between c.channel and c.channel
                      and m.id > greatest($2::bigint, b.floor)
                      and (m.expires_at is null or m.expires_at > clock_timestamp())
                    order by m.channel, m.id limit $3) m
               order by m.id limit $3) m
  ) p on p.before < $4::bigint
 order by p.id;

-- name: read_channel_backwards
-- As read_channels, for one channel ($1) before an id ($2) and after one ($3), newest first.
select b.head, b.epoch, b.floor, b.partitioned_to, p.id, p.channel, p.payload, p.created_at, p.size
  from pgchannels.bounds b
  left join lateral (
      select m.*, sum(m.size) over (order by m.id desc) - m.size as before
        from (select m.* from pgchannels.messages m
               where m.channel between $1 and $1
                 and m.id < $2::bigint and m.id > greatest($3::bigint, b.floor)
                 and (m.expires_at is null or m.expires_at > clock_timestamp())
               order by m.channel desc, m.id desc limit $4) m
  ) p on p.before < $5::bigint
 order by p.id desc;

-- name: read_log
-- As read_channels, for the log as a whole.
select b.head, b.epoch, b.floor, b.partitioned_to, p.id, p.channel, p.payload, p.created_at, p.size
  from pgchannels.bounds b
  left join lateral (
      select m.*, sum(m.size) over (order by m.id) - m.size as before
        from (select m.* from pgchannels.messages m
               where m.id > greatest($1::bigint, b.floor)
                 and (m.expires_at is null or m.expires_at > clock_timestamp())
               order by m.id limit $2) m
  ) p on p.before < $3::bigint
 order by p.id;

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
-- Keep room for one whole partition beyond the one in use.
select pgchannels.add_partitions(b.head + l.partition_size)
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
       substring(b.bound from 'FROM \(''?(\d+)''?\)')::bigint as first_id,
       substring(b.bound from 'TO \(''?(\d+)''?\)')::bigint as end_id
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

-- name: requeue_stragglers
select pgchannels.requeue_stragglers();
