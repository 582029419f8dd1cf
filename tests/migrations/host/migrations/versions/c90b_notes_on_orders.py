"""Orders have notes."""

import sqlalchemy as sa
from alembic import op

revision = "c90b"
down_revision = "a47e"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("orders", sa.Column("note", sa.String))


def downgrade() -> None:
    op.drop_column("orders", "note")
