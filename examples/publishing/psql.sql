-- Publish from SQL, in the transaction of the data.
--
--   export PGCHANNELS_DATABASE_URL=postgresql://…
--   pip install 'pgchannels[cli]' && pgchannels migrate
--   psql "$PGCHANNELS_DATABASE_URL" -v ON_ERROR_STOP=1 -f psql.sql
--   pgchannels tail orders:7

create table if not exists example_orders (
    id bigint generated always as identity primary key,
    customer_id bigint not null,
    total numeric not null
);

begin;

with placed as (
    insert into example_orders (customer_id, total) values (7, 19.90) returning *
)
select pgchannels.publish(
           'orders:' || p.customer_id,
           json_build_object('type', 'order.placed', 'id', p.id, 'total', p.total))
  from placed p;

-- What is rolled back was never published.
savepoint before_the_mistake;
select pgchannels.publish('orders:7', '{"type": "order.mistaken"}');
rollback to before_the_mistake;

commit;

-- It can be read within 50 ms; with this, at once. After the commit, not in the transaction: there
-- it would hold a lock over the commit that all who notify wait for.
notify pgchannels;
