-- With the trigger function go the triggers of what is watched.

drop view pgchannels.watches;
drop function pgchannels.publish_changes() cascade;
drop function pgchannels.primary_key(regclass);
drop function pgchannels.regrant();
drop function pgchannels.grant_access(text, text, boolean);
drop function pgchannels.watch(regclass, text, text[], jsonpath, text[], text);
drop function pgchannels.unwatch(regclass, text, text);
drop function pgchannels.watched_change(text, text[], text[], jsonpath, jsonb, jsonb, oid);
drop function pgchannels.watched_channel(text[], jsonb, boolean, boolean);
drop function pgchannels.publish_many(text[], json[], interval, text[], text[], interval);
drop function pgchannels.publish(text, json, interval, text, boolean, text[], text, text, interval);
-- restore pgchannels.publish
-- restore pgchannels.seal
-- restore pgchannels.seal_and_notify
comment on column pgchannels.messages.size is 'bytes of the payload''s text, so that a page can be bounded without reading it';
drop function pgchannels.check_message(text, json, bigint);
drop function pgchannels.check_ttl(interval);
alter table pgchannels.outbox drop constraint outbox_reserved_are_granted;
drop function pgchannels.claim_keys(text[], text[], interval);
drop function pgchannels.claim_channel_keys(text[], text[], interval);
drop function pgchannels.claim_reserved_keys(text[], text[], interval);
drop function pgchannels.check_reserved(text);
drop function pgchannels.user_channel(text);
alter function pgchannels.is_channel(text) reset search_path;
alter function pgchannels.is_payload(json) reset search_path;
alter function pgchannels.is_headers(json) reset search_path;
alter function pgchannels.add_partitions(bigint) security invoker;
alter table pgchannels.log drop column works_from;
do $$
declare
    routine regprocedure;
begin
    for routine in select p.oid::regprocedure from pg_proc p
                    where p.pronamespace = (select c.relnamespace from pg_class c where c.oid = 'pgchannels.messages'::regclass)
    loop
        execute format('grant execute on routine %s to public', routine);
    end loop;
end
$$;
