"""Publish from a plain script, by psycopg, in the transaction of the data.

export PGCHANNELS_DATABASE_URL=postgresql://…
pip install 'psycopg[binary]' 'pgchannels[cli]'
pgchannels migrate
python script.py
pgchannels tail orders:7
"""

import psycopg
from psycopg.types.json import Json

from pgchannels import Settings
from pgchannels.waker import waker_for

settings = Settings()  # PGCHANNELS_DATABASE_URL


def place_order(connection: psycopg.Connection, customer_id: int, total: int) -> None:
    row = connection.execute(
        "insert into example_orders (customer_id, total) values (%s, %s) returning id",
        [customer_id, total],
    ).fetchone()
    assert row is not None
    connection.execute(
        "select pgchannels.publish(%s, %s)",
        [f"orders:{customer_id}", Json({"type": "order.placed", "id": row[0], "total": total})],
    )


def main() -> None:
    with psycopg.connect(settings.dsn) as connection:
        connection.execute(
            "create table if not exists example_orders ("
            "id bigint generated always as identity primary key,"
            " customer_id bigint not null, total numeric not null)"
        )
        place_order(connection, customer_id=7, total=20)
    # Committed. Without this it is read within 50 ms, with it at once, also from a script that
    # ends here: what is still to be told is told at exit.
    waker_for(settings).wake()


if __name__ == "__main__":
    main()
