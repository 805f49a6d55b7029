"""A `vllm serve` process on the loopback interface, asked through the openai client.

For tests/serving/test_server.py and docs/make_server.py. Needs vLLM, which brings the client.
"""

import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import serving_cases as cases
import torch


BASE = "base"  # the name under which the base model is asked
START_SECONDS = 300
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


class Server:
    """A server that runs.

    Args:
        port: where it listens.
        process: the server.
        log: file with its output.
    """

    def __init__(self, port: int, process: subprocess.Popen, log: Path) -> None:
        from openai import OpenAI

        self.address, self.process, self.log = f"http://127.0.0.1:{port}", process, log
        self.client = OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=120)

    def ask(self, model: str, prompt: list[int], **options):
        """A greedy completion of token ids by an adapter or the base model, in the openai client's type."""
        defaults = {"temperature": 0, "max_tokens": cases.NEW_TOKENS}
        extra = {"ignore_eos": True, "return_token_ids": True}
        return self.client.completions.create(model=model, prompt=prompt, extra_body=extra, **{**defaults, **options})

    def tokens(self, model: str, prompt: list[int], number: int = cases.NEW_TOKENS) -> list[int]:
        """The greedy tokens."""
        return self.ask(model, prompt, max_tokens=number).choices[0].token_ids

    def models(self) -> list[str]:
        """The names that can be asked."""
        return [model.id for model in self.client.models.list()]

    def load(self, name: str, folder: Path) -> str:
        """Load an adapter; return "" or the error."""
        return self._post("load_lora_adapter", lora_name=name, lora_path=str(folder))

    def unload(self, name: str) -> str:
        """Unload an adapter; return "" or the error."""
        return self._post("unload_lora_adapter", lora_name=name)

    def _post(self, path: str, **content: str) -> str:
        request = urllib.request.Request(
            f"{self.address}/v1/{path}", json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        try:
            urllib.request.urlopen(request, timeout=120).close()
        except urllib.error.HTTPError as error:
            return json.load(error)["error"]["message"]
        return ""


@contextmanager
def serve(model: Path, adapters: Mapping[str, Path], log: Path, *options: str) -> Iterator[Server]:
    """Start `vllm serve` with adapters, and stop it at the end.

    Args:
        model: folder of the base model.
        adapters: name -> folder.
        log: file for the server's output.
        options: more arguments.

    Raises:
        RuntimeError: the server has ended, or does not answer in time; the message has the end of its output.
    """
    port = free_port()
    command = [
        *vllm_serve(),
        *(str(model), "--served-model-name", BASE, "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "128"),
        *("--enable-lora", "--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())),
        *options,
    ]
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(command, env={**os.environ, **SETTINGS}, stdout=output, stderr=subprocess.STDOUT)
    try:
        server = Server(port, process, log)
        _wait(server)
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def is_greedy(reference: torch.nn.Module, prompt: list[int], tokens: list[int]) -> bool:
    """Whether tokens are the greedy continuation of a prompt by a model in transformers or PEFT."""
    likeliest = cases.logprobs_of(reference, prompt, cases.Answer(tokens, [])).argmax(-1)
    return likeliest.tolist() == tokens


def vllm_serve() -> list[str]:
    """The command `vllm serve`; the package vllm-cpu has the server, but its command fails (docs/upstream.md)."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return [str(Path(sys.executable).with_name("vllm")), "serve"]


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _wait(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            urllib.request.urlopen(f"{server.address}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    end = "\n".join(server.log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])
    raise RuntimeError(f"vllm serve does not answer (return code {server.process.poll()}):\n{end}")
