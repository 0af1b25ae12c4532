"""A model hub on 127.0.0.1 for the real huggingface_hub client: the part of the protocol that a download uses.

    GET       /api/models/REPO[/revision/REV]     what is in it, and the commit
    GET       /api/models/REPO/tree/REV           the same with sizes (newer clients)
    HEAD GET  /REPO/resolve/REV/FILE              a file; weights are redirected to /cdn/, as the hub does with large files

A test can make it fail: `gated` holds repositories that refuse access, `cut` the names of files whose download always breaks
off half-way, and `dead` closes every connection after noting it. `requests` lists what was asked for, in order.
"""
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = (".safetensors", ".bin")


class Hub:
    def __init__(self, **repos):
        """repos: {"org/name": folder}"""
        self.repos, self.requests, self.gated, self.cut, self.dead = dict(repos), [], set(), set(), False

    def __enter__(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, h: BaseHTTPRequestHandler):
        path = unquote(urlsplit(h.path).path)
        self.requests.append(f"{h.command} {path}")
        if self.dead:
            h.close_connection = True
            return
        for pattern, respond in ((rf"/api/models/{REPO}/tree/[^/]+", self.tree),
                                 (rf"/api/models/{REPO}/revision/[^/]+", self.info), (rf"/api/models/{REPO}", self.info),
                                 (rf"/(?P<cdn>cdn/){REPO}/(?P<file>[^/]+)", self.file),
                                 (rf"/{REPO}/resolve/[^/]+/(?P<file>.+)", self.file)):
            if m := re.fullmatch(pattern, path):
                if m["repo"] not in self.repos:
                    return send(h, 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
                return respond(h, **m.groupdict())
        send(h, 404, {"error": "no such page"})

    def files(self, repo):
        return sorted(f for f in Path(self.repos[repo]).iterdir() if f.is_file())

    def info(self, h, repo):
        send(h, 200, {"_id": "0", "id": repo, "modelId": repo, "sha": COMMIT, "private": False, "disabled": False,
                      "gated": "manual" if repo in self.gated else False, "downloads": 0, "likes": 0, "tags": [],
                      "siblings": [{"rfilename": f.name} for f in self.files(repo)]})

    def tree(self, h, repo):
        entries = []
        for f in self.files(repo):
            entry = {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": etag(f)}
            if f.suffix in WEIGHTS:
                entry["lfs"] = {"oid": etag(f), "size": f.stat().st_size, "pointerSize": 134}
            entries.append(entry)
        send(h, 200, entries)

    def file(self, h, repo, file, cdn=None):
        path = Path(self.repos[repo]) / file
        headers = {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if repo in self.gated:
            return send(h, 403, {"error": "gated"}, {**headers, "X-Error-Code": "GatedRepo"})
        if not path.is_file():
            return send(h, 404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"})
        body = path.read_bytes()
        headers["ETag"] = f'"{etag(path)}"'
        if path.suffix in WEIGHTS and not cdn:
            headers.update({"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(body)),
                            "Location": f"{self.url}/cdn/{repo}/{file}"})
            return send(h, 302, b"", headers)
        start, status = 0, 200
        if m := re.fullmatch(r"bytes=(\d+)-", h.headers.get("Range", "")):
            start, status = int(m[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        # Such a file always breaks off at the same place, however often and from whatever offset it is requested.
        end = len(body) // 2 if file in self.cut else len(body)
        send(h, status, body[start:end], headers, promised=len(body) - start)


def etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def send(h, status, body, headers=None, promised=None):
    """Send a response that announces `promised` bytes. If the body has fewer, the connection is closed."""
    if not isinstance(body, bytes):
        body, headers = json.dumps(body).encode(), {**(headers or {}), "Content-Type": "application/json"}
    promised = len(body) if promised is None else promised
    h.send_response(status)
    for key, value in {**(headers or {}), "Content-Length": str(promised)}.items():
        h.send_header(key, value)
    h.end_headers()
    if h.command != "HEAD":
        h.wfile.write(body)
        h.close_connection = h.close_connection or len(body) < promised
