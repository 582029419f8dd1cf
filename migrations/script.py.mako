"""${message}."""

from alembic import context, op

from pgchannels.revisions import downgrade_from, upgrade_to

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    for statement in upgrade_to(revision, schema()):
        op.execute(statement)


def downgrade() -> None:
    for statement in downgrade_from(revision, schema()):
        op.execute(statement)


def schema() -> str:
    name: str = context.get_context().opts["version_table_schema"]
    return name
