"""Limits of connections and groups, revocations, commands to all nodes, shared rates."""

from alembic import context, op

from pgchannels.revisions import downgrade_from, upgrade_to

revision = "0004"
down_revision = "0003"
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
