"""A small Hugging Face Hub on the loopback interface, kept in memory, for tests with the real client.

It speaks the model-repository endpoints that `huggingface_hub` (0.36 to 2.4) uses to create a repository, upload
(preupload, LFS batch, commit), download (`resolve`) and inspect it; branches and commit hashes are revisions. As on
the Hub, downloads of large files are redirected to a storage on another host, which refuses requests that carry the
token. The newer xet storage is left out, so clients need `HF_HUB_DISABLE_XET=1`.

`huggingface_hub` reads the endpoint when it is imported and copies it to several of its modules. Therefore a client
belongs in a process of its own, started with the environment that `client_environment` returns.
"""

import base64
import hashlib
import json
import os
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import yaml


TOKEN, USER = "hf_loopback", "user"
REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = []


class HubError(Exception):
    def __init__(self, status, code, **headers):
        super().__init__(code)
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": code, **headers}


class File(NamedTuple):
    data: bytes
    lfs: bool

    @property
    def oid(self):
        """The name of the content: the sha256 of a large file, the git hash of a regular one."""
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


class Repo:
    def __init__(self):
        self.branches = {}  # name -> commit hash
        self.commits = {}  # commit hash -> {path: File}
        self.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)})

    def commit(self, branch, files):
        state = (self.branches.get(branch), len(self.commits), sorted(files.items()))
        self.branches[branch] = oid = hashlib.sha1(repr(state).encode()).hexdigest()
        self.commits[oid] = files
        return oid

    def resolve(self, revision):
        """The commit hash and the files of a branch or commit, as it stands in a URL."""
        oid = self.branches.get(unquote(revision), revision)
        if oid not in self.commits:
            raise HubError(404, "RevisionNotFound")
        return oid, self.commits[oid]


