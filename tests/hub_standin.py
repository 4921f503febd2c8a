"""A small Hub on loopback: the routes that huggingface_hub's client uses, over real HTTP, with repos in memory.

    with Hub(token="hf_...") as hub:
        hub.url                                   # HF_ENDPOINT
        hub.fail("POST", "/commit/", status=500)  # the next matching request fails; status None cuts the connection

It has repositories of the three kinds, private ones, branches, regular and LFS files, downloads with ranges, Space
variables and card validation, and records what it was sent.
"""

import asyncio
import base64
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field

import uvicorn
import yaml
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from huggingface_hub import close_session, constants

TOKEN = "hf_" + "Secret" * 6


@dataclass
class Repo:
    private: bool = False
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    messages: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)

    def files(self, revision: str) -> tuple[str, dict[str, bytes]]:
        commit = self.branches.get(revision, revision)
        if commit not in self.commits:
            raise HTTPException(404, "no such revision", {"X-Error-Code": "RevisionNotFound"})
        return commit, self.commits[commit]


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".png"))


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub:
    """`repos` maps (kind, id) to Repo, kind being models, datasets or spaces."""

    def __init__(self, token: str = TOKEN, user: str = "you"):
        self.token, self.user = token, user
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}  # sha256 -> content of LFS files
        self.requests: list[str] = []
        self.faults: list[tuple[str, str, int | None]] = []
        self.app = FastAPI()
        self.app.middleware("http")(self.guard)
        self.routes()

    def __enter__(self):
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(self.app, log_level="critical"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(10)

    def connect(self, monkeypatch, cache) -> None:
        """Empty it, and point this process's client and its children at it, logged in."""
        for contents in (self.repos, self.blobs, self.requests, self.faults):
            contents.clear()
        environment = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        settings = {"ENDPOINT": self.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": cache}
        settings["HUGGINGFACE_CO_URL_TEMPLATE"] = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        close_session()

    def fail(self, method: str, pattern: str, status: int | None, times: int = 1) -> None:
        """The next `times` requests whose path matches fail with `status`; None: connection cut; 0: stalls 6 seconds.

        A request that is cut has no effect, but a GET sends half of its answer first.
        """
        self.faults += [(method, pattern, status)] * times

    async def guard(self, request: Request, call_next):
        self.requests.append(f"{request.method} {request.url.path}")
        cut = False
        for fault in self.faults:
            method, pattern, status = fault
            if method == request.method and re.search(pattern, request.url.path):
                self.faults.remove(fault)
                if status == 0:
                    await asyncio.sleep(6)
                    break
                if status is None and method == "GET":
                    cut = True
                    break
                if status is None:
                    return Response(b"{", headers={"Content-Length": "1000"})  # uvicorn closes: the client sees a cut
                return JSONResponse({"error": f"failing on purpose with {status}"}, status)
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token != self.token:
            return JSONResponse({"error": "Invalid username or password."}, 401)
        request.state.authorized = bool(token)
        open_to_all = request.url.path == "/api/validate-yaml" or "/blobs/" in request.url.path
        if request.method in ("POST", "PUT") and not token and not open_to_all:
            return JSONResponse({"error": "log in"}, 401)
        response = await call_next(request)
        if cut:
            body = b"".join([part async for part in response.body_iterator])
            return Response(body[: len(body) // 2], response.status_code, dict(response.headers))
        return response

    def find(self, kind: str, name: str, request: Request) -> Repo:
        repo = self.repos.get((kind, name))
        if repo is None or (repo.private and not request.state.authorized):
            raise HTTPException(404, "Repository not found", {"X-Error-Code": "RepoNotFound"})
        return repo

    def routes(self) -> None:
        app = self.app

        @app.get("/api/whoami-v2")
        async def whoami(request: Request):
            if not request.state.authorized:
                return JSONResponse({"error": "log in"}, 401)
            return {"type": "user", "name": self.user, "orgs": []}

        @app.post("/api/validate-yaml")
        async def validate(request: Request):
            metadata = yaml.safe_load((await request.json())["content"].split("---\n")[1])
            if metadata.get("license") not in (None, "mit", "apache-2.0"):
                return Response('"license" must be one of [apache-2.0, mit]', 400)
            return {"errors": [], "warnings": []}

        @app.post("/api/repos/create")
        async def create(request: Request):
            body = await request.json()
            kind = (body.get("type") or "model") + "s"
            name = f"{body.get('organization') or self.user}/{body['name']}"
            url = f"{self.url}/{'' if kind == 'models' else kind + '/'}{name}"
            if not name.startswith(self.user + "/"):
                return JSONResponse({"error": "You don't have the rights"}, 403)
            if (kind, name) in self.repos:
                return JSONResponse({"error": "You already created this repo", "url": url}, 409)
            private = body.get("private") or body.get("visibility") == "private"
            self.repos[kind, name] = Repo(private=bool(private))
            return {"url": url, "name": name}

        @app.post("/api/{kind}/{owner}/{name}/branch/{branch:path}")
        async def branch(kind: str, owner: str, name: str, branch: str, request: Request):
            repo = self.find(kind, f"{owner}/{name}", request)
            if branch in repo.branches:
                return JSONResponse({"error": "Reference already exists"}, 409)
            repo.branches[branch] = repo.branches["main"]
            return {}

        @app.post("/api/spaces/{owner}/{name}/variables")
        async def variables(owner: str, name: str, request: Request):
            body = await request.json()
            repo = self.find("spaces", f"{owner}/{name}", request)
            repo.variables[body["key"]] = body["value"]
            return {k: {"value": v, "updatedAt": "2026-01-01T00:00:00.000Z"} for k, v in repo.variables.items()}

        @app.post("/api/{kind}/{owner}/{name}/preupload/{revision:path}")
        async def preupload(kind: str, owner: str, name: str, revision: str, request: Request):
            repo = self.find(kind, f"{owner}/{name}", request)
            files, answer = repo.files(revision)[1], []
            for file in (await request.json())["files"]:
                path, data = file["path"], files.get(file["path"])
                mode = "lfs" if is_lfs(path) else "regular"
                oid = None if data is None else hashlib.sha256(data).hexdigest() if mode == "lfs" else git_id(data)
                answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            return {"files": answer}

        @app.post("/{path:path}/info/lfs/objects/batch")
        async def batch(path: str, request: Request):
            objects = []
            for item in (await request.json())["objects"]:
                entry = {"oid": item["oid"], "size": item["size"]}
                if item["oid"] not in self.blobs:
                    entry["actions"] = {"upload": {"href": f"{self.url}/blobs/{item['oid']}", "header": {}}}
                objects.append(entry)
            return JSONResponse({"transfer": "basic", "objects": objects})

        @app.put("/blobs/{oid}")
        async def put_blob(oid: str, request: Request):
            data = await request.body()
            if hashlib.sha256(data).hexdigest() != oid:
                return JSONResponse({"error": "checksum"}, 400)
            self.blobs[oid] = data
            return {}

        @app.post("/api/{kind}/{owner}/{name}/commit/{revision:path}")
        async def commit(kind: str, owner: str, name: str, revision: str, request: Request):
            repo = self.find(kind, f"{owner}/{name}", request)
            files = dict(repo.files(revision)[1])
            for line in (await request.body()).splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "header":
                    repo.messages.append(value["summary"])
                elif entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = self.blobs[value["oid"]]
                elif entry["key"] == "deletedFile":
                    files.pop(value["path"], None)
            oid = hashlib.sha1(json.dumps([len(repo.commits), sorted(files)]).encode()).hexdigest()
            repo.commits[oid], repo.branches[revision] = files, oid
            return {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{owner}/{name}/commit/{oid}"}

        @app.get("/api/{kind}/{owner}/{name}/tree/{revision}")
        async def tree(kind: str, owner: str, name: str, revision: str, request: Request):
            repo = self.find(kind, f"{owner}/{name}", request)
            entries = []
            for path, data in repo.files(revision)[1].items():
                entry = {"type": "file", "path": path, "size": len(data), "oid": git_id(data)}
                if is_lfs(path):
                    entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
                entries.append(entry)
            return entries

        @app.get("/api/{kind}/{owner}/{name}")
        @app.get("/api/{kind}/{owner}/{name}/revision/{revision:path}")
        async def info(kind: str, owner: str, name: str, request: Request, revision: str = "main"):
            repo = self.find(kind, f"{owner}/{name}", request)
            commit, files = repo.files(revision)
            siblings = [{"rfilename": path} for path in files]
            facts = {"id": f"{owner}/{name}", "sha": commit, "private": repo.private}
            return {**facts, "siblings": siblings, "tags": []}

        async def resolve(kind: str, name: str, revision: str, path: str, request: Request):
            repo = self.find(kind, name, request)
            commit, files = repo.files(revision)
            if path not in files:
                raise HTTPException(404, "no such file", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            data = files[path]
            tag = hashlib.sha256(data).hexdigest() if is_lfs(path) else git_id(data)
            headers = {"ETag": f'"{tag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            if is_lfs(path):
                headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{tag}"'}
            if match := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", "")):
                first, last = int(match[1]), int(match[2] or len(data) - 1)
                if first >= len(data):
                    return Response(status_code=416, headers={"Content-Range": f"bytes */{len(data)}"})
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                return Response(data[first : last + 1], 206, headers)
            if request.method == "HEAD":
                return Response(headers={**headers, "Content-Length": str(len(data))})
            return Response(data, 200, headers)

        @app.api_route("/{kind}/{owner}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
        async def other(kind: str, owner: str, name: str, revision: str, path: str, request: Request):
            return await resolve(kind, f"{owner}/{name}", revision, path, request)

        @app.api_route("/{owner}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
        async def model(owner: str, name: str, revision: str, path: str, request: Request):
            return await resolve("models", f"{owner}/{name}", revision, path, request)
