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
                  hint = 'Names that begin with pgchannels: are reserved. To reach a user, give user_id; for everyone, everyone => true.';
    end if;
    if not coalesce(pgchannels.is_payload(payload), false) then
        raise exception 'invalid payload%: %', at, case
                when payload is null then 'it is NULL'
                when json_typeof(payload) <> 'object' then 'it is a JSON ' || json_typeof(payload)
                when octet_length(payload::text) > 16777216 then 'it has more than 16 MiB'
                when pgchannels.is_payload(regexp_replace(replace(payload::text, E'\\\\', ' '),
                                                          E'\\\\u[dD][89a-fA-F][0-9a-fA-F]{2}', ' ', 'g')::json)
                    then 'it holds half of a surrogate pair'
                else 'it holds a number beyond the range of a double, or more than 500 arrays and objects in each other'
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

-- The channel that all connections of a user read. pgchannels/channels.py has the same; a test compares
-- them. Any text can be an id: what a name may not hold is percent-encoded, a long one is a digest.
create function pgchannels.user_channel(user_id text) returns text
language plpgsql immutable strict parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
    bytes bytea := convert_to(user_id, 'UTF8');
    encoded text := user_id;
begin
    if char_length(user_id) not between 1 and 1000 or octet_length(bytes) > 1900 then
        raise exception 'invalid user id %', quote_literal(left(user_id, 80))
            using errcode = 'invalid_parameter_value',
                  hint = 'A user''s id has 1 to 1000 characters, and at most 1900 bytes.';
    end if;
    -- Most ids have nothing to encode.
    if user_id collate "C" !~ '^[A-Za-z0-9_.~-]+$' then
        select string_agg(
                   case when chr(b.byte) collate "C" ~ '[A-Za-z0-9_.~-]' then chr(b.byte)
                        else '%' || upper(lpad(to_hex(b.byte), 2, '0')) end, '' order by b.place)
          into encoded
          from (select get_byte(bytes, p.place) as byte, p.place
                  from generate_series(0, octet_length(bytes) - 1) p(place) offset 0) b;
    end if;
    if char_length(encoded) <= 200 - char_length('pgchannels:user:') then
        return 'pgchannels:user:' || encoded;
    end if;
    return 'pgchannels:user::' || encode(sha256(bytes), 'hex');
end
$$;

-- Who may publish to a channel whose name is reserved. Everyone's: each publisher. Users', and that of
-- several connections: publishers that were granted so. Nodes obey what is in one of the other two, and
-- look at each name in the other: nodes alone.
--
-- Raises, because a check of the table could not say why.
create function pgchannels.check_reserved(channel text) returns boolean
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
    if channel = 'pgchannels:everyone' then
        return true;
    end if;
    if channel in ('pgchannels:commands', 'pgchannels:members') then
        return has_function_privilege('pgchannels.seal(integer, bigint)', 'execute');
    end if;
    if not has_function_privilege('pgchannels.claim_reserved_keys(text[], text[], interval)', 'execute') then
        raise exception 'role % may publish to channels, groups and everyone, but not to users or to several connections: %',
                quote_ident(current_user), quote_literal(left(channel, 80))
            using errcode = 'insufficient_privilege',
                  hint = format('The owner of the schema can allow it: select pgchannels.grant_access(''publisher'', %L, to_users => true);', current_user);
    end if;
    return true;
end
$$;

-- Claim idempotency keys, each for the channel at the same place (a null key is no key), and return which
-- messages are to be published: those without a key, and the first with each that is new. A key that
-- another transaction has claimed is waited for until that one ends; keys of one call are claimed in
-- their order. A key that this transaction has claimed is known, until a savepoint takes it back.
--
-- As the owner, because publishers cannot read keys. Three functions: the first is for every
-- channel, and its grant is what lets a publisher publish to users; the second one is for the other
-- channels; the third one is called, and says why the first cannot be.
create function pgchannels.claim_reserved_keys(channels text[], keys text[], lifetime interval) returns boolean[]
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    moment timestamptz := clock_timestamp();
    claimed boolean[];