class Hub(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint, self.storage = (f"http://{host}:{self.server_port}" for host in ("127.0.0.1", "localhost"))
        self.repos, self.objects, self.lock = {}, {}, threading.Lock()

    def repo(self, name):
        if name not in self.repos:
            raise HubError(404, "RepoNotFound")
        return self.repos[name]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        url, body = urlsplit(self.path), self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            with self.server.lock:
                token, stored = self.headers.get("Authorization"), url.path.startswith("/storage/")
                if stored and token:
                    raise HubError(400, "InvalidArgument")
                if not stored and self.command == "POST" and token != f"Bearer {TOKEN}":
                    raise HubError(401, "Unauthorized")
                for methods, pattern, function in ROUTES:
                    match = re.fullmatch(pattern, url.path)
                    if match and self.command in methods:
                        return function(self, self.server, body, *match.groups())
                raise HubError(404, "NotFound")
        except HubError as error:
            self.reply({"error": str(error)}, error.status, **error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def reply(self, content=b"", status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def route(methods, pattern):
    def register(function):
        ROUTES.append((methods.split(), pattern, function))
        return function

    return register


def card_data(readme):
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", readme, re.DOTALL)
    return (match and yaml.safe_load(match[1])) or {}


@route("GET", "/api/whoami-v2")
def whoami(request, hub, body):
    request.reply({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})


@route("POST", "/api/repos/create")
def create_repo(request, hub, body):
    options = json.loads(body)
    name = f"{options.get('organization') or USER}/{options['name']}"
    status = 409 if name in hub.repos else 200
    hub.repos.setdefault(name, Repo())
    request.reply({"name": name, "url": f"{hub.endpoint}/{name}"}, status)


@route("POST", "/api/validate-yaml")
def validate_yaml(request, hub, body):
    try:
        data, errors = card_data(json.loads(body)["content"]), []
    except yaml.YAMLError as error:
        data, errors = {}, [str(error)]
    base = data.get("base_model", [])
    for model in [base] if isinstance(base, str) else base:  # the Hub refuses the path of a local folder
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
            errors.append(f'"base_model" with value "{model}" is not valid. Use a model id from https://hf.co/models.')
    warnings = [] if data or errors else ["empty or missing yaml metadata in repo card"]
    messages = {"errors": errors, "warnings": warnings}
    content = {kind: [{"message": text} for text in texts] for kind, texts in messages.items()}
    request.reply(content, 400 if errors else 200)


@route("POST", f"/api/models/{REPO}/branch/([^/]+)")
def create_branch(request, hub, body, name, branch):
    repo, branch = hub.repo(name), unquote(branch)
    if branch in repo.branches:
        raise HubError(409, "Conflict")
    repo.branches[branch], _ = repo.resolve(json.loads(body).get("startingPoint", "main"))
    request.reply({})


@route("POST", f"/api/models/{REPO}/preupload/([^/]+)")
def preupload(request, hub, body, name, revision):
    _, files = hub.repo(name).resolve(revision)
    modes = []
    for entry in json.loads(body)["files"]:
        mode = "lfs" if b"\0" in base64.b64decode(entry["sample"]) else "regular"
        modes.append({"path": entry["path"], "uploadMode": mode, "shouldIgnore": False})
        if entry["path"] in files:
            modes[-1]["oid"] = files[entry["path"]].oid
    request.reply({"files": modes})


@route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
def lfs_batch(request, hub, body, name):
    objects = json.loads(body)["objects"]
    for entry in objects:
        if entry["oid"] not in hub.objects:
            entry["actions"] = {"upload": {"href": f"{hub.storage}/storage/{entry['oid']}"}}
    request.reply({"transfer": "basic", "objects": objects})


@route("PUT", r"/storage/(\w{64})")
def store(request, hub, body, oid):
    if hashlib.sha256(body).hexdigest() != oid:
        raise HubError(400, "BadDigest")
    hub.objects[oid] = body
    request.reply()


@route("GET", r"/storage/(\w{64})")
def stored(request, hub, body, oid):
    request.reply(hub.objects[oid])


@route("POST", f"/api/models/{REPO}/commit/([^/]+)")
def commit(request, hub, body, name, branch):
    repo, branch = hub.repo(name), unquote(branch)
    files = dict(repo.resolve(branch)[1])
    for line in body.splitlines():
        operation = json.loads(line)
        value = operation["value"]
        if operation["key"] == "file":
            files[value["path"]] = File(base64.b64decode(value["content"]), False)
        elif operation["key"] == "lfsFile":
            files[value["path"]] = File(hub.objects[value["oid"]], True)
    oid = repo.commit(branch, files)
    request.reply({"success": True, "commitOid": oid, "commitUrl": f"{hub.endpoint}/{name}/commit/{oid}"})


@route("GET HEAD", rf"/{REPO}/resolve/([^/]+)/(.+)")
def resolve(request, hub, body, name, revision, path):
    oid, files = hub.repo(name).resolve(revision)
    if unquote(path) not in files:
        raise HubError(404, "EntryNotFound", **{"X-Repo-Commit": oid})
    file = files[unquote(path)]
    headers = {"X-Repo-Commit": oid, "ETag": f'"{file.oid}"'}
    if not file.lfs:
        return request.reply(file.data, **headers)
    headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": len(file.data)}
    request.reply(status=302, Location=f"{hub.storage}/storage/{file.oid}", **headers)


@route("GET", f"/api/models/{REPO}(?:/revision/([^/]+))?")
def model_info(request, hub, body, name, revision):
    oid, files = hub.repo(name).resolve(revision or "main")
    card = card_data(files["README.md"].data.decode()) if "README.md" in files else {}
    siblings = [{"rfilename": path} for path in sorted(files)]
    kept = {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}
    request.reply(
        {"id": name, "sha": oid, "siblings": siblings, "cardData": card, "tags": card.get("tags", []), **kept}
    )


@route("GET", f"/api/models/{REPO}/tree/([^/]+)(?:/(.+))?")
def tree(request, hub, body, name, revision, folder):
    _, files = hub.repo(name).resolve(revision)
    entries = []
    for path, file in sorted(files.items()):
        if not folder or path.startswith(f"{unquote(folder)}/"):
            entries.append({"type": "file", "path": path, "oid": file.oid, "size": len(file.data)})
            if file.lfs:
                entries[-1]["lfs"] = {"oid": file.oid, "size": len(file.data), "pointerSize": 0}
    if not entries:
        raise HubError(404, "EntryNotFound")
    request.reply(entries)


@contextmanager
def running_hub():
    """A hub that serves for the length of the `with` block."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


def client_environment(hub, home):
    """The environment of a client process that sees only `hub`, with its caches in the folder `home`."""
    foreign = re.compile("(HF|HUGGING|TRANSFORMERS)_.*|.*_PROXY", re.IGNORECASE)
    kept = {name: value for name, value in os.environ.items() if not foreign.fullmatch(name)}
    settings = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return kept | settings | {"HF_HOME": str(home)}
