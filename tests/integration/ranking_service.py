"""A running ranking service."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager

from tests.conftest import REPOSITORY

TOKEN = "a-token-for-the-tests"


class Service:
    """A running ``launch/serve.py``."""

    def __init__(self, process, port, metrics_port, line):
        self.process, self.port, self.metrics_port, self.line = process, port, metrics_port, line

    def ask(self, body, *, method="POST", path="/rank", headers=None):
        """Return status, headers and decoded answer of a request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = json.dumps(body).encode() if isinstance(body, dict | list) else body
        sent = {"Content-Type": "application/json"} if headers is None else headers
        connection.request(method, path, data, {"Authorization": f"Bearer {TOKEN}"} | sent)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        return answer.status, answer.headers, json.loads(text)


@contextmanager
def serving(run_dir, *options):
    """Start the service of a run, with a token, and stop it after the block."""
    command = [sys.executable, "launch/serve.py", "--config", str(run_dir / "config.yaml"), "--port", "0", *options]
    with running(command, REPOSITORY, os.environ | {"COLLM_DIST_TOKEN": TOKEN}) as service:
        yield service


@contextmanager
def running(command, folder, environment):
    """Start a command that serves, in a folder, and stop it after the block."""
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            line = next((text for text in process.stdout if text.startswith("serving ")), "")
            found = re.search(r"http://127\.0\.0\.1:(\d+) .* at port (\d+)", line)
            assert found, "the service did not start"
            yield Service(process, *map(int, found.groups()), line)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(180)
            finally:
                process.kill()