begin
    if exists (select from unnest(keys) k(key) where char_length(k.key) not between 1 and 200) then
        raise exception 'invalid key: it must have 1 to 200 characters'
            using errcode = 'invalid_parameter_value';
    end if;
    if not coalesce(lifetime > interval '0', false) then
        raise exception 'invalid lifetime % of a key: it must be positive', coalesce(lifetime::text, 'NULL')
            using errcode = 'invalid_parameter_value';
    end if;
    with given as materialized (
        select m.channel, m.key, m.place,
               row_number() over (partition by m.channel, m.key order by m.place) = 1 as is_first
          from unnest(channels, keys) with ordinality m(channel, key, place)
    ), fresh as (
        insert into pgchannels.keys as k (channel, key, created_at, expires_at)
        select g.channel, g.key, moment, moment + lifetime
          from given g where g.key is not null and g.is_first order by g.channel, g.key
        on conflict (channel, key) do update
            set created_at = excluded.created_at, expires_at = excluded.expires_at, claimed_by = excluded.claimed_by
            where k.expires_at <= excluded.created_at
        returning k.channel, k.key
    )
    select array_agg(g.key is null or g.is_first and f.key is not null order by g.place) into claimed
      from given g left join fresh f on f.channel = g.channel and f.key = g.key;
    return claimed;
end
$$;

create function pgchannels.claim_channel_keys(channels text[], keys text[], lifetime interval) returns boolean[]
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    if exists (select from unnest(channels) c(name)
                where not pgchannels.is_channel(c.name)
                   or starts_with(c.name, 'pgchannels:') and c.name <> 'pgchannels:everyone') then
        raise exception 'these are not all channels that anyone may publish to'
            using errcode = 'insufficient_privilege';
    end if;
    return pgchannels.claim_reserved_keys(channels, keys, lifetime);
end
$$;

create function pgchannels.claim_keys(channels text[], keys text[], lifetime interval) returns boolean[]
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    reserved text;
begin
    select c.name into reserved from unnest(channels) c(name)
     where starts_with(c.name, 'pgchannels:') and c.name <> 'pgchannels:everyone' limit 1;
    if reserved is null then
        return pgchannels.claim_channel_keys(channels, keys, lifetime);
    end if;
    perform pgchannels.check_reserved(reserved);
    return pgchannels.claim_reserved_keys(channels, keys, lifetime);
end
$$;

-- One check, and a short one: it is made ready for each INSERT, also of a single row. Rights are looked up
-- for reserved names only. Rows that are there already pass: the rights are the migrating role's.
alter table pgchannels.outbox add constraint outbox_reserved_are_granted check (
    not starts_with(channel, 'pgchannels:') or pgchannels.check_reserved(channel));

-- Publish a message when the transaction commits:
--
--     select pgchannels.publish('orders:7', '{"type": "order.paid"}');
--     select pgchannels.publish(user_id => '42', payload => '{"type": "invoice.paid"}');
--     select pgchannels.publish(everyone => true, payload => '{"type": "maintenance"}');
--
-- "recipients" are the channels of several connections, and "exclude" is that of one that does not get
-- it. With a key, a second message with the same key to the same address within key_lifetime is not
-- published. Returns whether it was.
drop function pgchannels.publish(text, json, interval);

create function pgchannels.publish(
    channel text default null, payload json default null, ttl interval default null,
    user_id text default null, everyone boolean default false, recipients text[] default null,
    exclude text default null, key text default null, key_lifetime interval default '1 day')
returns boolean
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    target text := channel;
    headers json;
    invalid text;
