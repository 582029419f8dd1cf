-- Publishing from tables, by any role that may: triggers, grants, batches of a given snapshot.
--
-- Written for the schema "pgchannels"; whoever runs it puts in the configured name. This migration
-- and each later one ends with regrant(): what it has made is nobody's until then.

alter table pgchannels.log
    -- a migration that older code can live with leaves this as it is
    add column works_from text not null default '0003';

comment on column pgchannels.log.works_from is 'the oldest revision whose code works on this schema';

-- Run by whoever inserts into the outbox, so with a search path that is not theirs.
alter function pgchannels.is_channel(text) set search_path = pg_catalog, pg_temp;

alter function pgchannels.is_payload(json) set search_path = pg_catalog, pg_temp;

alter function pgchannels.is_headers(json) set search_path = pg_catalog, pg_temp;

comment on column pgchannels.messages.size is 'bytes of the payload''s text, of the headers'' and of the attachments, so that a page can be bounded without reading it';

-- Raise what a publisher is to read; "place" is where in an array, null if there is none.
create function pgchannels.check_message(channel text, payload json, place bigint default null) returns void
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
    at text := coalesce(' at place ' || place, '');
begin
    if not coalesce(pgchannels.is_channel(channel), false) then
        raise exception 'invalid channel name %', coalesce(quote_literal(left(channel, 80)), 'NULL') || at
            using errcode = 'invalid_parameter_value',
                  hint = 'A name has 1 to 200 printable characters, no white space, none of + # *.';
    end if;
    if starts_with(channel, 'pgchannels:') and channel <> 'pgchannels:everyone' then
        raise exception 'invalid channel name %', quote_literal(left(channel, 80)) || at
            using errcode = 'invalid_parameter_value',
                  hint = 'Names that begin with pgchannels: are reserved.';
    end if;
    if not coalesce(pgchannels.is_payload(payload), false) then
        raise exception 'invalid payload%: %', at, case
                when payload is null then 'it is NULL'
                when json_typeof(payload) <> 'object' then 'it is a JSON ' || json_typeof(payload)
                when octet_length(payload::text) > 16777216 then 'it has more than 16 MiB'
                else 'it holds half of a surrogate pair'
            end
            using errcode = 'invalid_parameter_value',
                  hint = 'A payload is a JSON object of at most 16 MiB.';
    end if;
end
$$;

create function pgchannels.check_ttl(ttl interval) returns void
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
    if ttl <= interval '0' then
        raise exception 'invalid ttl %: it must be positive', ttl
            using errcode = 'invalid_parameter_value';
    end if;
end
$$;

create or replace function pgchannels.publish(channel text, payload json, ttl interval default null)
returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    perform pgchannels.check_message(channel, payload);
    perform pgchannels.check_ttl(ttl);
    insert into pgchannels.outbox (channel, payload, expires_at)
    values (channel, payload, clock_timestamp() + ttl);
end
$$;

-- Publish several, in their order: select pgchannels.publish_many('{a,b}', array['{"n": 1}', '{"n": 2}']::json[]);
-- Returns how many.
create function pgchannels.publish_many(channels text[], payloads json[], ttl interval default null)
returns integer
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    published integer;
begin
    if channels is null or payloads is null or cardinality(channels) <> cardinality(payloads)
       or array_ndims(channels) > 1 or array_ndims(payloads) > 1 then
        raise exception 'publish_many() takes an array of channels and one of as many payloads, not of % and %',
                coalesce(cardinality(channels)::text, 'NULL'), coalesce(cardinality(payloads)::text, 'NULL')
            using errcode = 'invalid_parameter_value';
    end if;
    perform pgchannels.check_ttl(ttl);
    perform pgchannels.check_message(m.channel, m.payload, m.place)
       from unnest(channels, payloads) with ordinality m(channel, payload, place);
    insert into pgchannels.outbox (channel, payload, expires_at)
    select m.channel, m.payload, clock_timestamp() + ttl
      from unnest(channels, payloads) with ordinality m(channel, payload, place) order by m.place;
    get diagnostics published = row_count;
    return published;
