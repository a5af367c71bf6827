"""PostgreSQL, S3, Prefect, MLflow and a worker on this machine's loopback, with passwords.

    make stack         starts them, prints the pages and a file of variables for the commands that use them
    make stack-down    ends them and removes what they kept

or with a folder of your own: `python infra/stack.py up FOLDER`, `down FOLDER`. The folder holds data, logs, the
variables (`stack.env`) and what runs (`stack.json`); nobody else can read it. It must be one that the user `postgres`
can reach where this runs as root, since PostgreSQL refuses to run as root.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

HOST = "127.0.0.1"
BUCKET = "ingot"
USER = "ingot"
ADMIN = "admin"
POOL = "ingot"
FOLDER = Path("/var/tmp") / f"ingot-stack-{os.getuid()}"  # noqa: S108 - made with mode 0711, refused if another's
SERVICES = ("postgresql", "s3", "prefect", "mlflow", "worker")
DEADLINE_S = 300.0
_STOP_S = 15.0
_PROGRAMS = Path(sysconfig.get_path("scripts"))
_S3_PORTS = (
    "master.port", "volume.port", "filer.port", "s3.port", "s3.port.grpc", "s3.port.iceberg", "metricsPort",
    "master.port.grpc", "volume.port.grpc", "filer.port.grpc", "admin.port", "admin.port.grpc",
)  # fmt: skip
_AUTH = """\
[mlflow]
default_permission = MANAGE
database_uri = {database}
admin_username = {admin}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


class StackError(Exception):
    """Something that the user can do something about."""