begin
    if user_id is not null or everyone or recipients is not null then
        if num_nonnulls(channel, user_id, recipients, nullif(everyone, false)) > 1 then
            raise exception 'publish() takes one of channel, user_id, everyone and recipients'
                using errcode = 'invalid_parameter_value';
        end if;
        target := case when user_id is not null then pgchannels.user_channel(user_id)
                       when everyone then 'pgchannels:everyone'
                       else 'pgchannels:direct' end;
        perform pgchannels.check_message('pgchannels:everyone', payload);
    else
        perform pgchannels.check_message(channel, payload);
    end if;
    perform pgchannels.check_ttl(ttl);
    if exclude is not null or recipients is not null then
        if exclude is not null and recipients is not null then
            raise exception 'publish() to recipients takes no exclude: leave it out of them'
                using errcode = 'invalid_parameter_value';
        end if;
        if cardinality(array(select distinct r.name from unnest(recipients) r(name))) not between 1 and 1000 and exclude is null then
            raise exception 'publish() takes 1 to 1000 recipients' using errcode = 'invalid_parameter_value';
        end if;
        select coalesce(n.name, 'NULL') into invalid from unnest(coalesce(recipients, array[exclude])) n(name)
         where not coalesce(pgchannels.is_channel(n.name), false)
            or starts_with(n.name, 'pgchannels:') and n.name <> 'pgchannels:everyone' limit 1;
        if invalid is not null then
            perform pgchannels.check_message(invalid, '{}');
            raise exception 'invalid channel name NULL among recipients' using errcode = 'invalid_parameter_value';
        end if;
        headers := case when exclude is not null then json_build_object('pgchannels-except', exclude)
                        else json_build_object('pgchannels-only', to_json(array(
                                 select distinct r.name from unnest(recipients) r(name) order by r.name))::text) end;
    end if;
    if key is not null and not (pgchannels.claim_keys(array[target], array[key], key_lifetime))[1] then
        return false;
    end if;
    if headers is null then
        insert into pgchannels.outbox (channel, payload, expires_at)
        values (target, payload, clock_timestamp() + ttl);
    else
        insert into pgchannels.outbox (channel, payload, expires_at, headers)
        values (target, payload, clock_timestamp() + ttl, headers);
    end if;
    return true;
end
$$;

-- Publish several, in their order: select pgchannels.publish_many('{a,b}', array['{"n": 1}', '{"n": 2}']::json[]);
-- To users: user_ids => '{42,43}' instead of channels. "keys", if given, has one for each, or null. Returns
-- how many were published.
create function pgchannels.publish_many(
    channels text[] default null, payloads json[] default null, ttl interval default null,
    user_ids text[] default null, keys text[] default null, key_lifetime interval default '1 day')
returns integer
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    addressed text[] := coalesce(channels, user_ids);
    claimed boolean[];
    published integer;
begin
    if channels is not null and user_ids is not null then
        raise exception 'publish_many() takes channels or user_ids, not both'
            using errcode = 'invalid_parameter_value';
    end if;
    if addressed is null or payloads is null or cardinality(addressed) <> cardinality(payloads)
       or array_ndims(addressed) > 1 or array_ndims(payloads) > 1 then
        raise exception 'publish_many() takes an array of % and one of as many payloads, not of % and %',
                case when user_ids is null then 'channels' else 'user_ids' end,
                coalesce(cardinality(addressed)::text, 'NULL'), coalesce(cardinality(payloads)::text, 'NULL')
            using errcode = 'invalid_parameter_value';
    end if;
    if cardinality(keys) <> cardinality(payloads) or array_ndims(keys) > 1 then
        raise exception 'publish_many() takes as many keys as payloads, not %', cardinality(keys)
            using errcode = 'invalid_parameter_value';
    end if;
    perform pgchannels.check_ttl(ttl);
    if user_ids is null then
        perform pgchannels.check_message(m.channel, m.payload, m.place)
           from unnest(channels, payloads) with ordinality m(channel, payload, place);
    else
        if array_position(user_ids, null) is not null then
            raise exception 'invalid user id NULL at place %', array_position(user_ids, null)
                using errcode = 'invalid_parameter_value';
        end if;
        perform pgchannels.check_message('pgchannels:everyone', m.payload, m.place)
           from unnest(payloads) with ordinality m(payload, place);
        addressed := array(select pgchannels.user_channel(u.id) from unnest(user_ids) with ordinality u(id, place) order by u.place);
    end if;
    if array_remove(keys, null) <> '{}' then
        claimed := pgchannels.claim_keys(addressed, keys, key_lifetime);
    end if;
    insert into pgchannels.outbox (channel, payload, expires_at)
    select m.channel, m.payload, clock_timestamp() + ttl
      from unnest(addressed, payloads) with ordinality m(channel, payload, place)
     where claimed is null or claimed[m.place] order by m.place;
    get diagnostics published = row_count;
    return published;