end
$$;

-- The watch of a table is three triggers, one an operation, with what is watched as their argument:
-- channel: as it was given; parts: literal, column, literal, column, …, literal; columns: null for
-- all; key: of the table; condition: a jsonpath predicate, or null.
--
-- A channel's name for a row; null if a column in it is. An invalid one is the writer's mistake if the
-- row is new; an old row has only been in no channel.
create function pgchannels.watched_channel(parts text[], changed jsonb, is_new boolean) returns text
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
    name text := parts[1];
begin
    for place in 2 .. cardinality(parts) by 2 loop
        name := name || (changed ->> parts[place]) || parts[place + 1];
    end loop;
    if not pgchannels.is_channel(name) then
        if not is_new then
            return null;
        end if;
        raise exception 'invalid channel name %, of a watched row', quote_literal(left(name, 80))
            using errcode = 'invalid_parameter_value',
                  hint = 'A name has 1 to 200 printable characters, no white space, none of + # *.';
    end if;
    return name;
end
$$;

-- What is published of a row; null if nothing is. A row that was inserted has no "before", one that
-- was deleted no "after".
create function pgchannels.watched_change(
    kind text, key text[], columns text[], condition jsonpath, before jsonb, after jsonb)
returns json
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
    identity jsonb;
    news jsonb := after;
    olds jsonb := before;
begin
    if condition is not null
       and not coalesce(jsonb_path_match(
               jsonb_build_object('new', after, 'old', before), condition, silent => true), false) then
        return null;
    end if;
    if cardinality(key) = 1 then
        identity := jsonb_build_object(key[1], coalesce(after, before) -> key[1]);
    else
        select jsonb_object_agg(k.name, coalesce(after, before) -> k.name) into identity from unnest(key) k(name);
    end if;
    if after is not null and before is not null then
        select jsonb_object_agg(n.name, n.value), jsonb_object_agg(n.name, before -> n.name) into news, olds
          from jsonb_each(after) n(name, value)
         where n.value is distinct from before -> n.name and (columns is null or n.name = any (columns));
        if news is null then
            return null;
        end if;
    elsif columns is not null then
        select jsonb_object_agg(c.name, coalesce(after, before) -> c.name) into news from unnest(columns) c(name);
        olds := news;
    end if;
    return case
        when before is null then json_build_object('type', kind, 'key', identity, 'new', news)
        when after is null then json_build_object('type', kind, 'key', identity, 'old', olds)
        else json_build_object('type', kind, 'key', identity, 'new', news, 'old', olds)
    end;
end
$$;

-- The columns of a table's primary key, in its order; none if it has none.
create function pgchannels.primary_key(relation regclass, out columns text[], out is_deferrable boolean)
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
    -- Behind the columns of the key may stand those that it includes.
    select array_agg(a.attname::text order by k.place), not i.indimmediate into columns, is_deferrable
      from pg_index i cross join unnest(i.indkey) with ordinality k(number, place)
      join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.number
     where i.indrelid = relation and i.indisprimary and k.place <= i.indnkeyatts
     group by i.indexrelid, i.indimmediate;
    columns := coalesce(columns, '{}');
    is_deferrable := coalesce(is_deferrable, false);
end
$$;

