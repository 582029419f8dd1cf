"""Publish from Django when a model is saved, in the same transaction. One file, for the example.

export PGCHANNELS_DATABASE_URL=postgresql://…
pip install django 'psycopg[binary]' 'pgchannels[cli]'
pgchannels migrate
python django_orders.py
pgchannels tail orders:7
"""

import json
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import django
from django.conf import settings as django_settings
from django.db import connection, models, transaction
from django.db.models.signals import post_save
from django.dispatch import receiver

from pgchannels import Settings
from pgchannels.waker import waker_for

settings = Settings()  # PGCHANNELS_DATABASE_URL
url = urlsplit(settings.dsn)
django_settings.configure(
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": url.path[1:],
            "USER": unquote(url.username or ""),
            "PASSWORD": unquote(url.password or ""),
            "HOST": url.hostname or "",
            "PORT": url.port or "",
            "OPTIONS": dict(parse_qsl(url.query)),
        }
    }
)
django.setup()


class Order(models.Model):
    customer_id = models.BigIntegerField()
    total = models.IntegerField()

    class Meta:
        app_label = "shop"
        db_table = "example_orders"


@receiver(post_save, sender=Order)
def publish_order(instance: Order, created: bool, **_: Any) -> None:
    """save() is in a transaction here: the request's, that of atomic(), or one of its own."""
    payload = {"type": "order.placed" if created else "order.changed", "id": instance.pk}
    with connection.cursor() as cursor:
        cursor.execute(
            "select pgchannels.publish(%s, %s::json)",
            [f"orders:{instance.customer_id}", json.dumps(payload)],
        )
    # Never raises, and does not wait. Safe in workers that gunicorn has forked.
    transaction.on_commit(waker_for(settings).wake)


if __name__ == "__main__":
    with connection.schema_editor() as editor:
        if "example_orders" not in connection.introspection.table_names():
            editor.create_model(Order)
    with transaction.atomic():
        Order.objects.create(customer_id=7, total=20)