end
$$;

-- The watch of a table is three triggers, one for each operation, whose argument says what is watched:
-- channel: as it was given, and pgchannels:user:… for a user's; is_user: whether it is one;
-- parts: literal, column, literal, column, …, literal; columns: null for all; key: of the table;
-- condition: a jsonpath predicate, or null.
--
-- The name of the channel for a row, or null if a column in it is null. An invalid one is the
-- writer's mistake if the row is new; an old row was in no channel then.
create function pgchannels.watched_channel(parts text[], changed jsonb, is_new boolean, is_user boolean default false) returns text
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
    name text := parts[1];
begin
    for place in 2 .. cardinality(parts) by 2 loop
        name := name || (changed ->> parts[place]) || parts[place + 1];
    end loop;
    if is_user then
        if is_new or char_length(name) between 1 and 1000 and octet_length(name) <= 1900 then
            return pgchannels.user_channel(name);
        end if;
        return null;
    end if;
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
-- Of a column that is bigint or numeric, a number that a double does not hold exactly is a text in the
-- message: readers that round it would take it for another one, and as a key, for another row.
create function pgchannels.watched_change(
    kind text, key text[], columns text[], condition jsonpath, before jsonb, after jsonb, relation oid)
returns json
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
    identity jsonb;
    news jsonb := after;
    olds jsonb := before;
    parts jsonb[];
    change json;
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
    change := case
        when before is null then json_build_object('type', kind, 'key', identity, 'new', news)
        when after is null then json_build_object('type', kind, 'key', identity, 'old', olds)
        else json_build_object('type', kind, 'key', identity, 'new', news, 'old', olds)
    end;
    -- Few rows have a long number. Only for them are the types looked up, also those of domains.
    if change::text ~ '": -?[0-9.]{16}' then
        parts := array[identity, news, olds];
        for place in 1 .. 3 loop
            parts[place] := parts[place] || (
                select coalesce(jsonb_object_agg(p.name, p.value), '{}')
                  from jsonb_each_text(parts[place]) p(name, value)
                 where p.value ~ '[0-9.]{16}'
                   and case when jsonb_typeof(parts[place] -> p.name) <> 'number' then false
                            when strpos(p.value, '.') = 0 then abs(p.value::numeric) > 9007199254740991
                            else length(replace(ltrim(p.value, '-0'), '.', '')) > 15 end
                   and exists (select from pg_attribute a join pg_type t on t.oid = a.atttypid
                                where a.attrelid = relation and a.attname = p.name
                                  and coalesce(nullif(t.typbasetype, 0), t.oid) in ('bigint'::regtype, 'numeric'::regtype)));
        end loop;
        change := case
            when before is null then json_build_object('type', kind, 'key', parts[1], 'new', parts[2])
            when after is null then json_build_object('type', kind, 'key', parts[1], 'old', parts[3])
            else json_build_object('type', kind, 'key', parts[1], 'new', parts[2], 'old', parts[3])
        end;
    end if;
    return change;
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
    is_user boolean := coalesce((watch ->> 'is_user')::boolean, false);
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
          from (select pgchannels.watched_channel(parts, c.row, true, is_user) as channel, c.payload
                  from (select r.row, pgchannels.watched_change(kind, key, columns, condition, null, r.row, tg_relid) as payload
                          from (select to_jsonb(n.*) - unseen as row from new_rows n offset 0) r offset 0) c
                 where c.payload is not null offset 0) m
         where m.channel is not null;
    elsif tg_op = 'DELETE' then
        insert into pgchannels.outbox (channel, payload)
        select c.channel, c.payload
          from (select pgchannels.watched_channel(parts, r.row, false, is_user) as channel,
                       pgchannels.watched_change(kind, key, columns, condition, r.row, null, tg_relid) as payload
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
                           key, columns, condition, b.row, a.row, tg_relid) as payload
                  from (select to_jsonb(o.*) - unseen as row from old_rows o offset 0) b
                  full join (select to_jsonb(n.*) - unseen as row, row_number() over () as place from new_rows n) a
                    on case when cardinality(key) = 1 then a.row -> key[1]
                            else (select jsonb_agg(a.row -> k.name) from unnest(key) k(name)) end
                     = case when cardinality(key) = 1 then b.row -> key[1]
                            else (select jsonb_agg(b.row -> k.name) from unnest(key) k(name)) end
                offset 0) c
         cross join lateral (select pgchannels.watched_channel(parts, c.before, false, is_user) as old,
                                    pgchannels.watched_channel(parts, c.after, true, is_user) as new offset 0) m
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
-- there is in no channel. For all connections of a user instead: user_id => '{customer_id}', without a
-- channel. "columns" are those that messages have, and that an UPDATE must change to be
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
    relation regclass, channel text default null, columns text[] default null, condition jsonpath default null,
    operations text[] default '{insert,update,delete}', user_id text default null)
returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    table_class pg_class;
    given text := coalesce(channel, user_id);
    is_user boolean := channel is null and user_id is not null;
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
    if given is null then
        raise exception 'invalid channel NULL' using errcode = 'invalid_parameter_value';
    end if;
    if channel is not null and user_id is not null then
        raise exception 'watch() takes a channel or a user_id: call it once for each'
            using errcode = 'invalid_parameter_value';
    end if;

    -- Into literal, column, literal, column, …, literal.
    for token in select t[1] from regexp_matches(given, '[{]{2}|[}]{2}|[{][^{}]+[}]|[^{}]+|[{}]', 'g') t loop
        if token in ('{', '}') then
            raise exception 'invalid %: a single brace',
                    case when is_user then 'user_id ' else 'channel ' end || quote_literal(left(given, 80))
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
    if is_user then
        perform pgchannels.user_channel(watched);
        -- No channel can have this name, so that none is taken for it.
        channel := 'pgchannels:user:' || user_id;
    else
        perform pgchannels.check_message(watched, '{}');
    end if;
    if not is_user and cardinality(parts) > 1 and starts_with('pgchannels:', parts[1]) then
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

    perform pgchannels.unwatch(relation, case when not is_user then channel end, user_id);
    foreach operation in array array(select distinct o.name from unnest(operations) o(name)) loop
        execute format(
            'create trigger %I after %s on %s referencing %s for each statement execute function pgchannels.publish_changes(%L)',
            'pgchannels_' || left(md5('pgchannels.' || channel), 16) || '_' || operation, operation, relation,
            case operation when 'insert' then 'new table as new_rows'
                           when 'delete' then 'old table as old_rows'
                           else 'old table as old_rows new table as new_rows' end,
            jsonb_build_object('channel', channel, 'is_user', is_user, 'parts', parts, 'used', used, 'key', key,
                               'columns', columns, 'condition', condition::text));
    end loop;
end
$$;