-- The trigger function of watched tables, once a statement, as whoever writes: a publisher.
--
-- The rows of an UPDATE, before and after, belong together by their key: one whose key has changed
-- is a deletion and an insertion. What moves from one channel to another is told of in both. Of any
-- number of rows none are gathered but in what can spill to disk: the transition tables, the join
-- of an UPDATE and its sort. Those of other operations come in the order in which they were written.
create function pgchannels.publish_changes() returns trigger
language plpgsql volatile
set search_path = pg_catalog, pg_temp
-- A value has one text, whoever writes: it may be part of a key, or of a channel's name.
set timezone = 'UTC'
set datestyle = 'ISO'
set intervalstyle = 'postgres'
set bytea_output = 'hex'
set extra_float_digits = 1
as $$
-- The table may have a column of any name.
#variable_conflict use_variable
declare
    watch jsonb := tg_argv[0];
    kind text := tg_table_name || case tg_op when 'INSERT' then '.inserted' when 'UPDATE' then '.updated' else '.deleted' end;
    parts text[] := array(select jsonb_array_elements_text(watch -> 'parts'));
    key text[] := array(select jsonb_array_elements_text(watch -> 'key'));
    columns text[] := case when jsonb_typeof(watch -> 'columns') = 'array'
                           then array(select jsonb_array_elements_text(watch -> 'columns')) end;
    condition jsonpath := watch ->> 'condition';
    -- A trigger gets NULL for these, whatever their value.
    unseen text[] := array(select a.attname::text from pg_attribute a
                            where a.attrelid = tg_relid and a.attgenerated = 'v');
    sample jsonb;
    missing text;
begin
    if tg_op = 'DELETE' then
        select to_jsonb(o.*) into sample from old_rows o limit 1;
    else
        select to_jsonb(n.*) into sample from new_rows n limit 1;
    end if;
    if sample is null then
        return null;
    end if;
    -- Rather than to fall silent after a column was renamed.
    select u.name into missing from jsonb_array_elements_text(watch -> 'used') u(name)
     where not sample ? u.name limit 1;
    if missing is not null then
        raise exception 'column % of watched table % is no more', quote_ident(missing), tg_relid::regclass
            using errcode = 'undefined_column', table = tg_table_name, column = missing,
                  hint = 'Watch the table anew, with the names that its columns have now.';
    end if;
    -- By another key, rows would be taken for each other, and one's values told in the other's channel.
    if tg_op = 'UPDATE' and (select (k.columns, k.is_deferrable) is distinct from (key, false)
                               from pgchannels.primary_key(tg_relid) k) then
        raise exception 'the primary key of watched table % is another one now', tg_relid::regclass
            using errcode = 'object_not_in_prerequisite_state', table = tg_table_name,
                  hint = 'Watch the table anew.';
    end if;
    if tg_op = 'UPDATE' and columns is not null then
        -- A row that moves to another channel is told of, whatever else messages show.
        columns := columns || array(select p.part from unnest(parts) with ordinality p(part, place) where p.place % 2 = 0);
    end if;
    -- OFFSET 0 keeps what is computed for a row from being computed anew wherever it is used.
    if tg_op = 'INSERT' then
        insert into pgchannels.outbox (channel, payload)
        select m.channel, m.payload
          from (select pgchannels.watched_channel(parts, c.row, true) as channel, c.payload
                  from (select r.row, pgchannels.watched_change(kind, key, columns, condition, null, r.row) as payload
                          from (select to_jsonb(n.*) - unseen as row from new_rows n offset 0) r offset 0) c
                 where c.payload is not null offset 0) m
         where m.channel is not null;
    elsif tg_op = 'DELETE' then
        insert into pgchannels.outbox (channel, payload)
        select c.channel, c.payload
          from (select pgchannels.watched_channel(parts, r.row, false) as channel,
                       pgchannels.watched_change(kind, key, columns, condition, r.row, null) as payload
                  from (select to_jsonb(o.*) - unseen as row from old_rows o offset 0) r offset 0) c
         where c.channel is not null and c.payload is not null;
    else
        -- A key is a table's own: rows of its children by inheritance may have the same.
        if exists (select from pg_inherits i join pg_class c on c.oid = i.inhparent
                    where i.inhparent = tg_relid and c.relkind = 'r')
           and exists (select from (select 'old', (select jsonb_agg(to_jsonb(o.*) -> k.name) from unnest(key) k(name)) from old_rows o
                                    union all
                                    select 'new', (select jsonb_agg(to_jsonb(n.*) -> k.name) from unnest(key) k(name)) from new_rows n
                                   ) r(side, identity)
                        group by r.side, r.identity having count(*) > 1) then
            raise exception 'rows of watched table % and of its children have the same primary key', tg_relid::regclass
                using errcode = 'object_not_in_prerequisite_state', table = tg_table_name,
                      hint = 'Update them by themselves (ONLY), or watch only insert and delete.';
        end if;
        insert into pgchannels.outbox (channel, payload)
        select t.channel, c.payload
          from (select b.row as before, a.row as after, a.place,
                       pgchannels.watched_change(
                           case when a.row is null then tg_table_name || '.deleted'
                                when b.row is null then tg_table_name || '.inserted' else kind end,
                           key, columns, condition, b.row, a.row) as payload
                  from (select to_jsonb(o.*) - unseen as row from old_rows o offset 0) b
                  full join (select to_jsonb(n.*) - unseen as row, row_number() over () as place from new_rows n) a
                    on case when cardinality(key) = 1 then a.row -> key[1]
                            else (select jsonb_agg(a.row -> k.name) from unnest(key) k(name)) end
                     = case when cardinality(key) = 1 then b.row -> key[1]
                            else (select jsonb_agg(b.row -> k.name) from unnest(key) k(name)) end
                offset 0) c
         cross join lateral (select pgchannels.watched_channel(parts, c.before, false) as old,
                                    pgchannels.watched_channel(parts, c.after, true) as new offset 0) m
         cross join lateral unnest(case when m.old = m.new then array[m.new] else array[m.old, m.new] end) t(channel)
         where c.payload is not null and t.channel is not null
         order by c.place nulls first;
    end if;
    return null;