class Stack:
    """The services of one folder.

    Args:
        folder: where they keep everything.
        guard: what stands before each command; see `pipelines.core.parent_guard.command`.
    """

    def __init__(self, folder: Path = FOLDER, guard: Sequence[str] = ()) -> None:
        self.folder, self._guard = folder, list(guard)
        self._started: list[subprocess.Popen[bytes]] = []
        self._state: dict[str, Any] = {"passwords": {}, "ports": {}, "processes": {}}
        if (folder / "stack.json").exists():
            if folder.stat().st_uid != os.getuid():
                raise StackError(f"{folder} belongs to somebody else: name another folder")
            self._state = json.loads((folder / "stack.json").read_text(encoding="utf-8"))

    # ---- what users need -------------------------------------------------------------------------------------------

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which commands reach all services."""
        s3 = {
            "AWS_ACCESS_KEY_ID": USER,
            "AWS_SECRET_ACCESS_KEY": self._password("s3"),
            "AWS_ENDPOINT_URL": f"http://{HOST}:{self._port('s3.port')}",
            "AWS_REGION": "us-east-1",
            "INGOT_STORE": f"s3://{BUCKET}/store",
        }
        return s3 | {
            "PREFECT_API_URL": f"{self.address('prefect')}/api",
            "PREFECT_API_AUTH_STRING": f"{ADMIN}:{self._password('prefect')}",
            "MLFLOW_TRACKING_URI": self.address("mlflow"),
            "MLFLOW_TRACKING_USERNAME": ADMIN,
            "MLFLOW_TRACKING_PASSWORD": self._password("mlflow"),
        }

    def address(self, service: str) -> str:
        """Return the address of a page: `prefect` or `mlflow`."""
        return f"http://{HOST}:{self._port(service)}"

    def running(self) -> dict[str, psutil.Process]:
        """Return the processes that are at work, by service."""
        found = {}
        for name, (pid, started) in self._state["processes"].items():
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if abs(process.create_time() - started) < 1 and process.status() != psutil.STATUS_ZOMBIE:
                    found[name] = process
        return found

    def log(self, service: str) -> Path:
        """Return the log of a service."""
        return self.folder / f"{service}.log"

    # ---- life ------------------------------------------------------------------------------------------------------

    def up(self, services: Sequence[str] = SERVICES) -> None:
        """Start what is not at work, and return when all of it answers.

        Raises:
            StackError: a program is missing, or a service did not come up.
        """
        if missing := [what for what, place in _needed().items() if place is None]:
            raise StackError(f"{', '.join(missing)} not installed: see docs/guides/stack.md")
        self.folder.mkdir(mode=0o711, parents=True, exist_ok=True)
        if self.folder.is_symlink() or self.folder.stat().st_uid != os.getuid():
            raise StackError(f"{self.folder} belongs to somebody else: name another folder")
        for ready in (self.start(name) for name in services if name in {"postgresql", "s3"}):
            ready()
        if "postgresql" in services:
            self._databases("prefect", "mlflow", "users")
        later = [self.start(name) for name in services if name in {"prefect", "mlflow"}]
        for ready in later:
            ready()
        if "worker" in services:
            self.start("worker")()
        variables = "".join(f"export {name}='{value}'\n" for name, value in self.environment.items())
        _write(self.folder / "stack.env", variables)

    def start(self, service: str) -> Callable[[], None]:
        """Start a service unless it is at work; return what waits until it answers."""
        if service not in self.running():
            command, environment = {
                "postgresql": self._postgresql,
                "s3": self._s3,
                "prefect": self._prefect,
                "mlflow": self._mlflow,
                "worker": self._worker,
            }[service]()
            with self.log(service).open("ab") as log:
                process = subprocess.Popen(
                    [*self._guard, *command],
                    cwd=self.folder,
                    env={**_plain_environment(), **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self._started.append(process)
            self._state["processes"][service] = [process.pid, psutil.Process(process.pid).create_time()]
            self._save()
        return lambda: self._wait(service)

    def stop(self, *services: str) -> None:
        """End services with all that they started, the last first; all of them if none is named."""
        processes = self.running()
        for name in reversed(services or SERVICES):
            if name not in processes:
                continue
            process = processes[name]
            below = process.children(recursive=True)
            process.send_signal(signal.SIGINT if name == "postgresql" else signal.SIGTERM)  # it would wait for clients
            _, left = psutil.wait_procs([process, *below], _STOP_S)
            for each in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            psutil.wait_procs(left, _STOP_S)
        self._started = [process for process in self._started if process.poll() is None]
        self._state["processes"] = {k: v for k, v in self._state["processes"].items() if k in self.running()}
        if self.folder.exists():
            self._save()

    def down(self) -> None:
        """End everything and remove the folder."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- the services ----------------------------------------------------------------------------------------------

    def _postgresql(self) -> tuple[list[str], dict[str, str]]:
        data, programs = self.folder / "postgresql", _postgresql_programs()
        assert programs is not None
        other_user = _unprivileged()
        if not data.exists():
            data.mkdir(mode=0o700)
            secret = self.folder / "postgresql.password"
            _write(secret, self._password("postgresql"))
            if other_user:
                for path in (data, secret):
                    shutil.chown(path, "postgres", "postgres")
            options = ["--username", USER, "--auth=scram-sha-256", f"--pwfile={secret}", "--encoding=UTF8", "--no-sync"]
            command = [*other_user, str(programs / "initdb"), "-D", str(data), "--locale=C", *options]
            done = subprocess.run(command, cwd=self.folder, env=_plain_environment(), capture_output=True, text=True)
            secret.unlink()
            if done.returncode:
                shutil.rmtree(data)
                raise StackError(f"initdb: {done.stderr.strip()}")
        options = ["-p", str(self._port("postgresql")), "-c", f"listen_addresses={HOST}"]
        options += ["-c", "unix_socket_directories=", "-c", "max_connections=200"]
        death = ["--pdeathsig", "KILL"] if self._guard and other_user else []
        return [*other_user[:1], *death, *other_user[1:], str(programs / "postgres"), "-D", str(data), *options], {}

    def _s3(self) -> tuple[list[str], dict[str, str]]:
        data, config = self.folder / "s3", self.folder / "s3.json"
        data.mkdir(exist_ok=True)
        keys = [{"accessKey": USER, "secretKey": self._password("s3")}]
        _write(config, json.dumps({"identities": [{"name": USER, "credentials": keys, "actions": ["Admin"]}]}))
        ports = [f"-{name}={self._port(name)}" for name in _S3_PORTS]
        command = [
            str(_PROGRAMS / "weed"), "mini", f"-dir={data}", f"-ip={HOST}", f"-ip.bind={HOST}", f"-bucket={BUCKET}",
            "-webdav=false", "-admin.ui=false", f"-s3.config={config}", *ports,
        ]  # fmt: skip
        return command, {}

    def _prefect(self) -> tuple[list[str], dict[str, str]]:
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST]
        return [*command, "--port", str(self._port("prefect"))], {
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": self._database("prefect", "postgresql+asyncpg"),
            "PREFECT_SERVER_API_AUTH_STRING": f"{ADMIN}:{self._password('prefect')}",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_CLI_PROMPT": "false",
            "DO_NOT_TRACK": "1",
        }

    def _mlflow(self) -> tuple[list[str], dict[str, str]]:
        settings = self.folder / "mlflow-auth.ini"
        _write(settings, _AUTH.format(database=self._database("users", "postgresql+psycopg"), admin=ADMIN))
        command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--host", HOST]
        command += ["--port", str(self._port("mlflow")), "--workers", "1"]
        command += ["--artifacts-destination", f"s3://{BUCKET}/mlflow"]
        own = {name: value for name, value in self.environment.items() if name.startswith("AWS_")}
        return command, own | {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # it keeps seven processes for jobs, and gets none
            "MLFLOW_BACKEND_STORE_URI": self._database("mlflow", "postgresql+psycopg"),
            "MLFLOW_AUTH_CONFIG_PATH": str(settings),
            "MLFLOW_AUTH_ADMIN_PASSWORD": self._password("mlflow"),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": self._password("sessions"),
            "MLFLOW_S3_ENDPOINT_URL": own["AWS_ENDPOINT_URL"],
        }

    def _worker(self) -> tuple[list[str], dict[str, str]]:
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"]
        return command, self.environment | {"PREFECT_HOME": str(self.folder / "prefect"), "PREFECT_CLI_PROMPT": "false"}

    # ---- parts -----------------------------------------------------------------------------------------------------

    def _database(self, name: str, scheme: str) -> str:
        return f"{scheme}://{USER}:{self._password('postgresql')}@{HOST}:{self._port('postgresql')}/{name}"

    def _databases(self, *names: str) -> None:
        import psycopg

        with psycopg.connect(self._database("postgres", "postgresql"), autocommit=True) as connection:
            there = {row[0] for row in connection.execute("SELECT datname FROM pg_database").fetchall()}
            for name in (each for each in names if each not in there):
                connection.execute(psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(name)))

    def _wait(self, service: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not self._answers(service):
            if service not in self.running():
                tail = "\n".join(self.log(service).read_text(errors="replace").splitlines()[-15:])
                raise StackError(f"{service} has ended; the end of {self.log(service)}:\n{tail}")
            if time.monotonic() > deadline:
                raise StackError(f"{service} does not answer; see {self.log(service)}")
            time.sleep(0.2)

    def _answers(self, service: str) -> bool:
        if service == "postgresql":
            import psycopg

            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(self._database("postgres", "postgresql"), connect_timeout=5).close()
                return True
            return False
        if service == "worker":
            return "started" in self.log("worker").read_text(errors="replace")
        port = self._port("s3.port" if service == "s3" else service)
        path = {"s3": f"/{BUCKET}", "prefect": "/api/health", "mlflow": "/health"}[service]
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                f"http://{HOST}:{port}{path}", timeout=5
            ) as answer:
                answer.read()
        except urllib.error.HTTPError as error:
            return error.code in {401, 403}  # it wants to know who asks
        except OSError:
            return False
        return True

    def _password(self, name: str) -> str:
        return str(self._state["passwords"].setdefault(name, secrets.token_hex(16)))

    def _port(self, name: str) -> int:
        ports = self._state["ports"]
        if name not in ports:
            with contextlib.ExitStack() as held:
                names = [each for each in ("postgresql", "prefect", "mlflow", *_S3_PORTS) if each not in ports]
                for each in names:
                    probe = held.enter_context(socket.create_server((HOST, 0)))
                    ports[each] = probe.getsockname()[1]
        return int(ports[name])

    def _save(self) -> None:
        _write(self.folder / "stack.json", json.dumps(self._state, indent=1))


