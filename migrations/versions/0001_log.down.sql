-- Partitions go with their parent; those that were detached and, by a crash of the pruner, not
-- dropped, are looked up.

drop function pgchannels.requeue_stragglers(xid8);
drop procedure pgchannels.seal_and_notify(integer, bigint, text, integer, bigint, boolean);
drop function pgchannels.seal(integer, bigint);
drop function pgchannels.add_partitions(bigint);
drop function pgchannels.lock_sequencer();
drop function pgchannels.publish(text, json, interval);
drop table pgchannels.leases;
drop table pgchannels.nodes;
drop table pgchannels.memberships;
drop table pgchannels.channels;
drop view pgchannels.bounds;
drop table pgchannels.log;
drop table pgchannels.sequencer_lock;
drop table pgchannels.batches;
drop table pgchannels.messages;
do $$
declare
    leftover text;
begin
    for leftover in select c.oid::regclass from pg_class c
                     where c.relnamespace = (select o.relnamespace from pg_class o
                                              where o.oid = 'pgchannels.outbox'::regclass)
                       and c.relkind = 'r' and c.relname ~ '^messages_[0-9]+$'
    loop
        execute 'drop table ' || leftover;
    end loop;
end
$$;
drop table pgchannels.outbox;
drop function pgchannels.is_payload(json);
drop function pgchannels.is_channel(text);