end
$$;

-- Publish what becomes of a table's rows, whoever writes them:
--
--     select pgchannels.watch('orders', 'orders:{customer_id}', columns => '{status,total}');
--
-- {column} in the channel stands for a value of the row, {{ and }} for braces. A row that has NULL
-- there is in no channel. "columns" are those that messages have, and that an UPDATE must change to be
-- published at all; null for all. "condition" is a jsonpath predicate over {"new": …, "old": …}. Again
-- for the same channel: replaces it.
--
-- Not seen: TRUNCATE; what is written by the name of a partition, or of a child by inheritance; what
-- is written while session_replication_role is "replica"; the values of virtual generated columns.
-- What one statement does to a row more than once, by foreign keys or by a trigger of the table's own
-- that writes to it again, is not always told of in its order. Of a MERGE that inserts and updates
-- rows of a partitioned table, PostgreSQL (16 to 18) shows wrong ones to triggers. A row must fit into
-- jsonb.
create function pgchannels.watch(
    relation regclass, channel text, columns text[] default null, condition jsonpath default null,
    operations text[] default '{insert,update,delete}')
returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    table_class pg_class;
    token text;
    parts text[] := '{""}';
    used text[];
    key text[];
    is_deferrable boolean;
    missing text;
    operation text;
    watched text;
