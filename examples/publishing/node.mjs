// Publish from Node.js, by pg, in the transaction of the data.
//
//   export PGCHANNELS_DATABASE_URL=postgresql://…
//   pip install 'pgchannels[cli]' && pgchannels migrate
//   npm install pg
//   node node.mjs
//   pgchannels tail orders:7

import pg from "pg";

const pool = new pg.Pool({ connectionString: process.env.PGCHANNELS_DATABASE_URL });

async function placeOrder(customerId, total) {
  const client = await pool.connect();
  try {
    await client.query("begin");
    const { rows } = await client.query(
      "insert into example_orders (customer_id, total) values ($1, $2) returning id",
      [customerId, total],
    );
    await client.query("select pgchannels.publish($1, $2)", [
      `orders:${customerId}`,
      { type: "order.placed", id: Number(rows[0].id), total }, // pg gives a bigint as text
    ]);
    await client.query("commit");
  } catch (error) {
    await client.query("rollback");
    throw error;
  } finally {
    client.release();
  }
  // Only so that it is read at once, and not up to 50 ms later: nothing depends on it.
  pool.query("notify pgchannels").catch(() => {});
}

await pool.query(`create table if not exists example_orders (
  id bigint generated always as identity primary key, customer_id bigint not null, total numeric not null)`);
await placeOrder(7, 20);
await pool.end();