-- All that is watched, a row for each trigger.
create view pgchannels.watches as
select w.relation, case when not (w.config ->> 'is_user')::boolean then w.config ->> 'channel' end as channel,
       case when jsonb_typeof(w.config -> 'columns') = 'array'
            then array(select jsonb_array_elements_text(w.config -> 'columns')) end as columns,
       (w.config ->> 'condition')::jsonpath as condition, w.operation, w.trigger,
       case when (w.config ->> 'is_user')::boolean
            then substr(w.config ->> 'channel', char_length('pgchannels:user:') + 1) end as user_id
  from (select t.tgrelid::regclass as relation, t.tgname as trigger,
               case when t.tgtype & 4 > 0 then 'insert' when t.tgtype & 16 > 0 then 'update' else 'delete' end as operation,
               -- arguments have a NUL at the end of each
               convert_from(substring(t.tgargs from 1 for length(t.tgargs) - 1), 'UTF8')::jsonb as config
          from pg_trigger t where t.tgfoid = 'pgchannels.publish_changes()'::regprocedure) w;

-- No longer publish a table's changes to a channel or user, as it was given to watch(); to none at
-- all, if neither is given. Returns whether it was watched.
create function pgchannels.unwatch(relation regclass, channel text default null, user_id text default null) returns boolean
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    trigger_name name;
    was_watched boolean := false;
begin
    for trigger_name in select w.trigger from pgchannels.watches w
                         where w.relation = unwatch.relation
                           and (unwatch.channel is null and unwatch.user_id is null
                                or w.channel = unwatch.channel or w.user_id = unwatch.user_id) loop
        execute format('drop trigger %I on %s', trigger_name, relation);
        was_watched := true;
    end loop;
    return was_watched;
end
$$;

-- A publisher may publish, and nothing else: it reads nothing. With to_users, it may do so to users and
-- to several connections at once, not only to channels, groups and everyone. A node may do what a running node
-- does but for pruning, which drops partitions, as only their owner may. A maintainer is a member of
-- the owner. regrant() gives what a later migration makes to the roles that have such a grant.
create function pgchannels.grant_access(kind text, role_name text, to_users boolean default false) returns void
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
                      and (p.proname in ('is_channel', 'is_payload', 'is_headers', 'is_attachments', 'attachments_size', 'check_message', 'check_ttl', 'publish',
                                         'publish_many', 'primary_key', 'watched_channel', 'watched_change', 'user_channel',
                                         'check_reserved', 'claim_keys', 'claim_channel_keys')
                           or to_users and p.proname = 'claim_reserved_keys'
                           or kind = 'node' and p.proname not in ('watch', 'unwatch', 'limit_messages', 'publish_changes', 'grant_access', 'regrant')) loop
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
-- the right to insert, one to users by that to claim reserved keys, and one to a node by that to seal.
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
        select 'publisher' as kind, r.rolname as role_name,
               exists (select from pg_proc p cross join aclexplode(p.proacl) a
                        where p.oid = 'pgchannels.claim_reserved_keys(text[], text[], interval)'::regprocedure
                          and a.privilege_type = 'EXECUTE' and a.grantee = r.oid) as to_users
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
        select 'node', r.rolname, false
          from pg_proc p cross join aclexplode(p.proacl) x join pg_roles r on r.oid = x.grantee
         where p.oid = 'pgchannels.seal(integer, bigint)'::regprocedure and x.privilege_type = 'EXECUTE' and x.grantee <> p.proowner
    loop
        perform pgchannels.grant_access(given.kind, given.role_name, given.to_users);
    end loop;
end
$$;

-- A node that is not the owner needs partitions, too.
alter function pgchannels.add_partitions(bigint) security definer;

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
    stopped := sealed = max_messages;
end
$$;


-- As it was; whoever calls it may have any search path, and with one of its own it could not commit.
create or replace procedure pgchannels.seal_and_notify(
    max_messages integer, max_bytes bigint, notified text,
    inout sealed integer default null, inout head bigint default null, inout stopped boolean default null)
language plpgsql
as $$
begin
    select s.sealed, s.head, s.stopped into sealed, head, stopped from pgchannels.seal(max_messages, max_bytes) s;
    commit;
    if sealed operator(pg_catalog.>) 0 then
        perform pg_catalog.pg_notify(notified, head::pg_catalog.text);
    end if;
end
$$;

select pgchannels.regrant();