begin
    select c.* into table_class from pg_class c where c.oid = relation;
    if table_class.relkind is distinct from 'r' and table_class.relkind is distinct from 'p' then
        raise exception '% is not a table', coalesce(relation::text, 'NULL') using errcode = 'wrong_object_type';
    end if;
    if table_class.relnamespace = (select o.relnamespace from pg_class o where o.oid = 'pgchannels.outbox'::regclass) then
        raise exception 'the tables of pgchannels itself cannot be watched' using errcode = 'wrong_object_type';
    end if;
    if channel is null then
        raise exception 'invalid channel NULL' using errcode = 'invalid_parameter_value';
    end if;

    -- Into literal, column, literal, column, …, literal.
    for token in select t[1] from regexp_matches(channel, '[{]{2}|[}]{2}|[{][^{}]+[}]|[^{}]+|[{}]', 'g') t loop
        if token in ('{', '}') then
            raise exception 'invalid channel %: a single brace', quote_literal(left(channel, 80))
                using errcode = 'invalid_parameter_value',
                      hint = 'A column''s name stands in {braces}; {{ and }} stand for themselves.';
        elsif token in ('{{', '}}') then
            parts[cardinality(parts)] := parts[cardinality(parts)] || left(token, 1);
        elsif left(token, 1) = '{' then
            parts := parts || substr(token, 2, length(token) - 2) || ''::text;
        else
            parts[cardinality(parts)] := parts[cardinality(parts)] || token;
        end if;
    end loop;
    watched := array_to_string(array(
        select case when u.place % 2 = 1 then u.part else 'x' end
          from unnest(parts) with ordinality u(part, place) order by u.place), '');
    perform pgchannels.check_message(watched, '{}');
    if cardinality(parts) > 1 and starts_with('pgchannels:', parts[1]) then
        raise exception 'invalid channel %: it must begin with a word of its own', quote_literal(left(channel, 80))
            using errcode = 'invalid_parameter_value',
                  hint = 'Else a value in a row could lead to any channel. Say orders:{id}, not {id}.';
    end if;

    if cardinality(columns) = 0 or array_ndims(columns) > 1 or exists (select from unnest(columns) c(name) where c.name is null) then
        raise exception 'columns must be an array of names, or null for all' using errcode = 'invalid_parameter_value';
    end if;
    if jsonb_path_query_array('{"new": {}, "old": {}}', condition, silent => true) not in ('[true]', '[false]', '[null]') then
        raise exception 'condition % is not a predicate', quote_literal(left(condition::text, 80))
            using errcode = 'invalid_parameter_value', hint = 'Say $.new.paid == true, not $.new.paid.';
    end if;
    select k.columns, k.is_deferrable into key, is_deferrable from pgchannels.primary_key(relation) k;
    used := array(select distinct u.name from (
        select p.part as name from unnest(parts) with ordinality p(part, place) where p.place % 2 = 0
        union all select c.name from unnest(columns) c(name)
        union all select k.name from unnest(key) k(name)) u);
    select u.name into missing from unnest(used) u(name)
     where not exists (select from pg_attribute a
                        where a.attrelid = relation and a.attname = u.name and a.attnum > 0 and not a.attisdropped
                          and a.attgenerated <> 'v')
     limit 1;
    if missing is not null then
        raise exception 'table % has no stored column %', relation, quote_ident(missing) using errcode = 'undefined_column';
    end if;

    if operations is null or cardinality(operations) = 0
       or not operations <@ '{insert,update,delete}'::text[] then
        raise exception 'operations must be some of insert, update and delete, not %', coalesce(operations::text, 'NULL')
            using errcode = 'invalid_parameter_value';
    end if;
    if 'update' = any (operations) and (key = '{}' or is_deferrable) then
        raise exception 'table % has %', relation,
                case when is_deferrable then 'a deferrable primary key' else 'no primary key' end
            using errcode = 'object_not_in_prerequisite_state',
                  hint = 'Without one that holds at any time, what a row was before an UPDATE cannot be told. Add one, or watch only insert and delete.';
    end if;

    perform pgchannels.unwatch(relation, channel);
    foreach operation in array array(select distinct o.name from unnest(operations) o(name)) loop
        execute format(
            'create trigger %I after %s on %s referencing %s for each statement execute function pgchannels.publish_changes(%L)',
            'pgchannels_' || left(md5('pgchannels.' || channel), 16) || '_' || operation, operation, relation,
            case operation when 'insert' then 'new table as new_rows'
                           when 'delete' then 'old table as old_rows'
                           else 'old table as old_rows new table as new_rows' end,
            jsonb_build_object('channel', channel, 'parts', parts, 'used', used, 'key', key,
                               'columns', columns, 'condition', condition::text));
    end loop;
end
$$;

-- Whatever is watched, a row a trigger.
create view pgchannels.watches as
select w.relation, w.config ->> 'channel' as channel,
       case when jsonb_typeof(w.config -> 'columns') = 'array'
            then array(select jsonb_array_elements_text(w.config -> 'columns')) end as columns,
       (w.config ->> 'condition')::jsonpath as condition, w.operation, w.trigger
  from (select t.tgrelid::regclass as relation, t.tgname as trigger,
               case when t.tgtype & 4 > 0 then 'insert' when t.tgtype & 16 > 0 then 'update' else 'delete' end as operation,
               -- arguments have a NUL at the end of each
               convert_from(substring(t.tgargs from 1 for length(t.tgargs) - 1), 'UTF8')::jsonb as config
          from pg_trigger t where t.tgfoid = 'pgchannels.publish_changes()'::regprocedure) w;

