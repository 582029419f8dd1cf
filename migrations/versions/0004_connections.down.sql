-- Who is connected goes on being so, and counts for nobody's limit any more.

-- First of all: the sequencer takes its locks in this order, too.
update pgchannels.log set partitioned_to = attached_to;
alter table pgchannels.log drop column attached_to;
comment on column pgchannels.log.partitioned_to is 'the first id that no partition takes';

drop function pgchannels.begin_epoch(integer);
drop function pgchannels.take(text[], bigint[], bigint[], double precision[], double precision[]);
drop function pgchannels.join_groups(text[], text[], text[], integer[], interval, uuid);
drop function pgchannels.admit(uuid, text[], text[], text[], integer[], integer[], integer[]);
-- restore pgchannels.remove_channels
drop function pgchannels.add_places(uuid, integer);
drop table pgchannels.places;
drop table pgchannels.rates;
drop table pgchannels.revocations;
alter table pgchannels.outbox drop constraint outbox_max_message_size;
drop function pgchannels.limit_messages(integer);
drop function pgchannels.attachments_size(bytea[]);
alter table pgchannels.log drop column max_message_size;
drop index pgchannels.channels_user;
drop index pgchannels.channels_connections;
alter table pgchannels.channels drop column is_connection;
-- restore pgchannels.seal
drop function pgchannels.seal_part(bigint, xid8, xid8[], integer, bigint);
-- restore pgchannels.add_partitions
alter function pgchannels.add_partitions(bigint) security definer;
