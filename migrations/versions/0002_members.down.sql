-- Who is where is known by the nodes that are running; 0001 has no place for it.

drop function pgchannels.reap(uuid, interval, integer);
drop function pgchannels.settle_departures(interval, integer, interval);
drop function pgchannels.remove_channels(text[], interval, uuid);
drop function pgchannels.change_memberships(text[], text[], boolean[], text[], interval, uuid);
drop function pgchannels.publish_left(json);
drop function pgchannels.add_present(text, bigint);
drop table pgchannels.present;
drop function pgchannels.lock_presence(text[]);
drop function pgchannels.hand_back(text[], bigint[], uuid, bigint);
drop function pgchannels.claim(text[], integer[], integer[], uuid, bigint, bigint, bigint);
drop function pgchannels.judge(pgchannels.claiming[], bigint, bigint, bigint);
drop type pgchannels.claiming;
drop function pgchannels.recipients(json);
alter table pgchannels.outbox
    drop constraint outbox_headers_are_valid, drop constraint outbox_attachments_are_valid;
drop table pgchannels.ephemeral;
drop function pgchannels.is_attachments(bytea[]);
drop function pgchannels.is_headers(json);
drop table pgchannels.followers;
drop table pgchannels.claims;
drop table pgchannels.cursors;
drop table pgchannels.keys;
delete from pgchannels.memberships;
drop index pgchannels.memberships_identity;
drop index pgchannels.memberships_left_at;
alter table pgchannels.memberships
    drop constraint memberships_presence_is_valid,
    drop column identity, drop column presence, drop column user_id, drop column metadata,
    drop column joined_at, drop column renewed_at, drop column left_at,
    add column expires_at timestamptz;
delete from pgchannels.channels;
drop index pgchannels.channels_node;
alter table pgchannels.channels
    drop column metadata, drop column is_received, drop column created_at,
    add column expires_at timestamptz;
delete from pgchannels.nodes;
alter table pgchannels.nodes drop column steady_since, drop column dead_since;
