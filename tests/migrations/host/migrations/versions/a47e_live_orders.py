"""Changes of orders are published."""

from alembic import op

revision = "a47e"
down_revision = "3f1c"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.pgchannels_upgrade(to="0004")  # type: ignore[attr-defined]
    op.pgchannels_watch("orders", "orders:{customer_id}", columns=["status", "total"])  # type: ignore[attr-defined]


def downgrade() -> None:
    op.pgchannels_unwatch("orders", "orders:{customer_id}")  # type: ignore[attr-defined]
    op.pgchannels_downgrade(to="base")  # type: ignore[attr-defined]
