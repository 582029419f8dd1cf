"""Publish from SQLAlchemy: messages commit with the data, or not at all.

:func:`install` prepares sessions, :func:`publish` adds a message to one, and :func:`publishes` has
the objects of a mapped class publish whenever they are inserted, updated or deleted.
"""

from pgchannels.orm.change import Change
from pgchannels.orm.models import publishes
from pgchannels.orm.sessions import install, publish

__all__ = ["Change", "install", "publish", "publishes"]
