"""A real NDIF server on loopback, in parts that a test may stop and start again."""

import contextlib
import fcntl
import os
import signal
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

HERE = Path(__file__).parent
URL = "http://127.0.0.1:8001"
REDIS, HEAD, CLIENTS = 6399, 6385, 10001


def only_loopback():
    """Whether this process has no network interface but `lo`, which is then switched on."""
    if [name for _, name in socket.if_nameindex()] != ["lo"]:
        return False
    set_flags, up = 0x8914, 1  # SIOCSIFFLAGS, IFF_UP
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as some:
        fcntl.ioctl(some, set_flags, struct.pack("16sH14s", b"lo", up, b""))
    return True


class Server:
    """Redis, Ray with the controller, and the API, each a process of its own."""

    def __init__(self, python, state):
        """Take the Python of an environment with ndif and ray, and a folder of its own."""
        self.python, self.state = Path(python), Path(state)
        self.key = str(uuid.uuid4())
        (self.state / "log").mkdir()
        path = f"{self.python.parent}{os.pathsep}{os.environ['PATH']}"
        left_out = ("NDIF_", "RAY_", "PYTHON", "VIRTUAL_ENV")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
        self.environment = kept | {
            "PATH": path,
            "PYTHONPATH": str(HERE),
            # Marks every process of this server, also those that Ray starts.
            "PROBE_NDIF_STATE": str(self.state),
            "PROBE_NDIF_KNOWN_KEY": self.key,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.state / "hub"),
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            # Ray would listen on every interface otherwise.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            # A token that another cluster left at home would bind some of its processes, not all.
            "RAY_AUTH_MODE": "disabled",
            "GRPC_ENABLE_FORK_SUPPORT": "0",
            "NDIF_HOME": str(self.state / "home"),
            "NDIF_REDIS_URL": f"redis://127.0.0.1:{REDIS}",
            # Nobody is there: what a job saves has to fit into its response.
            "NDIF_OBJECT_STORE_URL": "http://127.0.0.1:9",
            "NDIF_RAY_ADDRESS": f"ray://127.0.0.1:{CLIENTS}",
            "NDIF_RAY_HEAD_PORT": str(HEAD),
            "NDIF_API_URL": URL,
            "NDIF_DEFAULT_MODEL_ACTOR_CLASS": "cpu_server.CpuModel",
            "NDIF_CONTROLLER_IMPORT_PATH": "cpu_server.Controller",
            "NDIF_DEFAULT_DTYPE": "float32",
            "NDIF_DEFAULT_PADDING_BIAS": "0",
            "NDIF_DEFAULT_EXECUTION_TIMEOUT_SECONDS": "15",
            "NDIF_STATUS_TTL_S": "1",
        }
        self.started = {}

    def start(self):
        """Start everything; takes half a minute."""
        self.start_redis()
        resources = '{"head": 10, "cuda_memory_bytes": 2000000000, "cpu_memory_bytes": 2000000000}'
        self._start(
            "ray",
            *("-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
            *("--node-ip-address=127.0.0.1", f"--port={HEAD}", "--num-cpus=2", "--num-gpus=1"),
            *("--object-store-memory=100000000", f"--ray-client-server-port={CLIENTS}"),
            *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--resources={resources}"),
            f"--temp-dir={self.state / 'r'}",
            NDIF_SERVICE="ray",
        )
        log = self.state / "log" / "ray.log"
        self._until(lambda: "Ray runtime started" in log.read_text(), 180, "Ray")
        self._start(
            "controller",
            *("-m", "ndif.services.ray.deployments.controller.controller"),
            NDIF_SERVICE="ray",
            RAY_ADDRESS=f"127.0.0.1:{HEAD}",
        )
        if self.started.pop("controller").wait(180):
            raise RuntimeError(f"no controller\n{self.logs()}")
        self.start_api()

    def start_redis(self):
        """Start Redis."""
        self._start(
            "redis",
            *("--port", str(REDIS), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"),
            *("--dir", str(self.state)),
            program="redis-server",
        )
        self._until(lambda: self.redis("ping"), 10, "redis")

    def start_api(self):
        """Start the API and its dispatcher."""
        config = "python:ndif.services.api.gunicorn_conf"
        self._start(
            "api",
            *("-m", "gunicorn", "--config", config, "--bind", URL.removeprefix("http://")),
            "keyed_api:app",
            NDIF_SERVICE="api",
        )
        self._until(self._connected, 90, "the API")

    def kill(self, name):
        """Kill a part and all that it has started, at once."""
        process = self.started.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def redis(self, *command):
        """Tell Redis something; whether it listened."""
        client = ["redis-cli", "-p", str(REDIS), *command]
        return subprocess.run(client, capture_output=True, timeout=10).returncode == 0

    def slow(self, seconds):
        """Let each job that begins from now on wait before it runs."""
        (self.state / "slow").write_text(str(seconds))

    def kill_models(self):
        """Kill the processes of all models; Ray starts them again. How many there were."""
        models = [pid for pid in self._processes() if "CpuModel" in _title(pid)]
        for pid in models:
            os.kill(pid, signal.SIGKILL)
        return len(models)

    def kill_dispatcher(self):
        """Kill what hands jobs to models, while the API goes on taking them."""
        api = self.started["api"].pid
        spawned = [pid for pid in self._processes() if "spawn_main" in _title(pid)]
        spawned = [pid for pid in spawned if os.getpgid(pid) == api]
        for pid in spawned:
            os.kill(pid, signal.SIGKILL)
        return len(spawned)

    def stop(self):
        """Stop everything, and see that nothing is left."""
        for name in list(self.started):
            self.kill(name)
        for pid in self._processes():  # Ray's are in groups of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._until(lambda: not self._processes(), 20, "the end of all processes")

    def logs(self):
        """All that the server has written."""
        return "".join(path.read_text(errors="replace") for path in (self.state / "log").iterdir())

    def _start(self, name, *arguments, program=None, **environment):
        with (self.state / "log" / f"{name}.log").open("a") as log:
            self.started[name] = subprocess.Popen(
                [program or self.python, *arguments],
                env=self.environment | environment,
                cwd=self.state,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _connected(self):
        try:
            with urllib.request.urlopen(f"{URL}/connected", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def _until(self, ready, seconds, what):
        end = time.monotonic() + seconds
        while not ready():
            for name, process in self.started.items():
                if process.poll() is not None:
                    raise RuntimeError(f"{name} has ended; see {self.state / 'log'}\n{self.logs()}")
            if time.monotonic() > end:
                raise RuntimeError(f"no {what} after {seconds} s\n{self.logs()}")
            time.sleep(0.2)

    def _processes(self):
        """Ids of all processes that bear this server's mark."""
        mark = f"PROBE_NDIF_STATE={self.state}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (path / "environ").read_bytes().split(b"\0"):
                    found.append(int(path.name))
            except OSError:
                continue  # gone, or not ours
        return found


def _title(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
