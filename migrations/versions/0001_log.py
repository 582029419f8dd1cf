"""The outbox, the log and the functions between them."""

from alembic import context, op

from pgchannels.revisions import downgrade_from, upgrade_to

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    for statement in upgrade_to(revision, schema()):
        op.execute(statement)


def downgrade() -> None:
    for statement in downgrade_from(revision, schema()):
        op.execute(statement)


def schema() -> str:
    name: str = context.get_context().opts["version_table_schema"]
    return name
