"""Publish from Celery, in the transaction of a synchronous SQLAlchemy session.

export PGCHANNELS_DATABASE_URL=postgresql://…
pip install celery 'psycopg[binary]' 'pgchannels[cli]'
pgchannels migrate
celery -A celery_worker worker                    # needs a broker: redis, RabbitMQ
python -c "import celery_worker as w; w.Base.metadata.create_all(w.engine)"
python -c "import celery_worker as w; w.place_order.delay(7, 20)"
pgchannels tail orders:7
"""

from celery import Celery
from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from pgchannels import Settings
from pgchannels.orm import install, publish

settings = Settings()  # PGCHANNELS_DATABASE_URL
app = Celery("celery_worker")

# The worker's processes are forked from the one that imports this: nothing is connected yet.
engine = create_engine(settings.dsn.replace("postgresql://", "postgresql+psycopg://", 1))
sessions: sessionmaker[Session] = sessionmaker(engine)
install(sessions)  # no layer in a worker: after each commit, a thread of its own tells the servers


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "example_orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer_id: Mapped[int]
    total: Mapped[int]


@app.task
def place_order(customer_id: int, total: int) -> int:
    with sessions.begin() as session:
        order = Order(customer_id=customer_id, total=total)
        session.add(order)
        session.flush()
        publish(
            session,
            f"orders:{customer_id}",
            {"type": "order.placed", "id": order.id, "total": total},
        )
        return order.id
