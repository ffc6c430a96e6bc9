"""The installed command, as the tests of a remote server call it."""

import os
import subprocess
import time


class Client:
    """The installed command."""

    def __init__(self, python, key):
        """Take the Python of an environment with the package, and the key to send."""
        self.python, self.key = python, key
        self.said = []
        """All that it has ever written."""

    @property
    def package(self):
        """Where the package is."""
        command = [self.python, "-c", "import probe; print(probe.__file__)"]
        environment = self.environment()
        return subprocess.check_output(command, env=environment, cwd="/", text=True)

    def environment(self, **changes):
        """Variables that it sees."""
        left_out = ("NDIF_", "PYTHON", "VIRTUAL_ENV")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
        return kept | {"NDIF_API_KEY": self.key, "HF_HUB_OFFLINE": "1"} | changes

    def start(self, *arguments, **changes):
        """Start the command."""
        return subprocess.Popen(
            [self.python, "-m", "probe.cli", *map(str, arguments)],
            env=self.environment(**changes),
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, process, seconds=600):
        """Wait for the end of a command: its code, and what it wrote."""
        try:
            output, errors = process.communicate(timeout=seconds)
        finally:
            process.kill()
        self.said += [output, errors]
        return process.returncode, output, errors

    def __call__(self, *arguments, **changes):
        """Run the command."""
        return self.end(self.start(*arguments, **changes))

    def refused(self, *arguments, **changes):
        """Run the command, which ends with one clear line: that line, and the seconds it took."""
        return self.ends_refused(self.start(*arguments, **changes))

    def ends_refused(self, process):
        """Wait for a command to end with one clear line."""
        begun = time.monotonic()
        code, _, errors = self.end(process)
        lines = [line for line in errors.splitlines() if line.startswith("probe: ")]
        assert code == 2, errors
        assert len(lines) == 1, errors
        assert errors.splitlines()[-1] == lines[0]
        assert "Traceback" not in errors
        return lines[0], time.monotonic() - begun

    def script(self, path, url, *arguments):
        """Run a script with the package as it is installed: what it printed."""
        process = subprocess.Popen(
            [self.python, str(path), url, *map(str, arguments)],
            env=self.environment(),
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        code, output, errors = self.end(process)
        assert code == 0, errors
        return output