def _write(path: Path, text: str) -> None:
    """Write a file that nobody else can read, whole."""
    part = path.with_name(f".{path.name}.part")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as stream:
        stream.write(text)
    part.replace(path)


def _plain_environment() -> Mapping[str, str]:
    """Return this process's environment without what configures other servers."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "PREFECT_", "MLFLOW_", "INGOT_", "PG"))}


def _unprivileged() -> list[str]:
    """Return what stands before a command of PostgreSQL: as root another user runs it."""
    if os.geteuid():
        return []
    return ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]


def _postgresql_programs() -> Path | None:
    """Return the folder of `postgres` and `initdb`: the newest that Debian has installed, or that of the path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    named = shutil.which("postgres")
    return found[-1].parent if found else Path(named).parent if named else None


def _needed() -> dict[str, object]:
    weed = _PROGRAMS / "weed"
    return {"PostgreSQL": _postgresql_programs(), "SeaweedFS": weed if weed.exists() else None}


def main(arguments: list[str]) -> int:
    """Start or end the stack; return the exit code."""
    if not arguments or arguments[0] not in {"up", "down"} or len(arguments) > 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        stack = Stack(Path(arguments[1]).absolute() if arguments[1:] else FOLDER)
        if arguments[0] == "down":
            stack.down()
            return 0
        stack.up()
    except StackError as error:
        print(error, file=sys.stderr)
        return 2
    pages = stack.environment
    print(f"Prefect  {stack.address('prefect')}  (user and password: {pages['PREFECT_API_AUTH_STRING']})")
    print(f"MLflow   {stack.address('mlflow')}  ({ADMIN}, {pages['MLFLOW_TRACKING_PASSWORD']})")
    print(f"S3       {pages['AWS_ENDPOINT_URL']}  (bucket {BUCKET})")
    print(f"\nFor commands that use them:  . {stack.folder / 'stack.env'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
