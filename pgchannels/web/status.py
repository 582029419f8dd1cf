"""What this process does, for people and programs that look after it."""

# No postponed annotations here: FastAPI resolves those of the endpoints.

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Depends, HTTPException, Query, Response
from pydantic import BaseModel, Field

from pgchannels.errors import ConfigurationError
from pgchannels.web.codes import by_label
from pgchannels.web.error_handlers import answering
from pgchannels.web.health import Health, is_listening

if TYPE_CHECKING:
    from pgchannels.web.connections import ConnectionManager

__all__ = ["guarded", "status_router"]

Problem = Literal["draining", "closed", "database", "listener"]


class Cluster(BaseModel):
    """Of all nodes together."""

    connections: int


class Status(BaseModel):
    """What one process has counted since it began."""

    connections: int = Field(description="that there are")
    users: int = Field(description="that they belong to")
    pending: int = Field(description="messages that wait to be sent")
    is_draining: bool = Field(description="whether it shuts down, and refuses new connections")
    is_listening: bool = Field(
        description="whether notifications come in; if not, messages are found by polling"
    )
    opened: int = Field(description="connections that were admitted")
    closed: dict[str, int] = Field(
        description="how many were closed, by close code; codes of clients by their thousands"
    )
    refused: dict[str, int] = Field(description="how many were not admitted, by error code")
    errors: dict[str, int] = Field(description="what clients were told of, by error code")
    messages_in: int
    bytes_in: int
    messages_out: int
    bytes_out: int
    cluster: Cluster | None = Field(None, description="if it was asked for")


class Alive(BaseModel):
    status: Literal["alive"] = "alive"


class Ready(BaseModel):
    status: Literal["ready", "not ready"]
    problems: list[Problem] = Field(
        description="`draining`: it shuts down. `closed`: the layer is not open. `database`: it "
        "does not answer. `listener`: no notifications, for longer than the grace time"
    )


def status_router(
    connections: "ConnectionManager",
    *,
    dependencies: Sequence[Any] = (),
    public: bool = False,
    grace: float = 15.0,
    timeout: float = 5.0,
    **options: Any,
) -> APIRouter:
    """Make a router with ``GET /status``, ``GET /health/live`` and ``GET /health/ready``.

    The health endpoints are for a load balancer, and open to anybody: ``live`` answers as long as
    the process does, ``ready`` with 503 while it should get no new connections, and why.

    Args:
        connections: the manager that it is about.
        dependencies: FastAPI's, which refuse who may not see ``/status`` by raising an
            ``HTTPException``, or by returning False. Anything else allows, as FastAPI has it: one
            that gives a user allows all users. There is no default: who may see it is the
            application's to say.
        public: instead: anybody may.
        grace: seconds that the listener may be away before the process is not ready. It is counted
            from the first look at ``/health/ready`` that found it so.
        timeout: seconds that the database may take to answer.
        options: for :class:`fastapi.APIRouter`.

    Raises:
        ConfigurationError: neither *dependencies* nor *public*, or both; or a number is out of its
            range.
    """
    guards = guarded("status_router", dependencies, public)
    health = Health(connections, grace=grace, timeout=timeout)
    router = APIRouter(**{"tags": ["status"], **options})

    @router.get("/status", dependencies=guards, response_model_exclude_none=True)
    async def status(
        response: Response,
        cluster: Annotated[bool, Query(description="count the connections of all nodes")] = False,
    ) -> Status:
        """What this process has counted since it began."""
        response.headers["Cache-Control"] = "no-store"
        counted = None
        if cluster:
            with answering():
                counted = Cluster(connections=await connections.count())
        statistics = connections.statistics()
        return Status(
            **{**statistics.to_dict(), "closed": by_label(statistics.closed)},
            is_listening=is_listening(connections),
            cluster=counted,
        )

    @router.get("/health/live")
    async def live(response: Response) -> Alive:
        """Whether the process answers."""
        response.headers["Cache-Control"] = "no-store"
        return Alive()

    @router.get("/health/ready", responses={503: {"model": Ready}})
    async def ready(response: Response) -> Ready:
        """Whether it should get new connections, and if not, why."""
        response.headers["Cache-Control"] = "no-store"
        problems: list[Any] = await health.problems()
        if problems:
            response.status_code = 503
        return Ready(status="not ready" if problems else "ready", problems=problems)

    return router


def guarded(router: str, dependencies: Sequence[Any], public: bool) -> list[Any]:
    """The dependencies of a route, so that False refuses with 403. FastAPI looks at no result.

    Raises:
        ConfigurationError: neither *dependencies* nor *public*, or both.
    """
    if bool(dependencies) is bool(public):
        raise ConfigurationError(
            f"{router}() needs either dependencies=[Depends(…)], which say who may see it, or "
            "public=True"
        )
    return [Depends(_refusing(dependency)) for dependency in dependencies]


def _refusing(dependency: Any) -> Callable[..., None]:
    def check(allowed: Annotated[Any, dependency]) -> None:
        if allowed is False:
            raise HTTPException(403, "you may not see this")

    return check