-- No longer publish a table's changes to a channel, as it was given to watch(); to none, if null.
-- Returns whether it was watched.
create function pgchannels.unwatch(relation regclass, channel text default null) returns boolean
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    trigger_name name;
    was_watched boolean := false;
begin
    for trigger_name in select w.trigger from pgchannels.watches w
                         where w.relation = unwatch.relation
                           and (unwatch.channel is null or w.channel = unwatch.channel) loop
        execute format('drop trigger %I on %s', trigger_name, relation);
        was_watched := true;
    end loop;
    return was_watched;
end
$$;

-- A publisher may publish, and nothing else: it reads nothing. A node may do what a running node
-- does but for pruning, which drops partitions, as only their owner may. A maintainer is a member of
-- the owner. What a later migration makes, regrant() gives to who has such a grant already.
create function pgchannels.grant_access(kind text, role_name text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    log_class pg_class;
    schema_name name;
    owner_name name;
    owner_is_superuser boolean;
    routine regprocedure;
    is_table boolean;
    relation regclass;
begin
    if kind is null or kind not in ('publisher', 'node', 'maintainer') then
        raise exception 'there is no access as %', coalesce(quote_literal(kind), 'NULL')
            using errcode = 'invalid_parameter_value', hint = 'It is publisher, node or maintainer.';
    end if;
    if role_name is null or not exists (select from pg_roles r where r.rolname = role_name) then
        raise exception 'role % does not exist', coalesce(quote_ident(role_name), 'NULL')
            using errcode = 'undefined_object';
    end if;
    select c.* into log_class from pg_class c where c.oid = 'pgchannels.messages'::regclass;
    select n.nspname into schema_name from pg_namespace n where n.oid = log_class.relnamespace;
    select r.rolname, r.rolsuper into owner_name, owner_is_superuser from pg_roles r where r.oid = log_class.relowner;

    if kind = 'maintainer' then
        if owner_is_superuser then
            raise exception 'the owner of schema %, %, is a superuser, and so would be its maintainers', schema_name, owner_name
                using errcode = 'object_not_in_prerequisite_state',
                      hint = 'Let a role of its own migrate, and so own it.';
        end if;
        execute format('grant %I to %I', owner_name, role_name);
        return;
    end if;
    execute format('grant usage on schema %I to %I', schema_name, role_name);
    execute format('grant insert (channel, payload, expires_at, headers, attachments) on pgchannels.outbox to %I', role_name);
    for routine in select p.oid::regprocedure from pg_proc p
                    where p.pronamespace = log_class.relnamespace
                      and (p.proname in ('is_channel', 'is_payload', 'is_headers', 'is_attachments', 'check_message', 'check_ttl', 'publish',
                                         'publish_many', 'primary_key', 'watched_channel', 'watched_change')
                           or kind = 'node' and p.proname not in ('watch', 'unwatch', 'publish_changes', 'grant_access', 'regrant')) loop
        execute format('grant execute on routine %s to %I', routine, role_name);
    end loop;
    if kind = 'node' then
        for relation in select c.oid::regclass from pg_class c
                         where c.relnamespace = log_class.relnamespace and c.relkind in ('r', 'p', 'v')
                           and not c.relispartition and c.relname not in ('alembic_version', 'watches') loop
            execute format('grant select, insert, update, delete on %s to %I', relation, role_name);
        end loop;
        execute format('grant select on pgchannels.alembic_version to %I', role_name);
    end if;
end
$$;

-- At the end of each migration: what is new is its owner's, whoever has migrated; nothing is for
-- everybody; and who has been given access has it to what is new. A grant to a publisher is known by
-- the right to insert, to a node by that to seal.
create function pgchannels.regrant() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    log_class pg_class;
    ownership text;
    routine regprocedure;
    given record;
begin
    select c.* into log_class from pg_class c where c.oid = 'pgchannels.messages'::regclass;
    for ownership in
        select format('alter routine %s owner to %I', p.oid::regprocedure, pg_get_userbyid(log_class.relowner))
          from pg_proc p
         where p.pronamespace = log_class.relnamespace and p.proowner <> log_class.relowner and p.proowner = current_user::regrole
        union all
        select format('alter table %s owner to %I', c.oid::regclass, pg_get_userbyid(log_class.relowner))
          from pg_class c
         where c.relnamespace = log_class.relnamespace and c.relowner <> log_class.relowner
           and c.relowner = current_user::regrole and c.relkind in ('r', 'p', 'v') loop
        execute ownership;
    end loop;
    for routine in select p.oid::regprocedure from pg_proc p where p.pronamespace = log_class.relnamespace loop
        execute format('revoke execute on routine %s from public', routine);
    end loop;
    for given in
        select 'publisher' as kind, r.rolname as role_name
          from pg_class c
         cross join lateral (
             select x.grantee, x.privilege_type from aclexplode(c.relacl) x
             union all
             select x.grantee, x.privilege_type
               from pg_attribute a cross join aclexplode(a.attacl) x
              where a.attrelid = c.oid and a.attname = 'channel') x
          join pg_roles r on r.oid = x.grantee
         where c.oid = 'pgchannels.outbox'::regclass and x.privilege_type = 'INSERT' and x.grantee <> c.relowner
        union
        select 'node', r.rolname
          from pg_proc p cross join aclexplode(p.proacl) x join pg_roles r on r.oid = x.grantee
         where p.oid = 'pgchannels.seal(integer)'::regprocedure and x.privilege_type = 'EXECUTE' and x.grantee <> p.proowner
    loop
        perform pgchannels.grant_access(given.kind, given.role_name);
    end loop;
end
$$;

-- A node that is not the owner needs partitions, too.
alter function pgchannels.add_partitions(bigint) security definer;

create or replace function pgchannels.seal(max_messages integer default 10000, out sealed integer, out head bigint)
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
    perform pgchannels.add_partitions(previous_id + max_messages)
      from pgchannels.log l where l.partitioned_to <= previous_id + max_messages;

    -- The delete and the recorded snapshot must be one statement: two have two snapshots, and what
    -- commits between them would be lost for good. The rows that have become visible since the
    -- previous batch are those of transactions that were in flight then or have begun since (PgQ's
    -- rule). A batch that stops at its limit has not taken all that its snapshot could see, but all
    -- of the transactions before the last one it took from. It records what that one could have
    -- seen, so that the next batch begins there and does not walk over what this one has taken.
    --
    -- Of two transactions that changed the same row, the one that had to wait for the other comes
    -- second, whichever began first: it went on to publish after the other had committed. So they are
    -- ordered by their last messages.
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
        select previous_id + row_number() over (order by last_id, id),
               channel, payload, attachments, headers,
               octet_length(payload::text) + coalesce(octet_length(headers::text), 0)
               + case when attachments is null then 0
                      else (select coalesce(sum(octet_length(a.bytes)), 0) from unnest(attachments) a(bytes)) end,
               created_at, expires_at
          from (select t.*, max(t.id) over (partition by t.xid) as last_id from taken t) t
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
end
$$;


-- As it was; whoever calls it may have any search path, and with one of its own it could not commit.
create or replace procedure pgchannels.seal_and_notify(
    max_messages integer, notified text, inout sealed integer default null, inout head bigint default null)
language plpgsql
as $$
begin
    select s.sealed, s.head into sealed, head from pgchannels.seal(max_messages) s;
    commit;
    if sealed operator(pg_catalog.>) 0 then
        perform pg_catalog.pg_notify(notified, head::pg_catalog.text);
    end if;
end
$$;

select pgchannels.regrant();
