import os

from alembic import context
from shop.models import Base  # type: ignore[import-not-found]
from sqlalchemy import create_engine

from pgchannels.alembic import include_name

url = os.environ["DATABASE_URL"]

options = {
    "target_metadata": Base.metadata,
    "include_schemas": True,
    "include_name": include_name,  # leaves the schema pgchannels out
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
