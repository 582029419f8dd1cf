import os

from alembic import context
from shop.models import Base  # type: ignore[import-not-found]
from sqlalchemy import create_engine

import pgchannels.alembic  # noqa: F401

url = os.environ["DATABASE_URL"]

options = {
    "target_metadata": Base.metadata,
    "transaction_per_migration": True,  # what one revision locks is free before the next
}

if context.is_offline_mode():
    context.configure(url=url, literal_binds=True, **options)
    with context.begin_transaction():
        context.run_migrations()
else:
    with create_engine(url).connect() as connection:
        context.configure(connection=connection, **options)
        with context.begin_transaction():
            context.run_migrations()
